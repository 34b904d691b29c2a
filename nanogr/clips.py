"""The packed clip format: writer, reader, random windows for training, checker.

A clip is a sentence, a run of camera frames and, if a robot made it, its states and actions. A data set is:

    DIR/meta.json    source, cameras with sizes, fps, counts, the command; written when all shards are done
        00000.bin    JPEGs back to back, the cameras interleaved per step, so that a window is one pread:
                     | static 0 | gripper 0 | static 1 | gripper 1 | ... | static 0 | gripper 0 | ...
                      '---------------- clip 0 -------------------'  '---- clip 1 ----------
        00000.npz    where all is in 00000.bin; renamed into place last: it is the shard's commit mark
        00000.codes.safetensors    the same pictures as GR-2's codes, if they were made, see `codes_path`
        00001.bin    and so on; recipe.json, if there, is what the shards were begun with (see `claim`)

One step of a clip, in CALVIN's names, sizes and units. A clip without a robot is frames and a sentence.

    key          dtype    shape      units and range
    rgb_static   uint8    (H, W, 3)  RGB 0..255; CALVIN: 200 x 200
    rgb_gripper  uint8    (H, W, 3)  RGB 0..255; CALVIN: 84 x 84
    sentence     str                 what is done in the clip; one for all its steps
    robot_obs    float32  (15,)      tcp x y z [m], tcp Euler x y z [rad], gripper width [m], 7 joints [rad],
                                     gripper action: -1 closed, +1 open
    rel_actions  float32  (7,)       dx dy dz [1/50 m], Euler x y z [1/20 rad], in -1..1; gripper -1 or +1;
                                     NaN: no action is known for this step (say, a clip's last)

A robot may be filmed at every S-th of its steps only. A clip then has S actions a frame, its `stride`.

A shard's npz, for N clips with M steps and C cameras:

    offsets    int64 (M*C + 1,)  byte where each JPEG begins     sentences, tasks   str (N,)
    bounds     int64 (N + 1,)    step where each clip begins     episodes           int64 (N,)
    cameras    str (C,)          names in the order of the bin   crc32              uint32 (N,) of the JPEGs
    sizes      int64 (C, 2)      height, width                   robot_obs          float32 (M, 15)
                                                                 rel_actions        float32 (M*S, 7)
    Without a robot the last two have 0 rows.

    python -m nanogr.clips DIR                   # print what a data set holds, check every byte of it
    python -m nanogr.clips A B --join OUT        # one data set of several, a copy
"""
import collections
import functools
import io
import json
import math
import os
import pathlib
import random
import shutil
import zipfile
import zlib

import numpy as np
import safetensors.numpy
import simplejpeg
import torch
from tqdm import tqdm

from nanogr.common import (Parser, UserError, check_apart, check_same, in_pool, read_json, run_script,
                           temp_path, write_whole)
from nanogr.pictures import write_sheet

FORMAT_VERSION = 1
COUNTED = ("shards", "clips", "frames", "bytes")
MOST = 8192                                            # px of a picture's side
# What people give in place of a data set, told by a file of it, and what to do with it.
PACK = "it is raw CALVIN: prepare_calvin.py DIR OUT packs it, --data takes OUT"
FILM = "it holds videos: prepare_ego4d.py OUT --videos DIR --captions FILE.csv packs them, --data takes OUT"
EGO4D = "it is Ego4D: prepare_ego4d.py DIR OUT packs it, --data takes OUT"
OTHERS = {"episode_*.npz": PACK, "ep_start_end_ids.npy": PACK, "training/ep_start_end_ids.npy": PACK,
          "validation/ep_start_end_ids.npy": PACK,
          "meta/info.json": "it has LeRobot's layout, which is not read; course/your_robot.py shows packing",
          "narration.json": EGO4D, "annotations/narration.json": EGO4D,
          "model.safetensors": "it is a checkpoint: --init or --checkpoint takes it",
          "meta.json": "it is packed already: train.py --data takes it",
          "training/meta.json": "it is packed already: train.py --data takes it",
          **dict.fromkeys(("*.mp4", "*.mov", "*.mkv", "*.avi", "*.webm", "*.MP4", "*.MOV"), FILM)}
OBS_DIM, ACTION_DIM = 15, 7
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
SHARDS = "[0-9]" * 5 + ".npz"                          # names of shards, as a glob: no stray copies
KEYS = "offsets bounds sentences tasks episodes crc32 cameras sizes robot_obs rel_actions".split()


# --------------------------------------------------------------------------------------------- writing
def shard_is_done(directory, index):
    """True if shard `index` was written to its end."""
    return (pathlib.Path(directory) / f"{index:05d}.npz").exists()


def check_clip(cameras, frames, sentence, robot_obs, rel_actions, stride):
    """Raise ValueError unless a clip's parts fit; return its kind: (sizes [H, W], has actions)."""
    if set(frames) != set(cameras) or not isinstance(sentence, str):
        raise ValueError(f"need frames of {cameras} and a str, not {list(frames)} and {sentence!r}")
    L = len(frames[cameras[0]])
    parts = [(name, images, "uint8", (L, *images.shape[1:3], 3)) for name, images in frames.items()]
    parts += [("robot_obs", robot_obs, "float32", (L, OBS_DIM)),
              ("rel_actions", rel_actions, "float32", (L * stride, ACTION_DIM))]
    for name, values, dtype, shape in parts:
        if values is not None and (values.dtype != dtype or values.shape != shape or not L):
            raise ValueError(f"{name} must be {dtype} {shape} with L > 0, not {values.dtype} {values.shape}")
    if (robot_obs is None) != (rel_actions is None):
        raise ValueError("robot_obs and rel_actions come together or not at all")
    if robot_obs is not None and not (np.isfinite(robot_obs).all() and not np.isinf(rel_actions).any()):
        raise ValueError("robot_obs must be finite; so must rel_actions, except for NaN where none is known")
    return [list(frames[name].shape[1:3]) for name in cameras], robot_obs is not None


class ShardWriter:
    """Writes one shard, in a `with` block: after an exception nothing stays under a final name.

    `cameras`: names, in the order in which a step stores them. `quality`, `subsampling` are the JPEGs': "444"
    keeps CALVIN's saturated blocks sharp, "420" is smaller and enough for video, which had it before.
    `stride`: the robot's steps, and so its actions, from one frame to the next.
    """

    def __init__(self, directory, index, cameras, quality=95, subsampling="444", stride=1):
        self.path, self.cameras = pathlib.Path(directory) / f"{index:05d}.npz", list(cameras)
        self.jpeg = dict(quality=quality, colorspace="RGB", colorsubsampling=subsampling)
        self.kind, self.offsets, self.bounds, self.clips, self.stride = None, [0], [0], [], stride
        self.rows = [np.zeros((0, OBS_DIM), np.float32)], [np.zeros((0, ACTION_DIM), np.float32)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temp = temp_path(self.path.with_suffix(".bin"))
        self.file = open(self.temp, "wb")

    def add(self, frames, sentence, task="", episode=0, robot_obs=None, rel_actions=None):
        """Append a clip of L steps; ValueError if a shape or dtype is wrong or not that of earlier clips.

        frames {camera: uint8 (L, H, W, 3)}; robot_obs float32 (L, 15), rel_actions float32 (L * S, 7), S =
        stride, or none; episode: the number of the recording, so that `split` never parts two clips of one.
        """
        kind = check_clip(self.cameras, frames, sentence, robot_obs, rel_actions, self.stride)
        if self.kind not in (None, kind):
            raise ValueError(f"a shard's clips agree in sizes and actions: {self.kind} before, now {kind}")
        crc = 0
        for step in zip(*(frames[name] for name in self.cameras)):
            for image in step:
                data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), **self.jpeg)
                self.file.write(data)
                self.offsets.append(self.offsets[-1] + len(data))
                crc = zlib.crc32(data, crc)
        self.kind = kind
        self.bounds.append(self.bounds[-1] + len(frames[self.cameras[0]]))
        self.clips.append((sentence, task, episode, crc))
        if kind[1]:
            for rows, new in zip(self.rows, (robot_obs, rel_actions)):
                rows.append(new)

    def close(self):
        """Put the shard in place: the bin, then the npz which says that the bin is whole."""
        if self.file.closed:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        sentences, tasks, episodes, crc32 = zip(*self.clips) if self.clips else [()] * 4
        robot_obs, rel_actions = map(np.concatenate, self.rows)
        index = io.BytesIO()
        np.savez(index, offsets=np.array(self.offsets, np.int64), bounds=np.array(self.bounds, np.int64),
                 sentences=np.array(sentences, str), tasks=np.array(tasks, str),
                 episodes=np.array(episodes, np.int64), crc32=np.array(crc32, np.uint32),
                 cameras=np.array(self.cameras, str),
                 sizes=np.array(self.kind[0] if self.kind else [], np.int64).reshape(-1, 2),
                 robot_obs=robot_obs, rel_actions=rel_actions)
        self.path.unlink(missing_ok=True)              # a shard made anew: no old npz beside the new bin
        os.replace(self.temp, self.path.with_suffix(".bin"))
        write_whole(self.path, index.getvalue())

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            if error is None:
                self.close()
        finally:
            self.file.close()
            self.temp.unlink(missing_ok=True)


def claim(directory, **recipe):
    """Note in recipe.json what the shards are made from; UserError if an earlier run noted something else.

    Without it a run with other options would resume on the first one's shards, and mix the two in silence.
    """
    path = pathlib.Path(directory) / "recipe.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_whole(path, json.dumps(recipe, indent=1).encode())
    before = read_json(path, "delete it and begin again")
    check_same(before, recipe, directory, ": delete it or choose another")


def make_shards(make, jobs, directory, workers, **bar):
    """Call make(job), which returns how many clips that settles, for each of `jobs`, (shard, clips, job),
    whose shard is not in `directory` yet: on `workers` processes, with a progress bar over all clips.
    """
    todo = [(count, job) for shard, count, job in jobs if not shard_is_done(directory, shard)]
    total, left = sum(count for _, count, _ in jobs), sum(count for count, _ in todo)
    # Clips count when their shard is done, and the rate is the whole run's mean: the time left is no guess.
    with tqdm(total=total, initial=total - left, smoothing=0, **bar) as bar:
        for count in in_pool(make, [job for _, job in todo], min(workers, max(1, len(todo)))):
            bar.update(count)


def write_meta(directory, source, fps, command, **extra):
    """Count what the shards hold and write meta.json, which makes them a data set; call it when all are done.

    UserError if a shard is missing or broken, if they differ in cameras or in having actions, or are empty.
    """
    directory = pathlib.Path(directory)
    last = max((int(path.stem) for path in directory.glob(SHARDS)), default=-1)
    shards = [load_shard(directory, index) for index in range(last + 1)]
    full = [shard for shard in shards if len(shard["episodes"])]
    kinds = [([*zip(shard["cameras"].tolist(), shard["sizes"].tolist())], actions_a_frame(shard))
             for shard in full]                          # a list: the order of the cameras is that of the bin
    if not full:
        raise UserError(f"{directory}: no clip was written; mend the cause, delete it and run again")
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(f"{directory}: shards differ in cameras or actions; delete it and make it again")
    counts = dict(shards=len(shards), clips=sum(len(shard["episodes"]) for shard in full),
                  frames=sum(int(shard["bounds"][-1]) for shard in full),
                  bytes=sum(int(shard["offsets"][-1]) for shard in full))
    tasks = collections.Counter(task for shard in full for task in shard["tasks"].tolist() if task)
    meta = dict(format_version=FORMAT_VERSION, source=source, cameras=dict(kinds[0][0]), fps=fps,
                counts=counts, has_actions=kinds[0][1] > 0, stride=max(1, kinds[0][1]),
                tasks=dict(sorted(tasks.items())), command=command, **extra)
    write_whole(directory / "meta.json", json.dumps(meta, indent=1).encode())
    for stale in directory.glob("[0-9]*.*.tmp"):       # of killed writers: all shards are done by now
        stale.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------- reading
def read_arrays(path):
    """{key: array} of a shard's npz. ValueError if a member claims to hold more than the file has: what it
    claims is checked before any memory is asked for.
    """
    with zipfile.ZipFile(path) as archive:
        members = {key: archive.getinfo(f"{key}.npy") for key in KEYS}
        if any(x.compress_type != zipfile.ZIP_STORED for x in members.values()) \
                or sum(x.file_size for x in members.values()) > path.stat().st_size:
            raise ValueError("it claims to hold more than it has")
        arrays = {}
        for key, member in members.items():
            file = io.BytesIO(archive.read(member))
            read_header = HEADERS[np.lib.format.read_magic(file)]
            shape, _, dtype = read_header(file)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                raise ValueError(f"{key} is not what it claims to be, {dtype} {shape}")
            file.seek(0)
            arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def actions_a_frame(shard):
    """Of a shard's arrays; 0: no robot made it."""
    return len(shard["rel_actions"]) // max(1, len(shard["robot_obs"]))


def load_shard(directory, index):
    """Return the arrays of one npz; UserError unless they fit each other and the size of the bin."""
    npz, again = pathlib.Path(directory) / f"{index:05d}.npz", f"run the command that made {directory} again"
    try:
        shard = read_arrays(npz)
        size = npz.with_suffix(".bin").stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; delete {npz.name}, if there, and {again}") from None
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile,
            zlib.error) as error:
        raise UserError(f"{npz} can't be read ({error}); delete it and {again}") from None
    offsets, bounds = shard["offsets"], shard["bounds"]
    fits = (all(shard[key].ndim == 1 for key in KEYS[:7]) and len(bounds) and len(offsets)
            and shard["robot_obs"].shape[1:] == (OBS_DIM,) and shard["rel_actions"].shape[1:] == (ACTION_DIM,)
            and all(len(shard[key]) == len(bounds) - 1 for key in ("sentences", "tasks", "episodes", "crc32"))
            and len(offsets) == bounds[-1] * len(shard["cameras"]) + 1 and offsets[0] == bounds[0] == 0
            and (np.diff(offsets) > 0).all() and (np.diff(bounds) > 0).all()
            and len(shard["robot_obs"]) in (0, bounds[-1])
            and len(shard["rel_actions"]) == len(shard["robot_obs"]) * actions_a_frame(shard)
            and (actions_a_frame(shard) > 0) == (len(shard["robot_obs"]) > 0))
    if not fits or size != offsets[-1]:
        said = offsets[-1] if offsets.size else "nothing"
        raise UserError(f"{npz.with_suffix('.bin')} has {size} bytes, but {npz.name} says {said}: one is cut "
                        f"off or changed; delete {npz.name} and {again}")
    return shard


# --------------------------------------------------------------------------------------- pictures as codes
def codes_path(directory, index):
    """Where the codes of a shard's pictures are: GR-2's, nanogr/tokenizer.py makes them. A uint16 array
    (M, P) for each camera, P codes of each of the shard's M frames, and `of`, what they are of: the
    tokenizer's fingerprint and the pictures' checksum.
    """
    return pathlib.Path(directory) / f"{index:05d}.codes.safetensors"


def pictures_of(clips, index):
    """Checksum of a shard's pictures."""
    return str(zlib.crc32(clips.shards[index]["crc32"].tobytes()))


def write_codes(clips, index, fingerprint, codes):
    """Write {camera: uint16 (M, P)} beside a shard of Clips."""
    made_of = f"{fingerprint} {pictures_of(clips, index)}"               # one entry, for two have no order
    content = safetensors.numpy.save(codes, {"of": made_of})
    write_whole(codes_path(clips.directory, index), content)


def read_codes(clips, index, fingerprint):
    """Return {camera: uint16 (M, P)} of a shard of Clips; UserError if they are not there, or of another
    tokenizer or other pictures.
    """
    path = codes_path(clips.directory, index)
    cure = f"`python -m nanogr.tokenizer --encode {clips.directory} --tokenizer ...` makes them"
    if not path.is_file():
        raise UserError(f"{clips.directory} has no codes for shard {index}: {cure}")
    try:
        with safetensors.safe_open(path, "np") as file:
            made, _, pictures = (file.metadata() or {}).get("of", "").partition(" ")
            codes = {key: file.get_tensor(key) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} can't be read ({error}): {cure} anew") from None
    if made != fingerprint:
        raise UserError(f"{path} holds codes of tokenizer {made}, not {fingerprint}: {cure} anew")
    if pictures != pictures_of(clips, index):
        raise UserError(f"{path} holds codes of other pictures than the shard's: {cure} anew")
    return codes


def has_codes(clips, index, fingerprint, places):
    """Whether a shard has codes of this tokenizer, {camera: P} of each frame."""
    try:
        codes = read_codes(clips, index, fingerprint)
    except UserError:
        return False
    return all(camera in codes and codes[camera].shape[1] == count for camera, count in places.items())


def looks_like(directory):
    """What else a directory is that somebody gave, and what to do with it: a few words, or None."""
    return next((words for glob, words in OTHERS.items() if any(pathlib.Path(directory).glob(glob))), None)


def load_meta(directory):
    """Return what DIR/meta.json holds; UserError, with what to do, if it is not there or not ours."""
    path = pathlib.Path(directory) / "meta.json"
    makers = "nanogr.worlds.tabletop and the prepare_*.py make one"
    if not path.parent.is_dir():
        raise UserError(f"{directory}: no such directory; it should be a data set: {makers}")
    if not path.exists() and any(path.parent.glob(SHARDS)):
        raise UserError(f"{directory}: its making was interrupted; run the same command again")
    if not path.exists():
        raise UserError(f"{directory} has no meta.json, so it is no data set; "
                        f"{looks_like(directory) or makers}")
    meta = read_json(path, "run the command that made it again")
    meta.setdefault("stride", 1)                         # of before a robot could be filmed now and then
    version, sides = meta.get("format_version"), meta.get("cameras")
    if version != FORMAT_VERSION:
        raise UserError(f"{directory} has format version {version}, not {FORMAT_VERSION}: make it again")
    whole = isinstance(sides, dict) and sides and all(
        isinstance(size, list) and len(size) == 2 and all(type(x) is int and 0 < x <= MOST for x in size)
        for size in sides.values()) and isinstance(meta.get("counts"), dict) and all(
        type(meta["counts"].get(key)) is int and meta["counts"][key] >= 0 for key in COUNTED)
    if not whole or not {"has_actions", "fps", "source", "tasks"} <= set(meta):
        raise UserError(f"{path} is damaged (a key is missing or makes no sense): run the command that made "
                        "it again")
    return meta


class Clips:
    """A data set, opened for reading; UserError if it is not whole.

    `meta`, `cameras` {name: (H, W)}, `has_actions`, `fps`, `stride` (S, the robot's steps from one frame to
    the next); per clip: `sentences`, `tasks` (lists), `episodes`, `lengths` [frames] (int64). No file stays
    open, so it can be forked or pickled to any worker.
    """

    def __init__(self, directory):
        self.directory, self.meta = pathlib.Path(directory), load_meta(directory)
        self.has_actions, self.fps = self.meta["has_actions"], self.meta["fps"]
        self.cameras = {name: tuple(size) for name, size in self.meta["cameras"].items()}
        self.shards = [load_shard(directory, index) for index in range(self.meta["counts"]["shards"])]
        self.stride = self.meta["stride"]
        self.sentences = [text for shard in self.shards for text in shard.pop("sentences").tolist()]
        self.tasks = [text for shard in self.shards for text in shard.pop("tasks").tolist()]
        self.episodes = np.concatenate([shard["episodes"] for shard in self.shards])
        self.lengths = np.concatenate([np.diff(shard["bounds"]) for shard in self.shards])
        self.first = np.cumsum([0] + [len(shard["episodes"]) for shard in self.shards])   # clip of each shard
        if len(self) != self.meta["counts"]["clips"] or any(
                actions_a_frame(shard) != self.stride * self.has_actions
                for shard in self.shards if len(shard["episodes"])):
            raise UserError(f"{directory}: shards and meta.json differ; run the command that made it again")

    def __len__(self):
        return len(self.lengths)

    def find(self, i):
        """Return the number of the shard that holds clip i, and the first and last + 1 of its steps there."""
        if not 0 <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        number = int(np.searchsorted(self.first, i, side="right")) - 1
        return number, *self.shards[number]["bounds"][i - self.first[number]:][:2].tolist()

    def frames_a_timestep(self, stride):
        """Of a model that looks at every `stride`-th step; UserError if frames lie too far apart for it."""
        if stride % self.stride:
            raise UserError(f"{self.directory} has a frame every {self.stride} steps, no use to a model that "
                            f"looks every {stride}: train with --stride {self.stride}, or a multiple")
        return stride // self.stride

    def rows(self, i):
        """Return all of clip i's robot_obs float32 (L, 15) and rel_actions float32 (L * S, 7)."""
        number, begin, end = self.find(i)
        shard, S = self.shards[number], self.stride
        return shard["robot_obs"][begin:end], shard["rel_actions"][S * begin:S * end]

    def read(self, i, start=0, count=None, cameras=None):
        """Read `count` frames of clip i from `start` on (fewer where it ends; None: all that follow).

        -> dict(frames={camera: uint8 (n, H, W, 3)}, robot_obs (n, 15), rel_actions (n * S, 7); the last two
        None without a robot). `cameras`: decode these alone. UserError if a JPEG is broken.
        """
        frames = self.pictures(i, start, count, cameras)
        if not self.has_actions:
            return dict(frames=frames, robot_obs=None, rel_actions=None)
        robot_obs, rel_actions = self.rows(i)
        stop = len(robot_obs) if count is None else start + count
        return dict(frames=frames, robot_obs=robot_obs[start:stop],
                    rel_actions=rel_actions[self.stride * start:self.stride * stop])

    def pictures(self, i, start=0, count=None, cameras=None, every=1):
        """The frames of `read`, {camera: uint8 (n, H, W, 3)}, or `count` that lie `every` frames apart."""
        number, begin, end = self.find(i)
        stop = end - begin if count is None else min(start + (count - 1) * every + 1, end - begin)
        if not 0 <= start < stop:
            raise IndexError(f"frames {start} to {stop} of clip {i}, which has {end - begin}")
        C = len(self.cameras)
        offsets = self.shards[number]["offsets"][(begin + start) * C:(begin + stop) * C + 1]
        # Opened anew each time: microseconds beside the milliseconds of decoding, and no limit on open files.
        with open(self.directory / f"{number:05d}.bin", "rb", buffering=0) as file:
            file.seek(offsets[0])
            data = memoryview(file.read(offsets[-1] - offsets[0]))
        offsets = (offsets - offsets[0]).tolist()
        frames = {}
        for c, (name, size) in enumerate(self.cameras.items()):
            if cameras is None or name in cameras:
                jpegs = [data[offsets[k]:offsets[k + 1]] for k in range(c, len(offsets) - 1, C * every)]
                frames[name] = self.decode(jpegs, size, f"shard {number:05d}, clip {i}, camera {name}")
        return frames

    def single(self, camera, ids, steps):
        """One frame of each of the clips `ids`, at `steps` (both int64 (N,)): uint8 (N, H, W, 3)."""
        return np.concatenate([self.pictures(i, step, 1, [camera])[camera]
                               for i, step in zip(ids.tolist(), steps.tolist())])

    def decode(self, jpegs, size, where):
        """Decode n JPEGs to uint8 (n, H, W, 3)."""
        frames = np.empty((len(jpegs), *size, 3), np.uint8)
        try:
            for image, jpeg in zip(frames, jpegs):
                if simplejpeg.decode_jpeg_header(jpeg)[:2] != size:          # before memory is asked for
                    raise ValueError("it has another size")
                image[:] = simplejpeg.decode_jpeg(jpeg, "RGB")
        except ValueError as error:                    # simplejpeg's, or the wrong size
            raise UserError(f"{self.directory}: a JPEG is broken in {where} ({error}); "
                            f"`python -m nanogr.clips {self.directory}` lists all damage") from None
        return frames


def split(clips, fraction, seed=0):
    """Hold out a share of the episodes: -> (train ids, held-out ids), int64.

    The episodes are shuffled by `seed`. With fraction > 0 at least one of two is held out, but never all.
    """
    episodes = np.random.default_rng(seed).permutation(np.unique(clips.episodes))
    count = min(max(round(fraction * len(episodes)), fraction > 0), len(episodes) - 1)
    held_out = np.isin(clips.episodes, episodes[:count])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def share_of_tasks(clips, ids, fraction, seed=0):
    """A data set made smaller, as in the paper's 10% setting: -> ids of the same number of each task's clips.

    Drawn by `seed`: of each task `fraction` of what a task has on average, or all where it has fewer. CALVIN
    ABCD has 675 segments a task, of which the paper's 10% are 66: the average counts as 660 at most.
    """
    if fraction == 1:
        return ids
    ids = np.random.default_rng(seed).permutation(ids)
    tasks = np.array(clips.tasks)[ids]
    names = np.unique(tasks)
    average = min(len(ids) / len(names), 660 if any(names) else np.inf)       # video has no tasks: one, ""
    chosen = [ids[tasks == name][:max(1, round(fraction * average))] for name in names]
    return np.sort(np.concatenate(chosen))


def open_data(path):
    """Open PATH, a data set or a folder with training/ and maybe validation/: -> (train, val or None)."""
    path = pathlib.Path(path)
    if (path / "meta.json").exists() or not (path / "training").is_dir():
        return Clips(path), None
    return Clips(path / "training"), Clips(path / "validation") if (path / "validation").is_dir() else None


class Windows(torch.utils.data.Dataset):
    """Batches of random windows: windows[step] is a function of (seed, step) alone, so that a resumed run
    sees the data of a straight one. windows[step, part, parts] is the part-th of so many equal parts of it:
    processes that share a batch see together what one alone would see.
    For DataLoader(windows, batch_size=None, sampler=range(first, last)), or an iterator of such triples.

    B windows of T steps, each from a clip drawn uniformly from `ids`, short or long. Its start is uniform in
    [-(T-1), L-1], then clipped to [0, L-T]: thus a clip's ends are seen about as often as its middle (T times
    less without the overhang). Only a clip shorter than T is padded: with zeros, after its real steps.
    F more frames are read where targets are asked for: frames[:, t + F] is what step t predicts. With
    `stride` > 1 a step is so many steps of the robot after the one before, and so are the F; of frames that
    lie S of these apart T above is (T-1) stride / S + 1. Actions are those of all steps of the robot.

    With per_clip W > 1, W windows that start one step after the other are cut from each clip and share its
    frames, a run of N = T+W-1 steps that is stored once. The starts are drawn and clipped as above, so that
    some of the W are the same window near a clip's ends: else the ends would be seen far less.

    All that is random about a step, but for dropout and noise on keypoints, is drawn here: with `shift`, by
    how much DrQ-v2's augmentation moves each run of each camera (0.05: up to 10 px of 200), with `foresee` V
    > 0 at which V of a window's T steps the future frame is asked for, with `latent` z > 0 what a VAE's
    latents are drawn by, with `blind` in which share of the windows the states are hidden, and with
    `reword` in which share of the windows the sentence is any that a clip of `ids` of their task has.

        frames       {camera: uint8 (B/W, N+F, 3, H, W)}; N alone where no future frame is asked for
        codes        {camera: int32 (B/W, N+F, P)}   instead of frames, if `fingerprint` names a tokenizer
        shifts       {camera: int64 (B/W, 2)}     up and to the left [px]; only if shift > 0
        video_at     int64 (V,)                   all T steps, or `foresee` of them; none where foresee_every
                                                  is 0 or does not divide the number of the batch
        frame_at     int64 (B, T)                 a window's frames among all (B/W * N); only if W > 1
        sentences    [str] * B
        mask         bool (B, T)                  real steps
        future_mask  bool (B, T)                  the clip has a frame t + F
      and, if a robot made the clips,
        robot_obs    float32 (B, T, 15)           NaN: hidden
        noise        float32 (B, T, z)            from N(0, 1); only if z > 0
        rel_actions  float32 (B, T, chunk, 7)     the robot's actions from step t on
        action_mask  bool (B, T, chunk)           those that are known; the others are 0
    """

    def __init__(self, clips, ids, batch_size, window, future, cameras, chunk=1, seed=0, per_clip=1,
                 shift=0.0, foresee=0, stride=1, latent=0, blind=0.0, fingerprint="",
                 foresee_every=1, reword=0.0):
        if not set(cameras) <= set(clips.cameras):
            raise UserError(f"{clips.directory} has the cameras {list(clips.cameras)}, not {list(cameras)}")
        if not len(ids):
            raise UserError(f"{clips.directory}: no clip to draw windows from")
        self.clips, self.ids, self.cameras = clips, np.asarray(ids), list(cameras)
        self.B, self.T, self.F, self.chunk = batch_size, window, future, chunk
        self.seed, self.W, self.shift = seed, per_clip, shift
        self.foresee, self.foresee_every, self.reword = foresee, foresee_every, reword
        self.said = sentences_of_tasks(clips, ids) if reword else {}
        if reword and not self.said:
            raise UserError(f"{clips.directory} does not name its clips' tasks: leave --reword out")
        self.every, self.latent, self.blind = clips.frames_a_timestep(stride), latent, blind
        self.codes = [read_codes(clips, i, fingerprint) for i in range(len(clips.shards)) if fingerprint]

    def __len__(self):
        return 2 ** 31 - 1                             # endless, in effect: a run sets its own last step

    def __getitem__(self, key):
        step, part, parts = key if isinstance(key, tuple) else (key, 0, 1)
        rng, every, N = np.random.default_rng([self.seed, step]), self.every, self.T + self.W - 1
        ids, window = rng.choice(self.ids, self.B // self.W), (self.T - 1) * every + 1            # in frames
        lengths = self.clips.lengths[ids]
        at = rng.integers(1 - window, lengths) - self.W // 2 * every     # where the first of W would start
        order = rng.permutation(self.T)
        video_at = order[:self.foresee] if self.foresee else np.arange(self.T)
        asks = self.foresee_every and step % self.foresee_every == 0
        video_at = video_at if asks else video_at[:0]
        reach = {c: round(self.shift * self.clips.cameras[c][0]) for c in self.cameras}
        shifts = {c: rng.integers(-far, far + 1, (len(ids), 2)) for c, far in reach.items()}
        ids, lengths, at, *shifts = (np.split(x, parts)[part] for x in (ids, lengths, at, *shifts.values()))
        runs = np.clip(at, 0, np.maximum(0, lengths - window - (self.W - 1) * every))
        last = (np.maximum(0, lengths - window) - runs) // every         # how far the last of W may start
        nth = np.clip((at - runs)[:, None] // every + np.arange(self.W), 0, last[:, None])        # (B/W, W)
        steps = (runs[:, None] + nth * every).reshape(-1, 1) + np.arange(self.T) * every         # (B, T)
        frame_at = (nth + N * np.arange(len(runs))[:, None]).reshape(-1, 1) + np.arange(self.T)
        count = N + self.F * bool(len(video_at))
        seen = (self.frames_as_codes if self.codes else self.frames)(ids, runs, count)
        ids, lengths = ids.repeat(self.W), lengths.repeat(self.W)
        batch = dict(mask=steps < lengths[:, None], video_at=video_at,
                     future_mask=steps + self.F * every < lengths[:, None])
        batch |= {"frame_at": frame_at} if self.W > 1 else {}
        if self.clips.has_actions:
            batch |= self.robot(ids, steps)
            if self.latent:                              # of the whole batch, whoever computes which part
                noise = rng.standard_normal((self.B, self.T, self.latent), np.float32)
                batch["noise"] = np.split(noise, parts)[part]
            if self.blind:
                batch["robot_obs"][np.split(rng.random(self.B) < self.blind, parts)[part]] = np.nan
        batch = {key: torch.from_numpy(value) for key, value in batch.items()}
        if self.shift:
            batch["shifts"] = dict(zip(self.cameras, map(torch.from_numpy, shifts)))
        sentences = [self.clips.sentences[i] for i in ids]
        if self.reword:
            draws = np.split(rng.random((self.B, 2)), parts)[part]                       # as noise, see above
            for b, (whether, which) in enumerate(draws):
                said = self.said.get(self.clips.tasks[ids[b]])
                if said and whether < self.reword:
                    sentences[b] = said[int(which * len(said))]
        return batch | {"codes" if self.codes else "frames": seen, "sentences": sentences}

    def frames(self, ids, starts, count):
        """Return {camera: uint8 (B/W, count, 3, H, W)}, as views of (..., H, W, 3): turning the bytes round
        is the device's work. numpy fills them: torch's threads cost more here.
        """
        frames = {name: np.zeros((len(ids), count, *self.clips.cameras[name], 3), np.uint8)
                  for name in self.cameras}
        for b, (i, start) in enumerate(zip(ids.tolist(), starts.tolist())):
            for name, images in self.clips.pictures(i, start, count, self.cameras, self.every).items():
                frames[name][b, :len(images)] = images
        return {name: torch.from_numpy(images).permute(0, 1, 4, 2, 3) for name, images in frames.items()}

    def frames_as_codes(self, ids, starts, count):
        """Return {camera: int32 (B/W, count, P)}."""
        codes = {name: np.zeros((len(ids), count, self.codes[0][name].shape[1]), np.int32)
                 for name in self.cameras}
        for b, (i, start) in enumerate(zip(ids.tolist(), starts.tolist())):
            number, begin, end = self.clips.find(i)
            for name in self.cameras:
                rows = self.codes[number][name][begin + start:end:self.every][:count]
                codes[name][b, :len(rows)] = rows
        return {name: torch.from_numpy(rows) for name, rows in codes.items()}

    def robot(self, ids, steps):
        """Return robot_obs, rel_actions and action_mask of the clips `ids` (B,) at `steps` (B, T)."""
        ahead = steps[:, :, None] * self.clips.stride + np.arange(self.chunk)               # (B, T, chunk)
        robot_obs = np.zeros((*steps.shape, OBS_DIM), np.float32)
        rel_actions = np.full((*ahead.shape, ACTION_DIM), np.nan, np.float32)
        for b, i in enumerate(ids):
            for out, rows, t in zip((robot_obs[b], rel_actions[b]), self.clips.rows(i), (steps[b], ahead[b])):
                out[t < len(rows)] = rows[t[t < len(rows)]]
        known = ~np.isnan(rel_actions).any(-1)
        return dict(robot_obs=robot_obs, action_mask=known,
                    rel_actions=np.where(known[..., None], rel_actions, np.float32(0)))


def sentences_of_tasks(clips, ids):
    """{task: all the sentences that the clips `ids` have for it, sorted}; clips without a task are left out.
    They mean the same, so each clip may be told any of them: a policy that learns by one sentence a clip
    obeys some of a task's sentences and not others."""
    said = {}
    for i in ids:
        if clips.tasks[i]:
            said.setdefault(clips.tasks[i], set()).add(clips.sentences[i])
    return {task: sorted(some) for task, some in said.items()}


def contact_sheet(clips, path, count=8, steps=10):
    """Write a PNG: `count` clips drawn from all, a row each: the sentence above the first camera's frames."""
    some = sorted(random.Random(0).sample(range(len(clips)), min(count, len(clips))))
    camera = list(clips.cameras)[0]
    shown = [clips.read(i, 0, steps, [camera])["frames"][camera] for i in some]
    write_sheet(path, [(clips.sentences[i], frames) for i, frames in zip(some, shown)], side=112)


# -------------------------------------------------------------------------------------------- checking
def check_shard(directory, index):
    """Return the problems in one shard's bytes: crc of each clip, first and last mark of each JPEG."""
    try:
        shard = load_shard(directory, index)
    except UserError as error:
        return [str(error)]
    path, offsets, problems = pathlib.Path(directory) / f"{index:05d}.bin", shard["offsets"].tolist(), []
    with open(path, "rb") as file:
        for clip, crc in enumerate(shard["crc32"]):
            first, last = shard["bounds"][clip:clip + 2] * len(shard["cameras"])
            jpegs = [file.read(end - begin) for begin, end in zip(offsets[first:last], offsets[first + 1:])]
            if zlib.crc32(b"".join(jpegs)) != crc:
                problems.append(f"{path}: clip {clip} has changed since it was written (crc32)")
            elif any(jpeg[:2] + jpeg[-2:] != b"\xff\xd8\xff\xd9" for jpeg in jpegs):
                problems.append(f"{path}: clip {clip} has an image that is no JPEG")
    return problems


def check(directory):
    """Read every byte of a data set: -> list of problems, a line each; empty if it is whole."""
    problems = []
    try:
        for index in range(load_meta(directory)["counts"]["shards"]):
            problems += check_shard(directory, index)
        if not problems:
            Clips(directory)                           # do the shards agree with meta.json?
    except UserError as error:
        problems.append(str(error))
    return problems


def summary(directory):
    """Return lines that say what a data set claims to hold."""
    meta = load_meta(directory)
    cameras = ", ".join(f"{name} {height} x {width}" for name, (height, width) in meta["cameras"].items())
    actions = f"{meta['stride']} actions a frame" if meta["stride"] > 1 else \
        "with actions" if meta["has_actions"] else "no actions"
    return [f"{directory}: {meta['source']}, {cameras}, {meta['fps']:g} fps, {actions}",
            "  {clips:,} clips, {frames:,} frames, {bytes:,} bytes, {shards} shards".format(**meta["counts"]),
            *(f"  {count:7,} {task}" for task, count in meta["tasks"].items())]


def join(directories, out):
    """Copy data sets into one, which lies in `out` then: their shards, one after the other, no two of their
    recordings under one number. GR-2's codes are not copied. A killed run goes on where it was. UserError if
    the sets differ in kind or share a clip, or if `out` has other shards. Whether their actions mean the same
    (record_calvin.py --actions) no data set says.
    """
    parts, out, index, first, known = [Clips(x) for x in directories], pathlib.Path(out), 0, 0, set()
    for part in parts:
        check_apart(out, part.directory)
        check_apart(part.directory, out)
        own = {*zip(part.sentences, np.concatenate([shard["crc32"] for shard in part.shards]).tolist())}
        if own & known:
            raise UserError(f"{part.directory} has a clip that another one has: give no recording twice, or "
                            "it may be both learned from and held out")
        known |= own
        for key in "cameras", "stride", "has_actions", "fps":
            theirs, ours = (list(x.items()) if key == "cameras" else x
                            for x in (part.meta[key], parts[0].meta[key]))             # in their order
            if theirs != ours:
                raise UserError(f"{key} of {parts[0].directory}: {ours}, of {part.directory}: {theirs}: "
                                "these don't make one data set")
    if any(out.glob(SHARDS)) and not (out / "recipe.json").exists():
        raise UserError(f"{out} holds a data set that was not joined: choose another OUT")
    claim(out, joined=[str(part.directory) for part in parts], of=[part.meta["counts"] for part in parts])
    for part in parts:
        for number in range(len(part.shards)):
            source = part.directory / f"{number:05d}.npz"
            if not shard_is_done(out, index):
                arrays, content = read_arrays(source), io.BytesIO()
                arrays["episodes"] += first
                np.savez(content, **arrays)
                copy = functools.partial(shutil.copyfile, source.with_suffix(".bin"))
                write_whole(out / f"{index:05d}.bin", copy)
                write_whole(out / f"{index:05d}.npz", content.getvalue())              # the commit mark
            index += 1
        first += int(part.episodes.max(initial=0)) + 1
    write_meta(out, ", ".join(dict.fromkeys(part.meta["source"] for part in parts)), parts[0].fps,
               "; ".join(part.meta.get("command", "") for part in parts))


def look_at(path):
    """Print what a data set, or a folder of two, holds: -> its problems."""
    parts, problems = [part for part in (path / "training", path / "validation") if part.is_dir()], []
    for directory in [path] if (path / "meta.json").exists() or not parts else parts:
        try:
            print("\n".join(summary(directory)))
            problems += check(directory)
        except UserError as error:
            problems.append(str(error))
    return problems


def main():
    parser = Parser(description="Print what data sets hold and check every byte of them.")
    parser.add_argument("directory", type=pathlib.Path, nargs="+", help="a data set or a folder of two")
    parser.add_argument("--join", type=pathlib.Path, metavar="OUT",
                        help="make one of them first, in OUT; no folders of two here")
    args = parser.parse_args()
    if args.join:
        join(args.directory, args.join)
    problems = []
    for path in [args.join] if args.join else args.directory:
        problems += look_at(path)
    print("\n".join(problems) or "every byte is as it was written")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    run_script(main)
