"""Packs Ego4D, or anybody's narrated videos, into clips: a sentence and ten frames 1/3 s apart.

    python prepare_ego4d.py ego4d/v2 data/ego4d --estimate    # what it will take: core-hours and GB
    python prepare_ego4d.py ego4d/v2 data/ego4d               # 800,000 clips, as in the paper
    python prepare_ego4d.py ego4d/v2 data/ego4d --shard 3/8   # the third of eight machines
    python prepare_ego4d.py data/own --videos DIR --captions FILE.csv
    python prepare_ego4d.py data/ego4d --verify --deep        # is every byte as it was written?
    python train.py --stage pretrain --data data/ego4d

Reads what Ego4D's own client writes:
    ego4d.json                   the videos: durations, stereo, splits, redacted intervals (or one folder up)
    annotations/narration.json   sentences with a time, from up to two annotators ("passes") a video
    video_540ss/UID.mp4          or another folder: --folder full_scale
or a CSV file, its first line video,start,text (start: of the first frame, in s), and a folder of videos.
Writes OUT in the format of clips.py, 3 fps, JPEG q95 4:2:0, and beside it:
    clips.jsonl   the chosen clips, a line each: publish it, or pack another's with --clip-list
    choice.json   how many sentences each rule dropped when they were chosen
    00000.json    a shard's log: how many clips, core seconds and bytes, what was lost and why
    report.json   what each rule dropped, what was lost of which video, sizes and times
    sheet.png     some clips with their sentences
A killed run goes on where it was: start the same command again. A broken video costs its own clips only.
Longer than its siblings: it distrusts four million narrations and ten thousand files that others made.
In order: the choice of clips, what they are chosen from, frames, packing, reports, the command line.
"""
import argparse
import collections
import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import shlex
import sys
import tempfile
import time
import zlib

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

from nanogr import clips
from nanogr.common import Parser, UserError, check_apart, cores, parse_part, run_script, write_whole

FRAMES, STEP, SIZE = 10, 1 / 3, 224
SPAN = (FRAMES - 1) * STEP                             # 3 s from the first frame to the last
SHARD = 256                                            # clips at least: 50 MB, about a minute of one core
NEAR = 2                                               # s; to get over a shorter gap, decode on: don't seek
# swscale's AREA | FULL_CHR_H_INT | ACCURATE_RND: AREA alone comes out two gray levels too dark.
SCALING = 0x20 | 0x2000 | 0x40000
SCALER = VideoReformatter()                            # one for all: frame.reformat sets up one a frame
BEGINNING = 20                                         # s; so much is decoded where seeking fails
RAW = {"h264", "hevc", "vvc", "av1", "m4v", "mpegvideo", "obu"}        # formats of nothing but pictures
NOTES = {"h264": "6", "hevc": "39|40"}                 # kinds of units beside the pictures: SEI messages
PIXELS = 1 << 27                                       # most of a picture: 16384 x 8192
TAGS = dict(metadata_errors="ignore") if int(av.__version__.split(".")[0]) < 19 else {}   # 19: always so
WEARER = re.compile(r"\A\s*#\s*C\s*C\s+", re.IGNORECASE)               # also written "# C C", "#c C", "#CC"

Clip = collections.namedtuple("Clip", "uid pass_number index start text")     # start [s] of its first frame
Video = collections.namedtuple("Video", "duration stereo redacted excluded there")
Job = collections.namedtuple("Job", "index episode clips out folder suffix crop")       # makes one shard


# --------------------------------------------------------------------------------- the choice of clips
def clean(text):
    """The sentence as a person would write it: without its tag, stray blanks and the dot at the end."""
    text = " ".join(WEARER.sub("", text, count=1).split())
    text = re.sub(r" ([,.;])(?!\w)", r"\1", text).rstrip(" .,;_")        # but not in "adds .5 litre"
    return re.sub(r"\A([ ,;_]|\.(?!\d))+", "", text, count=1)


# Scripts that put no blanks between words: Thai and its neighbours, Khmer, Chinese, Japanese.
NO_BLANKS = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"


def count_words(text):
    """How many words it has; in scripts that put no blanks between words each letter counts as one."""
    return len(re.findall(rf"[{NO_BLANKS}]|[^\s{NO_BLANKS}]+", text))


# A rule says of (clip, its video) whether to drop it, its key says why. The first that does is counted.
RULES = {
    "not an action of the wearer (#C C)": lambda clip, video: not WEARER.match(clip.text),
    "unsure, or another tag inside": lambda clip, video: "#" in WEARER.sub("", clip.text, count=1),
    "fewer than two words": lambda clip, video: count_words(clean(clip.text)) < 2,
    "video not in ego4d.json": lambda clip, video: video is None,
    "not all of its 3 s inside the video": lambda clip, video: not 0 <= clip.start <= video.duration - SPAN,
    "touches a redacted interval": lambda clip, video: any(
        begin <= clip.start + SPAN and clip.start <= end for begin, end in video.redacted),
    "stereo video": lambda clip, video: video.stereo,
    "video in an excluded split": lambda clip, video: video.excluded,
    "no video file": lambda clip, video: not video.there,
}
CAPTION_RULES = {reason: RULES[reason] for reason in (
    "fewer than two words", "not all of its 3 s inside the video", "no video file")}


def choose(candidates, videos, rules, dropped):
    """Yield the clips that no rule drops, with clean sentences; count the others in dropped[reason, uid]."""
    for clip in candidates:
        video = videos.get(clip.uid)
        reason = next((reason for reason, drops in rules.items() if drops(clip, video)), None)
        if reason:
            dropped[reason, clip.uid] += 1
        else:
            yield clip._replace(text=clean(clip.text))


def draw(fit, count, seed):
    """Return `count` clips, or all if there are no more, by video and time.

    Those whose hashed names come first. So it matters little what else there is: a smaller draw is part of a
    larger one, and a video that is missing changes nothing in the choice among the others but its end.
    """
    name = lambda clip: hashlib.sha256(f"{seed} {clip.uid} {clip.pass_number} {clip.index}".encode()).digest()
    return sorted(sorted(fit, key=name)[:count], key=by_time)


def by_time(clip):
    return clip.uid, clip.start, clip.pass_number, clip.index


# ----------------------------------------------------------------------------- what there is to choose
ADVICE = ("DATASET is the folder with ego4d.json, --folder the one in it with the videos; Ego4D's client "
          "makes both: ego4d --output_directory DIR --datasets annotations video_540ss")
COLUMNS = "The first line must be video,start,text; start is the time of the first frame, in seconds"
KEYS = ("uid", "pass", "index", "start", "text")       # of a line of clips.jsonl
LINE = 'A line is such as {"uid": "x", "pass": 1, "index": 0, "start": 0.5, "text": "opens a drawer"}'


@contextlib.contextmanager
def reading(path, advice):
    """Turns whatever is wrong with a user's file into one line that says which file it is and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. {advice}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} can't be used ({type(error).__name__}: {error}). {advice}") from None


def load_videos(path, folder, splits):
    """Return {uid: Video} of ego4d.json; excluded: those that any benchmark has in one of the `splits`."""
    videos, flaw = {}, None
    with reading(folder, ADVICE):
        there = set(os.listdir(folder))
    with reading(path, ADVICE):
        for about in json.loads(path.read_bytes())["videos"]:
            uid = about["video_uid"]
            with reading(f"{path}, video {uid}", ADVICE):
                excluded = is_excluded(about, splits)
            try:
                videos[uid] = Video(float(about["duration_sec"] or 0), bool(about["is_stereo"]),
                                    [(float(interval["start_sec"]), float(interval["end_sec"]))
                                     for interval in about["redacted_intervals"] or []],
                                    excluded, f"{uid}.mp4" in there)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                flaw = f"video {uid}: its entry can't be used ({error!r})"
                print(f"{path}, {flaw}, so it is left out")
        if flaw and not videos:
            raise ValueError(flaw)
    return videos


def is_excluded(about, splits):
    """True if a benchmark has the video, as ego4d.json describes it, in one of the splits.

    A benchmark's value is "multi" where some of the video's clips are in one split, some in another.
    """
    found = [value for key, value in about.items() if key.startswith("split_")]    # em, av, fho, goalstep ...
    if splits and not found:
        raise ValueError("without a key split_..., --exclude-splits can't be obeyed")
    return not splits.isdisjoint(found) or "multi" in found and not splits.isdisjoint(("val", "test"))


def load_narrations(path):
    """Return the narrations of narration.json as Clips, the narrated moment in the middle of their 3 s."""
    # Reduced while parsed: 3.85 million dicts would take gigabytes.
    pair = lambda item: (
        (item.get("timestamp_sec"), item["narration_text"]) if "narration_text" in item else item)
    found = []
    with reading(path, ADVICE):
        content = json.loads(path.read_bytes(), object_hook=pair)
        if "videos" in content:
            raise UserError(f"{path} has the format of all_narrations_redacted.json, not that of "
                            "narration.json, which is needed")
        for (uid, video), number in itertools.product(content.items(), (1, 2)):
            with reading(f"{path}, video {uid}, pass {number}", ADVICE):
                told = (video.get(f"narration_pass_{number}") or {}).get("narrations") or []
                for index, (seconds, text) in enumerate(told):
                    middle = math.nan if seconds is None else seconds          # which is inside no video
                    found.append(Clip(encodable(uid), number, index, round(middle - SPAN / 2, 6),
                                      encodable(text or "")))
    return found


def encodable(text):
    """The text with a question mark for what UTF-8 can't write: half of a character beyond U+FFFF."""
    return text.encode("utf-8", "replace").decode()


def load_captions(path):
    """Return the rows of a CSV file as Clips."""
    found = []
    with reading(path, COLUMNS):
        content = path.read_bytes()
        content = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        first = content.partition("\n")[0]
        mark = max(",;\t", key=first.count)            # spreadsheets write ; where a comma is in numbers
        names = [name.strip(' "\r').lower() for name in first.split(mark)]
        rows = csv.DictReader(io.StringIO(content.partition("\n")[2], newline=""), names, delimiter=mark)
        for index, row in enumerate(rows):
            with reading(f"{path}, row {index + 1}", COLUMNS):
                start = row["start"].replace(",", ".") if mark != "," else row["start"]
                name = pathlib.PurePath(row["video"])
                if name.is_absolute() or ".." in name.parts:
                    raise ValueError(f"the video {name} is not in the folder of --videos")
                found.append(checked(Clip(row["video"], 0, index, round(float(start), 6), row["text"])))
    return found


def load_list(path):
    """Return the Clips of a clips.jsonl, by video and time."""
    found = []
    with reading(path, LINE):
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")       # JSON's only line end
    for number, line in enumerate(lines, 1):
        with reading(f"{path}, line {number}", LINE):
            item = json.loads(line)
            found.append(checked(Clip(*(item[key] for key in KEYS))))
    return sorted(found, key=by_time)


def checked(clip):
    """Return a clip that a person may have written; TypeError or ValueError if one of its parts can't be."""
    for value, kind in zip(clip, (str, int, int, (int, float), str)):
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is of the wrong kind")
        if isinstance(value, str):
            value.encode()                             # UnicodeEncodeError, a ValueError
    if not abs(clip.start) < 1e6:                      # s: twelve days; NaN, too
        raise ValueError(f"start {clip.start} is no time in a video")
    return clip


def to_lines(chosen):
    """Return what clips.jsonl holds, as bytes."""
    return "".join(json.dumps(dict(zip(KEYS, clip)), ensure_ascii=False) + "\n" for clip in chosen).encode()


# ---------------------------------------------------------------------------------------------- frames
class Reader:
    """An open video. Ask for frames in the order of time: it decodes once what overlaps, and seeks over gaps.

    Seconds count from the first frame. ValueError or FFmpegError if the file, or a frame, can't be had.
    """
    UNREAD, ENDED = (-math.inf, None), (math.inf, None)                # in place of (seconds, frame)

    def __init__(self, path):
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        self.path, self.tolerant, self.container = path, False, None
        self.open()

    def open(self):
        """Open the file, or open it anew to read it from its first byte."""
        self.close()
        # No name is taken for an address, no playlist in disguise fetches one; odd tags don't matter.
        how = dict(options=dict(protocol_whitelist="file"), **TAGS)
        self.container = av.open(str(self.path.resolve()), **how)
        self.stream = self.container.streams.best("video")             # else a cover picture may come first
        codec, kind = self.stream and self.stream.codec_context, self.container.format.name
        why = ("no video in it, or it is cut off" if not self.stream else
               "no decoder for its codec" if not codec else
               f"it claims pictures of {codec.width} x {codec.height} px"
               if codec.width * codec.height > PIXELS else
               f"raw {kind} tells no times; wrap it: ffmpeg -framerate 30 -i {self.path.name} "
               "-c copy NAME.mp4, with its true rate" if kind in RAW else "")
        if why:
            self.close()
            raise ValueError(why)
        self.stream.thread_type, codec.thread_count = "NONE", 1        # a worker, a core
        # By default H.264's decoder patches over damage, and nobody would know.
        codec.options = {"err_detect": "explode", "max_pixels": str(PIXELS)}
        self.start, self.unit = self.stream.start_time or 0, float(self.stream.time_base)
        self.counted = kind == "avi"                   # whose packets tell when to decode, not when to show
        self.filter = None
        if self.tolerant and codec.name in NOTES:
            without = f"filter_units=remove_types={NOTES[codec.name]}"
            self.filter = BitStreamFilterContext(without, self.stream)
        self.frames = self.decoded()
        self.forget()

    def close(self):
        if self.container:
            self.container.close()

    def forget(self):
        """After an error: seek whatever is asked for next."""
        self.before = self.after = self.UNREAD

    def decoded(self):
        """Yield (seconds, frame) from where the file stands. What can't be decoded before the first picture
        is no damage: a file, or the place that was sought, may begin amid pictures that need earlier ones.
        """
        number, flaw = 0, None
        for packet in self.container.demux(self.stream):
            for part in self.filter.filter(packet) if self.filter and packet.size else [packet]:
                try:
                    frames = self.stream.decode(part)
                except av.FFmpegError as error:
                    if number:
                        raise
                    frames, flaw = [], error
                for frame in frames:
                    if self.counted:
                        yield number / float(self.stream.average_rate), frame
                    elif frame.pts is not None:
                        yield (frame.pts - self.start) * self.unit, frame
                    number += 1
        if flaw and not number:
            raise flaw

    def seek(self, seconds):
        """Decode from the last keyframe on that is not after `seconds`, up to there.

        With open GOPs the frames beside a keyframe need some from before it: then from an earlier keyframe.
        Some files can't be sought to their beginning: then they are opened anew.
        """
        flaw = None
        for early in (0, 1, 10):
            if self.counted or seconds <= early:
                break
            self.forget()
            self.container.seek(self.start + int((seconds - early) / self.unit), stream=self.stream)
            self.frames = self.decoded()
            try:
                self.advance(seconds)
            except av.FFmpegError as error:
                flaw = error
                continue
            if self.before != self.UNREAD or self.after[0] == seconds:
                return
        if seconds < BEGINNING or self.counted:
            self.open()
            self.advance(seconds)
        elif flaw:
            raise flaw

    def advance(self, seconds):
        while self.after[0] < seconds:
            self.before, self.after = self.after, next(self.frames, self.ENDED)

    def picture(self, seconds, crop):
        """See nearest and to_picture. If the notes beside a video's pictures are flawed, it goes without."""
        try:
            return to_picture(self.nearest(seconds), crop)
        except av.FFmpegError:
            if self.tolerant or self.stream.codec_context.name not in NOTES:
                raise
            self.tolerant = True
            self.open()
            return to_picture(self.nearest(seconds), crop)

    def nearest(self, seconds):
        """Return the frame whose presentation time is nearest or, where a slow or stalled camera has none
        within 1/6 s, the one being shown."""
        if self.after == self.UNREAD or seconds < self.before[0] or \
                seconds > self.after[0] + NEAR and not self.counted:
            self.seek(seconds)
        self.advance(seconds)
        shown, frame = min(self.before, self.after, key=lambda pair: abs(pair[0] - seconds))
        if abs(shown - seconds) <= STEP / 2:
            return frame
        if self.before == self.UNREAD:
            raise ValueError(f"its first picture that can be decoded comes at {self.after[0]:.1f} s")
        if self.after == self.ENDED:
            raise ValueError(f"it ends early, at {self.before[0]:.1f} s")
        return self.before[1]


def to_picture(frame, crop):
    """uint8 (SIZE, SIZE, 3), upright: the frame squashed, as the authors did, or its central square."""
    sides, short = (frame.width, frame.height), min(frame.width, frame.height)
    width, height = (round(SIZE * side / short) if crop else SIZE for side in sides)
    scale = lambda: SCALER.reformat(frame, width, height, "rgb24", interpolation=SCALING, threads=1)
    try:
        image = scale().to_ndarray()
    except (av.FFmpegError, ValueError):               # a colour space that swscale lacks: as if unspecified
        frame.colorspace = 2
        image = scale().to_ndarray()
    top, left = (height - SIZE) // 2, (width - SIZE) // 2
    return upright(image[top:top + SIZE, left:left + SIZE], frame)


def upright(image, frame):
    """The image (S, S, 3) as players show it: turned and mirrored as the frame's display matrix says, if that
    is one of the eight that do so."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.round(np.frombuffer(bytes(matrix), "<i4")[:5] / 65536).astype(int)   # x' = ax + cy
    if sorted(map(abs, (a, b, c, d))) != [0, 0, 1, 1] or abs(a) != abs(d):
        return image
    if a == 0:
        image, a, d = image.swapaxes(0, 1), c, b
    return image[::d, ::a]


def read_clips(path, group, crop):
    """Yield (clip, uint8 (FRAMES, SIZE, SIZE, 3), or a str that says why not) for clips of one video."""
    explain = lambda error: getattr(error, "strerror", None) or str(error)
    try:
        reader = Reader(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise_if_passing(error, path)
        yield from ((clip, f"can't be opened: {explain(error)}") for clip in group)
        return
    pictures = {i: [] for i in range(len(group))}      # of clips that have not got all of them yet
    with contextlib.closing(reader):
        wanted = ((clip.start + k * STEP, i) for i, clip in enumerate(group) for k in range(FRAMES))
        for seconds, i in sorted(wanted):
            try:
                if i in pictures:
                    pictures[i].append(reader.picture(seconds, crop))
            except (av.FFmpegError, ValueError) as error:
                raise_if_passing(error, path)
                reader.forget()
                del pictures[i]
                yield group[i], f"can't be decoded: {explain(error)}"
            if len(pictures.get(i, ())) == FRAMES:
                yield group[i], np.stack(pictures.pop(i))


def raise_if_passing(error, path):
    """Raise OSError if the machine failed, not the video: clips lost to that would stay lost.

    FFmpeg says EIO and ENOMEM of some damaged files, too. Then others can read them.
    """
    number = getattr(error, "errno", None)
    if isinstance(error, av.FFmpegError) and number in (errno.EIO, errno.ENOMEM):
        with open(path, "rb", buffering=0) as file:
            while file.read(2 ** 26):                  # 64 MB, which must be there
                pass
    elif number in (errno.EIO, errno.ENOMEM, errno.ESTALE, errno.EMFILE, errno.ENFILE):
        raise OSError(number, os.strerror(number), str(path)) from None


# --------------------------------------------------------------------------------------------- packing
def by_video(chosen):
    """Return [(uid, its clips)] of a list in order."""
    return [(uid, list(group)) for uid, group in itertools.groupby(chosen, key=lambda clip: clip.uid)]


def make_jobs(chosen, **options):
    """Return a Job for each shard: whole videos, so that each is opened once, with SHARD clips or more."""
    jobs = []
    for episode, (_, group) in enumerate(by_video(chosen)):
        if not jobs or len(jobs[-1].clips) >= SHARD:
            jobs.append(Job(len(jobs), episode, [], **options))
        jobs[-1].clips.extend(group)
    return jobs


def pack_shard(job):
    """Write one shard, its log first; return how many clips that settles, packed or lost."""
    begin, lost = time.process_time(), collections.Counter()
    with clips.ShardWriter(job.out, job.index, ["rgb_static"], subsampling="420") as writer:
        for episode, (uid, group) in enumerate(by_video(job.clips), job.episode):
            for clip, found in read_clips(job.folder / f"{uid}{job.suffix}", group, job.crop):
                if isinstance(found, str):
                    lost[uid, found] += 1
                else:
                    writer.add(dict(rgb_static=found), clip.text, episode=episode)
        if lost:
            check_folder(job.folder)                   # again: its disk may have gone
        log = dict(clips=len(writer.clips), seconds=round(time.process_time() - begin, 2),
                   bytes=writer.offsets[-1], lost=[(*key, count) for key, count in lost.items()])
        write_whole(log_path(job), json.dumps(log).encode())
    return len(job.clips)


def check_folder(folder):
    if not folder.is_dir():                            # else each of its videos would count as lost
        raise UserError(f"{folder}: no such folder; the videos are in DATASET/--folder, or --videos")


def pack(args, chosen, dropped):
    """Make our share of the shards; if no other share's is missing then, complete the set and report."""
    begin, lines, (number, shares) = time.time(), to_lines(chosen), args.share
    source = "videos with captions" if args.videos else f"ego4d {args.folder}"
    try:
        clips.claim(args.out, source=source, clips=len(chosen), crc32=zlib.crc32(lines), crop=args.crop,
                    shard=SHARD)
    except UserError as error:
        raise UserError(f"{error}, or keep to its list: --clip-list {args.out}/clips.jsonl") from None
    write_whole(args.out / "clips.jsonl", lines)
    if not (args.clip_list or (args.out / "choice.json").exists()):
        write_whole(args.out / "choice.json", json.dumps(count_dropped(dropped), indent=1).encode())
    jobs = make_jobs(chosen, **options_of(args))
    ours = jobs[number - 1::shares]
    clips.make_shards(pack_shard, [(job.index, len(job.clips), job) for job in ours], args.out, args.workers,
                      unit="clip", desc=str(args.out))
    lost = {job.index: load_log(job)["lost"] for job in ours}
    print_lost([each for some in lost.values() for each in some])
    print_again(args.out, [index for index, some in lost.items() if some])
    missing = sum(not clips.shard_is_done(args.out, job.index) for job in jobs)
    if missing:
        print(f"share {number}/{shares} is done; {missing} of {len(jobs)} shards are left to the others")
        return
    clips.write_meta(args.out, source, fps=3, command=shlex.join(sys.argv))
    clips.contact_sheet(clips.Clips(args.out), args.out / "sheet.png")
    report(args.out, jobs, wall=time.time() - begin)


def options_of(args):
    """Return what a Job must know of the command line."""
    folder, suffix = (args.videos, "") if args.videos else (args.dataset / args.folder, ".mp4")
    return dict(out=args.out, folder=folder, suffix=suffix, crop=args.crop)


# --------------------------------------------------------------------------------------------- reports
def log_path(job):
    return job.out / f"{job.index:05d}.json"


def load_log(job):
    with reading(log_path(job), f"Delete {job.index:05d}.npz beside it and run the same command again"):
        return json.loads(log_path(job).read_bytes())


def count_dropped(dropped):
    """Return what choice.json holds: how many sentences each rule has dropped, and the videos without a file.

    dropped: {(reason, uid): count} of `choose`.
    """
    rules = {reason: sum(count for (why, _), count in dropped.items() if why == reason) for reason in RULES}
    return dict(dropped={reason: count for reason, count in rules.items() if count},
                no_file={uid: count for (why, uid), count in dropped.items() if why == "no video file"})


def print_dropped(rules):
    for reason, count in rules.items():
        print(f"{count:11,} dropped: {reason}")


def print_lost(lost, most=20):
    for uid, reason, count in lost[:most]:
        print(f"  lost {count} clips of {uid}: {reason}")
    if len(lost) > most:
        print(f"  and so on: {len(lost)} such lines")


def print_again(out, indices, most=20):
    """Print how to try those shards again that lost clips."""
    if indices:
        names = " ".join(f"{index:05d}.npz" for index in indices[:most]) + " ..." * (len(indices) > most)
        print(f"  to try them again: in {out} delete {names} and run the same command")


def estimate(args, chosen, n_videos=8, n_clips=10):
    """Print what the whole list will take, from neighbouring clips of some videos, packed and thrown away.

    A video is as likely to be among them as it has clips, so that long ones count for what they are.
    """
    rng, groups = random.Random(args.seed), dict(by_video(chosen))
    some = {clip.uid for clip in rng.sample(chosen, min(n_videos, len(chosen)))}
    sample = []
    for uid in sorted(some):
        first = rng.randrange(max(1, len(groups[uid]) - n_clips + 1))
        sample += groups[uid][first:first + n_clips]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(0, 0, sample, **options_of(args) | dict(out=pathlib.Path(folder)))
        pack_shard(job)
        log = load_log(job)
    print_lost(log["lost"])
    if not log["clips"]:
        raise UserError(f"nothing to estimate from: no clip of {len(some)} videos could be read")
    seconds, size = (log[key] / len(sample) for key in ("seconds", "bytes"))
    hours = seconds * len(chosen) / 3600
    print(f"tried {len(sample)} clips of {len(some)} videos: {seconds:.2f} core-seconds and {size:,.0f} "
          f"bytes each, {len(sample) - log['clips']} could not be read")
    print(f"all {len(chosen):,} clips of {len(groups):,} videos: {hours:.3g} core-hours ("
          f"{hours / args.workers:.3g} hours of {args.workers} cores), {size * len(chosen) / 1e9:.3g} GB")


def report(out, jobs, wall):
    """Write report.json and print it in short. What was dropped is of the run that chose: see choice.json."""
    path, choice = out / "choice.json", dict(dropped={}, no_file={})       # packed from another's list
    if path.exists():
        with reading(path, "Delete it: only the counts of what was dropped are in it"):
            choice = json.loads(path.read_bytes())
    logs, counts = [load_log(job) for job in jobs], clips.load_meta(out)["counts"]
    lost = [each for log in logs for each in log["lost"]]
    result = dict(listed=sum(len(job.clips) for job in jobs), packed=counts["clips"],
                  hours=counts["clips"] * SPAN / 3600, gigabytes=counts["bytes"] / 1e9,
                  bytes_a_frame=counts["bytes"] / counts["frames"],
                  core_hours=sum(log["seconds"] for log in logs) / 3600, wall_hours_of_last_run=wall / 3600,
                  lost=[dict(zip(("video", "reason", "clips"), each)) for each in lost], **choice)
    write_whole(out / "report.json", json.dumps(result, indent=1).encode())
    print_dropped(choice["dropped"])
    print("packed {packed:,} of {listed:,} clips: {hours:.4g} hours, {gigabytes:.4g} GB, "
          "{bytes_a_frame:,.0f} bytes a frame, {core_hours:.4g} core-hours".format(**result))
    print(f"this run took {wall:,.1f} s; see {out}/report.json and sheet.png")


def verify(out, deep):
    """Return what is wrong with a finished set, a line each; deep: check each byte and decode each frame."""
    made, problems = clips.load_meta(out)["counts"]["shards"], clips.check(out) if deep else []
    with noting(problems), reading(out / "clips.jsonl", "It must be as it was when the set was begun"):
        crc = zlib.crc32((out / "clips.jsonl").read_bytes())
        if crc != json.loads((out / "recipe.json").read_bytes())["crc32"]:
            raise ValueError("its crc32 is not that in recipe.json")
        jobs = make_jobs(load_list(out / "clips.jsonl"), out=out, folder=None, suffix=None, crop=None)
        if made != len(jobs):
            raise ValueError(f"it makes {len(jobs)} shards, the set has {made}")
        for job in jobs:
            with noting(problems):
                verify_shard(job)
    with noting(problems):
        data = clips.Clips(out)
        for i in tqdm(range(len(data) if deep else 0), unit="clip", desc="decoding", disable=not deep):
            with noting(problems):
                data.read(i)
    return list(dict.fromkeys(problems))


def verify_shard(job):
    """Raise ClipsError unless a shard has, or has lost, as many clips as clips.jsonl lists."""
    has = len(clips.load_shard(job.out, job.index)["episodes"])
    lost = sum(count for _, _, count in load_log(job)["lost"])
    if has + lost != len(job.clips):
        raise UserError(f"{job.out}: shard {job.index:05d} has {has} clips and lost {lost}, but "
                        f"clips.jsonl lists {len(job.clips)}")


@contextlib.contextmanager
def noting(problems):
    """Adds a ClipsError to the problems and goes on after the block."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


# ------------------------------------------------------------------------------------ the command line
def choose_clips(args):
    """Return the clips to pack, by video and time, and how many were dropped: {(reason, uid): count}."""
    dropped = collections.Counter()
    if args.clip_list:
        return load_list(args.clip_list), dropped
    if args.videos:
        candidates, rules = load_captions(args.captions), CAPTION_RULES
        videos = {uid: Video(math.inf, False, [], False, (args.videos / uid).is_file())
                  for uid in {clip.uid for clip in candidates}}
    else:
        candidates, rules = load_narrations(args.dataset / "annotations" / "narration.json"), RULES
        above, path = args.dataset.resolve().parent / "ego4d.json", args.dataset / "ego4d.json"
        path = above if above.exists() and not path.exists() else path         # some clients put it there
        print(f"what is known of the videos: {path}")
        videos = load_videos(path, args.dataset / args.folder, args.exclude_splits)
    fit = list(choose(candidates, videos, rules, dropped))
    chosen = draw(fit, args.clips, args.seed)
    print(f"{len(candidates):,} sentences, of which {len(fit):,} fit and {len(chosen):,} are taken")
    return chosen, dropped


def splits(text):
    if not set(text.split(",")) <= {"train", "val", "test", "multi"}:
        raise argparse.ArgumentTypeError(f"{text}: must be some of train,val,test,multi")
    return set(text.split(","))


def parse():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", nargs="?", type=pathlib.Path, help="Ego4D's folder v1 or v2")
    parser.add_argument("out", type=pathlib.Path, help="where the packed data set goes")
    parser.add_argument("--folder", default="video_540ss", help="where in DATASET the videos are")
    parser.add_argument("--videos", type=pathlib.Path, metavar="DIR", help="your own, instead of DATASET")
    parser.add_argument("--captions", type=pathlib.Path, metavar="CSV", help="what is done in them, and when")
    parser.add_argument("--clip-list", type=pathlib.Path, metavar="FILE", help="take those of a clips.jsonl")
    parser.add_argument("--clips", type=int, default=800_000, help="how many to take of those that fit")
    parser.add_argument("--seed", type=int, default=0, help="which of them to take")
    parser.add_argument("--exclude-splits", type=splits, default=set(), metavar="val,test",
                        help="leave out videos that any of Ego4D's benchmarks has there")
    parser.add_argument("--crop", action="store_true", help="take the central square, don't squash")
    parser.add_argument("--workers", type=int, default=cores(), help="processes, a core each")
    parser.add_argument("--shard", default="1/1", metavar="I/N",
                        help="make the I-th of N shares, on a machine each; all write into one OUT")
    parser.add_argument("--estimate", action="store_true", help="print what it will take, write nothing")
    parser.add_argument("--verify", action="store_true", help="check a finished OUT")
    parser.add_argument("--deep", action="store_true", help="with --verify: every byte and every frame")
    args = parser.parse_intermixed_args()              # so that OUT may stand alone, before or after flags
    args.share = parse_part(parser, args.shard)
    given = lambda key: getattr(args, key) != parser.get_default(key)
    for wrong, message in (
            (args.deep and not args.verify, "--deep goes with --verify"),
            (not args.verify and not (args.dataset or args.videos),
             f"{args.out} is one folder, two are needed: DATASET OUT, or --videos DIR OUT"),
            (args.dataset and args.videos, "give either DATASET or --videos"),
            (args.captions and not args.videos, "--captions goes with --videos"),
            (args.videos and not (args.captions or args.clip_list), "--videos goes with --captions"),
            (args.clip_list and any(map(given, ("captions", "clips", "seed", "exclude_splits"))),
             "--clip-list leaves nothing to choose: give no --captions, --clips, --seed, --exclude-splits"),
            (min(args.clips, args.workers) < 1, "--clips and --workers must be at least 1")):
        if wrong:
            parser.error(message)
    return args


def main():
    args = parse()
    try:
        if args.verify:
            problems = verify(args.out, args.deep)
            print("\n".join(problems or [*clips.summary(args.out), "nothing is wrong with it"]))
            sys.exit(bool(problems))
        check_folder(args.videos or args.dataset / args.folder)
        check_apart(args.out, args.videos or args.dataset)
        chosen, dropped = choose_clips(args)
        if args.estimate or not chosen:                # a packed set's report tells this at its end
            print_dropped(count_dropped(dropped)["dropped"])
        if not chosen:
            raise UserError("no clip is left to pack")
        estimate(args, chosen) if args.estimate else pack(args, chosen, dropped)
    except MemoryError:
        raise UserError("out of memory; with fewer --workers the same command goes on") from None
    except OSError as error:                           # OUT can't be written, the disk is full
        said = f"{error.filename or args.out}: {error.strerror}" if error.strerror else error
        raise UserError(f"{said}; mend that, and the same command goes on where it was") from None
    except KeyboardInterrupt:
        raise UserError("interrupted; the same command goes on where it was") from None


if __name__ == "__main__":
    run_script(main)
