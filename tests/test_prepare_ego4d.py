"""prepare_ego4d.py: frames in time, rules, broken videos, runs that are killed.

Uses, where it is there, ../shared/data/ego4d_mini: real videos in Ego4D's layout.
"""
import argparse
import collections
import errno
import fractions
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from unittest import mock

import av
import numpy as np
import pytest
from PIL import Image

import prepare_ego4d
from nanogr import clips, common
from tests.helpers import ROOT, fails_in_one_line, read_log, refused, run, training


EGO4D_MINI = ROOT.parent / "shared/data/ego4d_mini/v2"
TICK = 1 / 30000                                       # s; of the videos made here


def make_video(path, ticks=1000 * np.arange(240), codec="libx264", rotated=False, format="mp4", unit=30_000,
               **options):
    """A video that tells each frame's number n: gray 16 * (n % 16) left, 16 * (n // 16) right.

    ticks: when it is shown, in parts of 1/30000 s; unit: so many parts of a second is the file's own time in;
    rotated: the video is to be turned clockwise for display, as a phone's may be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options = dict(preset="ultrafast") | options if codec == "libx264" else options
    noise = np.random.default_rng(0).integers(0, 5, (48, 64, 3), np.uint8)
    with av.open(str(path), "w", format, options=dict(movflags="faststart")) as container:
        stream = container.add_stream(codec, 30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, unit)
        for n, tick in enumerate(ticks.tolist()):
            image = np.roll(noise, n, axis=1)
            image[:, :32] += 16 * (n % 16)
            image[:, 32:] += 16 * (n // 16)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = tick * unit // 30_000, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if rotated:                                        # QuickTime's matrix: x' = -y, y' = x
        data, row = path.read_bytes(), lambda *x: struct.pack(">3i", *x)
        at = data.index(row(1 << 16, 0, 0) + row(0, 1 << 16, 0), data.index(b"tkhd"))
        path.write_bytes(data[:at] + row(0, 1 << 16, 0) + row(-1 << 16, 0, 0) + data[at + 24:])
    return path


def number(picture):
    """The n that a picture of a frame tells."""
    left, right = (picture[:, side:side + 72].mean() // 16 for side in (20, 132))
    return int(left + 16 * right)


def ego4d_clips(*starts, uid="x"):
    return [prepare_ego4d.Clip(uid, 1, i, start, f"does {start}") for i, start in enumerate(starts)]


VIDEOS = dict(
    constant=dict(), slow=dict(ticks=1200 * np.arange(200)), ntsc=dict(ticks=1001 * np.arange(240)),
    variable=dict(ticks=np.cumsum(np.random.default_rng(0).choice([300, 1000, 1700, 2500], 240))),
    late=dict(ticks=150_000 + 1000 * np.arange(240)), rotated=dict(rotated=True),
    long_gop=dict(g="999", bf="3", b_strategy="0", preset="veryfast"),
    open_gop={"preset": "medium", "x264-params": "open-gop=1:keyint=24:bframes=3"},
    hevc={"codec": "libx265", "x265-params": "keyint=24:log-level=none"},
    vp9={"codec": "libvpx-vp9", "deadline": "realtime", "g": "128", "cpu-used": "8"},
    transport_stream=dict(format="mpegts", g="24"), long_transport_stream=dict(format="mpegts", g="250"),
    mpeg2_transport_stream=dict(codec="mpeg2video", format="mpegts", unit=30, g="24", bf="2", qmax="2"),
    hevc_transport_stream={"codec": "libx265", "format": "mpegts", "x265-params": "log-level=none"},
    avi=dict(format="avi", unit=30, preset="medium", bf="3"), slow_camera=dict(ticks=16_000 * np.arange(30)),
    stalled=dict(ticks=np.array([*range(0, 90_000, 1000), *range(135_000, 240_000, 1000)])),
    odd_colours={"x264-params": "colormatrix=ICtCp"}, matroska=dict(format="matroska", g="50", bf="2"))


@pytest.mark.parametrize("kind", VIDEOS)
def test_ego4d_takes_the_nearest_frames(tmp_path, kind):
    """Catches frames off by one, times from a wrong zero, constant rate taken for granted, frames that are
    missing after a seek, lost rotation."""
    path = make_video(tmp_path / "x.mp4", **VIDEOS[kind])
    seconds = VIDEOS[kind].get("ticks", 1000 * np.arange(240)) * TICK
    seconds -= seconds[0]
    part = ego4d_clips(0.0, 0.41, 0.56, 4.8, 4.81)
    found = list(prepare_ego4d.read_clips(path, part, crop=False))
    assert [clip for clip, _ in found] == part
    for start in np.random.default_rng(1).uniform(0, 4.9, 12).tolist():     # each sought by itself
        found += prepare_ego4d.read_clips(path, ego4d_clips(start), crop=False)
    for clip, pictures in found:
        assert pictures.shape == (10, 224, 224, 3) and pictures.dtype == np.uint8
        told = [number(picture.swapaxes(0, 1) if kind == "rotated" else picture) for picture in pictures]
        asked = [clip.start + k / 3 for k in range(10)]
        near = [np.abs(seconds - t).argmin() for t in asked]
        shown = [n if abs(seconds[n] - t) <= 1 / 6 else np.searchsorted(seconds, t, "right") - 1
                 for n, t in zip(near, asked)]
        assert told == shown, clip


# Of a display matrix, x' = ax + cy, y' = bx + dy: a, b, c, d. The last means nothing.
MATRICES = [*((a, 0, 0, d) for a in (1, -1) for d in (1, -1)),
            *((0, b, c, 0) for b in (1, -1) for c in (1, -1)), (3, 2, 1, 1)]


def test_ego4d_shows_what_players_show(tmp_path):
    """Catches a picture that is turned or mirrored otherwise than its display matrix says, in any of the
    eight ways; a meaningless matrix that turns it at all.
    """
    data = make_video(tmp_path / "x.mp4").read_bytes()
    row = lambda *x: struct.pack(">3i", *(65536 * i for i in x))
    at = data.index(row(1, 0, 0) + row(0, 1, 0), data.index(b"tkhd"))
    upright, = prepare_ego4d.read_clips(tmp_path / "x.mp4", ego4d_clips(0.5), crop=False)
    for a, b, c, d in MATRICES:
        (tmp_path / "y.mp4").write_bytes(data[:at] + row(a, b, 0) + row(c, d, 0) + data[at + 24:])
        (_, pictures), = prepare_ego4d.read_clips(tmp_path / "y.mp4", ego4d_clips(0.5), crop=False)
        wanted = upright[1]
        if a == 0:                                     # turned: x' = cy, y' = bx
            wanted = wanted.swapaxes(1, 2)[:, ::b, ::c]
        elif a != 3:
            wanted = wanted[:, ::d, ::a]
        assert np.array_equal(pictures, wanted), (a, b, c, d)


def test_ego4d_pictures_that_would_fill_the_memory(tmp_path, monkeypatch):
    """Catches a file of some bytes whose pictures, by its own word, take gigabytes each."""
    path = make_video(tmp_path / "x.mp4")
    monkeypatch.setattr(prepare_ego4d, "PIXELS", 64 * 48 - 1)
    (_, why), = prepare_ego4d.read_clips(path, ego4d_clips(0.5), crop=False)
    assert why == "can't be opened: it claims pictures of 64 x 48 px"


def test_ego4d_flaws_beside_the_pictures(tmp_path):
    """Catches a note beside the pictures that costs all clips though no pixel is damaged; a file that begins
    amid pictures that need earlier ones, raw video without times, or a codec without decoder, that is told
    wrongly or ends all.
    """
    flawed, whole = tmp_path / "flawed.mp4", make_video(tmp_path / "whole.mp4")
    with av.open(str(whole)) as source, av.open(str(flawed), "w") as box:
        stream = box.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:                 # a message that says it is longer than it is
                data = bytes(packet)
                new = av.Packet(struct.pack(">I", 10) + b"\x06\x05\xff\xff\x10\x20\x30\x80\0\0" + data)
                new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
                new.is_keyframe, new.stream = packet.is_keyframe, stream
                box.mux(new)
    read = lambda path, start: next(iter(prepare_ego4d.read_clips(path, ego4d_clips(start), crop=False)))[1]
    assert np.array_equal(read(flawed, 1.0), read(whole, 1.0))
    long = make_video(tmp_path / "x.ts", format="mpegts", g="60")
    (tmp_path / "cut.ts").write_bytes(long.read_bytes()[188 * 20:])
    assert "its first picture that can be decoded comes at" in read(tmp_path / "cut.ts", 0.0)
    raw = make_video(tmp_path / "x.h264", format="h264")
    assert "wrap it: ffmpeg" in read(raw, 1.0)
    data = whole.read_bytes()
    at = data.index(b"avc1", data.index(b"stsd"))
    whole.write_bytes(data[:at] + b"zzzz" + data[at + 4:])
    assert "no decoder for its codec" in read(whole, 1.0)


def test_captions_of_other_programs(tmp_path):
    """Catches semicolons, tabs, UTF-16 and capitals of spreadsheets that are refused; languages without
    blanks that count as one word; a video that lies outside the folder named.
    """
    for mark, start, coding in (",", "1.5", "utf-8"), (";", "1,5", "utf-8-sig"), ("\t", "1.5", "utf-16"):
        text = f"Video{mark} Start{mark}TEXT\r\nx.mp4{mark}{start}{mark}打开抽屉\r\n"
        (tmp_path / "a.csv").write_bytes(text.encode(coding))
        clip, = prepare_ego4d.load_captions(tmp_path / "a.csv")
        assert (clip.uid, clip.start, clip.text) == ("x.mp4", 1.5, "打开抽屉")
    count = prepare_ego4d.count_words
    for text, words in ("打开抽屉", 4), ("开", 1), ("opens", 1), ("opens it", 2), ("ドアを開ける", 6), ("", 0):
        assert count(text) == words, text
    (tmp_path / "a.csv").write_text("video,start,text\n../x.mp4,1,opens it\n")
    assert refused("row 1.*not in the folder", prepare_ego4d.load_captions, tmp_path / "a.csv")


def test_ego4d_decodes_once(tmp_path, monkeypatch):
    """Catches a file opened, or a stretch decoded, for each clip anew: twice the hours."""
    path, calls = make_video(tmp_path / "x.mp4"), collections.Counter()
    for thing, name in (av, "open"), (prepare_ego4d.Reader, "seek"):
        original = getattr(thing, name)
        monkeypatch.setattr(thing, name, lambda *args, _name=name, _original=original, **options: (
            calls.update([_name]), _original(*args, **options))[1])
    assert len(list(prepare_ego4d.read_clips(path, ego4d_clips(0.1, 0.2, 0.3, 4.0), crop=False))) == 4
    assert calls == dict(open=1, seek=1)
    assert len(list(prepare_ego4d.read_clips(path, ego4d_clips(0.1, 4.9), crop=False))) == 2
    assert calls == dict(open=2, seek=2)
    monkeypatch.setattr(prepare_ego4d, "NEAR", 1)
    assert len(list(prepare_ego4d.read_clips(path, ego4d_clips(0.1, 4.9), crop=False))) == 2
    assert calls == dict(open=3, seek=4)


def test_ego4d_pictures(tmp_path):
    """Catches swscale's dark AREA scaling, a crop that is off centre, a squash that crops."""
    for color, within in ((128, 128, 128), 0.5), ((200, 40, 40), 2), ((16, 235, 60), 2):
        image = np.zeros((270, 480, 3), np.uint8)
        image[:, 105:375] = color                      # the central square
        frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p")
        squashed, cropped = (prepare_ego4d.to_picture(frame, crop) for crop in (False, True))
        assert squashed.shape == cropped.shape == (224, 224, 3)
        assert np.abs(cropped[4:-4, 4:-4].astype(int) - color).max() <= within
        assert squashed[:, :45].max() <= 2 and squashed[:, -45:].max() <= 2
        assert np.abs(squashed[:, 56:168].mean((0, 1)) - color).max() <= within


SENTENCES = {
    "#C C slides the cups on the table ": "slides the cups on the table",
    "#C C shuffles the red cups.": "shuffles the red cups",
    "# C C holds the cup with the left hand": "holds the cup with the left hand",
    "#c C pours coffee in the mug": "pours coffee in the mug",
    "#CC  puts\n the T block , beside the M block . ": "puts the T block, beside the M block",
    "#C C moves the cup_": "moves the cup",
    "#C C picks 2.5 kg, doesn't say \"ok\"": "picks 2.5 kg, doesn't say \"ok\"",
    "#C C adds .5 litre , then 1.5 .": "adds .5 litre, then 1.5",
    "#C C .5 kg is weighed": ".5 kg is weighed",
    "#C C writes down\ud83d": "writes down?",
    "#C C writes #cc on it": "unsure, or another tag inside",
    "#C C moves a #unsure with her hand": "unsure, or another tag inside",
    "#C C looks around #Unsure": "unsure, or another tag inside",
    "#C C opens it #O man X sits": "unsure, or another tag inside",
    "#unsure": "not an action of the wearer (#C C)",
    "#O a woman X stands behind the table": "not an action of the wearer (#C C)",
    "#summary C cooks": "not an action of the wearer (#C C)",
    "C opens the door": "not an action of the wearer (#C C)",
    "": "not an action of the wearer (#C C)",
    "#C C": "not an action of the wearer (#C C)",
    "#C C pours": "fewer than two words",
    "#C C pours . ": "fewer than two words",
}


def test_ego4d_rules():
    """Catches a rule that takes what it should drop or drops what it should take, at its very edge, too."""
    good = prepare_ego4d.Video(10.0, False, [(7.0, 7.5)], False, True)

    def verdict(text="#C C opens a door", start=1.0, video=good):
        dropped, text = collections.Counter(), prepare_ego4d.encodable(text)
        clip = prepare_ego4d.Clip("x", 1, 0, start, text)
        kept = list(prepare_ego4d.choose([clip], dict(x=video), prepare_ego4d.RULES, dropped))
        (found, _), = dropped or [(kept[0].text, "x")]
        assert len(kept) + dropped.total() == 1
        return found

    assert {text: verdict(text) for text in SENTENCES} == SENTENCES
    assert prepare_ego4d.clean("adds .5 ml of glue #cc 3 .") == "adds .5 ml of glue #cc 3"
    for start, found in ((0.0, "opens a door"), (-0.001, "inside"), (3.999, "opens a door"),
                         (4.0, "redacted"), (7.0, "redacted"), (7.001, "inside"), (math.nan, "inside")):
        assert found in verdict(start=start), start
    for change, why in ((dict(duration=13.0), "redacted"), (dict(duration=13.0, redacted=[]), "opens a door"),
                        (dict(duration=10.499, redacted=[]), "inside"),
                        (dict(stereo=True, redacted=[], duration=20), "stereo"),
                        (dict(excluded=True, redacted=[], duration=20), "split"),
                        (dict(there=False, redacted=[], duration=20), "no video file")):
        assert why in verdict(start=7.5, video=good._replace(**change)), change
    assert verdict(video=None) == "video not in ego4d.json"


def test_ego4d_splits(tmp_path):
    """Catches a model pre-trained on what some benchmark tests on; ego4d.json of another download."""
    made = lambda **splits: dict(
        video_uid="-".join(splits.values()), duration_sec=9, is_stereo=False, redacted_intervals=None,
        **{f"split_{benchmark}": value or None for benchmark, value in splits.items()})
    videos = [made(em="train", fho=""), made(em="", goalstep="val"), made(av="train", fho="multi"),
              made(new="test")]
    path = tmp_path / "ego4d.json"
    path.write_text(json.dumps(dict(videos=videos)))
    for splits, excluded in (("val", ["-val", "train-multi"]), ("test", ["train-multi", "test"]), ("", []),
                             ("train", ["train-", "train-multi"]), ("multi", ["train-multi"])):
        found = prepare_ego4d.load_videos(path, tmp_path, {splits} - {""})
        assert [uid for uid, video in found.items() if video.excluded] == excluded, splits
    raw = make_ego4d(tmp_path / "v2", dict(x=DOES))
    path.write_text(json.dumps(dict(videos=[])))
    status, text = run("prepare_ego4d.py", raw, tmp_path / "out", "--workers", 1)
    assert status == 0 and f"{raw / 'ego4d.json'}\n" in text and "packed 5 of 5" in text, text


def test_ego4d_narrations_that_say_too_little(tmp_path):
    """Catches a null or an odd character in one narration of four million that ends the run."""
    told = [(None, "#C C opens it"), (2, None), (3, "#C C writes \ud83d\ude00 "),
            (4, "#C C writes \udc00, \u2028 \x85")]
    raw = make_ego4d(tmp_path / "v2", {"x": told, os.fsdecode(b"\xff"): DOES[:1]})
    status, text = run("prepare_ego4d.py", raw, tmp_path / "out", "--workers", 1)
    assert status == 0 and "1 dropped: not all of its 3 s" in text and "packed 2 of 2" in text, text
    assert "1 dropped: video not in ego4d.json" in text            # no file of ours can hold its name
    assert clips.Clips(tmp_path / "out").sentences == ["writes \U0001f600", "writes ?"]
    line = '{"uid": "x", "pass": 1, "index": 0, "start": 0, "text": "one\u2028two"}\n'
    (tmp_path / "list").write_text(line, encoding="utf-8")
    assert prepare_ego4d.load_list(tmp_path / "list")[0].text == "one\u2028two"


def test_ego4d_draw():
    """Catches a choice that another machine, another order of the file or a missing video would change."""
    fit = [prepare_ego4d.Clip(uid, 1, i, i / 2, "opens it") for uid in "abcde" for i in range(100)]
    some, fewer = (prepare_ego4d.draw(fit, count, seed=0) for count in (200, 50))
    assert len(set(some)) == 200 and set(fewer) < set(some) and set(some) < set(fit)
    assert some == sorted(some) == prepare_ego4d.draw(fit[::-1], 200, seed=0)
    assert 20 <= sum(clip.uid == "c" for clip in some) <= 60 and prepare_ego4d.draw(fit, 999, 0) == fit
    assert set(prepare_ego4d.draw(fit, 200, seed=1)) != set(some)
    without = prepare_ego4d.draw([clip for clip in fit if clip.uid != "c"], 200, seed=0)
    assert {clip for clip in some if clip.uid != "c"} < set(without)


def make_ego4d(root, narrations, **videos):
    """Ego4D's layout: narrations {uid: [(seconds, text)]}; videos: what make_video is to be told of some."""
    about = dict(is_stereo=False, redacted_intervals=[], split_em=None, split_av=None, split_fho="train")
    for uid in narrations:
        make_video(root / f"video_540ss/{uid}.mp4", **videos.get(uid, {}))
    (root / "annotations").mkdir()
    (root / "ego4d.json").write_text(json.dumps(dict(videos=[
        dict(about, video_uid=uid, duration_sec=8.0) for uid in narrations])))
    (root / "annotations/narration.json").write_text(json.dumps({
        uid: dict(status="complete", narration_pass_2=dict(summaries=[], narrations=[
            dict(timestamp_sec=seconds, narration_text=text, annotation_uid="u") for seconds, text in told]))
        for uid, told in narrations.items()} | dict(hidden=dict(status="redacted"))))
    return root


def contents(directory):
    """The bytes of a packed set; without the logs and the report, which hold times, and the command."""
    return {path.name: path.read_bytes() for path in directory.iterdir()
            if path.suffix in (".bin", ".npz", ".jsonl")}
DOES = [(1.5 + i, f"#C C does {i + 1.5} ") for i in range(5)]


@pytest.fixture(scope="session")
def ego4d_raw(tmp_path_factory):
    """Six videos, each with five clips: x0 ... x5."""
    return make_ego4d(tmp_path_factory.mktemp("ego4d") / "v2", {f"x{i}": DOES for i in range(6)})


def test_ego4d_is_packed_and_trained_on(ego4d_raw, tmp_path):
    """Catches sentences beside another clip's frames, videos mixed up, sets that pre-training can't take."""
    status, text = run("prepare_ego4d.py", ego4d_raw, tmp_path / "out", "--workers", 1)
    assert status == 0 and "packed 30 of 30 clips" in text, text
    data = clips.Clips(tmp_path / "out")
    assert data.fps == 3 and not data.has_actions and data.cameras == dict(rgb_static=(224, 224))
    assert data.lengths.tolist() == [10] * 30 and data.episodes.tolist() == [i // 5 for i in range(30)]
    for i, sentence in enumerate(data.sentences):
        assert sentence == f"does {i % 5 + 1.5}"
        told = [number(picture) for picture in data.read(i)["frames"]["rgb_static"]]
        assert told == [30 * (i % 5) + 10 * k for k in range(10)]
    assert Image.open(tmp_path / "out/sheet.png").size == (1120, 8 * 130)
    listed = [json.loads(line) for line in (tmp_path / "out/clips.jsonl").read_text().splitlines()]
    assert listed[6] == {"uid": "x1", "pass": 2, "index": 1, "start": 1.0, "text": "does 2.5"}
    batch = clips.Windows(data, range(30), 4, 10, 1, ["rgb_static"])[0]
    assert batch["mask"].all() and batch["future_mask"].sum(1).tolist() == [9] * 4
    command = training("pretrain", tmp_path / "out", tmp_path / "run", window=10, future=1)
    status, text = run(*command)
    assert status == 0 and len(read_log(tmp_path / "run", "rgb_static")) == 6, text
    for flags in [], ["--deep"]:
        status, text = run("prepare_ego4d.py", tmp_path / "out", "--verify", *flags)
        assert status == 0 and "nothing is wrong" in text, text


def pack_ego4d(*arguments):
    with mock.patch.object(sys, "argv", ["prepare_ego4d.py", *map(str, arguments)]):
        common.run_script(prepare_ego4d.main)


def test_ego4d_resumes(ego4d_raw, tmp_path, monkeypatch):
    """Catches a resumed, shared or parallel run that packs clips twice, skips some or mixes two choices."""
    monkeypatch.setattr(prepare_ego4d, "SHARD", 7)                     # so two videos a shard
    straight, read = tmp_path / "straight", prepare_ego4d.read_clips
    pack_ego4d(ego4d_raw, straight, "--workers", 1)
    assert len(contents(straight)) == 3 * 2 + 1
    assert clips.Clips(straight).episodes.tolist() == [i // 5 for i in range(30)]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(prepare_ego4d, "read_clips",
                      lambda path, *rest: 1 / 0 if path.stem == "x3" else read(path, *rest))
        pack_ego4d(ego4d_raw, tmp_path / "resumed", "--workers", 1)
    before = (tmp_path / "resumed/00000.bin").stat().st_mtime_ns
    assert refused("interrupted", clips.Clips, tmp_path / "resumed")
    for out, *flags in (("resumed", "--workers", 1), ("parts", "--shard", "2/2", "--workers", 1),
                        ("parts", "--shard", "1/2", "--workers", 2), ("list", "--workers", 1, "--clip-list",
                                                                      straight / "clips.jsonl")):
        pack_ego4d(ego4d_raw, tmp_path / out, *flags)
        if flags[1] == "2/2":
            assert refused("interrupted", clips.Clips, tmp_path / out)
        else:
            assert contents(tmp_path / out) == contents(straight)
    assert (tmp_path / "resumed/00000.bin").stat().st_mtime_ns == before
    assert not list((tmp_path / "parts").glob("*.tmp"))
    for flags, words in ((["--clips", 9], ["clips 30, now 9", "--clip-list"]), (["--crop"], ["crop"]),
                         ([], ["shard 7, now 256"])):
        assert fails_in_one_line("prepare_ego4d.py", ego4d_raw, straight, *flags, words=words)
    pack_ego4d(ego4d_raw, tmp_path / "some", "--clips", 20, "--workers", 1)
    with pytest.raises(SystemExit, match="crc32"):                     # as many others
        pack_ego4d(ego4d_raw, tmp_path / "some", "--clips", 20, "--workers", 1, "--seed", 1)
    assert prepare_ego4d.verify(straight, deep=False) == []
    (straight / "00001.json").write_text('{"lost": [["x2", "why", 1]]}')
    assert "shard 00001 has 10 clips and lost 1" in " ".join(prepare_ego4d.verify(straight, deep=False))
    (straight / "00001.json").write_text("{")
    assert re.search("00001.json.*again", *prepare_ego4d.verify(straight, deep=False))


def test_ego4d_verify_lists_all_damage(ego4d_raw, tmp_path, monkeypatch):
    """Catches a list of clips that is not the packed one, damage that hides other damage."""
    monkeypatch.setattr(prepare_ego4d, "SHARD", 5)
    pack_ego4d(ego4d_raw, tmp_path, "--workers", 1)
    lines, verify = (tmp_path / "clips.jsonl").read_text(), prepare_ego4d.verify
    assert verify(tmp_path, deep=True) == []
    (tmp_path / "clips.jsonl").write_text(lines.replace("does 2.5", "does 9.5", 1))
    for deep in False, True:
        problem, = verify(tmp_path, deep)
        assert "clips.jsonl" in problem and "crc32" in problem
    (tmp_path / "clips.jsonl").write_text(lines)
    with open(tmp_path / "00000.bin", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    (tmp_path / "00002.npz").unlink()
    (tmp_path / "00003.npz").write_bytes(b"")
    (tmp_path / "00004.json").unlink()
    for deep in False, True:
        text = "\n".join(verify(tmp_path, deep))
        for words in "00002.npz is missing", "00003.npz can't be read", "00004.json":
            assert words in text
        assert ("00000.bin: clip 0 has changed" in text) == deep and "00001." not in text


def test_ego4d_reports_what_was_dropped(ego4d_raw, tmp_path):
    """Catches counts that are gone once the list itself is given back to finish a run."""
    raw = tmp_path / "v2"
    shutil.copytree(ego4d_raw, raw)
    (raw / "video_540ss/x1.mp4").unlink()
    for flags in [], ["--clip-list", tmp_path / "out/clips.jsonl"]:
        status, text = run("prepare_ego4d.py", raw, tmp_path / "out", "--workers", 1, *flags)
        report = json.loads((tmp_path / "out/report.json").read_text())
        assert status == 0 and report["dropped"] == {"no video file": 5} and report["no_file"] == dict(x1=5)
        assert "5 dropped: no video file" in text and "packed 25 of 25" in text, text
    for flags, dropped in (flags, {}), ([], {"no video file": 5}):         # first another's list, then chosen
        run("prepare_ego4d.py", raw, tmp_path / "new", "--workers", 1, *flags)
        assert json.loads((tmp_path / "new/report.json").read_text())["dropped"] == dropped


def test_ego4d_killed(ego4d_raw, tmp_path, monkeypatch):
    """Catches a kill -9 that leaves half a shard under a final name, or that no next run can go on from."""
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    some = [clip for i in range(6) for clip in ego4d_clips(*np.arange(0, 4.9, 0.05).tolist(), uid=f"x{i}")]
    listed.write_bytes(prepare_ego4d.to_lines(some))
    arguments = [ego4d_raw, out, "--clip-list", listed, "--workers", 2]
    command = [sys.executable, "-c", "import prepare_ego4d as p; p.SHARD = 9; p.main()", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not list(out.glob("*.npz")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert 1 <= len(list(out.glob("*.npz"))) < 6 and refused("interrupted", clips.Clips, out)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    monkeypatch.setattr(prepare_ego4d, "SHARD", 9)
    pack_ego4d(ego4d_raw, tmp_path / "straight", "--clip-list", listed, "--workers", 1)
    assert contents(out) == contents(tmp_path / "straight") and len(clips.Clips(out)) == 588
    assert not list(out.glob("*.tmp"))


def damage(path):
    """Overwrite some of a packet in the middle of a video."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][120]
    with open(path, "r+b") as file:
        file.seek(packet.pos + packet.size // 3)
        file.write(bytes(255 - x for x in os.urandom(packet.size // 3)))


def test_ego4d_bad_videos_cost_their_own_clips(tmp_path):
    """Catches a broken video that ends the run, takes others' clips along, or is patched over unnoticed."""
    names = "good cut damaged empty headless missing page sound".split()
    raw = make_ego4d(tmp_path / "v2", dict.fromkeys(names, DOES), damaged=dict(g="15"))
    path = {name: raw / f"video_540ss/{name}.mp4" for name in names}
    content = path["cut"].read_bytes()
    path["cut"].write_bytes(content[:len(content) * 6 // 10])
    damage(path["damaged"])
    path["empty"].write_bytes(b"")
    path["headless"].write_bytes(content[:300])
    path["page"].write_text("<html>not found</html>" * 99)
    with av.open(str(path["sound"]), "w") as container:
        stream = container.add_stream("aac", 16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    run("prepare_ego4d.py", raw, tmp_path / "all", "--workers", 1)     # lists also what will be missing
    path["missing"].unlink()
    for out, *flags in ("out",), ("listed", "--clip-list", tmp_path / "all/clips.jsonl"):
        status, text = run("prepare_ego4d.py", raw, tmp_path / out, "--workers", 1, *flags)
        assert status == 0, text
        report = json.loads((tmp_path / out / "report.json").read_text())
        lost = {each["video"]: (each["clips"], each["reason"]) for each in report["lost"]}
        data = clips.Clips(tmp_path / out)
        for i in range(len(data)):
            first = 30 * int(float(data.sentences[i][5:]) - 1.5)
            assert [number(picture) for picture in data.read(i)["frames"]["rgb_static"]] == [
                first + 10 * k for k in range(10)]
        whole = collections.Counter(sorted(names)[episode] for episode in data.episodes)
        assert whole == dict(good=5, cut=5 - lost["cut"][0], damaged=5 - lost["damaged"][0])
        assert whole["cut"] and whole["damaged"]
        assert lost["empty"] == (5, "can't be opened: the file is empty")
        assert lost["sound"] == lost["headless"] == (5, "can't be opened: no video in it, or it is cut off")
        assert lost["page"] == (5, "can't be opened: Invalid data found when processing input")
        assert all(lost[name][1].startswith("can't be decoded: ") for name in ("cut", "damaged"))
        assert report["packed"] == len(data) == report["listed"] - sum(count for count, _ in lost.values())
        assert all(f"lost {count} clips of {name}: {why}" in text for name, (count, why) in lost.items())
        assert f"in {tmp_path / out} delete 00000.npz and run the same command" in text
        assert run("prepare_ego4d.py", tmp_path / out, "--verify", "--deep")[0] == 0
    assert lost["missing"] == (5, "can't be opened: No such file or directory") and report["no_file"] == {}
    assert json.loads((tmp_path / "out/report.json").read_text())["no_file"] == dict(missing=5)


def test_ego4d_passing_failures_lose_nothing(ego4d_raw, tmp_path, monkeypatch):
    """Catches a network disk that fails for a second, or is not there, and costs clips for good."""
    read, out, full = prepare_ego4d.Reader.nearest, tmp_path / "out", tmp_path / "all"
    video = ego4d_raw / "video_540ss/x1.mp4"
    for kind in OSError, av.error.OSError:             # Python's and FFmpeg's
        for name in "ESTALE", "EMFILE", "ENFILE", "EIO":
            error = kind(getattr(errno, name), "as the disk says", str(video))
            with monkeypatch.context() as patch, pytest.raises(SystemExit, match="mp4: .*goes on"):
                patch.setattr(prepare_ego4d.Reader, "nearest", mock.Mock(side_effect=error))
                if kind is OSError or name != "EIO":
                    patch.setattr(prepare_ego4d.Reader, "__init__", mock.Mock(side_effect=error))
                else:                                  # can't be read by others either
                    patch.setattr(prepare_ego4d, "open", mock.Mock(side_effect=OSError(
                        errno.EIO, "Input/output error", str(video))), raising=False)
                pack_ego4d(ego4d_raw, out, "--workers", 1)
            assert not list(out.glob("*.npz"))
    pack_ego4d(ego4d_raw, full, "--workers", 1)
    for name in "EIO", "ENOMEM":                       # of a file that is only damaged
        kind = av.error.MemoryError if name == "ENOMEM" else av.error.OSError
        error = kind(getattr(errno, name), "as FFmpeg says", "")
        fail = mock.Mock(side_effect=error)
        nearest = lambda self, seconds: read(self, seconds) if seconds < 4.5 else fail()
        with monkeypatch.context() as patch:
            patch.setattr(prepare_ego4d.Reader, "nearest", nearest)
            pack_ego4d(ego4d_raw, out, "--workers", 1)
        assert len(clips.Clips(out)) < 30 and "as FFmpeg says" in (out / "report.json").read_text()
        (out / "00000.npz").unlink()                   # what the run says to do
    pack_ego4d(ego4d_raw, out, "--workers", 1)
    assert contents(out) == contents(full)
    raw, open_it = tmp_path / "v2", prepare_ego4d.Reader
    shutil.copytree(ego4d_raw, raw)
    unmount = lambda path: ((raw / "video_540ss").exists() and (raw / "video_540ss").rename(raw / "gone"),
                            open_it(path))[1]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="video_540ss: no such folder"):
        patch.setattr(prepare_ego4d, "Reader", unmount)
        pack_ego4d(raw, tmp_path / "unmounted", "--workers", 1)
    assert not list((tmp_path / "unmounted").glob("*.npz"))
    (tmp_path / "captions.csv").write_text("video,start,text\nx.mp4,1,opens it\n")
    for flags in ([ego4d_raw, tmp_path / "new", "--folder", "none", "--clip-list", out / "clips.jsonl"],
                  [tmp_path / "new", "--videos", tmp_path / "none", "--captions", tmp_path / "captions.csv"]):
        assert fails_in_one_line("prepare_ego4d.py", *flags, words=["none", "no such folder"])
    assert not (tmp_path / "new").exists()


def test_anybodys_videos(tmp_path):
    """Catches captions beside another video's frames, a bad row that is dropped or ends in a traceback."""
    make_video(tmp_path / "videos/a/one.mp4")
    make_video(tmp_path / "videos/two.mkv", format="matroska")
    captions, out, flags = tmp_path / "captions.csv", tmp_path / "out", ["--workers", 1]
    start = ["prepare_ego4d.py", out, "--videos", tmp_path / "videos", "--captions", captions, *flags]
    captions.write_bytes(b'\xef\xbb\xbfvideo,start,text\na/one.mp4,2,"opens it, slowly."\n'
                         b"two.mkv,1.0,closes the box\na/one.mp4,0.5,hebt d\xc3\xa4s Glas\ntwo.mkv,1,waits\n"
                         b"two.mkv,-1,opens it\nnone.mp4,1,opens it\ntwo.mkv,6,opens a door\n")
    status, text = run(*start)
    assert status == 0 and "7 sentences, of which 4 fit" in text and "lost 1 clips of two.mkv" in text, text
    data = clips.Clips(out)
    assert data.sentences == ["hebt däs Glas", "opens it, slowly", "closes the box"]
    told = [number(data.read(i, 0, 1)["frames"]["rgb_static"][0]) for i in range(3)]
    assert told == [15, 60, 30] and data.episodes.tolist() == [0, 0, 1]
    status, text = run(*start, "--estimate")
    assert status == 0 and "core-hours" in text and "all 4 clips of 2 videos" in text, text
    seen = collections.Counter()
    with mock.patch.object(prepare_ego4d, "pack_shard", lambda job: seen.update(job.clips) or 1 / 0):
        chosen = ego4d_clips(*range(90), uid="a") + ego4d_clips(*range(10), uid="b")
        for seed in range(100):
            args = argparse.Namespace(seed=seed, out=out, videos=tmp_path, crop=False)
            with pytest.raises(ZeroDivisionError):
                prepare_ego4d.estimate(args, chosen, n_videos=1, n_clips=5)
    assert seen.total() == 500 and 380 < sum(n for clip, n in seen.items() if clip.uid == "a") < 490
    assert len(seen) > 85                              # the middle and the end of a video, too
    for content, words in ((b"video,start,text\na.mp4,soon,opens it\n", ["row 1", "soon"]),
                           (b"video,start,text\na.mp4,1,opens it\na.mp4,1e30,opens it\n", ["row 2", "1e+30"]),
                           (b"video,text\na.mp4,opens it\n", ["row 1", "start"]),
                           (b"video,start,text\na.mp4,1\n", ["row 1", "video,start,text"]),
                           (b"video,start,text\n", ["no clip"]), (b"\xff\xfe\0", [captions.name])):
        captions.write_bytes(content)
        assert fails_in_one_line(*start, words=words), content


def test_ego4d_user_errors(ego4d_raw, tmp_path, monkeypatch):
    """Catches tracebacks for a wrong path, another format, a full disk; flags that contradict each other."""
    raw, out, broken = tmp_path / "v2", tmp_path / "out", tmp_path / "list.jsonl"
    shutil.copytree(ego4d_raw, raw)
    (tmp_path / "file").write_text("")
    narrations, videos = raw / "annotations/narration.json", raw / "ego4d.json"
    fails = lambda *arguments, words: fails_in_one_line("prepare_ego4d.py", *arguments, words=words)
    other = json.dumps(dict(videos=dict(x0=dict(narrations=[dict(time=2, text="#C C opens it")]))))
    odd = json.dumps(dict(x0=dict(narration_pass_1=dict(narrations=[
        dict(timestamp_sec="soon", narration_text="#C C opens it")]))))
    for path, content in ((narrations, other), (narrations, '{"x0": '), (narrations, "[]"),
                          (narrations, '{"x0": [1]}'), (narrations, odd), (narrations, None),
                          (videos, "[]"), (videos, None), (videos, '{"videos": [{"video_uid": "x0"}]}')):
        before = path.read_text()
        path.unlink() if content is None else path.write_text(content)
        assert fails(raw, out, words=[str(path), "needed" if content == other else "DATASET",
                                    "x0" if content == odd else ""]), content
        path.write_text(before)
    good = '{"uid": "x0", "pass": 1, "index": 0, "start": %s, "text": "opens it"}'
    for line in ("{", "[]", '{"uid": "x0"}', good % '"soon"', good % "NaN", good % "1e30", "",
                 good.replace("x0", r"\ud800") % 1, good.replace("opens", r"\udfff") % 1,
                 good.replace('"x0"', "0") % 1):
        broken.write_text(good % 0 + "\n" + line + "\n")
        assert fails(raw, out, "--clip-list", broken, words=["line 2", "pass"]), line
    before = videos.read_text()
    content = json.loads(before)
    content["videos"][3] = {key: value for key, value in content["videos"][3].items() if "split" not in key}
    videos.write_text(json.dumps(content))
    assert fails(raw, out, "--exclude-splits", "val", words=["video x3", "split_", "--exclude-splits"])
    videos.write_text(before)
    for arguments, words in (
            ([raw / "nowhere", out], ["nowhere", "DATASET"]), ([raw, tmp_path / "file"], ["file"]),
            ([raw, out, "--folder", "full_scale"], ["full_scale", "--folder"]),
            ([out, "--verify"], ["out", "no such directory"]),
            ([raw, out, "--clip-list", tmp_path / "none"], ["none", "No such file"]),
            ([raw, out, "--clip-list", broken, "--seed", 3], ["--clip-list"]),
            ([raw], ["DATASET"]), ([], ["out"]),
            ([raw, out, "--deep"], ["--verify"]), ([raw, out, "--videos", raw], ["--videos"]),
            ([out, "--videos", raw], ["--captions"]), ([raw, out, "--captions", broken], ["--videos"]),
            ([raw, out, "--shard", "9/8"], ["9/8"]), ([raw, out, "--shard", "0/8"], ["0/8"]),
            ([raw, out, "--exclude-splits", "vla"], ["vla", "val"]), ([raw, out, "--clips", 0], ["--clips"]),
            ([raw, out, "--exclude-splits", "val,train"], ["no clip"]),
            ([raw, out, "--folderr", 1], ["did you mean --folder?"])):
        assert fails(*arguments, words=words), arguments
    assert not out.exists()
    videos.rename(tmp_path / videos.name)              # one folder up is fine, too
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(clips.ShardWriter, "add", mock.Mock(side_effect=full))
    assert fails(raw, out, "--workers", 1, words=["out", "No space left", "goes on"])
    assert not list(out.glob("*.npz")) and not list(out.glob("*.tmp")) and not list(out.glob("*.bin"))


@pytest.mark.skipif(not EGO4D_MINI.exists(), reason="needs ../shared/data/ego4d_mini")
def test_ego4d_real_video(tmp_path):
    """Catches rules that narrations with all the real file's quirks get past, real codecs that go wrong."""
    status, text = run("prepare_ego4d.py", EGO4D_MINI, tmp_path / "out", "--workers", 1)
    assert status == 0 and "21 sentences, of which 11 fit" in text, text
    assert clips.Clips(tmp_path / "out").sentences == [
        "pours coffee into a blue cup", "holds the cup with the left hand", "slides the cups on the table",
        "moves the cups", "moves the cups with both hands", "swaps two red cups", "shuffles the red cups",
        "puts the T block beside the M block", "pushes the blocks with both hands", "picks a yellow block",
        "arranges the yellow blocks in a row"]
    status, text = run("prepare_ego4d.py", EGO4D_MINI, tmp_path / "train", "--exclude-splits", "val,test",
                       "--workers", 1)
    assert status == 0 and "4 dropped: video in an excluded split" in text and "packed 7 of 7" in text, text
