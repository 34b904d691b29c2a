"""What tests share: small models and data sets, commands run in this process, golden figures."""
import contextlib
import io
import json
import os
import pathlib
import pickle
import runpy
import signal
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as gr1
from nanogr import clips, common, encoders, tokenizer
from nanogr.worlds import tabletop

ROOT = pathlib.Path(__file__).resolve().parents[1]
CAMERAS = ["rgb_static", "rgb_gripper"]
SIZES = dict(window=4, future=2, width=32, layers=2, heads=4, dropout=0.0, vision_dim=32, text_dim=16,
             latents=3, resampler_depth=1, resampler_heads=2, resampler_head_dim=8, decoder_depth=1,
             decoder_heads=4)


CALVIN_TASKS = set(
    [f"{verb}_{colour}_block_{where}" for colour in ("red", "blue", "pink")
     for verb, places in (("lift", "table slider drawer"), ("push", "left right"), ("rotate", "left right"))
     for where in places.split()]
    + "move_slider_left move_slider_right open_drawer close_drawer place_in_slider place_in_drawer"
      " push_into_drawer stack_block unstack_block turn_on_lightbulb turn_off_lightbulb turn_on_led"
      " turn_off_led".split())


GATES = pytest.mark.parametrize("gate", [{}, dict(norm_pixels=False, copy_gate=True)])


def small_config(**changes):
    """GR1Config of a model with every part of the real one, at a thousandth of its size."""
    return gr1.GR1Config.from_dict(dict(preset="tiny", cameras=dict.fromkeys(CAMERAS, 32)) | SIZES | changes)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = small_config(**changes)
    return gr1.GR1(config, *encoders.build_encoders(config)).eval()


def small_tokenizer(seed=0):
    """An untrained TinyTokenizer whose codes depend on the picture all the same."""
    torch.manual_seed(seed)
    made = tokenizer.TinyTokenizer().eval()
    for p in made.encoder.parameters():
        p.data *= 4
    return made


def random_window(config, batch=2):
    """What GR1.forward takes, drawn at random: pixels, sentences, robot_obs."""
    rng = torch.Generator().manual_seed(0)
    pixels = {camera: torch.randn(batch, config.window, 3, side, side, generator=rng)
              for camera, side in config.cameras.items()}
    return pixels, [f"do {i}" for i in range(batch)], torch.randn(batch, config.window, 15, generator=rng)


def same(a, b, within=1e-6):
    return torch.allclose(a, b, rtol=0, atol=within)


def run(script, *arguments):
    """Run a script, or "-m MODULE", as __main__ in this process (a new one imports torch for seconds):
    -> status, output.
    """
    module, output = script.removeprefix("-m "), io.StringIO()
    with mock.patch.object(sys, "argv", [str(ROOT / script), *map(str, arguments)]), \
            contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            if module == script:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                with mock.patch.dict(sys.modules):       # runpy warns of a module that is there already
                    sys.modules.pop(module, None)
                    runpy.run_module(module, run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)      # train.py had its own
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if isinstance(status, str):                                           # sys.exit(text): printed, status 1
        return 1, output.getvalue() + status
    return int(status or 0), output.getvalue()


def run_apart(script, *arguments):
    """The same in a process of its own, for a script whose workers send it what it defines itself."""
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def fails_in_one_line(script, *arguments, words):
    """The command ends with a status, without a traceback and with a line that holds all the words."""
    status, text = run(script, *arguments)
    assert status and any(all(word in line for word in words) for line in text.splitlines()), text
    assert "Traceback" not in text
    return True


def refused(words, call, *arguments, **named):
    """The call raises a user's error: one line, in which the pattern `words` is found."""
    with pytest.raises((gr1.ModelError, common.UserError), match=words) as error:
        call(*arguments, **named)
    return "\n" not in str(error.value)


class Bomb:
    """Unpickled by the ordinary pickle, it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Reduced:
    """Pickled, it says: call this with that, then set this state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class Waits(TorchDispatchMode):
    """Lists what makes the host wait for the device: copies between them, values and shapes that it reads."""
    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 or any(x in str(operation) for x in ("local_scalar", "nonzero", "masked_select")):
            self.found.append(str(operation))
        return out


class Recorded(nn.Module):
    """An encoder that says what the official one said, whatever it is shown."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = list(answers)

    def forward(self, _):
        return self.answers.pop(0)


def golden_file(path, prefix="", **more):
    """The golden weights as the authors store theirs: a torch file with a state_dict. -> (path, golden)."""
    golden = np.load(ROOT / "tests/fixtures/official_small.npz")
    state = {prefix + name[7:]: torch.tensor(golden[name]) for name in golden if name.startswith("weight/")}
    torch.save({"state_dict": state | more, "epoch": 3}, path)
    return path, golden


def golden_config(**changes):
    return small_config(**dict(vision_dim=24, resampler_depth=2, decoder_depth=2, decoder_heads=16) | changes)


def make_clip(number, length, actions=True, size=32):
    """A clip of flat frames: gray = 10 * step on static, 5 more on gripper; its last action is unknown."""
    gray = 10 * np.arange(length, dtype=np.uint8)[:, None, None, None]
    frames = dict(rgb_static=np.broadcast_to(gray, (length, size, size, 3)),
                  rgb_gripper=np.broadcast_to(gray + 5, (length, 16, 24, 3)))
    clip = dict(frames=frames, sentence=f"clip {number}", task=f"task {number // 2}", episode=number // 2)
    steps = np.arange(length, dtype=np.float32)[:, None]
    rows = dict(robot_obs=steps + np.arange(15, dtype=np.float32) / 100,
                rel_actions=-steps + np.arange(7, dtype=np.float32) / 100)
    rows["rel_actions"][-1:] = np.nan
    return clip | rows if actions else clip


def write_shard(directory, index, *content):
    with clips.ShardWriter(directory, index, CAMERAS) as writer:
        for clip in content:
            writer.add(**clip)
    return directory


def make_data_set(directory, lengths=((12, 3, 7), (9, 20)), actions=True):
    """Shards of clips with the given lengths; two clips in a row share an episode and a task."""
    number = iter(range(1000))
    for index, shard in enumerate(lengths):
        write_shard(directory, index, *(make_clip(next(number), length, actions) for length in shard))
    clips.write_meta(directory, "test", 30, "a command")
    return directory


HEADER = (np.lib.format.magic(1, 0) + b"\x76\0"
          + b"{'descr': '|O', 'fortran_order': False, 'shape': ()}".ljust(117) + b"\n")


def make_calvin(split, segments, recordings=((10, 19), (20, 40))):
    """A split in CALVIN's layout: frames 10 .. 40, recordings and segments as given."""
    (split / "lang_annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10, 41):
        np.savez(split / f"episode_{i:07d}.npz", rgb_static=np.full((200, 200, 3), i, np.uint8),
                 rgb_gripper=np.full((84, 84, 3), 2 * i, np.uint8), robot_obs=rng.normal(size=15),
                 rel_actions=np.full(7, i / 100), depth_static=np.zeros((2, 2)))
    np.save(split / "ep_start_end_ids.npy", np.array(recordings))
    annotate(split, segments)
    return split


def annotate(split, segments, core=b"numpy._core"):
    """Write the annotation file as a numpy does whose core has this name."""
    language = dict(ann=[f"do {a}" for a, _ in segments], task=[np.str_("lift")] * len(segments),
                    emb=np.zeros((len(segments), 1, 384), np.float32))
    content = np.array(dict(language=language, info=dict(indx=segments, episodes=[])), object)
    path = split / "lang_annotations/auto_lang_ann.npy"
    pickled = pickle.dumps(content, 3).replace(b"numpy._core", b"numpy.core")
    path.write_bytes(HEADER + pickled.replace(b"numpy.core", core))
    assert core + b".multiarray" in path.read_bytes()


def eval_settings(**changes):
    """What eval_calvin.parse makes of a command line, for the tabletop."""
    settings = dict(env="tabletop", scene="D", language="validation", shuffle_language=False, gif=0,
                    serve=False, seed=0, steps=tabletop.STEPS, policy="noop", sample_z=False)
    return types.SimpleNamespace(**settings | changes)


def training(stage, data, out, *more, **model):
    """A command line of a short run: six steps of four windows."""
    sizes = [f"{key}={value}" for key, value in (SIZES | model).items()]
    return ["train.py", "--stage", stage, "--data", data, "--out", out, "--init", "none", "--steps", 6,
            "--batch", 4, "--eval-every", 3, "--eval-batches", 1, "--log-every", 1, *more, "--model", *sizes]


def read_log(out, key):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}
