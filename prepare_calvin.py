"""Packs the language-annotated part of a raw CALVIN data set into clips.

    python prepare_calvin.py DATASET OUT             # DATASET: the unzipped task_ABCD_D, task_D_D, ...
    python prepare_calvin.py DATASET OUT --limit 50  # only the first 50 segments of each split
    python clips.py OUT                              # what came out; checks every byte
    python train.py --stage finetune --data OUT

Reads, for each of training/ and validation/ that DATASET has:
    episode_0000064.npz ...              one frame each: rgb_static, rgb_gripper, robot_obs, rel_actions
    ep_start_end_ids.npy                 int (n, 2): first and last frame of each recording
    lang_annotations/auto_lang_ann.npy   a pickled dict: language.ann, language.task, info.indx (first, last)
Writes OUT/training and OUT/validation in the format of clips.py, 30 fps, JPEG q95 4:4:4: a clip for each
segment, its last frame included; a clip's episode is the recording that it lies in. A segment is left out,
counted and reported if a frame of it is missing, misshapen or not finite. A killed run goes on where it was:
start the same command again.
"""
import collections
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
ROWS = dict(robot_obs=(15,), rel_actions=(7,))
Segment = collections.namedtuple("Segment", "first last sentence task episode")        # last is included


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


def load_annotations(path):
    """Return (sentences, tasks, int64 (n, 2) first and last frames) from the npy; runs no code in it."""
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(path, "rb") as file:
            formats[np.lib.format.read_magic(file)](file)
            content = SafeUnpickler(file).load().item()
        language, pairs = content["language"], np.array(content["info"]["indx"], np.int64).reshape(-1, 2)
        sentences, tasks = [str(x) for x in language["ann"]], [str(x) for x in language["task"]]
    except FileNotFoundError:
        raise clips.ClipsError(f"{path} is missing: only annotated segments can be packed") from None
    except clips.ClipsError as error:
        raise clips.ClipsError(f"{path}: {error}") from None
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, IndexError, KeyError, TypeError,
            ValueError) as error:
        raise clips.ClipsError(f"{path} is not a CALVIN annotation ({error!r}): download it again") from None
    if not len(sentences) == len(tasks) == len(pairs):
        raise clips.ClipsError(f"{path}: {len(sentences)} sentences, {len(tasks)} tasks, {len(pairs)} pairs")
    return sentences, tasks, pairs


def load_recordings(path):
    """Return int64 (n, 2): first and last frame of each recording, in order."""
    try:
        recordings = np.load(path, allow_pickle=False).astype(np.int64).reshape(-1, 2)
    except (OSError, EOFError, ValueError) as error:
        raise clips.ClipsError(f"{path} can't be read ({error}): download it again") from None
    return recordings[np.argsort(recordings[:, 0])]


def segments(split, dropped):
    """Yield the Segments of DATASET/training or /validation that lie within a recording; count the others."""
    recordings = load_recordings(split / "ep_start_end_ids.npy")
    annotations = load_annotations(split / "lang_annotations" / "auto_lang_ann.npy")
    for sentence, task, (first, last) in zip(*annotations):
        episode = int(np.searchsorted(recordings[:, 0], first, side="right")) - 1
        if episode < 0 or not first <= last <= recordings[episode, 1]:
            dropped["outside every recording"] += 1
        else:
            yield Segment(int(first), int(last), sentence, task, episode)


def read_frame(path):
    """Return {key: array} for one frame; ValueError with the reason if it can't be used."""
    try:
        with np.load(path, allow_pickle=False) as file:
            frame = {key: file[key] for key in (CAMERAS | ROWS)}
    except FileNotFoundError:
        raise ValueError("a frame is missing") from None
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        raise ValueError("a frame can't be read") from None
    if any(frame[key].shape != shape for key, shape in (CAMERAS | ROWS).items()) \
            or any(frame[key].dtype != np.uint8 for key in CAMERAS) \
            or any(frame[key].dtype.kind != "f" for key in ROWS):
        raise ValueError("a frame has a wrong shape or type")
    if not all(np.isfinite(frame[key]).all() for key in ROWS):
        raise ValueError("a frame has a number that is not finite")
    return frame


def read_clip(split, segment):
    """Return what ShardWriter.add needs of a segment; ValueError with the reason if it can't be used."""
    frames = [read_frame(split / f"episode_{i:07d}.npz") for i in range(segment.first, segment.last + 1)]
    stacked = {key: np.stack([frame[key] for frame in frames]) for key in CAMERAS | ROWS}
    return dict(frames={key: stacked[key] for key in CAMERAS}, sentence=segment.sentence, task=segment.task,
                episode=segment.episode, **{key: stacked[key].astype(np.float32) for key in ROWS})


def pack(split, out, limit):
    """Pack one split into `out`, shard by shard, skipping those that an earlier run finished."""
    dropped = collections.Counter()
    todo = list(segments(split, dropped))[:limit]
    clips.claim(out, source="calvin", limit=limit, segments=len(todo), crc32=zlib.crc32(repr(todo).encode()))
    with tqdm(total=len(todo), desc=str(out), unit="segment") as bar:
        for index in range(-(-len(todo) // SHARD)):
            part = todo[index * SHARD:(index + 1) * SHARD]
            if not clips.shard_is_done(out, index):
                pack_shard(split, out, index, part, dropped)
            bar.update(len(part))
    for why, count in dropped.items():
        print(f"{out}: {count} segments left out: {why}. Once mended, delete {out} and run again")
    clips.write_meta(out, "calvin", fps=30, command=shlex.join(sys.argv), segments=len(todo))
    print("\n".join(clips.summary(out)))


def pack_shard(split, out, index, part, dropped):
    """Write one shard; count in `dropped` the segments that can't be used, by reason."""
    with clips.ShardWriter(out, index, CAMERAS) as writer:
        for segment in part:
            try:
                clip = read_clip(split, segment)
            except ValueError as reason:
                dropped[str(reason)] += 1
            else:
                writer.add(**clip)


def main():
    parser = clips.Parser(description="Pack CALVIN's language-annotated segments into clips.")
    parser.add_argument("dataset", type=pathlib.Path, help="a directory with training/, validation/ or both")
    parser.add_argument("out", type=pathlib.Path, help="where the packed data sets go")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N segments of each split")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    splits = [args.dataset / name for name in ("training", "validation") if (args.dataset / name).is_dir()]
    try:
        if not splits:
            raise clips.ClipsError(f"{args.dataset} has no training/ or validation/: no CALVIN data set")
        for split in splits:
            pack(split, args.out / split.name, args.limit)
    except (clips.ClipsError, OSError) as error:       # OSError: OUT can't be written, the disk is full
        sys.exit(f"prepare_calvin.py: {error}")


if __name__ == "__main__":
    main()
