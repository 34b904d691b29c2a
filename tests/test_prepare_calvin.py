"""prepare_calvin.py: CALVIN's files, zips, annotations that lie."""
import collections
import io
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch

import prepare_calvin
from nanogr import clips
from tests.helpers import (Bomb, CAMERAS, HEADER, ROOT, Reduced, annotate,
                           fails_in_one_line, make_calvin, refused, run)


RECONSTRUCT, SCALAR, FROM_BUFFER = (                    # numpy's constructors, wherever this numpy has them
    x.__reduce_ex__(5)[0] for x in (np.array(None), np.int64(1), np.zeros(1)))


def test_calvin_is_packed(tmp_path):
    """Catches segments without their last frame, splits mixed up, CALVIN's files of numpy 1 refused."""
    annotate(make_calvin(tmp_path / "raw/training", []), [(10, 14), (15, 19), (20, 40)], b"numpy.core")
    make_calvin(tmp_path / "raw/validation", [(np.int64(30), np.int64(33))])
    status, text = run("prepare_calvin.py", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and "3 lift" in text, text
    data, val = clips.open_data(tmp_path / "out")
    assert data.lengths.tolist() == [5, 5, 21] and val.lengths.tolist() == [4]
    assert data.episodes.tolist() == [0, 0, 1] and val.episodes.tolist() == [1]
    assert data.sentences == ["do 10", "do 15", "do 20"] and data.tasks == ["lift"] * 3
    assert data.fps == 30 and data.cameras == dict(rgb_static=(200, 200), rgb_gripper=(84, 84))
    clip, raw = data.read(2, 20), np.load(tmp_path / "raw/training/episode_0000040.npz")
    assert all(np.abs(clip["frames"][c].astype(int) - raw[c]).max() <= 2 for c in CAMERAS)
    assert all(np.allclose(clip[key], raw[key]) for key in ("rel_actions", "robot_obs"))


def test_calvin_bad_segments_are_counted(tmp_path):
    """Catches broken frames that end hours of packing, or go missing from the data without a word."""
    segments = [*((a, a + 1) for a in range(10, 20, 2)), (18, 21), (2, 5), (39, 41), (30, 29), (22, 24)]
    split = make_calvin(tmp_path / "raw/training", segments, recordings=((20, 40), (10, 19)))
    (split / "episode_0000011.npz").unlink()
    frame = dict(np.load(split / "episode_0000012.npz"))
    for i, change in ((12, dict(robot_obs=np.full(15, np.nan))), (18, dict(rel_actions=np.array([None] * 7))),
                      (14, dict(rgb_static=np.zeros((100, 100, 3), np.uint8)))):
        np.savez(split / f"episode_{i:07d}.npz", **frame | change)
    (split / "episode_0000016.npz").write_bytes(b"PK\3\4 not a zip")
    status, text = run("prepare_calvin.py", tmp_path / "raw", tmp_path / "out")
    for words in ("4 segments left out: outside", "1 segments left out: a frame is missing",
                  "a frame's rgb_static is uint8 (100, 100, 3), not uint8 (200, 200, 3)",
                  "2 segments left out: a frame can't be read",
                  "1 segments left out: a frame has a number that is not finite"):
        assert words in text, text
    assert status == 0 and clips.Clips(tmp_path / "out/training").sentences == ["do 22"]
    annotate(split, segments[:3])
    assert fails_in_one_line("prepare_calvin.py", tmp_path / "raw", tmp_path / "none", words=["no clip"])


def test_calvin_resumes(tmp_path, monkeypatch):
    """Catches a resumed run that packs a segment twice, skips one, or makes finished shards again."""
    monkeypatch.setattr(prepare_calvin, "SHARD", 2)
    make_calvin(tmp_path / "raw/training", [(a, a + 1) for a in range(20, 32, 2)])
    read = prepare_calvin.read_clip

    def pack(out, **changes):
        prepare_calvin.pack(mock.Mock(**dict(
            dataset=tmp_path / "raw", out=tmp_path / out, limit=None, actions="rel_actions", part=1, parts=1,
            shard="1/1", workers=1) | changes), "training")
        return tmp_path / out / "training"

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(prepare_calvin, "read_clip",
                      lambda source, split, segment, actions:
                      1 / 0 if segment.first == 26 else read(source, split, segment, actions))
        pack("resumed")
    resumed = tmp_path / "resumed/training"
    before = (resumed / "00000.bin").stat().st_mtime_ns
    assert [clips.shard_is_done(resumed, k) for k in range(3)] == [True, False, False]
    straight = pack("straight")
    assert pack("resumed") == resumed and (resumed / "00000.bin").stat().st_mtime_ns == before
    pack("parts", part=2, parts=2)
    assert not (tmp_path / "parts/training/meta.json").exists()
    for other in resumed, pack("parts", part=1, parts=2):
        for name in ("00000.bin", "00001.bin", "00002.bin"):
            assert (other / name).read_bytes() == (straight / name).read_bytes()
        assert clips.Clips(other).sentences == [f"do {a}" for a in range(20, 32, 2)]
    assert refused("limit None, now 3", pack, "resumed", limit=3)
    assert len(clips.Clips(pack("part", limit=3))) == 3


def test_calvin_from_the_zip(tmp_path):
    """Catches a zip that gives other clips than the folder, a --verify that is blind or imagines things."""
    split = make_calvin(tmp_path / "raw/training", [(10, 14), (20, 29)])
    (split / "episode_0000012.npz").unlink()
    archive = shutil.make_archive(tmp_path / "task_D_D", "zip", tmp_path, "raw")
    for source, out in ((tmp_path / "raw", tmp_path / "a"), (archive, tmp_path / "b")):
        status, text = run("prepare_calvin.py", source, out)
        assert status == 0 and "1 segments left out: a frame is missing" in text, text
        status, text = run("prepare_calvin.py", source, out, "--verify")
        assert status == 0 and "0 of 1 clips differ" in text, text
    packed = [(tmp_path / out / "training/00000.bin").read_bytes() for out in "ab"]
    assert packed[0] == packed[1]
    frame = dict(np.load(split / "episode_0000025.npz"))
    np.savez(split / "episode_0000025.npz", **frame | dict(robot_obs=frame["robot_obs"] + 1))
    status, text = run("prepare_calvin.py", tmp_path / "raw", tmp_path / "a", "--verify")
    assert status == 1 and "1 of 1 clips differ" in text, text
    status, text = run("prepare_calvin.py", split.parent, tmp_path / "c", "--actions", "executed_actions")
    assert status == 1 and "a frame has no executed_actions" in text, text
    (split / "episode_0000012.npz").write_bytes((split / "episode_0000013.npz").read_bytes())
    status, text = run("prepare_calvin.py", tmp_path / "raw", tmp_path / "a", "--verify")
    assert status == 1 and "1 clips, but 2 segments" in text, text
    pathlib.Path(archive).write_bytes(pathlib.Path(archive).read_bytes()[:5000])
    assert fails_in_one_line("prepare_calvin.py", archive, tmp_path / "d", words=["D_D.zip", "no whole zip"])
    assert not (tmp_path / "d").exists()


def test_calvin_damaged_zips(tmp_path, monkeypatch):
    """Catches a traceback for a flipped byte in a zip, a lost frame that ends the run, a date of month 0, a
    list of files that is read again for each shard."""
    make_calvin(tmp_path / "raw/training", [(10, 12), (20, 22)])
    whole = pathlib.Path(shutil.make_archive(tmp_path / "task_ABC_D", "zip", tmp_path, "raw"))

    def flipped(name, date=None):
        with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "bad_ABC.zip", "w") as bad:
            for info in archive.infolist():
                info.date_time = date or info.date_time
                bad.writestr(info, archive.read(info), zipfile.ZIP_STORED)
            place = bad.getinfo(f"raw/training/{name}").header_offset
        content = bytearray((tmp_path / "bad_ABC.zip").read_bytes())
        content[place + 120 + len(name)] ^= 1
        (tmp_path / "bad_ABC.zip").write_bytes(content)
        return tmp_path / "bad_ABC.zip"

    status, text = run("prepare_calvin.py", flipped("episode_0000011.npz", (1980, 0, 0, 0, 0, 0)),
                       tmp_path / "a")
    assert status == 0 and "1 segments left out: a frame can't be read" in text, text
    assert "WARNING" not in text
    for name in "ep_start_end_ids.npy", "lang_annotations/auto_lang_ann.npy":
        assert fails_in_one_line("prepare_calvin.py", flipped(name), tmp_path / "b", words=[name, "damaged"])
    monkeypatch.setattr(prepare_calvin, "SHARD", 1)
    opened = mock.Mock(wraps=zipfile.ZipFile)
    monkeypatch.setattr(zipfile, "ZipFile", opened)
    prepare_calvin.pack(mock.Mock(dataset=whole, out=tmp_path / "c", limit=None, actions="rel_actions",
                                  part=1, parts=1, shard="1/1", workers=1), "training")
    assert len(clips.Clips(tmp_path / "c/training")) == 2
    assert sum(call.args[0] == whole for call in opened.call_args_list) == 1


def test_malicious_annotation_is_refused(tmp_path):
    """Catches np.load(allow_pickle=True): an annotation file from the net would run any code."""
    split, bomb = make_calvin(tmp_path / "raw/training", []), tmp_path / "exploded"
    path = split / "lang_annotations/auto_lang_ann.npy"
    for protocol in range(5):
        path.write_bytes(HEADER + pickle.dumps(np.array(dict(language=Bomb(bomb)), object), protocol))
        assert np.load(path, allow_pickle=True).shape == () and bomb.is_dir()      # it is a working bomb
        bomb.rmdir()
        assert fails_in_one_line("prepare_calvin.py", split.parent, tmp_path, words=[str(path), "refused"])
        assert not bomb.exists()


def test_forged_arrays_are_refused(tmp_path):
    """Catches numpy's own constructors let loose on a file: what it says of a dtype makes bytes pointers."""
    split, four = make_calvin(tmp_path / "raw/training", []), b"\x41" * 32
    path = split / "lang_annotations/auto_lang_ann.npy"
    dtype = lambda spec, *state, flags=0: Reduced(np.dtype, (spec, False, True), (3, *state, flags))
    array = lambda *state: Reduced(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, *state))
    objects, numbers = (dtype(spec, "<", None, None, None, -1, -1) for spec in ("O8", "i8"))
    true = dtype("O8", "|", None, None, None, -1, -1, flags=63)      # honest; flags 0 says: holds no pointers
    fields = dtype("V8", "|", None, ("f",), dict(f=(np.dtype(object), 0)), 8, 1)
    letter = dtype("U1", "<", None, None, None, 4, 4)
    forged = dict(
        objects=array((4,), objects, False, four), fields=array((4,), fields, False, four),
        short_list=array((4096,), true, False, [0]), scalar=Reduced(SCALAR, (objects, four[:8])),
        short=array((5,), numbers, False, four), negative=array((-2, -2), numbers, False, four),
        deep=array((1,) * 4096, numbers, False, four[:8]),
        buffer=Reduced(FROM_BUFFER, (four, objects, (4,), "C")),
        rebuilt=Reduced(FROM_BUFFER, (four, numbers, (4,), "C"), (1, (4,), objects, False, four)),
        uninitialised=Reduced(np.ndarray, ((4,), "f8")), letter=Reduced(SCALAR, (letter, four[:4])))
    for name, ann in forged.items():
        content = np.array(dict(language=dict(ann=ann, task=[]), info=dict(indx=[])), object)
        (tmp_path / name).write_bytes(HEADER + pickle.dumps(content, 4))
    check = """if True:
        import pathlib, sys, prepare_calvin
        from nanogr import common
        for name in sys.argv[2:]:
            try:
                prepare_calvin.load_annotations(prepare_calvin.Folder(pathlib.Path(sys.argv[1])), name)
            except common.UserError as error:
                print(error)"""
    ended = subprocess.run([sys.executable, "-c", check, tmp_path, *forged], cwd=ROOT, capture_output=True,
                           text=True)                       # apart, for a failure would end pytest too
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0 and len(lines) == len(forged), (ended, lines)
    for name, line in zip(forged, lines):
        assert str(tmp_path / name) in line, line
        assert name in ("uninitialised", "letter") or "refused" in line, line
    path.write_bytes((tmp_path / "objects").read_bytes())
    assert fails_in_one_line("prepare_calvin.py", split.parent, tmp_path, words=[str(path), "refused"])


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_annotations_load_as_they_were(tmp_path, protocol):
    """Catches a way to write CALVIN's annotations, or an array in them, that is refused or read otherwise."""
    emb, pairs = np.random.default_rng(0).random((2, 1, 384), np.float32), [(3, 60), (64, 2**40)]
    for indx in (pairs, [np.array(x) for x in pairs], np.array(pairs), np.array(pairs, ">i8"),
                 [tuple(np.int64(x)) for x in pairs], np.asfortranarray(pairs), np.array(pairs, object)):
        for ann in ["lift it", "\u00e9\u20ac"], [np.str_("lift it"), np.str_("")], np.array(["lift", "it"]):
            language = dict(ann=ann, task=np.array(["a", "b"], object), emb=emb)
            content = HEADER + pickle.dumps(
                np.array(dict(language=language, info=dict(indx=indx, episodes=[])), object), protocol)
            (tmp_path / "ann.npy").write_bytes(content)
            source = prepare_calvin.Folder(tmp_path)
            sentences, tasks, found = prepare_calvin.load_annotations(source, "ann.npy")
            assert (sentences, tasks, found.tolist()) == (list(ann), ["a", "b"], [list(x) for x in pairs])
    for array in emb, emb[:0], emb.T, emb[::-1], np.array([True]), np.array([b"ab"]), np.array(7.0, ">f2"):
        loaded = prepare_calvin.SafeUnpickler(io.BytesIO(pickle.dumps(array, protocol))).load()
        assert loaded.dtype == array.dtype.newbyteorder("=") and np.array_equal(loaded, array)


def test_calvin_of_other_hands(tmp_path):
    """Catches a set that is packed in part without a word, or refused though all that is needed is there."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    training, validation = (make_calvin(raw / split, [(10, 12)]) for split in ("training", "validation"))
    (training / "lang_annotations").rename(training / "lang_clip_resnet50")
    shutil.rmtree(validation / "lang_annotations")
    language = collections.OrderedDict(ann=["do 10"], task=["lift"], emb=torch.zeros(1, 384))
    np.save(training / "lang_clip_resnet50/auto_lang_ann.npy", np.array(
        dict(language=language, info=dict(indx=[(10, 12)])), object))
    status, text = run("prepare_calvin.py", raw, out)
    assert status == 0 and "no validation/lang_annotations in it, so validation is left out" in text, text
    assert clips.Clips(out / "training").sentences == ["do 10"] and not (out / "validation").exists()
    fails = lambda *words: fails_in_one_line("prepare_calvin.py", raw, tmp_path / "none", words=words)
    frame = training / "episode_0000010.npz"
    np.savez(frame, **dict(np.load(frame), rgb_static=np.zeros((3, 224, 224))))
    assert fails("training: a frame's rgb_static is float64 (3, 224, 224), not uint8 (200, 200, 3)")
    assert not (tmp_path / "none").exists()
    for name, words in (("meta/info.json", "LeRobot"), ("x/a.txt", "no CALVIN"),
                        ("meta.json", "packed already")):
        path = tmp_path / name.replace("/", "-") / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        folder = tmp_path / name.replace("/", "-")
        assert fails_in_one_line("prepare_calvin.py", folder, tmp_path / "none", words=[words])


def test_calvin_zips_that_hold_more_than_they_show(tmp_path):
    """Catches a zip behind another, of which one is lost in silence, and one that unpacks into all memory."""
    parts = []
    for split in "training", "validation":
        make_calvin(tmp_path / split / "task_D_D" / split, [(10, 12)])
        parts.append(shutil.make_archive(tmp_path / split, "zip", tmp_path / split))
    both = tmp_path / "task_D_D.zip"
    both.write_bytes(b"".join(pathlib.Path(part).read_bytes() for part in parts))
    status, text = run("prepare_calvin.py", both, tmp_path / "out")
    assert status == 0 and "bytes stand before the archive" in text and "training is left out" in text, text
    frame = tmp_path / "training/task_D_D/training/episode_0000011.npz"
    np.savez_compressed(frame, **dict(np.load(frame), rgb_static=np.zeros((6000, 6000, 3), np.uint8)))
    status, text = run("prepare_calvin.py", frame.parents[1], tmp_path / "bomb")
    assert status == 1 and "1 segments left out: a frame can't be read" in text, text


def test_calvin_user_errors(tmp_path):
    """Catches tracebacks for a wrong path, an unfinished download, a data set without annotations."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    split = make_calvin(raw / "training", [(10, 12)])
    annotation, recordings = split / "lang_annotations/auto_lang_ann.npy", split / "ep_start_end_ids.npy"
    content = annotation.read_bytes()
    fails = lambda source, target, *words: fails_in_one_line("prepare_calvin.py", source, target, words=words)
    assert fails(tmp_path / "nowhere", out, "nowhere") and fails(annotation, out, annotation.name)
    for damaged in b"", content[:60], content[:-20], b"\x93NUMPY\3\0" + content[8:], b"<html>":
        annotation.write_bytes(damaged)
        assert fails(raw, out, annotation.name), damaged
    annotation.unlink()
    assert fails(raw, out, annotation.name, "missing")
    annotation.write_bytes(content)
    assert fails(raw, recordings, recordings.name)                             # OUT is a file
    recordings.unlink()
    assert fails(raw, out, recordings.name)
