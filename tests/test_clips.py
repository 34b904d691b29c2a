"""nanogr/clips.py: clips come back, damage is told, windows cover a clip evenly."""
import collections
import io
import shutil
import zipfile

import numpy as np
import pytest
import simplejpeg
import torch

import model as gr1
import train
from nanogr import clips, common
from tests.helpers import (
    CAMERAS,
    fails_in_one_line,
    make_clip,
    make_data_set,
    refused,
    run,
    same,
    small_model,
    write_shard,
)


def test_clips_come_back(tmp_path):
    """Catches cameras, steps, splits mixed up, reads beyond a clip's end, a robot taken for granted."""
    make_data_set(tmp_path / "training")
    make_data_set(tmp_path / "validation", lengths=[(4,)], actions=False)
    data, person = clips.open_data(tmp_path)
    assert data.lengths.tolist() == [12, 3, 7, 9, 20] and data.episodes.tolist() == [0, 0, 1, 1, 2]
    assert data.cameras == dict(rgb_static=(32, 32), rgb_gripper=(16, 24)) and data.has_actions
    assert data.sentences == [f"clip {i}" for i in range(5)] and data.tasks[4] == "task 2"
    assert data.meta["tasks"] == {"task 0": 2, "task 1": 2, "task 2": 1}
    for i, start, count, stop in (0, 0, None, 12), (0, 10, 5, 12), (3, 2, 4, 6), (4, 18, 8, 20):
        got, true = data.read(i, start, count), make_clip(i, data.lengths[i])
        for name in CAMERAS:
            wanted = true["frames"][name][start:stop]
            assert got["frames"][name].shape == wanted.shape and got["frames"][name].dtype == np.uint8
            assert np.abs(got["frames"][name].astype(int) - wanted).max() <= 2
        for key in ("robot_obs", "rel_actions"):
            assert np.array_equal(got[key], true[key][start:stop], equal_nan=True)
    assert list(data.read(0, 0, 1, cameras=["rgb_gripper"])["frames"]) == ["rgb_gripper"]
    assert not person.has_actions and person.read(0)["robot_obs"] is person.read(0)["rel_actions"] is None
    batch = clips.Windows(person, [0], 4, 5, 3, CAMERAS)[0]
    assert set(batch) == {"frames", "sentences", "mask", "future_mask", "video_at"}
    assert len(person) == 1 and clips.open_data(tmp_path / "training")[1] is None
    status, text = run("-m nanogr.clips", tmp_path)
    assert status == 0 and "5 clips, 51 frames" in text and "1 clips" in text


def test_data_sets_are_joined(tmp_path):
    """Catches a set that is lost, comes twice or does not fit the other; a join that a kill left halfway."""
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    make_data_set(one)
    make_data_set(two, lengths=[(4,), (6, 5)])
    for _ in range(2):                                   # the second finds one shard lacking
        status, text = run("-m nanogr.clips", one, two, "--join", out)
        assert status == 0 and "8 clips, 66 frames" in text and "every byte is as it was written" in text
        whole, parts = clips.Clips(out), [clips.Clips(one), clips.Clips(two)]
        assert whole.sentences == parts[0].sentences + parts[1].sentences
        assert same_frames(whole, 6, parts[1], 1) and same_frames(whole, 4, parts[0], 4)
        (out / "00003.npz").unlink()
    assert whole.episodes.tolist() == [0, 0, 1, 1, 2, 3, 3, 4] and list(whole.cameras) == CAMERAS
    assert refused("lies in, the data", clips.join, [two, one], one)
    assert refused("not joined", clips.join, [one], two)
    assert refused("twice", clips.join, [one, one], tmp_path / "mixed")
    turned = tmp_path / "turned"
    with clips.ShardWriter(turned, 0, CAMERAS[::-1]) as writer:
        writer.add(**make_clip(0, 4))
    clips.write_meta(turned, "test", 30, "")
    assert refused("cameras of", clips.join, [one, turned], tmp_path / "mixed")
    make_data_set(tmp_path / "video", lengths=[(4,)], actions=False)
    assert refused("has_actions", clips.join, [one, tmp_path / "video"], tmp_path / "mixed")
    assert refused("was begun with", clips.join, [two, one], out)


def same_frames(data, i, other, j):
    return all(np.array_equal(data.read(i)["frames"][c], other.read(j)["frames"][c]) for c in CAMERAS)


def test_wrong_clips_are_refused(tmp_path):
    """Catches float images, wrong lengths or sizes, half a set of actions, that only training finds."""
    good = make_clip(0, 4)
    frames = good["frames"]
    with clips.ShardWriter(tmp_path, 0, CAMERAS) as writer:
        writer.add(**good)
        for change in (dict(frames=dict(rgb_static=frames["rgb_static"])), make_clip(0, 0),
                       dict(frames={name: images / np.float32(255) for name, images in frames.items()}),
                       dict(frames=frames | dict(rgb_gripper=frames["rgb_gripper"][:3])),
                       dict(rel_actions=good["rel_actions"].astype(np.float64)), make_clip(0, 4, size=48),
                       dict(robot_obs=good["robot_obs"] * np.float32("nan")), dict(robot_obs=None),
                       dict(robot_obs=None, rel_actions=None), dict(sentence=None)):
            with pytest.raises(ValueError):
                writer.add(**good | change)
        writer.add(**good)
    clips.write_meta(tmp_path, "test", 30, "")
    assert len(clips.Clips(tmp_path)) == 2 and clips.check(tmp_path) == []      # of the refused ones no trace


def test_damage_is_one_clear_error(tmp_path):
    """Catches damage that passes for grey frames or ends in a traceback, and pickled arrays that run code."""
    pickled, arrays = io.BytesIO(), np.load(make_data_set(tmp_path / "jpeg") / "00000.npz")
    np.savez(pickled, **dict(arrays) | dict(tasks=arrays["tasks"].astype(object)))
    cut = lambda count: lambda content: content[:count]
    for n, (name, change, words) in enumerate((
            ("00001.bin", cut(-1), "00001.bin"), ("00000.npz", cut(500), "00000.npz"),
            ("00000.npz", cut(0), "00000.npz"), ("00000.npz", lambda _: pickled.getvalue(), "00000.npz"),
            ("00000.npz", lambda _: (tmp_path / "jpeg/00001.npz").read_bytes(), "00000"),
            ("00000.bin", None, "00000.bin"), ("00001.npz", None, "00001.npz"),
            ("meta.json", None, "interrupted"), ("meta.json", lambda _: b"{", "meta.json"),
            ("meta.json", lambda _: b'{"format_version": 0}', "version 0"))):
        file = make_data_set(tmp_path / str(n)) / name
        file.write_bytes(change(file.read_bytes())) if change else file.unlink()
        assert refused(words, clips.Clips, tmp_path / str(n))
        assert fails_in_one_line("-m nanogr.clips", tmp_path / str(n), words=["again"])
    (tmp_path / "empty").mkdir()
    assert refused("meta.json", clips.open_data, tmp_path / "empty")
    assert refused("no such directory", clips.open_data, tmp_path / "nowhere")
    data = clips.Clips(tmp_path / "jpeg")
    with open(tmp_path / "jpeg/00001.bin", "r+b") as file:
        file.seek(int(data.shards[1]["offsets"][2]))                 # shard 1, its clip 0 (3 of all), step 1
        file.write(b"\0\0\0\0")
    assert data.read(3, 0, 1) and data.read(2) and refused("shard 00001, clip 3", data.read, 3)
    assert fails_in_one_line("-m nanogr.clips", tmp_path / "jpeg", words=["00001.bin", "clip 0", "crc32"])


def test_files_that_lie_cost_no_memory(tmp_path):
    """Catches what a file claims and is believed: an array of 224 GiB, a picture of gigabytes, JSON nested
    too deep for the parser, counts and sizes that make no sense; each is to be one line.
    """
    make_data_set(tmp_path / "good")
    lie = np.lib.format.magic(1, 0) + b"\x76\0" + (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000, 15)}".ljust(117) + b"\n")
    for name, content in ("robot_obs.npy", lie), ("crc32.npy", b"\x93NUMPY\x09\x00"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        with zipfile.ZipFile(tmp_path / "good/00000.npz") as old, \
                zipfile.ZipFile(tmp_path / name / "00000.npz", "w") as new:
            for member in old.namelist():
                new.writestr(member, content if member == name else old.read(member))
        assert refused("can't be read", clips.Clips, tmp_path / name)
    meta = (tmp_path / "good/meta.json").read_text()
    for old, new, words in (("{", "[" * 200_000, "too deep"), ('"shards": 2', '"shards": -2', "damaged"),
                            ("16", "16000000", "damaged"), ('"has_actions"', '"actions"', "damaged")):
        assert old in meta
        (tmp_path / "good/meta.json").write_text(meta.replace(old, new, 1))
        assert refused(words, clips.Clips, tmp_path / "good")
    (tmp_path / "good/meta.json").write_text(meta)
    data = clips.Clips(tmp_path / "good")
    huge = bytearray(simplejpeg.encode_jpeg(np.zeros((16, 24, 3), np.uint8)))
    at = huge.index(b"\xff\xc0") + 5
    huge[at:at + 4] = b"\xff\xdc\xff\xdc"                # 65,500 x 65,500 px
    assert refused("another size", data.decode, [bytes(huge)], (16, 24), "a test")
    for copy in "00000 (1).npz", "._00000.npz":
        shutil.copy(tmp_path / "good/00000.npz", tmp_path / "good" / copy)
    clips.write_meta(tmp_path / "good", "test", 3, "test")         # strays beside the shards are no shards
    assert len(clips.Clips(tmp_path / "good")) == len(data)


def test_what_is_given_in_place_of_a_data_set(tmp_path):
    """Catches advice that leads in a circle where somebody gives raw data, videos or a checkpoint."""
    for name, words in (("training/episode_0000064.npz", "raw CALVIN.*prepare_calvin.py"),
                        ("meta/info.json", "LeRobot"), ("a.MP4", "prepare_ego4d.py OUT --videos"),
                        ("annotations/narration.json", "Ego4D"), ("model.safetensors", "checkpoint")):
        path = tmp_path / name.replace("/", "-") / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        assert refused(words, clips.open_data, tmp_path / name.replace("/", "-"))


def test_unfinished_shards_are_completed(tmp_path):
    """Catches half a shard under a final name after an error or a kill -9, and temporary files for ever."""
    with pytest.raises(ZeroDivisionError), clips.ShardWriter(tmp_path, 1, CAMERAS) as writer:
        writer.add(**make_clip(0, 4))
        1 / 0
    assert list(tmp_path.iterdir()) == [] and not clips.shard_is_done(tmp_path, 1)
    write_shard(tmp_path, 0, make_clip(0, 4))
    killed = clips.ShardWriter(tmp_path, 1, CAMERAS)                           # never closed
    killed.add(**make_clip(1, 4))
    killed.temp.rename(tmp_path / "00001.bin.1.tmp")                           # another process'
    assert [clips.shard_is_done(tmp_path, k) for k in (0, 1)] == [True, False]
    assert not (tmp_path / "00001.bin").exists() and refused("interrupted", clips.Clips, tmp_path)
    clips.write_meta(write_shard(tmp_path, 1, make_clip(1, 4)), "test", 30, "")
    assert clips.Clips(tmp_path).sentences == ["clip 0", "clip 1"] and not list(tmp_path.glob("*.tmp"))


def test_temp_names(tmp_path, monkeypatch):
    """Catches two machines whose processes have one number, and so write into one file; a file of another's
    that is swept away while it is written."""
    with clips.ShardWriter(tmp_path, 0, ["a"]) as one:
        monkeypatch.setattr(common.platform, "node", lambda: "another")
        with clips.ShardWriter(tmp_path, 0, ["a"]) as another:
            assert one.temp != another.temp and one.temp.exists() and another.temp.exists()
            for writer in one, another:
                writer.add(dict(a=np.zeros((1, 8, 8, 3), np.uint8)), "waits")
    stale, live = tmp_path / "00007.bin.x.1.tmp", tmp_path / "report.json.x.1.tmp"
    for path in stale, live:
        path.write_text("")
    clips.write_meta(tmp_path, "test", 3, "test")
    assert live.exists() and not stale.exists() and clips.check(tmp_path) == []


def test_mixtures_are_refused(tmp_path):
    """Catches a data set with a shard missing, of two kinds or recipes, and windows of what is not in it."""
    data = clips.Clips(make_data_set(tmp_path / "gap"))
    assert refused("rgb_static", clips.Windows, data, [0], 1, 5, 3, ["rgb_tactile"])
    assert refused("no clip", clips.Windows, data, [], 1, 5, 3, CAMERAS)
    (tmp_path / "gap/00000.npz").unlink()
    write_shard(make_data_set(tmp_path / "mixed"), 2, make_clip(0, 4, size=48))
    write_shard(tmp_path / "nothing", 0)
    for name, words in ("gap", "00000.npz is missing"), ("mixed", "differ"), ("nothing", "no clip"):
        assert refused(words, clips.write_meta, tmp_path / name, "test", 30, "")
    for _ in range(2):
        clips.claim(tmp_path, limit=10, source="x")
    assert refused("limit 10, now None", clips.claim, tmp_path, limit=None, source="x")


def window_frames(batch, T, F):
    """The static frames of each window and the F behind it, cut out of the runs that windows share."""
    frames, count = batch["frames"]["rgb_static"], len(batch["mask"])
    shared, span = count // len(frames), frames.shape[1] - F
    first = batch["frame_at"][:, 0] if "frame_at" in batch else torch.arange(count) * span
    starts = [(b // shared, int(first[b]) - b // shared * span) for b in range(count)]
    return torch.stack([frames[run, start:start + T + F] for run, start in starts])


@pytest.mark.parametrize("length", [2, 5, 6, 20])
@pytest.mark.parametrize("W", [1, 2])
def test_window_masks(tmp_path, length, W):
    """Catches masks off by one at either end, targets F +- 1 steps ahead, a neighbour's or NaN actions;
    windows that share frames but are given each other's.
    """
    T, F, chunk = 5, 3, 2
    data = clips.Clips(make_data_set(tmp_path, lengths=[(length,)]))
    windows, starts = clips.Windows(data, [0], 8, T, F, CAMERAS, chunk=chunk, per_clip=W), set()
    batches = [windows[step] for step in range(20)]
    assert batches[0]["frames"]["rgb_gripper"].shape == (8 // W, T + W - 1 + F, 3, 16, 24)
    assert batches[0]["action_mask"].shape == (8, T, chunk)
    assert batches[0]["rel_actions"].shape == (8, T, chunk, 7)
    for batch, b in ((batch, b) for batch in batches for b in range(8)):
        start = int(batch["robot_obs"][b, 0, 0])
        starts.add(start)
        assert batch["mask"][b].tolist() == [start + t < length for t in range(T)]
        assert batch["mask"][b].sum() == min(T, length)
        assert batch["future_mask"][b].tolist() == [start + t + F < length for t in range(T)]
        real = torch.arange(start, start + T + F) * (torch.arange(start, start + T + F) < length)
        static = window_frames(batch, T, F)[b]
        assert torch.equal(gr1.pick(batch["frames"]["rgb_static"][:, :-F], batch.get("frame_at"),
                                    torch.arange(T))[b], static[:T])
        assert (static.int() - 10 * real[:, None, None, None]).abs().max() <= 2
        assert torch.equal(batch["robot_obs"][b, :, 0], real[:T].float())
        for k in range(chunk):                                # the last step's action is unknown
            known = torch.arange(start + k, start + k + T) < length - 1
            assert torch.equal(batch["action_mask"][b, :, k], known)
            assert torch.equal(batch["rel_actions"][b, :, k, 0], -real[k:T + k].float() * known)
    assert starts == set(range(max(1, length - T + 1)))       # each place is seen, the last one too


def test_a_robot_filmed_at_every_fourth_step(tmp_path):
    """Catches actions of another step than a frame's, the next clip's, a model that looks between frames."""
    for index, steps in enumerate((22, 9)):
        clip, n = make_clip(index, steps), -(-steps // 4)
        last = np.full((4 * n - steps, 7), np.nan, np.float32)
        with clips.ShardWriter(tmp_path, index, CAMERAS, stride=4) as writer:
            writer.add(**clip | dict(
                frames={camera: x[::4] for camera, x in clip["frames"].items()},
                robot_obs=clip["robot_obs"][::4], rel_actions=np.concatenate([clip["rel_actions"], last])))
    clips.write_meta(tmp_path, "test", 7.5, "a command")
    data = clips.Clips(tmp_path)
    assert data.stride == 4 and data.lengths.tolist() == [6, 3] and not clips.check(tmp_path)
    assert data.read(0, 1, 2)["rel_actions"][:, 0].tolist() == [-4, -5, -6, -7, -8, -9, -10, -11]
    for stride, every in (4, 1), (8, 2):
        windows = clips.Windows(data, [0, 1], 8, 3, 1, CAMERAS, chunk=6, stride=stride)
        for batch in map(windows.__getitem__, range(20)):
            first, gray = batch["robot_obs"][:, :, 0], batch["frames"]["rgb_static"][:, :3, 0, 0, 0]
            assert (first[:, 1:] - first[:, :-1] == stride)[batch["mask"][:, 1:]].all()
            assert (gray - 10 * first)[batch["mask"]].abs().max() <= 2
            for k in range(6):
                known = batch["action_mask"][:, :, k]
                assert torch.equal(batch["rel_actions"][:, :, k, 0][known], -(first + k)[known])
    for stride in 2, 6:
        assert refused("train with --stride 4", clips.Windows, data, [0], 8, 3, 1, CAMERAS, stride=stride)
    for actions in 13, 12:                               # twice as many are no stride that was asked for
        with pytest.raises(ValueError, match="rel_actions must be"):
            write_shard(tmp_path / "broken", 0, make_clip(0, 6) | dict(
                rel_actions=np.zeros((actions, 7), np.float32)))
    write_shard(tmp_path, 1, make_clip(1, 3))            # a shard made anew, otherwise
    assert refused("shards and meta.json differ", clips.Clips, tmp_path)


def test_shared_frames_change_no_loss(tmp_path):
    """Catches a shortcut that is not exact, and one that encodes a frame as often as before."""
    data, model = clips.Clips(make_data_set(tmp_path)), small_model(cameras={"rgb_static": 32})
    config, losses, encoded = model.config, [], []
    batch = clips.Windows(data, range(5), 12, config.window, config.future, ["rgb_static"], per_clip=4)[0]
    apart = batch | dict(frames={"rgb_static": window_frames(batch, config.window, config.future)})
    del apart["frame_at"]
    model.vision.register_forward_hook(lambda vision, images, out: encoded.append(len(images[0])))
    for either in batch, apart:
        pixels = train.see(either, config)
        out = train.predict(model, config, either, pixels)
        losses.append(gr1.losses(out, either, pixels, config))
    assert all(same(losses[0][name], losses[1][name], 1e-6) for name in losses[1])
    assert encoded == [3 * (config.window + 3), 12 * config.window]


@pytest.mark.parametrize("W, length, share", [(1, 20, 0.8), (4, 20, 0.75), (10, 20, 0.75), (10, 8, 0.55)])
def test_ends_are_seen_as_often_as_the_middle(tmp_path, W, length, share):
    """Catches windows that see a clip's ends T times less often: the last steps are where tasks get done."""
    data = clips.Clips(make_data_set(tmp_path, lengths=[(length,)]))
    windows = clips.Windows(data, [0], 20 * W, 5, 0, CAMERAS[1:], per_clip=W)
    seen = np.zeros(length)
    for start in torch.cat([windows[step]["robot_obs"][:, 0, 0] for step in range(40)]).int().tolist():
        seen[start:start + 5] += 1
    assert seen.min() > 0.55 * seen.mean() and min(seen[0], seen[-1]) > share * seen.mean()


def test_batch_is_a_function_of_the_step(tmp_path):
    """Catches hidden random state: a resumed run, or one with more workers, would see other data."""
    data = clips.Clips(make_data_set(tmp_path))
    windows = lambda **which: clips.Windows(data, range(len(data)), 4, 5, 3, CAMERAS, reword=0.5, **which)
    content = lambda batch: [batch["sentences"], *(
        x.numpy().tobytes() for x in (*batch["frames"].values(), *batch.values()) if torch.is_tensor(x))]
    straight = [content(windows()[step]) for step in range(6)]
    assert content(windows()[4]) == straight[4]
    for workers in 0, 2:
        loader = torch.utils.data.DataLoader(windows(), None, sampler=range(3, 6), num_workers=workers)
        assert [content(batch) for batch in loader] == straight[3:]
    assert content(windows(seed=1)[4]) != straight[4] != straight[3]
    parts, whole = [windows()[4, part, 2] for part in (0, 1)], windows()[4]
    assert sum((part["sentences"] for part in parts), []) == whole["sentences"]
    for key in "rel_actions", "mask":
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    for c in CAMERAS:
        assert torch.equal(torch.cat([part["frames"][c] for part in parts]), whole["frames"][c])


def test_a_task_is_told_by_all_of_its_sentences(tmp_path):
    """Catches another task's sentence, a held-out clip's, clips without a task told anything but their own, a
    sentence that is never told, another share than asked for, held-out windows told others' too."""
    data = clips.Clips(make_data_set(tmp_path, lengths=[(9,) * 6]))
    data.tasks, learned = ["lift", "lift", "push", "lift", "", ""], [0, 1, 2, 4, 5]
    said = clips.sentences_of_tasks(data, range(4))
    assert said == dict(lift=["clip 0", "clip 1", "clip 3"], push=["clip 2"])
    told = collections.Counter()
    plain, reworded = (clips.Windows(data, learned, 100, 1, 0, CAMERAS[1:], reword=p) for p in (0, 0.5))
    for step in range(30):                               # of the same clips: what else is random comes first
        told.update(zip(plain[step]["sentences"], reworded[step]["sentences"]))
    lift = {f"clip {i}" for i in (0, 1)}
    assert set(told) == {(a, b) for a in lift for b in lift} | {(f"clip {i}",) * 2 for i in (2, 4, 5)}
    changed = sum(n for (own, other), n in told.items() if own != other)
    assert 0.2 < changed / sum(n for (own, _), n in told.items() if own in lift) < 0.3
    settings = train.TrainConfig(batch=8, shift=0, video_steps=0, video_every=1, reword=1)
    tiny = gr1.preset_config("tiny")
    drawn, judged = (make(data, np.arange(6), settings, tiny, *world)
                     for make, world in ((train.training_windows, ()),
                                         (train.held_out_windows, (train.Processes(),))))
    assert drawn.said and not judged.said
    data.tasks = [""] * 6
    assert refused("leave --reword out", train.training_windows, data, learned, settings, tiny)


def test_a_tenth_of_each_task(tmp_path):
    """Catches a small data set that leaves a task out, or that another run would not get again."""
    data = clips.Clips(make_data_set(tmp_path, lengths=[(3,) * 60]))
    data.tasks = ["lift"] * 38 + ["push"] * 20 + ["turn"] * 2
    counts = lambda *args: collections.Counter(data.tasks[i] for i in clips.share_of_tasks(data, *args))
    assert counts(range(60), 0.1) == dict(lift=2, push=2, turn=2)
    assert counts(range(60), 0.5) == dict(lift=10, push=10, turn=2)
    assert counts(range(38), 0.1) == dict(lift=4) and len(clips.share_of_tasks(data, range(9), 1)) == 9
    draw = lambda seed: clips.share_of_tasks(data, np.arange(60), 0.1, seed).tolist()
    assert draw(0) == draw(0) != draw(1)
    data.tasks = [f"task {i % 34}" for i in range(22_966)]                      # CALVIN ABCD's
    assert set(counts(range(22_966), 0.1).values()) == {66}


def test_split_is_by_episode(tmp_path):
    """Catches neighbours of training clips in the held-out set, which makes the validation loss a lie."""
    data = clips.Clips(make_data_set(tmp_path, lengths=[(3,) * 40]))
    train_ids, held_out = clips.split(data, 0.25)
    assert sorted([*train_ids, *held_out]) == list(range(40)) and len(held_out) == 10
    assert not set(data.episodes[train_ids]) & set(data.episodes[held_out])
    assert np.array_equal(clips.split(data, 0.25)[1], held_out)
    assert not np.array_equal(clips.split(data, 0.25, seed=1)[1], held_out)
    assert [len(clips.split(data, share)[1]) for share in (0, 0.001, 1.0)] == [0, 2, 38]        # never all
