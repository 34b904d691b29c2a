"""Packs the language-annotated part of a raw CALVIN data set into clips.

    python prepare_calvin.py DATASET OUT             # DATASET: task_ABCD_D, ..., or its .zip as it is
    python prepare_calvin.py DATASET OUT --limit 50  # only the first 50 segments of each split
    python prepare_calvin.py DATASET OUT --verify    # read OUT again beside DATASET: is it the same?
    python -m nanogr.clips OUT                              # what came out; checks every byte
    python train.py --stage finetune --data OUT

Reads, for each of training/ and validation/ that DATASET has:
    episode_0000064.npz ...              one frame each: rgb_static, rgb_gripper, robot_obs, rel_actions (or,
                                         from record_calvin.py, with --actions, executed_actions)
    ep_start_end_ids.npy                 int (n, 2): first and last frame of each recording
    lang_annotations/auto_lang_ann.npy   a pickled dict: language.ann, language.task, info.indx (first, last)
Writes OUT/training and OUT/validation in the format of clips.py, 30 fps, JPEG q95 4:4:4: a clip for each
segment, its last frame included; a clip's episode is the recording that it lies in. A segment is left out,
counted and reported if a frame of it is missing, misshapen or not finite. Of a zip only what the segments
need is read, about 1% of it. A killed run goes on where it was: start the same command again.

Another layout of CALVIN's data (one LMDB, LeRobot's parquet) would be another class beside `Folder`, with its
`splits`, `recordings`, `annotations`, `annotated` and `frame`, and a line in `open_source`; what comes after
knows nothing of files.
"""
import collections
import datetime
import fnmatch
import functools
import io
import json
import math
import pathlib
import pickle
import re
import shlex
import sys
import zipfile
import zlib

import numpy as np
from tqdm import tqdm

from nanogr import clips
from nanogr.common import Parser, UserError, check_apart, cores, parse_part, run_script, write_whole

SHARD = 64                                             # segments; about 4,000 frames, 100 MB
CAMERAS = dict(rgb_static=(200, 200, 3), rgb_gripper=(84, 84, 3))
STATES, ACTIONS = (15,), (7,)
MOST = 1 << 24                                         # bytes of one of a frame's arrays
MENDED = datetime.date(2022, 9, 16)                    # annotations of ABC and ABCD are wrong before that day
ZIP_WORKERS = 4                                        # each holds the zip's list of files: a GB or two
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)     # zipfile says so
Segment = collections.namedtuple("Segment", "first last sentence task episode")        # last is included


class Misshapen(ValueError):
    """A frame's array has not CALVIN's shape and type."""


class Folder:
    """A data set as CALVIN's authors lay it out, in a directory."""

    def __init__(self, path):
        self.path = path

    # ---- files: all that `Zip` does otherwise

    def open(self, name):
        """A file to read from; FileNotFoundError if it is not there, ClipsError if the archive is damaged."""
        return open(self.path / name, "rb")

    def exists(self, name):
        return (self.path / name).exists()

    def beside(self, glob):
        """The names that match."""
        return [path.relative_to(self.path).as_posix() for path in self.path.glob(glob)]

    def date(self, name):
        return datetime.date.fromtimestamp((self.path / name).stat().st_mtime)

    # ---- what they hold: all that packing asks of a layout

    def splits(self):
        """Which of training and validation there are."""
        return [split for split in ("training", "validation") if self.exists(split)
                or self.exists(f"{split}/ep_start_end_ids.npy")]

    def annotation(self, split):
        """The name of a split's annotations: the usual, or those with another language model's embeddings,
        which differ in nothing else; None without any."""
        usual = f"{split}/lang_annotations/auto_lang_ann.npy"
        if self.exists(usual):
            return usual
        return min(self.beside(f"{split}/lang_*/auto_lang_ann.npy"), default=None)

    def recordings(self, split):
        """int64 (n, 2): first and last frame of each recording, in order."""
        return load_recordings(self, f"{split}/ep_start_end_ids.npy")

    def annotations(self, split):
        """(sentences, tasks, int64 (n, 2) first and last frames)."""
        name = self.annotation(split)
        if not name:
            raise UserError(f"{self.path / split}/lang_annotations/auto_lang_ann.npy is missing: only "
                            "annotated segments can be packed")
        return load_annotations(self, name)

    def annotated(self, split):
        """The annotations' date, or None if nobody knows."""
        return self.date(self.annotation(split))

    def frame(self, split, number, keys):
        """{key: array} of one frame, nothing checked; ValueError with the reason if it can't be had."""
        try:
            with self.open(f"{split}/episode_{number:07d}.npz") as file, \
                    np.load(file, allow_pickle=False) as content:
                if any(content.zip.getinfo(f"{key}.npy").file_size > MOST for key in keys if key in content):
                    raise ValueError(f"more than {MOST >> 20} MB for an array")
                return {key: content[key] for key in keys}
        except FileNotFoundError:
            raise ValueError("a frame is missing") from None
        except KeyError as error:
            raise ValueError(f"a frame has no {error.args[0].split()[0]}") from None
        except (OSError, TypeError, ValueError, MemoryError, UserError, *DAMAGED):
            raise ValueError("a frame can't be read") from None


class Zip(Folder):
    """The same straight from a downloaded archive, in which all lies in one folder."""

    def __init__(self, path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise UserError(f"{path} is no whole zip ({error}): finish the download") from None
        ends = [name for name in self.zip.namelist() if name.endswith("/ep_start_end_ids.npy")]
        self.top = ends[0].rpartition("/")[0].rpartition("/")[0] if ends else ""
        before = min((entry.header_offset for entry in self.zip.infolist()), default=0)
        if before:
            print(f"{path}: {before:,} bytes stand before the archive; another zip there is not read: give "
                  "each as a file of its own")

    def find(self, name):
        try:
            return self.zip.getinfo(f"{self.top}/{name}".lstrip("/"))
        except KeyError:
            raise FileNotFoundError(2, "not in the zip", str(self.path / name)) from None

    def open(self, name):
        found = self.find(name)
        if found.file_size > 1 << 30:
            raise UserError(f"{self.path}: {name} in it claims {found.file_size:,} bytes: download it again")
        try:
            return io.BytesIO(self.zip.read(found))
        except DAMAGED as error:
            raise UserError(f"{self.path}: {name} in it is damaged ({error!r}): download it again"
                                   ) from None

    def beside(self, glob):
        names = (name.removeprefix(f"{self.top}/") for name in self.zip.NameToInfo)
        return [name for name in names if fnmatch.fnmatchcase(name, glob)]

    def exists(self, name):
        return any(f"{self.top}/{name}{end}".lstrip("/") in self.zip.NameToInfo for end in ("", "/"))

    def date(self, name):
        try:
            return datetime.date(*self.find(name).date_time[:3])
        except ValueError:                                     # some archivers write 0 for the month
            return None


@functools.lru_cache(1)
def open_source(path):
    """The data set at `path`, a directory or a zip; ClipsError if it is neither. A big zip's list of two
    million files is read once a process, not once a shard."""
    if path.is_dir():
        return Folder(path)
    if path.is_file() and path.suffix == ".zip":
        return Zip(path)
    raise UserError(f"{path} is neither a directory nor a .zip: no CALVIN data set")


class PlainType:
    """Stands for a dtype of numbers, strings or objects; of its state only the byte order counts."""
    __slots__ = "dtype"

    def __init__(self, spec, align, copy):
        if not re.fullmatch("[biufSU][0-9]+|O8?", spec):
            raise UserError(f"refused, for it has the dtype {spec[:20]!r}, which no annotation needs")
        self.dtype = np.dtype(spec)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class PlainArray(np.ndarray):
    """An array that takes from a pickle what its type and shape ask for, not a value or byte more or less.

    numpy checks neither how long a list is nor, in time, how long the shape: it reads on past their ends.
    """

    def __setstate__(self, state):
        _, shape, plain, fortran, values = state
        if type(plain) is not PlainType or type(shape) is not tuple \
                or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
            raise UserError("refused, for an array in it has an odd type or shape")
        kind, size = (list, 1) if plain.dtype == object else (bytes, plain.dtype.itemsize)
        if type(values) is not kind or len(values) != math.prod(shape) * size:
            raise UserError("refused, for an array in it does not hold what its type and shape say")
        super().__setstate__((1, shape, plain.dtype, bool(fortran), values))


def empty_array(*_):
    """Stands for numpy's _reconstruct: an array whose state is to follow."""
    return np.empty(0).view(PlainArray)


def array_from_bytes(values, plain, shape, order):
    """Stands for numpy's _frombuffer, how protocol 5 stores an array of numbers."""
    array = empty_array()
    array.__setstate__((1, shape, plain, dict(C=False, F=True)[order], bytes(values)))
    return array


def scalar_from_bytes(plain, values):
    """Stands for numpy's scalar; bytes are no object, so PlainArray refuses those."""
    return array_from_bytes(values, plain, (), "C")[()]


class Nothing:
    """Stands for what PyTorch would make, a tensor of embeddings: takes anything, does nothing with it."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


class SafeUnpickler(pickle.Unpickler):
    """Builds dicts, lists, tuples, strings, numbers, and numpy's scalars and arrays of these; Nothing, for
    PyTorch's tensors.

    A pickle runs code by naming what to call: if it names anything but numpy's constructors it is refused,
    before any call. Nor are numpy's own called, for they believe the file: if it says of a dtype of objects
    that it holds no pointers, they take raw bytes for pointers. What is above stands in for them and checks.
    No class of arrays is given out (its name is but an argument): it would show uninitialised memory.
    """
    STAND_INS = {("numpy", "ndarray"): None, ("numpy", "dtype"): PlainType,
                 ("numpy.core.multiarray", "_reconstruct"): empty_array,
                 ("numpy.core.multiarray", "scalar"): scalar_from_bytes,
                 ("numpy.core.numeric", "_frombuffer"): array_from_bytes,
                 ("collections", "OrderedDict"): dict}

    def find_class(self, module, name):
        key = module.replace("numpy._core.", "numpy.core."), name              # numpy 2's and numpy 1's
        if module.partition(".")[0] == "torch":
            return Nothing
        if key not in self.STAND_INS:
            raise UserError(f"refused, for it names {f'{module}.{name}'!r}, which no annotation needs: save "
                            "language.ann, language.task and info.indx alone, as lists")
        return self.STAND_INS[key]


def load_annotations(source, name):
    """Return (sentences, tasks, int64 (n, 2) first and last frames) from the npy; runs no code in it."""
    path = source.path / name
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with source.open(name) as file:
            formats[np.lib.format.read_magic(file)](file)
            content = SafeUnpickler(file).load().item()
        language, pairs = content["language"], np.array(content["info"]["indx"], np.int64).reshape(-1, 2)
        sentences, tasks = ([str(x) for x in language[key] if isinstance(x, str)] for key in ("ann", "task"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, pickle.UnpicklingError, AttributeError, IndexError, KeyError, TypeError, ValueError,
            MemoryError, OverflowError, RecursionError, SystemError, *DAMAGED) as error:
        raise UserError(f"{path} is not a CALVIN annotation ({error!r}): download it again") from None
    if not len(sentences) == len(tasks) == len(pairs):
        raise UserError(f"{path}: {len(sentences)} sentences, {len(tasks)} tasks, {len(pairs)} pairs")
    return sentences, tasks, pairs


def load_recordings(source, name):
    """Return int64 (n, 2): first and last frame of each recording, in order."""
    try:
        with source.open(name) as file:
            recordings = np.load(file, allow_pickle=False).astype(np.int64).reshape(-1, 2)
    except (OSError, ValueError, MemoryError, *DAMAGED) as error:
        raise UserError(f"{source.path / name} can't be read ({error}): download it again") from None
    return recordings[np.argsort(recordings[:, 0])]


def segments(source, split, dropped):
    """Yield the Segments of DATASET/training or /validation that lie within a recording; count the others."""
    recordings = source.recordings(split)
    for sentence, task, (first, last) in zip(*source.annotations(split)):
        episode = int(np.searchsorted(recordings[:, 0], first, side="right")) - 1
        if episode < 0 or not first <= last <= recordings[episode, 1]:
            dropped["outside every recording"] += 1
        else:
            yield Segment(int(first), int(last), sentence, task, episode)
    date = source.annotated(split)
    if date and date < MENDED and "ABC" in source.path.name:
        print(f"WARNING: {split}'s annotations are of {date}; before {MENDED} those of ABC and ABCD were "
              "wrong: download them again")


def read_frame(source, split, number, actions):
    """Return {key: array} for one frame; ValueError with the reason if it can't be used."""
    rows = {"robot_obs": STATES, actions: ACTIONS}
    frame = source.frame(split, number, [*CAMERAS, *rows])
    for key, shape in (CAMERAS | rows).items():
        kind, found = "u" if key in CAMERAS else "f", frame[key]
        if found.shape != shape or found.dtype.kind != kind or kind == "u" and found.dtype != np.uint8:
            wanted = "uint8" if kind == "u" else "floats"
            raise Misshapen(f"a frame's {key} is {found.dtype} {found.shape}, not {wanted} {shape}")
    if not all(np.isfinite(frame[key]).all() for key in rows):
        raise ValueError("a frame has a number that is not finite")
    return frame


def read_clip(source, split, segment, actions):
    """Return what ShardWriter.add needs of a segment; ValueError with the reason if it can't be used."""
    frames = [read_frame(source, split, i, actions) for i in range(segment.first, segment.last + 1)]
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
        write_whole(left_out(out, index), json.dumps(dropped).encode())
    return len(part)


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
    if args.workers > 1:
        open_source.cache_clear()                              # each worker has its own
    clips.make_shards(pack_shard, [(job[3], len(job[4]), job) for job in mine], out, args.workers,
                      unit="segment", desc=str(out))
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
    """Read every segment again beside its clip: rows equal, pictures near? -> whether anything differs."""
    data, source, found, differ = clips.Clips(args.out / split), open_source(args.dataset), 0, 0
    for job in tqdm(shards_of(args, split)[0], desc=f"verify {split}", unit="shard"):
        for segment in job[4]:
            try:
                raw = read_clip(source, split, segment, args.actions)
            except ValueError:
                continue                                       # left out, and reported then
            differ += found < len(data) and not is_same(data, found, raw)
            found += 1
    print(f"{args.out / split}: {differ} of {len(data)} clips differ from {args.dataset}")
    if found != len(data):
        print(f"{args.out / split}: {len(data)} clips, but {found} segments of {args.dataset} can be read: "
              f"it has changed since; delete {args.out / split} and pack it again")
    return differ > 0 or found != len(data)


def is_same(data, i, raw):
    """Whether clip i is what read_clip gave, but for JPEG's losses."""
    clip = data.read(i)
    return (all(clip["frames"][c].shape == raw["frames"][c].shape
                and np.abs(clip["frames"][c].astype(int) - raw["frames"][c]).mean() < 3 for c in CAMERAS)
            and all(np.array_equal(clip[key], raw[key]) for key in ("robot_obs", "rel_actions"))
            and (data.sentences[i], data.tasks[i]) == (raw["sentence"], raw["task"]))


def usable_splits(source, args):
    """Those of training and validation that can be packed; prints what is not there. UserError if that is all
    there is, or if a split's very first frame is misshapen, for so will be the others."""
    splits, usable = source.splits(), []
    if not splits:
        other = clips.looks_like(args.dataset) or "no CALVIN data set"
        raise UserError(f"{args.dataset} has no training/ or validation/: {other}")
    for split in "training", "validation":
        if split not in splits or len(splits) > 1 and not source.annotation(split):
            lacks = f"{split}/lang_annotations" if split in splits else f"{split}/"
            print(f"{args.dataset}: no {lacks} in it, so {split} is left out")
            continue
        usable.append(split)
        firsts = source.annotations(split)[2][:1, 0]
        try:
            for number in firsts:
                read_frame(source, split, number, args.actions)
        except Misshapen as problem:
            raise UserError(f"{args.dataset}, {split}: {problem}; resize or convert them first") from None
        except ValueError:                                     # packing counts it
            pass
    return usable


def parse():
    parser = Parser(description="Pack CALVIN's language-annotated segments into clips.")
    parser.add_argument("dataset", type=pathlib.Path, help="a directory or .zip with training/, validation/")
    parser.add_argument("out", type=pathlib.Path, help="where the packed data sets go")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N segments of each split")
    parser.add_argument("--actions", default="rel_actions", choices=["rel_actions", "executed_actions"],
                        help="CALVIN's, or what record_calvin.py's expert commanded (default: CALVIN's)")
    parser.add_argument("--verify", action="store_true", help="pack nothing, compare OUT with DATASET")
    parser.add_argument("--workers", type=int, help="processes (default: all cores, but for a zip at most "
                        f"{ZIP_WORKERS}, which take a GB or two each)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="pack the I-th of N parts, I = 1 .. N")
    args = parser.parse_args()
    args.part, args.parts = parse_part(parser, args.shard)
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    if args.workers is None:
        args.workers = min(cores(), ZIP_WORKERS) if args.dataset.suffix == ".zip" else cores()
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


def main():
    args, failed = parse(), False
    check_apart(args.out, args.dataset)
    splits = usable_splits(open_source(args.dataset), args)
    for split in splits:
        if args.verify:
            failed |= verify(args, split)
        else:
            pack(args, split)
    sys.exit(failed)


if __name__ == "__main__":
    run_script(main)
