"""Packs the language-annotated part of a raw CALVIN data set into clips.

    python prepare_calvin.py DATASET OUT             # DATASET: task_ABCD_D, ..., or its .zip as it is
    python prepare_calvin.py DATASET OUT --limit 50  # only the first 50 segments of each split
    python prepare_calvin.py DATASET OUT --verify    # read OUT again beside DATASET: is it the same?
    python clips.py OUT                              # what came out; checks every byte
    python train.py --stage finetune --data OUT

Reads, for each of training/ and validation/ that DATASET has:
    episode_0000064.npz ...              one frame each: rgb_static, rgb_gripper, robot_obs, rel_actions (or,
                                         from record_calvin.py, with --actions, executed_actions)
    ep_start_end_ids.npy                 int (n, 2): first and last frame of each recording
    lang_annotations/auto_lang_ann.npy   a pickled dict: language.ann, language.task, info.indx (first, last)
Writes OUT/training and OUT/validation in the format of clips.py, 30 fps, JPEG q95 4:4:4: a clip for each
segment, its last frame included; a clip's episode is the recording that it lies in. A segment is left out,
counted and reported if a frame of it is missing, misshapen or not finite. Of a zip only what the segments
need is read, about 1% of it. A killed run goes on where it was: start the same command again. Other layouts
of CALVIN's data (one LMDB, LeRobot's parquet) would be further classes with the methods of `Folder`.
"""
import collections
import datetime
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import shlex
import sys
import zipfile
import zlib

import numpy as np
from tqdm import tqdm

import clips

SHARD = 64                                             # segments; about 4,000 frames, 100 MB
CAMERAS = dict(rgb_static=(200, 200, 3), rgb_gripper=(84, 84, 3))
STATES, ACTIONS = (15,), (7,)
MENDED = datetime.date(2022, 9, 16)                    # annotations of ABC and ABCD are wrong before that day
Segment = collections.namedtuple("Segment", "first last sentence task episode")        # last is included


class Folder:
    """A data set's files in a directory; `open` raises FileNotFoundError for one that is not there."""

    def __init__(self, path):
        self.path = path

    def open(self, name):
        return open(self.path / name, "rb")

    def date(self, name):
        return datetime.date.fromtimestamp((self.path / name).stat().st_mtime)


class Zip:
    """The same straight from a downloaded archive, in which all lies in one folder."""

    def __init__(self, path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise clips.ClipsError(f"{path} is no whole zip ({error}): finish the download") from None
        ends = [name for name in self.zip.namelist() if name.endswith("/ep_start_end_ids.npy")]
        self.top = ends[0].rpartition("/")[0].rpartition("/")[0] if ends else ""

    def find(self, name):
        try:
            return self.zip.getinfo(f"{self.top}/{name}".lstrip("/"))
        except KeyError:
            raise FileNotFoundError(2, "not in the zip", str(self.path / name)) from None

    def open(self, name):
        return io.BytesIO(self.zip.read(self.find(name)))

    def date(self, name):
        return datetime.date(*self.find(name).date_time[:3])


def open_source(path):
    """The Source at `path`, a directory or a zip; ClipsError if it is neither."""
    if path.is_dir():
        return Folder(path)
    if path.is_file() and path.suffix == ".zip":
        return Zip(path)
    raise clips.ClipsError(f"{path} is neither a directory nor a .zip: no CALVIN data set")


def has(source, name):
    try:
        source.open(name).close()
    except FileNotFoundError:
        return False
    return True


class SafeUnpickler(pickle.Unpickler):
    """Builds arrays, dicts, lists, tuples, strings and numbers. A pickle runs code by naming what to call:
    if it names anything but numpy's constructors it is refused, before any call."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"),
               ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),      # numpy 1
               ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar")}    # numpy 2

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise clips.ClipsError(f"refused, for it names {module}.{name}, which no annotation needs")
        return super().find_class(module, name)


def load_annotations(source, name):
    """Return (sentences, tasks, int64 (n, 2) first and last frames) from the npy; runs no code in it."""
    path = source.path / name
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with source.open(name) as file:
            formats[np.lib.format.read_magic(file)](file)
            content = SafeUnpickler(file).load().item()
        language, pairs = content["language"], np.array(content["info"]["indx"], np.int64).reshape(-1, 2)
        sentences, tasks = [str(x) for x in language["ann"]], [str(x) for x in language["task"]]
    except FileNotFoundError:
        raise clips.ClipsError(f"{path} is missing: only annotated segments can be packed") from None
    except clips.ClipsError as error:
        raise clips.ClipsError(f"{path}: {error}") from None
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, IndexError, KeyError, TypeError,
            ValueError, zipfile.BadZipFile) as error:
        raise clips.ClipsError(f"{path} is not a CALVIN annotation ({error!r}): download it again") from None
    if not len(sentences) == len(tasks) == len(pairs):
        raise clips.ClipsError(f"{path}: {len(sentences)} sentences, {len(tasks)} tasks, {len(pairs)} pairs")
    return sentences, tasks, pairs


def load_recordings(source, name):
    """Return int64 (n, 2): first and last frame of each recording, in order."""
    try:
        with source.open(name) as file:
            recordings = np.load(file, allow_pickle=False).astype(np.int64).reshape(-1, 2)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise clips.ClipsError(f"{source.path / name} can't be read ({error}): download it again") from None
    return recordings[np.argsort(recordings[:, 0])]


def segments(source, split, dropped):
    """Yield the Segments of DATASET/training or /validation that lie within a recording; count the others."""
    recordings = load_recordings(source, f"{split}/ep_start_end_ids.npy")
    annotations = f"{split}/lang_annotations/auto_lang_ann.npy"
    for sentence, task, (first, last) in zip(*load_annotations(source, annotations)):
        episode = int(np.searchsorted(recordings[:, 0], first, side="right")) - 1
        if episode < 0 or not first <= last <= recordings[episode, 1]:
            dropped["outside every recording"] += 1
        else:
            yield Segment(int(first), int(last), sentence, task, episode)
    if source.date(annotations) < MENDED and "ABC" in source.path.name:
        print(f"WARNING: {annotations} is of {source.date(annotations)}; before {MENDED} the annotations of "
              "ABC and ABCD were wrong: download them again")


def read_frame(source, name, actions):
    """Return {key: array} for one frame; ValueError with the reason if it can't be used."""
    rows = {"robot_obs": STATES, actions: ACTIONS}
    try:
        with source.open(name) as file, np.load(file, allow_pickle=False) as content:
            frame = {key: content[key] for key in CAMERAS | rows}
    except FileNotFoundError:
        raise ValueError("a frame is missing") from None
    except KeyError as error:
        raise ValueError(f"a frame has no {error.args[0].split()[0]}") from None
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        raise ValueError("a frame can't be read") from None
    if any(frame[key].shape != shape for key, shape in (CAMERAS | rows).items()) \
            or any(frame[key].dtype != np.uint8 for key in CAMERAS) \
            or any(frame[key].dtype.kind != "f" for key in rows):
        raise ValueError("a frame has a wrong shape or type")
    if not all(np.isfinite(frame[key]).all() for key in rows):
        raise ValueError("a frame has a number that is not finite")
    return frame


def read_clip(source, split, segment, actions):
    """Return what ShardWriter.add needs of a segment; ValueError with the reason if it can't be used."""
    frames = [read_frame(source, f"{split}/episode_{i:07d}.npz", actions)
              for i in range(segment.first, segment.last + 1)]
    stacked = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
    return dict(frames={key: stacked[key] for key in CAMERAS}, sentence=segment.sentence, task=segment.task,
                episode=segment.episode, robot_obs=stacked["robot_obs"].astype(np.float32),
                rel_actions=stacked[actions].astype(np.float32))


def left_out(out, index):
    """Where a shard notes what it had to leave out, by reason, so that a resumed run can report it."""
    return out / f"{index:05d}.left_out.json"


def pack_shard(job):
    """Write one shard; -> its number of segments. job: (path, split, out, index, segments, actions)"""
    path, split, out, index, part, actions = job
    source, dropped = open_source(path), collections.Counter()
    with clips.ShardWriter(out, index, CAMERAS) as writer:
        for segment in part:
            try:
                clip = read_clip(source, split, segment, actions)
            except ValueError as reason:
                dropped[str(reason)] += 1
            else:
                writer.add(**clip)
        clips.write_whole(left_out(out, index), json.dumps(dropped).encode())
    return len(part)


def in_processes(function, jobs, workers):
    """map(function, jobs), on `workers` processes if that is more than one; the order is any."""
    if workers == 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap_unordered(function, jobs)


def shards_of(args, split):
    """The split's shards as jobs for pack_shard, and a Counter of what lies outside the recordings."""
    dropped, out = collections.Counter(), args.out / split
    todo = list(segments(open_source(args.dataset), split, dropped))[:args.limit]
    clips.claim(out, source="calvin", limit=args.limit, segments=len(todo), actions=args.actions,
                crc32=zlib.crc32(repr(todo).encode()))
    return [(args.dataset, split, out, index, todo[index * SHARD:(index + 1) * SHARD], args.actions)
            for index in range(-(-len(todo) // SHARD))], dropped


def pack(args, split):
    """Pack this machine's part of one split, skipping the shards that an earlier run finished."""
    (shards, dropped), out = shards_of(args, split), args.out / split
    mine = shards[args.part - 1::args.parts]
    todo = [job for job in mine if not clips.shard_is_done(out, job[3])]
    total = sum(len(job[4]) for job in mine)
    with tqdm(total=total, initial=total - sum(len(job[4]) for job in todo), desc=str(out),
              unit="segment") as bar:
        for count in in_processes(pack_shard, todo, args.workers):
            bar.update(count)
    if not all(clips.shard_is_done(out, job[3]) for job in shards):
        print(f"{out}: part {args.shard} is done; once all parts are there, start the command again")
        return
    for job in shards:
        dropped.update(json.loads(left_out(out, job[3]).read_text()))
    for why, count in dropped.items():
        print(f"{out}: {count} segments left out: {why}. Once mended, delete {out} and run again")
    clips.write_meta(out, "calvin", fps=30, command=shlex.join(sys.argv), left_out=dict(dropped),
                     segments=sum(len(job[4]) for job in shards), actions=args.actions)
    print("\n".join(clips.summary(out)))


def verify(args, split):
    """Read every segment again beside its clip: rows equal, pictures near? -> how many clips differ."""
    data, source, found, differ = clips.Clips(args.out / split), open_source(args.dataset), 0, 0
    for job in tqdm(shards_of(args, split)[0], desc=f"verify {split}", unit="shard"):
        for segment in job[4]:
            try:
                raw = read_clip(source, split, segment, args.actions)
            except ValueError:
                continue                                       # left out, and reported then
            clip = data.read(found)
            near = all(np.abs(clip["frames"][c].astype(int) - raw["frames"][c]).mean() < 3 for c in CAMERAS)
            same = all(np.array_equal(clip[key], raw[key]) for key in ("robot_obs", "rel_actions"))
            texts = (data.sentences[found], data.tasks[found]) == (segment.sentence, segment.task)
            differ += not (near and same and texts)
            found += 1
    print(f"{args.out / split}: {differ} of {len(data)} clips differ from {args.dataset}")
    return differ + abs(found - len(data))


def parse():
    parser = clips.Parser(description="Pack CALVIN's language-annotated segments into clips.")
    parser.add_argument("dataset", type=pathlib.Path, help="a directory or .zip with training/, validation/")
    parser.add_argument("out", type=pathlib.Path, help="where the packed data sets go")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N segments of each split")
    parser.add_argument("--actions", default="rel_actions", choices=["rel_actions", "executed_actions"],
                        help="CALVIN's, or what record_calvin.py's expert commanded (default: CALVIN's)")
    parser.add_argument("--verify", action="store_true", help="pack nothing, compare OUT with DATASET")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="pack the I-th of N parts, I = 1 .. N")
    args = parser.parse_args()
    args.part, args.parts = clips.parse_part(parser, args.shard)
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


def main():
    args, differ = parse(), 0
    try:
        source = open_source(args.dataset)
        splits = [name for name in ("training", "validation") if has(source, f"{name}/ep_start_end_ids.npy")
                  or (args.dataset / name).is_dir()]
        if not splits:
            raise clips.ClipsError(f"{args.dataset} has no training/ or validation/: no CALVIN data set")
        for split in splits:
            differ += verify(args, split) if args.verify else pack(args, split) or 0
    except (clips.ClipsError, OSError) as error:       # OSError: OUT can't be written, the disk is full
        sys.exit(f"prepare_calvin.py: {error}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
