"""
The tests: `python -m pytest test_model.py`. CPU, no network, about two minutes on two cores.

Each docstring names the bug that its test would catch. In order: helpers, model.py, clips.py, tabletop.py and
the scripts, README. Reads fixtures/official_small.npz: inputs, weights and outputs of the official model
(bytedance/GR-1) at a small size; and, if it is there, ../shared/data/ego4d_mini, real videos in Ego4D's
layout.
"""
import argparse
import ast
import collections
import contextlib
import dataclasses
import errno
import fractions
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"] = "", "1"        # before torch reads them

import av
import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import eval_calvin
import model as gr1
import prepare_calvin
import prepare_ego4d
import sample
import train
from nanogr import bench, clips, common, encoders, policy, weights
from nanogr.worlds import calvin, tabletop

ROOT = pathlib.Path(__file__).resolve().parent
CAMERAS = ["rgb_static", "rgb_gripper"]
SIZES = dict(window=4, future=2, width=32, layers=2, heads=4, dropout=0.0, vision_dim=32, text_dim=16,
             latents=3, resampler_depth=1, resampler_heads=2, resampler_head_dim=8, decoder_depth=1,
             decoder_heads=4)


GATES = pytest.mark.parametrize("gate", [{}, dict(norm_pixels=False, copy_gate=True)])


# ------------------------------------------------------------------------------------------ helpers

@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    signal.alarm(400)                          # what would hang for ever kills the tests instead
    yield
    signal.alarm(0)


def small_config(**changes):
    """GR1Config of a model with every part of the real one, at a thousandth of its size."""
    return gr1.GR1Config.from_dict(dict(preset="tiny", cameras=dict.fromkeys(CAMERAS, 32)) | SIZES | changes)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = small_config(**changes)
    return gr1.GR1(config, *encoders.build_encoders(config)).eval()


def random_window(config, batch=2):
    """What GR1.forward takes, drawn at random: pixels, sentences, robot_obs."""
    rng = torch.Generator().manual_seed(0)
    pixels = {camera: torch.randn(batch, config.window, 3, side, side, generator=rng)
              for camera, side in config.cameras.items()}
    return pixels, [f"do {i}" for i in range(batch)], torch.randn(batch, config.window, 15, generator=rng)


def same(a, b, within=1e-6):
    return torch.allclose(a, b, rtol=0, atol=within)


def run(script, *arguments):
    """Run a script as __main__ in this process (a new one imports torch for seconds): -> status, output."""
    output = io.StringIO()
    with mock.patch.object(sys, "argv", [str(ROOT / script), *map(str, arguments)]), \
            contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
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


# ------------------------------------------------------------------------------------------ model.py

def test_token_table():
    """Catches a token too many or misplaced in either stage: official weights would load, act at random."""
    count = lambda *stage, **changes: [
        row[:2] for row in gr1.token_table(gr1.preset_config("gr1", *stage, **changes))]
    context = [("language", 1), ("state", 1), ("rgb_static latents", 9), ("rgb_static CLS", 1),
               ("rgb_gripper latents", 9), ("rgb_gripper CLS", 1)]
    videos = [("[OBS] rgb_static", 10), ("[OBS] rgb_gripper", 10)]
    assert count() == context + [("[ACT]", 1)] + videos and sum(n for _, n in count()) == 43
    assert count("pretrain") == [context[0], *context[2:4], videos[0]]
    assert count(video=False, chunk=10) == context + [("[ACT]", 10)]
    config, finetune = gr1.preset_config("gr1", "pretrain"), gr1.preset_config("gr1")
    assert [query for *_, query in gr1.token_table(finetune)] == [False] * 6 + [True] * 3
    assert (config.future, config.window, finetune.future) == (1, 10, 3)
    assert gr1.preset_config("gr1", "pretrain", future=5).future == 5
    status, text = run("model.py", "--preset", "tiny")
    total = 5 * sum(count for _, count, _ in gr1.token_table(gr1.preset_config("tiny")))
    assert status == 0 and all(words in text for words in (f"= {total}", "[ACT] t+1", "trunk"))


def test_mask_is_the_drawn_one():
    """Catches a mask that is off by one, and a drawing that no longer shows the code."""
    rows = re.findall(r"^ *\[?[abcAO]\]?[01] +([#.](?: +[#.])+)$", gr1.attention_mask.__doc__, re.M)
    drawn = torch.tensor([[mark == "#" for mark in row.split()] for row in rows])
    assert drawn.shape == (10, 6) and torch.equal(gr1.attention_mask(2, 3, [0, 0, 1, 1]), drawn)


@GATES
def test_future_does_not_leak(gate):
    """Catches a policy that peeks: a later frame or state may change later answers, never an earlier one."""
    model = small_model(**gate)
    for key in [*CAMERAS, "robot_obs"]:
        pixels, sentences, robot_obs = random_window(model.config)
        before = model(pixels, sentences, robot_obs)
        changed = robot_obs if key == "robot_obs" else pixels[key]
        changed[:, 2] += torch.randn(changed[:, 2].shape)
        after = model(pixels, sentences, robot_obs)
        for name in before:
            assert same(before[name][:, :2], after[name][:, :2]), (key, name)
            assert all(not same(before[name][:, t], after[name][:, t]) for t in (2, 3)), (key, name)


def test_queries_are_alone():
    """Catches a query that is also a key: [OBS] would change the action, and acting without it be wrong."""
    model = small_model()
    inputs = random_window(model.config)
    for query, own in (model.query_act, ["arm", "gripper"]), *((model.query_obs[c], [c]) for c in CAMERAS):
        before = model(*inputs)
        query.data += torch.randn(query.shape)
        after = model(*inputs)
        assert [name for name in before if not same(before[name], after[name])] == own


def test_padding_changes_nothing():
    """Catches padding that is attended to, or is expected at the wrong end of the window."""
    model = small_model()
    inputs = pixels, sentences, robot_obs = random_window(model.config)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    before, unmasked = model(*inputs, mask), model(*inputs)
    for x in (*pixels.values(), robot_obs):
        x[0, 2:] = 100 * torch.randn(x[0, 2:].shape)
    after = model(*inputs, mask)
    short = model({c: x[:, :2] for c, x in pixels.items()}, sentences, robot_obs[:, :2])
    for name in before:
        assert same(before[name], after[name])              # the padded steps' own queries too see no padding
        assert same(before[name][:, :2], short[name], 1e-5) and same(before[name][1], unmasked[name][1], 1e-5)
        assert not same(before[name][0, 2:], unmasked[name][0, 2:])


@GATES
def test_video_at_asks_for_less(gate):
    """Catches answers given to the wrong timesteps when only some steps foresee."""
    model = small_model(chunk=2, **gate)
    inputs = random_window(model.config)
    everything, some = model(*inputs), model(*inputs, video_at=torch.tensor([3, 1]))
    for name, full in everything.items():
        assert same(some[name], full[:, [3, 1]] if name in CAMERAS else full)
    assert everything["arm"].shape == (2, 4, 2, 6) and everything["rgb_static"].shape == (2, 4, 4, 768)


def test_fast_trunk_equals_the_naive_one():
    """Catches a shortcut that is not exact, in values or gradients, and any token that looks ahead."""
    trunk = small_model().double().trunk
    trunk.unused_wte.requires_grad_(False)
    context, queries = (torch.randn(2, n, 32, dtype=torch.double, requires_grad=True) for n in (40, 36))
    mask, weights = torch.tensor([[True] * 4, [True] * 3 + [False]]), torch.randn_like(queries)
    tokens, at = context.unflatten(1, (4, 10)), torch.arange(4).repeat_interleave(9)
    results = []
    for out in trunk(tokens, queries, at, mask), bench.naive_trunk(trunk, tokens, queries, at, mask):
        leaves = [context, queries, *(p for p in trunk.parameters() if p.requires_grad)]
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True)])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(*results, strict=True))


def test_pixels_and_patches_by_hand():
    """Catches patches column by column or channel first, another mean, BGR, 0..255 for 0..1."""
    image = torch.tensor([[[100 * c + 10 * y + x for x in range(4)] for y in range(4)] for c in (1, 2, 3)])
    second = [102, 202, 302, 103, 203, 303, 112, 212, 312, 113, 213, 313]                   # top right
    assert gr1.patchify(image, 2)[1].tolist() == second
    assert gr1.patchify(image, 2)[2, :3].tolist() == [120, 220, 320]                        # bottom left
    images = torch.randn(2, 5, 3, 32, 32)
    assert torch.equal(policy.unpatchify(gr1.patchify(images, 16), 16), images)
    frames = torch.randint(0, 256, (2, 3, 3, 24, 24), dtype=torch.uint8)
    pixels = gr1.to_pixels(frames, 24)
    for c, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        assert same(pixels[1, 2, c, 3, 4], (frames[1, 2, c, 3, 4] / 255 - mean) / std)
    assert torch.equal(policy.to_images(pixels), frames.permute(0, 1, 3, 4, 2))
    flat = torch.full((1, 1, 3, 20, 20), 77, dtype=torch.uint8)
    assert all((policy.to_images(gr1.to_pixels(flat, side)) == 77).all() for side in (16, 32))


def test_shift_is_one_for_a_window():
    """Catches a camera that shakes within a window, black borders, rows taken for columns."""
    frames = torch.empty(200, 3, 3, 20, 20, dtype=torch.uint8)
    frames[:, :, 0], frames[:, :, 1] = torch.arange(20)[:, None], torch.arange(20)          # row, column
    frames[:, :, 2] = torch.arange(3)[:, None, None]                                        # timestep
    dy, dx = by = torch.randint(-2, 3, (2, 200))
    shifted = train.shift(frames, by.T)
    rows, columns = ((torch.arange(20) + d[:, None]).clamp(0, 19) for d in (dy, dx))
    assert (shifted[:, :, 0] == rows[:, None, :, None]).all()
    assert (shifted[:, :, 1] == columns[:, None, None, :]).all()
    assert torch.equal(shifted[:, :, 2], frames[:, :, 2])


def by_hand(out, batch, pixels, config, video_at):
    """The losses as the paper's formulas, term by term."""
    terms = collections.defaultdict(list)
    for b, t, k in np.argwhere(batch["action_mask"].numpy()):
        target, logit = batch["rel_actions"][b, t, k].numpy(), out["gripper"][b, t, k].item()
        distance = np.abs(out["arm"][b, t, k].numpy() - target[:6])
        terms["arm"].append(np.where(distance < 1, distance ** 2 / 2, distance - 0.5).mean())
        terms["gripper"].append(math.log(1 + math.exp(-logit * target[6])))
    for b, t, camera in ((b, t, c) for b, t in np.argwhere(batch["future_mask"].numpy()) for c in CAMERAS):
        if t in video_at:
            target = gr1.patchify(pixels[camera][b, t + config.future], 16).numpy()
            if config.norm_pixels:
                target = (target - target.mean(1, keepdims=True)) / target.std(1, ddof=1, keepdims=True)
            terms[camera].append(((out[camera][b, video_at.index(t)].numpy() - target) ** 2).mean())
    return {name: np.mean(values) for name, values in terms.items()}


@pytest.mark.parametrize("video_at, norm_pixels", [(None, True), ([3, 0], True), ([1], False)])
def test_losses_by_hand(video_at, norm_pixels):
    """Catches a mean over padding, targets a step off, biased variance, a gripper with its sign turned."""
    config = small_config(chunk=2, norm_pixels=norm_pixels)
    at = video_at or list(range(4))
    rel_actions = 2 * torch.randn(3, 4, 2, 7)
    rel_actions[..., 6] = rel_actions[..., 6].sign()
    batch = dict(rel_actions=rel_actions, action_mask=torch.rand(3, 4, 2) < 0.6,
                 future_mask=torch.rand(3, 4) < 0.7)
    batch["future_mask"][0] = True
    pixels = {c: torch.randn(3, 4 + config.future, 3, 32, 32) for c in CAMERAS}
    out = dict(arm=torch.randn(3, 4, 2, 6), gripper=torch.randn(3, 4, 2),
               **{c: torch.randn(3, len(at), 4, 768) for c in CAMERAS})
    batch |= {"video_at": torch.tensor(video_at)} if video_at else {}
    losses = gr1.losses(out, batch, pixels, config)
    expected = by_hand(out, batch, pixels, config, at)
    assert set(losses) == {"arm", "gripper", *CAMERAS}
    assert all(abs(losses[name].item() - expected[name]) < 1e-4 for name in losses)
    nothing = batch | {key: torch.zeros_like(batch[key]) for key in ("action_mask", "future_mask")}
    assert all(value == 0 for value in gr1.losses(out, nothing, pixels, config).values())
    counts, few = train.count_targets(batch), torch.tensor([0.5, 0.5])           # one known target in two parts
    for name, value in gr1.losses(out, batch, pixels, config, few).items():
        assert same(value * 0.5, losses[name] * counts[0 if name in ("arm", "gripper") else 1], 1e-3)


def test_foresight_is_judged_and_drawn():
    """Catches pictures scaled by another patch's spread; a ratio that counts padding or what stands still."""
    config, frame = small_config(), torch.randn(2, 3, 32, 32)
    assert same(policy.draw(gr1.video_target(frame, config), frame, config), frame, 1e-5)
    config, x = small_config(norm_pixels=False), torch.rand(2, 6, 3, 32, 32)
    assert torch.equal(policy.draw(gr1.video_target(frame, config), torch.zeros_like(frame), config), frame)
    x[..., 16:] = x[:, :1, ..., 16:]                                           # the right half never changes
    now, future = gr1.patchify(x[:, :4], 16), gr1.patchify(x[:, 2:], 16)
    perfect = future.clone()
    perfect[:, :, [1, 3]] += 1                                                 # but for that half
    errors = lambda out, real=True: policy.change_errors(
        dict.fromkeys(CAMERAS, out), dict.fromkeys(CAMERAS, x), torch.full((2, 4), real), config)
    assert errors(now).shape == (2, 2) and (errors(now) > 0).all() and same(*errors(now).T, 1e-4)
    assert (errors(perfect)[:, 0] == 0).all() and same(errors(perfect)[:, 1], errors(now)[:, 1], 1e-4)
    assert (errors(now, real=False) == 0).all()


def test_copy_gate_keeps_the_present_frame():
    """Catches a gate that mixes up pixels, channels or timesteps, or that lets the future frame through."""
    model = small_model(norm_pixels=False, copy_gate=True)
    pixels, *inputs = random_window(model.config)
    with torch.no_grad():
        model.video_head.pixels.bias[768:], model.video_head.pixels.weight[:] = 50, 0
        kept = model(pixels, *inputs, video_at=torch.tensor([2, 1]))
        assert all(same(kept[c], gr1.patchify(pixels[c][:, [2, 1]], 16), 1e-5) for c in CAMERAS)
        one = 16 * 5 + 7                                       # a pixel of each patch: row 5, column 7
        model.video_head.pixels.bias[768 + one] = -50
        model.video_head.pixels.bias[:768] = torch.arange(768.)
        painted = policy.unpatchify(model(pixels, *inputs)["rgb_static"], 16)
    colour = torch.arange(3 * one, 3 * one + 3.0)[:, None, None]
    assert same(painted[..., 5::16, 7::16], colour.expand(3, 2, 2), 1e-3)
    painted[..., 5::16, 7::16] = pixels["rgb_static"][..., 5::16, 7::16]
    assert same(painted, pixels["rgb_static"], 1e-5)
    assert refused("needs norm_pixels false", small_config, copy_gate=True)


@pytest.mark.parametrize("robot", [False, True])
def test_one_batch_is_learned(robot):
    """Catches a part that is cut off from the loss: either stage must learn one batch by heart."""
    changes = {} if robot else dict(cameras=dict(rgb_static=32), robot=False, future=1)
    model, config = small_model(**changes).train(), small_config(**changes)
    slopes = torch.rand(4, config.window + config.future, 2, 3, 1, 1)
    ramps = slopes[:, :, 0] * torch.arange(32) + slopes[:, :, 1] * torch.arange(32)[:, None]
    batch = dict(frames={c: (ramps * 4).byte() for c in config.cameras}, sentences=["a", "b", "c", "d"],
                 mask=torch.ones(4, 4, dtype=bool), future_mask=torch.ones(4, 4, dtype=bool))
    if robot:
        actions = torch.rand(4, 4, 1, 7) - 0.5
        batch |= dict(rel_actions=torch.cat([actions[..., :6], actions[..., 6:].sign()], -1),
                      robot_obs=torch.randn(4, 4, 15), action_mask=torch.ones(4, 4, 1, dtype=bool))
    optimizer, history = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0), []
    for _ in range(150):
        pixels = train.see(batch, config)
        out = train.predict(model, config, batch, pixels)
        losses = gr1.losses(out, batch, pixels, config)
        history.append({name: value.item() for name, value in losses.items()})
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, start in history[0].items():
        assert history[-1][name] < start / 5, (name, start, history[-1][name])


def test_keypoints_say_where_and_what():
    """Catches a keypoint with row and column swapped, upside down, at another scale, or of another cell."""
    vision, images = encoders.TinyVision(8, points=2), torch.zeros(3, 3, 32, 32)
    for i, (row, column) in enumerate(((1, 6), (1, 7), (2, 6))):             # one bright cell of 8 x 8
        images[i, 0, 4 * row:4 * row + 4, 4 * column:4 * column + 4] = 1
    with torch.no_grad():
        for parameter in vision.parameters():
            parameter.zero_()
        vision.stem.weight[0, 0] = vision.maps.weight[0, 0] = 1.0            # cell feature 0, map 0: red
        vision.cls.weight[[0, 1, 2], [0, 1, 4]] = 1.0                        # map 0's column, row and peak
        cls, points = vision(images)
    assert points.shape == (3, 2, 8)
    column, row = cls[:, 0], cls[:, 1]
    assert column[0] > 0 > row[0] and column[1] - column[0] > 0.3 and same(row[1], row[0], 1e-3)
    assert row[2] - row[0] > 0.3 and same(column[2], column[0], 1e-3)
    assert same(cls[0, 2], torch.nn.functional.gelu(torch.tensor(16.0)), 1e-3)


def test_the_papers_model():
    """Catches a layer too many or too wide; frozen encoders that train, are reset or fill the checkpoints."""
    config = gr1.preset_config("gr1")
    encoders = encoders.build_encoders(config, "none", "none")
    total = lambda: [sum(p.abs().sum().item() for p in encoder.parameters()) for encoder in encoders]
    before, model = total(), gr1.GR1(config, *encoders).train()
    assert total() == before
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    assert sum(n for trained, n in sizes if trained) == 45_988_039
    assert round(sum(n for _, n in sizes) / 1e6) == 195
    assert model.trunk.training and not any(part.training for x in encoders for part in x.modules())
    assert sum(x.numel() for x in model.trained_state().values()) == 45_988_039
    assert any(name.startswith("vision.") for name in small_model().trained_state())      # trained, so stored
    cls, patches = model.vision(torch.randn(1, 3, 224, 224))
    text = model.text(["open the drawer", "lift the block", "open the drawer"])
    assert cls.shape == (1, 768) and patches.shape == (1, 196, 768) and text.shape == (3, 512)
    assert not (cls.requires_grad or text.requires_grad)
    assert torch.equal(text[0], text[2]) and not torch.allclose(text[0], text[1])


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
    weights = {prefix + name[7:]: torch.tensor(golden[name]) for name in golden if name.startswith("weight/")}
    torch.save({"state_dict": weights | more, "epoch": 3}, path)
    return path, golden


def golden_config(**changes):
    return small_config(**dict(vision_dim=24, resampler_depth=2, decoder_depth=2, decoder_heads=16) | changes)


@pytest.mark.parametrize("cameras, robot, steps", [(CAMERAS, True, 4), (CAMERAS, True, 3),
                                                   (CAMERAS[:1], True, 4), (CAMERAS, False, 4)])
def test_parity_with_the_official_model(tmp_path, capsys, cameras, robot, steps):
    """Catches any departure from the official model: names, mask, token order, norms, activations, targets;
    a smaller config takes what it has of the file, says what it leaves out, and runs.
    """
    path, golden = golden_file(tmp_path / "snapshot.pt", **{
        "transformer.wte.weight": torch.ones(1, 32), "transformer.h.1.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4), "model_clip.x": torch.ones(2)})
    tensors = {name: torch.tensor(golden[name]) for name in golden if name.startswith(("in/", "out/"))}
    images = [tuple(tensors[f"in/{part}_{camera}"][:, :steps].flatten(0, 1) for part in ("cls", "patch"))
              for camera in ("static", "gripper")]
    config = golden_config(cameras=dict.fromkeys(cameras, 32), robot=robot)
    model = gr1.GR1.from_pretrained(path, config, Recorded(*images), Recorded(tensors["in/text"]))
    said = capsys.readouterr().out
    assert "the authors' GR-1" in said and "random" not in said
    assert all(word in said for word in ("model_clip.x", "causal mask", "sin-cos"))
    assert ("camera rgb_gripper" in said) == (len(cameras) == 1) and ("the robot" in said) == (not robot)
    assert (model.trunk.unused_wte == 1).all()
    pixels = {c: gr1.to_pixels(tensors[f"in/{c}"][:, :steps], 32) for c in cameras}
    robot_obs = torch.zeros(2, steps, 15)
    robot_obs[..., :6] = tensors["in/arm"][:, :steps]
    robot_obs[..., 14] = 2 * tensors["in/gripper"][:, :steps] - 1
    out = model(pixels, ["a", "b"], robot_obs, tensors["in/mask"][:, :steps].bool())
    if len(cameras) < 2 or not robot:                       # fewer tokens: other figures, and no golden ones
        assert set(out) == set(cameras) | ({"arm", "gripper"} if robot else set())
        return
    targets = [gr1.video_target(pixels[c], config) for c in CAMERAS]
    for name, value in (("arm_action_preds", out["arm"].squeeze(2)), ("gripper_action_preds", out["gripper"]),
                        ("obs_preds", out["rgb_static"]), ("obs_hand_preds", out["rgb_gripper"]),
                        ("obs_targets", targets[0]), ("obs_hand_targets", targets[1])):
        assert same(value, tensors[f"out/{name}"][:, :steps], 1e-4), name


def test_ego4d_weights_of_the_authors(tmp_path, capsys):
    """Catches a start from Ego4D that drops or misplaces tensors, or does so without a word."""
    path, golden = golden_file(tmp_path / "pretrained.pt", "model.", **{
        "model.embed_goal_image.weight": torch.ones(3), "model.text_encoder.x": torch.ones(2)})
    state = torch.load(path, weights_only=True)["state_dict"]
    robot = ("embed_arm", "embed_gripper", "embed_state", "action_queries", "pred_", "embed_hand", "obs_hand")
    torch.save({"state_dict": {k: v for k, v in state.items() if not k[6:].startswith(robot)}}, path)
    model = gr1.GR1.from_pretrained(path, golden_config(), Recorded(), Recorded())
    said = capsys.readouterr().out
    assert "GR-MG" in said and "goal image" in said
    anew = said.split("random until trained")[1]
    assert all(part in anew for part in weights.finetuning_parts(golden_config().cameras))
    assert same(model.embed_language.weight, torch.tensor(golden["weight/embed_lang.weight"]))
    assert same(model.trunk.blocks[1].kv.weight.T,
                torch.tensor(golden["weight/transformer.h.1.attn.c_attn.weight"])[:, 32:])
    video = golden_config(cameras={"rgb_static": 32}, robot=False)
    gr1.GR1.from_pretrained(path, video, Recorded(), Recorded())
    assert capsys.readouterr().out.endswith("random until trained: trunk.unused_wte\n")


def test_bad_official_files(tmp_path):
    """Catches a file that is loaded by halves, runs code, or fails with a traceback."""
    config = golden_config()
    load = lambda path: gr1.GR1.from_pretrained(path, config, Recorded(), Recorded())
    path, bad = golden_file(tmp_path / "good.pt")[0], tmp_path / "bad.pt"
    bad.write_bytes(b"")
    assert refused("not a readable weights file", load, bad)
    bad.write_bytes(path.read_bytes()[:20_000])
    assert refused("not a readable weights file", load, bad)
    bad.write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
    assert refused("not a plain weights file", load, bad)
    torch.save(Bomb(tmp_path / "bang"), bad)
    assert refused("not a plain weights file", load, bad) and not (tmp_path / "bang").exists()
    torch.save({"state_dict": {"layer1.weight": torch.ones(2)}}, bad)
    assert refused("no GR-1 checkpoint.*layer1.weight", load, bad)
    torch.save([1, 2], bad)
    assert refused("no weights file.*no tensor", load, bad)
    for name, tensor, words in (("embed_img.weight", torch.ones(32, 25), "another shape: embed_img.weight"),
                                ("embed_extra.weight", torch.ones(2), "no place for embed_extra.weight"),
                                ("transformer.h.7.ln_1.bias", torch.ones(32), "no place for transformer.h.7"),
                                ("decoder_pos_embed", torch.ones(1, 4, 32), "decoder_pos_embed")):
        golden_file(bad, **{name: tensor})
        assert refused(words, load, bad)
    state = torch.load(path, weights_only=True)["state_dict"]
    del state["decoder_embed.bias"]
    torch.save({"state_dict": state}, bad)
    assert refused("lacks video_head.embed.bias", load, bad)
    assert refused("no such file", load, tmp_path / "none.pt")
    bad.write_bytes(b"\x80\x02X\x01")
    assert refused("not a readable weights file", load, bad)


def test_the_authors_file_at_full_size(tmp_path):
    """Catches a tensor of the real model that is unknown, misplaced, lost or of another size."""
    lines = (ROOT / "tests/fixtures/official_keys.txt").read_text().splitlines()[2:]
    shapes = {name: tuple(map(int, shape.split("x"))) if shape else () for name, _, shape in
              (line.partition(" ") for line in lines)}
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    config = gr1.GR1Config()
    model = gr1.GR1(config, Recorded(), Recorded())
    state["decoder_pos_embed"] = model.video_head.positions_rgb_static[None].clone()
    torch.save({"state_dict": state}, tmp_path / "snapshot.pt")
    said = model.load_pretrained(weights.read_checkpoint(tmp_path / "snapshot.pt"), "snapshot.pt")
    left = sum(int(re.match(r"  left out (\d+)", line)[1]) for line in said.splitlines()[1:])
    assert "random" not in said and said.startswith(f"{len(state) - left} of the {len(state)} tensors")
    learned = {name: x for name, x in model.trained_state().items()}
    assert sum(x.numel() for x in learned.values()) == 45_988_039
    seen = {float(value) for x in learned.values() for value in x.flatten()[:1]}           # none came twice
    assert len(seen) == len(state) - left and all((x == x.flatten()[0]).all() for x in learned.values())


@pytest.mark.parametrize("changes", [dict(chunk=1), dict(chunk=2), dict(norm_pixels=False, copy_gate=True)])
def test_policy_equals_the_full_forward(changes):
    """Catches what a policy may wrongly keep: features at an old place in the window, sentence or episode."""
    model, rng = small_model(**changes), np.random.default_rng(0)
    policy, history, config = policy.Policy(model), [], model.config
    assert refused("call step before", policy.predicted_frames)
    assert refused("no .OBS", policy.Policy(small_model(video=False)).predicted_frames)
    for step in range(25):
        if step in (9, 20):
            policy.reset()
            history.clear()
        sentence = "open the drawer" if step < 13 else "lift the block"                # 13 is amid an episode
        history.append(dict(rgb_static=rng.integers(0, 256, (40, 40, 3), np.uint8),
                            rgb_gripper=rng.integers(0, 256, (32, 32, 3), np.uint8),
                            robot_obs=rng.normal(size=15)))
        seen = {key: torch.tensor(np.stack([x[key] for x in history[-config.window:]]))[None]
                for key in history[-1]}
        pixels = {c: gr1.to_pixels(seen[c].permute(0, 1, 4, 2, 3), 32) for c in CAMERAS}
        with torch.no_grad():
            out = model(pixels, [sentence], seen["robot_obs"].float())
        arm, gripper = policy.actions(history[-1], sentence)
        assert arm.shape == (model.config.chunk, 6)
        assert np.abs(arm - out["arm"][0, -1].numpy()).max() < 1e-5
        assert np.abs(gripper - out["gripper"][0, -1].numpy()).max() < 1e-5, step
        for c, frame in policy.predicted_frames().items():
            drawn = policy.to_images(policy.draw(out[c][0, -1], pixels[c][0, -1], config)).numpy().astype(int)
            assert frame.shape == (32, 32, 3) and np.abs(frame - drawn).max() <= 1
            assert (frame == drawn).mean() > 0.99
    action = policy.step(history[0], "x")
    assert action.dtype == np.float32 and action.shape == (7,) and action[6] in (-1, 1)
    assert np.abs(action[:6]).max() > 1                        # not cut off: the official evaluation doesn't


def test_checkpoints_come_back_or_are_refused(tmp_path):
    """Catches a checkpoint that lacks a tensor or a setting, strict=False, tracebacks for damaged files."""
    model, load = small_model(seed=1, chunk=3, action_activation=True), gr1.GR1.from_pretrained
    weights.save_checkpoint(tmp_path, model, step=7)
    loaded, inputs = load(tmp_path), random_window(model.config)
    assert loaded.config == model.config and not loaded.training and weights.read_config(tmp_path)["step"] == 7
    answers, again = model(*inputs), loaded(*inputs)
    assert set(answers) == set(again) and all(torch.equal(answers[name], again[name]) for name in answers)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good = weights.read_bytes(), config.read_text()
    for words, changes in ((r"another shape: .* is \(.*32", dict(width=64)),
                           ("no trunk.blocks.1", dict(layers=1)), ("lacks trunk.blocks.2", dict(layers=3))):
        assert refused(words, load, tmp_path, dataclasses.replace(model.config, **changes))
    for old, new, words in (("width", "widht", "did you mean 'width'"), ("32,", '"32",', "must be int"),
                            ("}", "", "damaged"), ('"model"', '"modle"', "config.json")):
        config.write_text(good[1].replace(old, new))
        assert refused(words, load, tmp_path)
    config.write_text(good[1])
    for part in 0, 4, 100, -1:
        weights.write_bytes(good[0][:part])
        assert refused("model.safetensors", load, tmp_path)
    weights.unlink()
    assert refused("no such file", load, tmp_path) and refused("no checkpoint in", load, tmp_path / "nowhere")


def test_malicious_weights_are_not_run(tmp_path):
    """Catches torch.load without weights_only: a checkpoint from a stranger would run any code."""
    bomb, path = tmp_path / "exploded", tmp_path / "weights.pth"
    for legacy in False, True:
        torch.save(dict(model=Bomb(bomb)), path, _use_new_zipfile_serialization=not legacy)
        assert refused("weights.pth", weights.read_weights, path) and not bomb.exists()
    torch.load(path, weights_only=False)
    assert bomb.is_dir()                                                      # it is a working bomb
    torch.save(dict(model=dict(a=torch.ones(2))), path)
    assert weights.read_weights(path)["a"].tolist() == [1, 1]
    for damaged in b"", b"not weights", path.read_bytes()[:-40], path.read_bytes()[:40]:
        path.write_bytes(damaged)
        assert refused("weights.pth", weights.read_weights, path)


# ------------------------------------------------------------------------------------------ clips.py

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
    assert set(batch) == {"frames", "sentences", "mask", "future_mask"}
    assert len(person) == 1 and clips.open_data(tmp_path / "training")[1] is None
    status, text = run("clips.py", tmp_path)
    assert status == 0 and "5 clips, 51 frames" in text and "1 clips" in text


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
        assert fails_in_one_line("clips.py", tmp_path / str(n), words=["again"])
    (tmp_path / "empty").mkdir()
    assert refused("meta.json", clips.open_data, tmp_path / "empty")
    assert refused("no such directory", clips.open_data, tmp_path / "nowhere")
    data = clips.Clips(tmp_path / "jpeg")
    with open(tmp_path / "jpeg/00001.bin", "r+b") as file:
        file.seek(int(data.shards[1]["offsets"][2]))                 # shard 1, its clip 0 (3 of all), step 1
        file.write(b"\0\0\0\0")
    assert data.read(3, 0, 1) and data.read(2) and refused("shard 00001, clip 3", data.read, 3)
    assert fails_in_one_line("clips.py", tmp_path / "jpeg", words=["00001.bin", "clip 0", "crc32"])


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
        static = gr1.windows_of(batch["frames"]["rgb_static"], batch.get("offsets"), torch.arange(T + F))[b]
        assert (static.int() - 10 * real[:, None, None, None]).abs().max() <= 2
        assert torch.equal(batch["robot_obs"][b, :, 0], real[:T].float())
        for k in range(chunk):                                # the last step's action is unknown
            known = torch.arange(start + k, start + k + T) < length - 1
            assert torch.equal(batch["action_mask"][b, :, k], known)
            assert torch.equal(batch["rel_actions"][b, :, k, 0], -real[k:T + k].float() * known)
    assert starts == set(range(max(1, length - T + 1)))       # each place is seen, the last one too


def test_shared_frames_change_no_loss(tmp_path):
    """Catches a shortcut that is not exact, and one that encodes a frame as often as before."""
    data, model = clips.Clips(make_data_set(tmp_path)), small_model(cameras={"rgb_static": 32})
    config, losses, encoded = model.config, [], []
    batch = clips.Windows(data, range(5), 12, config.window, config.future, ["rgb_static"], per_clip=4)[0]
    steps = torch.arange(config.window + config.future)
    frames = gr1.windows_of(batch["frames"]["rgb_static"], batch["offsets"], steps)
    apart = batch | dict(frames={"rgb_static": frames}, offsets=None)
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
    windows = lambda **which: clips.Windows(data, range(len(data)), 4, 5, 3, CAMERAS, **which)
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


# ------------------------------------------------------------------------------------------ prepare_calvin.py

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


HEADER = (np.lib.format.magic(1, 0) + b"\x76\0"
          + b"{'descr': '|O', 'fortran_order': False, 'shape': ()}".ljust(117) + b"\n")


def annotate(split, segments, core=b"numpy._core"):
    """Write the annotation file as a numpy does whose core has this name."""
    language = dict(ann=[f"do {a}" for a, _ in segments], task=[np.str_("lift")] * len(segments),
                    emb=np.zeros((len(segments), 1, 384), np.float32))
    content = np.array(dict(language=language, info=dict(indx=segments, episodes=[])), object)
    path = split / "lang_annotations/auto_lang_ann.npy"
    path.write_bytes(HEADER + pickle.dumps(content, 3).replace(b"numpy._core", core))
    assert core + b".multiarray" in path.read_bytes()


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
                  "1 segments left out: a frame has a wrong", "2 segments left out: a frame can't be read",
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


RECONSTRUCT, SCALAR, FROM_BUFFER = (                    # numpy's constructors, wherever this numpy has them
    x.__reduce_ex__(5)[0] for x in (np.array(None), np.int64(1), np.zeros(1)))


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
        import pathlib, sys, clips, prepare_calvin
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


# ------------------------------------------------------------------------------------------ prepare_ego4d.py

EGO4D_MINI = ROOT.parent / "shared/data/ego4d_mini/v2"
TICK = 1 / 30000                                       # s; of the videos made here


def make_video(path, ticks=1000 * np.arange(240), codec="libx264", rotated=False, format="mp4", **options):
    """A video that tells each frame's number n: gray 16 * (n % 16) left, 16 * (n // 16) right.

    ticks: when it is shown; rotated: the video is to be turned clockwise for display, as a phone's may be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options = dict(preset="ultrafast") | options if codec == "libx264" else options
    noise = np.random.default_rng(0).integers(0, 5, (48, 64, 3), np.uint8)
    with av.open(str(path), "w", format, options=dict(movflags="faststart")) as container:
        stream = container.add_stream(codec, 30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, 30000)
        for n, tick in enumerate(ticks.tolist()):
            image = np.roll(noise, n, axis=1)
            image[:, :32] += 16 * (n % 16)
            image[:, 32:] += 16 * (n // 16)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = tick, stream.codec_context.time_base
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
    transport_stream=dict(format="mpegts", g="24"), matroska=dict(format="matroska", g="50", bf="2"))


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
        assert told == [np.abs(seconds - clip.start - k / 3).argmin() for k in range(10)], clip


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
        prepare_ego4d.main()


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


# ------------------------------------------------------------------------------------------ tabletop.py

CALVIN_TASKS = set(
    [f"{verb}_{colour}_block_{where}" for colour in ("red", "blue", "pink")
     for verb, places in (("lift", "table slider drawer"), ("push", "left right"), ("rotate", "left right"))
     for where in places.split()]
    + "move_slider_left move_slider_right open_drawer close_drawer place_in_slider place_in_drawer"
      " push_into_drawer stack_block unstack_block turn_on_lightbulb turn_off_lightbulb turn_on_led"
      " turn_off_led".split())


@pytest.fixture(scope="session")
def tabletop_data(tmp_path_factory):
    """A folder with twelve clips of each kind: demonstrations/ and videos/."""
    folder = tmp_path_factory.mktemp("tabletop")
    for kind in "demonstrations", "videos":
        tabletop.make(kind, folder / kind, 12, "AD", workers=1)
    return folder


def test_tasks_are_calvins():
    """Catches a task under another name than CALVIN's, too few of them, and one sentence for two tasks."""
    assert len(CALVIN_TASKS) == 34 and len(tabletop.TASKS) >= 20 and set(tabletop.TASKS) <= CALVIN_TASKS
    for sentences in tabletop.TASKS, tabletop.NARRATIONS:
        assert all(len(set(phrasings)) >= 4 for phrasings in sentences.values())
        count = collections.Counter(sentence for phrasings in sentences.values() for sentence in phrasings)
        assert max(count.values()) == 1 and all(sentence.strip() == sentence for sentence in count)


def test_demonstrator_succeeds():
    """Catches rules of motion and a demonstrator that drift apart: its clips would teach failures."""
    counts, done = collections.Counter(), collections.Counter()
    for session in range(240):
        world, rng = tabletop.Tabletop("ABCD"[session % 4], session), np.random.default_rng(session)
        for task, _, actions, success in tabletop.play(world, rng, counts, 12, render=False):
            done[task] += success
            assert all(np.abs(action).max() <= 1 and action[6] in (-1, 1) for action in actions)
    assert set(counts) == set(tabletop.TASKS) and min(counts.values()) >= 20
    assert sum(done.values()) / sum(counts.values()) > 0.98
    assert all(done[task] / counts[task] > 0.9 for task in counts)


def test_nudged_demonstrations_say_where_to_go():
    """Catches a drag that is recorded as the robot's action, or that spoils the task."""
    def play(nudges):
        """Steps in which the arm moved against its action, all steps, share of tasks done."""
        rng, counts, against, steps, success = np.random.default_rng(2), collections.Counter(), 0, 0, 0
        for session in range(12):
            world = tabletop.Tabletop("ABCD"[session % 4], session)
            for _, observations, actions, done in tabletop.play(world, rng, counts, 12, False, nudges):
                moves = np.diff([o["robot_obs"][:3] for o in observations], axis=0)
                against += int(((moves * np.stack(actions)[:, :3]).sum(1) < -0.01).sum())
                steps, success = steps + len(actions), success + done
        return against, steps, success / sum(counts.values())

    against, steps, success = play(nudges=1.0)
    assert against > 0.05 * steps and success > 0.97
    assert play(nudges=0.0)[0] == 0                            # undisturbed, the arm goes where it wants to


def test_reset_restores_everything():
    """Catches state outside robot_obs and scene_obs: evaluation would start elsewhere than it says."""
    world, rng, held = tabletop.Tabletop("B", 3), np.random.default_rng(3), set()
    for _ in tabletop.play(world, rng, collections.Counter(), 20, render=False):
        seen, info, other = world.observe(), world.get_info(), tabletop.Tabletop("B", 99)
        again = other.reset(seen["robot_obs"], seen["scene_obs"])
        assert all(np.array_equal(seen[key], again[key]) for key in seen)
        assert all(np.array_equal(info[key], other.get_info()[key]) for key in info)
        held.add(info["held"])
    assert None in held and len(held) > 1                                     # with a block in hand, too
    robot, scene = seen["robot_obs"].copy(), seen["scene_obs"].copy()
    robot[5], scene[[11, 17, 23]] = 0.4, (0.3, -0.2, 0.1)                     # yaw of gripper and blocks
    again = world.reset(robot, scene)
    assert np.array_equal(again["robot_obs"], robot) and np.array_equal(again["scene_obs"], scene)
    shapes = dict(rgb_static=(64, 64, 3), rgb_gripper=(32, 32, 3), robot_obs=(15,), scene_obs=(24,))
    assert all(seen[key].shape == shape for key, shape in shapes.items())
    with pytest.raises(ValueError, match="both"):
        world.reset(seen["robot_obs"])


def test_states_offer_choices():
    """Catches states whose picture alone tells the task, and chains that two policies would not share."""
    for seed in range(40):
        world = tabletop.Tabletop("ABCD"[seed % 4], seed)
        assert sum(tabletop.feasible(world, task) for task in tabletop.TASKS) >= 4, seed
    for task in tabletop.TASKS:
        world.reset(*tabletop.draw_start(world.scene, task, 5))
        assert tabletop.feasible(world, task)
        info = world.get_info()
        assert not any(tabletop.success(other, info, info) for other in tabletop.TASKS)
    chains = [tabletop.draw_chain("D", seed) for seed in (1, 1, 2)]
    assert chains[0][2] == chains[1][2] != chains[2][2]
    assert all(np.array_equal(a, b) for a, b in zip(chains[0][:2], chains[1][:2]))
    world = tabletop.Tabletop("D", 0)
    for robot_obs, scene_obs, tasks in chains:
        world.reset(robot_obs, scene_obs)
        assert len(set(tasks)) == 5 and tabletop.feasible(world, tasks[0])


def test_oracle_by_hand():
    """Catches an oracle that says yes to half a task, another block, or a block still in the gripper."""
    def info(held=None, red=(0, 0, 0.03), on_block=False, in_drawer=False, **joints):
        first = np.array([True, False, False])
        return dict(door=0, drawer=0, bulb=0, led=0, held=held, below_block=np.zeros(3, bool),
                    on_block=first & on_block, blocks=np.array([red, (0.2, 0, 0.03), (-0.2, 0, 0.03)]),
                    in_drawer=first & in_drawer) | joints

    lying, held = info(), info("red")
    for task, start, no, yes in (
            ("open_drawer", lying, info(drawer=0.05), info(drawer=0.12)),
            ("close_drawer", info(drawer=0.14), info(drawer=0.09), info(drawer=0.01)),
            ("move_slider_left", info(door=0.14), info(door=0.14), info(door=0)),
            ("turn_on_led", lying, info(bulb=1), info(led=1)),
            ("lift_red_block_table", lying, info("red", (0, 0, 0.07)), info("red", (0, 0, 0.09))),
            ("lift_red_block_table", lying, info("blue", (0, 0, 0.09)), info("red", (0, 0, 0.09))),
            ("lift_red_block_drawer", info(red=(0, 0, -0.03), in_drawer=True), info("red", (0, 0, 0)), held),
            ("push_red_block_right", lying, info(red=(0.05, 0, 0.03)), info(red=(0.08, 0, 0.03))),
            ("push_red_block_left", lying, info("red", (-0.08, 0, 0.03)), info(red=(-0.08, 0, 0.03))),
            ("place_in_drawer", held, info("red", in_drawer=True), info(in_drawer=True)),
            ("stack_block", held, info("red", on_block=True), info(on_block=True)),
            ("unstack_block", info(on_block=True), info("red"), lying)):
        assert not tabletop.success(task, start, start) and not tabletop.success(task, start, no), task
        assert tabletop.success(task, start, yes), task


def test_tabletop_data(tabletop_data):
    """Catches clips whose states, actions and frames are shifted against each other, videos with a robot."""
    robot, person = (clips.Clips(tabletop_data / kind) for kind in ("demonstrations", "videos"))
    assert len(robot) == len(person) == 12 and not person.has_actions and list(person.cameras) == CAMERAS[:1]
    assert robot.cameras == dict(rgb_static=(64, 64), rgb_gripper=(32, 32))
    against = 0
    for i in range(12):
        assert person.sentences[i] in tabletop.NARRATIONS[person.tasks[i]]
        assert robot.sentences[i] in tabletop.TASKS[robot.tasks[i]]
        states, actions = robot.rows(i)
        assert np.isnan(actions[-1]).all() and np.isfinite(actions[:-1]).all()
        assert np.array_equal(states[1:, 14] < 0, actions[:-1, 6] < 0)        # the gripper obeys
        moves = np.diff(states[:, :3], axis=0) / tabletop.STEP
        free = np.abs(moves - actions[:-1, :3]).max(1) < 0.6                  # but for noise, edges, drags
        assert free.mean() > 0.4
        against += int(((moves * actions[:-1, :3]).sum(1) < -0.25).sum())
    assert against > 5                                                       # the arm was dragged about
    other = tabletop_data.parent / "again"
    tabletop.make("demonstrations", other, 12, "AD", workers=1)
    assert (other / "00001.bin").read_bytes() == (tabletop_data / "demonstrations/00001.bin").read_bytes()


# ------------------------------------------------------------------------------------------ eval_calvin.py

def eval_settings(**changes):
    """What eval_calvin.parse makes of a command line, for the tabletop."""
    settings = dict(env="tabletop", scene="D", language="validation", shuffle_language=False, gif=0,
                    serve=False, seed=0, steps=tabletop.STEPS, policy="noop")
    return mock.Mock(**settings | changes)


def test_chain_stops_at_the_first_failure(monkeypatch):
    """Catches a chain that goes on after a failure or counts what came later; 0 +- 0 for 0 of 20."""
    for answers, length in (([5, 3, None, 4, 4], 2), ([None] * 5, 0), ([1] * 5, 5)):
        asked = iter(answers)
        monkeypatch.setattr(eval_calvin, "follow", lambda *_: next(asked))
        result = eval_calvin.play_chain(tabletop.Tabletop("D", 0), None, eval_settings(), 7)
        assert result["length"] == length and result["steps"] == answers[:length + 1]
        assert len(list(asked)) == 5 - len(result["steps"])
    chains = [dict(kind="chain", length=length, tasks=["a", "b"], steps=[4, None]) for length in (0, 2, 5, 5)]
    figures = eval_calvin.summarise(chains)
    assert figures["chains"]["average_length"] == 3
    assert figures["chains"]["in_a_row"] == [0.75, 0.75, 0.5, 0.5, 0.5]
    assert figures["tasks"]["a"]["successes"] == figures["tasks"]["b"]["episodes"] == 4
    assert figures["tasks"]["a"]["steps"] == 4 and figures["tasks"]["b"]["rate"] == 0
    for successes, n, low, high in (8, 10, 0.4902, 0.9433), (0, 20, 0, 0.1611), (20, 20, 0.8389, 1):
        assert np.allclose(eval_calvin.wilson(successes, n), (low, high), atol=1e-4)


def test_the_scripted_expert_passes():
    """Catches an evaluation that nobody can pass: wrong starts, resets amid a chain, a late oracle."""
    args, expert = eval_settings(), eval_calvin.load_policy(mock.Mock(policy="scripted", seed=0, serve=False))
    worlds = [tabletop.Tabletop("D", seed) for seed in range(4)]
    chains = [eval_calvin.play_chain(world, expert, args, seed) for seed, world in enumerate(worlds)]
    assert sum(chain["length"] for chain in chains) >= 18
    singles = [eval_calvin.play_single(worlds[0], expert, args, task, 3) for task in tabletop.TASKS]
    assert sum(episode["steps"] is not None for episode in singles) >= len(singles) - 1


def test_doing_nothing_scores_nothing(tmp_path):
    """Catches an oracle that is satisfied with the state it started from, and episodes that go missing."""
    status, text = run("eval_calvin.py", "--policy", "noop", "--episodes", 1, "--chains", 2, "--workers", 1,
                       "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0 and (tmp_path / "report.md").read_text() in text and "PARTIAL" not in text
    assert len(report["episodes"]) == len(tabletop.TASKS) + 2 and report["chains"]["n"] == 2
    assert report["single"]["mean"] == report["chains"]["average_length"] == 0
    assert all(result["successes"] == 0 and result["episodes"] == 1 for result in report["tasks"].values())


def test_an_episode_depends_on_its_seed_alone():
    """Catches a report that depends on the number of workers, or a control that gives the right sentence."""
    def play(name, *jobs):
        args = eval_settings(policy=name, seed=5)
        policy = eval_calvin.load_policy(args)
        results = [eval_calvin.play(job, tabletop.Tabletop("D", job[2]), policy, args) for job in jobs]
        return results[-1] | dict(seconds=None), policy.rng.bit_generator.state

    first, second = ("single", "open_drawer", 5), ("chain", None, 9)
    for policy in "random", "scripted":
        assert play(policy, second) == play(policy, first, second), policy
    for task, seed in ((task, seed) for task in tabletop.TASKS for seed in range(20)):
        right, wrong, again = (eval_calvin.instruction(task, seed, eval_settings(shuffle_language=shuffle))
                               for shuffle in (False, True, True))
        assert right in tabletop.TASKS[task] and wrong not in tabletop.TASKS[task] and wrong == again


def test_one_model_serves_many_worlds():
    """Catches histories that get mixed up, or a batch that acts otherwise than each policy alone."""
    model, rng = small_model(), np.random.default_rng(0)
    alone, together = ([policy.Policy(model) for _ in range(3)] for _ in range(2))
    for t in range(7):
        who = [i for i in range(3) if t >= i and rng.random() < 0.8]                  # of different ages
        seen = [dict({c: rng.integers(256, size=(32, 32, 3), dtype=np.uint8) for c in CAMERAS},
                     robot_obs=rng.normal(size=15)) for _ in who]
        sentences = [f"do {i} {t // 4}" for i in who]
        apart = [alone[i].step(o, text) for i, o, text in zip(who, seen, sentences)]
        if who:
            chunks = policy.act_together([together[i] for i in who], seen, sentences)
            actions = [policy.to_action(*chunk) for chunk in zip(*chunks)]
            assert np.allclose(actions, apart, atol=1e-5)
            images = [list(policies[who[0]].predicted_frames().values()) for policies in (alone, together)]
            assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(*images))


def test_killed_and_sharded_runs_give_the_straight_report(tmp_path, monkeypatch):
    """Catches episodes lost or played twice by --resume and --merge, a part that passes for the whole."""
    def judge(out, *more):
        status, text = run("eval_calvin.py", *more, "--out", tmp_path / out)
        assert status == 0, text
        return json.loads((tmp_path / out / "report.json").read_text())

    def figures(report):
        timed = ("timing", "seconds, by part", "steps a second of a process")
        episodes = [episode | dict(seconds=None) for episode in report["episodes"]]
        return {key: value for key, value in report.items() if key not in timed} | dict(episodes=episodes)

    play = ["--policy", "random", "--episodes", 0, "--chains", 5, "--workers", 1]
    straight = judge("straight", *play)
    path = tmp_path / "straight/episodes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])                  # killed while it wrote a line
    assert figures(judge("straight", *play, "--resume")) == figures(straight)
    assert len(path.read_bytes().splitlines()) == 6
    parts = [judge(f"part{i}", *play, "--shard", f"{i}/2") for i in (1, 2)]
    assert all(part["title"].startswith("PARTIAL") for part in parts)
    directories = [tmp_path / "part1", tmp_path / "part2"]
    assert figures(judge("all", "--merge", *directories)) == figures(straight)
    assert judge("one", "--merge", directories[0])["title"].startswith("PARTIAL (3 of 5")
    assert figures(judge("again", "--merge", tmp_path / "all")) == figures(straight)       # a merge is a run
    assert fails_in_one_line("eval_calvin.py", "--merge", directories[0], "--out", directories[1],
                             words=["part2", "episodes that these don't"])
    judge("other", *play, "--seed", 3)
    assert fails_in_one_line("eval_calvin.py", "--merge", *directories, "--out", tmp_path / "other",
                             words=["other was played with", "seed 3"])
    (tmp_path / "other/episodes.jsonl").write_bytes(lines[0])              # killed in its first minute
    assert fails_in_one_line("eval_calvin.py", "--merge", tmp_path / "other", words=["no episode was"])
    out = ["--out", tmp_path / "no"]
    assert fails_in_one_line("eval_calvin.py", "--merge", *directories, directories[0], *out, words=["twice"])
    assert fails_in_one_line("eval_calvin.py", *play, "--seed", 3, "--resume", "--out", tmp_path / "all2",
                             "--shard", "3/2", words=["--shard", "3/2"])
    assert fails_in_one_line("eval_calvin.py", *play, "--seed", 3, "--resume", "--out", directories[0],
                             words=["part1", "seed 1000000, not 3"])
    assert not (tmp_path / "no").exists()


def test_nothing_played_is_lost(tmp_path, monkeypatch, capsys):
    """Catches a run that overwrites an earlier one, two that write one file, a result thrown away because the
    worker who sent it died next."""
    args, path = mock.Mock(out=tmp_path / "a", resume=False), tmp_path / "a/episodes.jsonl"
    said = dict(chains=2)
    _, file = eval_calvin.begin(args, said)
    file.write(eval_calvin.to_line(dict(kind="chain", seed=0)))
    file.close()
    first = path.read_bytes()
    (tmp_path / "a/model.safetensors").write_bytes(b"not evaluation's")
    results, file = eval_calvin.begin(args, said)                                      # --resume forgotten
    assert (tmp_path / "a/model.safetensors").exists()
    assert results == [] and (tmp_path / "a.1/episodes.jsonl").read_bytes() == first
    assert "--resume would have gone on" in capsys.readouterr().err
    for args.resume in False, True:
        assert refused("another run is writing", eval_calvin.begin, args, said)
    file.close()
    path.write_bytes(first + b'{"kind": "cha')                                         # killed amid a line
    results, file = eval_calvin.begin(args, said)
    file.close()
    assert results == [dict(kind="chain", seed=0)] and path.read_bytes() == first

    def hire(context):
        ours, theirs = context.Pipe()

        def work():
            theirs.send(("result", None))
            theirs.recv()
            theirs.send(("result", "the first chain's"))
            theirs.close()

        threading.Thread(target=work).start()
        return ours, mock.Mock(exitcode=-9)

    monkeypatch.setattr(eval_calvin, "hire", lambda context, args: hire(context))
    results = []
    with pytest.raises(gr1.ModelError, match="a worker died .exit status -9"):
        for result in eval_calvin.play_all(eval_settings(workers=1), [("chain", None, i) for i in (1, 2)]):
            results.append(result)
    assert results == ["the first chain's"]


# ------------------------------------------------------------------------------------------ calvin.py

def has_simulator():
    try:
        return bool(calvin.package())
    except common.UserError:
        return False


SIMULATOR = pytest.mark.skipif(not has_simulator(), reason="calvin_env is not installed, see calvin.py")
GOLDEN = ROOT.parent / "shared/golden"


def test_chains_are_those_that_calvin_draws():
    """Catches a generator or a shipped list that is not CALVIN's, on 25 of the 192 initial conditions."""
    rows, conditions = calvin.read_chains().tolist(), calvin.initial_conditions()
    assert len(conditions) == 192 and len(rows) == 1000
    for number in range(0, 192, 8):
        mine = [row[1:] for row in rows if row[0] == number]
        drawn = calvin.draw_chains_of((number, len(mine)))
        assert len(mine) == 5 + (number < 40) and sorted(drawn) == sorted(mine)
    assert calvin.load_chains()[0][1] == ["rotate_blue_block_right", "move_slider_right",
                                          "lift_red_block_slider", "place_in_slider", "turn_off_lightbulb"]
    assert calvin.fnv("test") == 3910690890                                # not textbook FNV-1
    state = calvin.initial_state(conditions[calvin.load_chains()[0][0]])[1]
    assert state[:6].tolist() == [0.28, 0.22, 0, 0.088, 1, 1]
    assert np.isclose(state[12], (0.05, 0.23), atol=1e-5).any()


def test_calvin_starts_of_single_instructions():
    """Catches starts from which the task can't be done or that repeat, and one that CALVIN has already."""
    alone = [task for task in calvin.NAMES if calvin.conditions_for(task)]
    assert len(alone) == 27 and not {"place_in_drawer", "lift_red_block_drawer", "unstack_block"} & set(alone)
    known = [calvin.initial_state(condition)[1] for condition in calvin.initial_conditions()]
    seen = [calvin.draw_start("D", "lift_red_block_table", seed)[1] for seed in range(50)]
    assert len({state.tobytes() for state in seen}) == 50
    assert not {state.tobytes() for state in seen} & {state.tobytes() for state in known}
    for state in seen:
        assert np.isclose(state[6], (0.05, 0.23), atol=1e-5).any() and state[7] < 0 and abs(state[11]) < 2
    assert all(calvin.draw_start("D", "open_drawer", seed)[1][1] == 0 for seed in range(20))
    assert np.array_equal(calvin.draw_start("D", None, 3)[1], calvin.draw_start("D", None, 3)[1])
    with pytest.raises(common.UserError, match="chains only"):
        calvin.draw_start("D", "stack_block", 0)


def test_chains_and_states_equal_the_golden_ones():
    """Catches any chain or initial state that differs from calvin_agent's, to the last bit. The golden
    figures are too big for the repository; what equals them has this checksum."""
    text = run("eval_calvin.py", "--list")[1]
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "05b7ca1e2ebc4a081fbb51055c8a52449d8b813c975198faaa250abaa9b72395")
    if not GOLDEN.is_dir():
        return
    listed = json.loads(text)
    assert listed["chains"] == json.loads((GOLDEN / "calvin_sequences.json").read_text())
    golden = np.load(GOLDEN / "calvin_initial_states.npz")
    states = {json.dumps(state["condition"]): state for state in listed["initial_states"]}
    assert len(states) == len(golden["initial_state"]) == 192
    for text, *observations in zip(*(golden[key] for key in ("initial_state", "robot_obs", "scene_obs"))):
        state = states[text]
        assert all(np.array_equal(state[key], x) for key, x in zip(("robot_obs", "scene_obs"), observations))


def test_sentences():
    """Catches a task without its sentences, and unseen ones that training or validation has."""
    assert list(calvin.SENTENCES) == calvin.NAMES and set(calvin.NAMES) == CALVIN_TASKS
    assert sum(len(x["training"]) for x in calvin.SENTENCES.values()) == 389
    known = {text for x in calvin.SENTENCES.values() for text in (x["validation"], *x["training"])}
    unseen = calvin.unseen_sentences()
    assert set(unseen) == CALVIN_TASKS and all(len(texts) == 50 for texts in unseen.values())
    every = [text for texts in unseen.values() for text in texts]
    assert len(set(every)) == 34 * 50 and not known & set(every) and "{" not in "".join(every)
    drawn = {calvin.unseen_instruction("open_drawer", seed) for seed in range(999)}
    assert drawn == set(unseen["open_drawer"])


def test_without_the_simulator(tmp_path, monkeypatch):
    """Catches a traceback, or a file begun, where calvin_env is not installed."""
    calvin.package.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "calvin_env"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "calvin_env", None)
    out = tmp_path / "out"
    for command in (("eval_calvin.py", "--env", "calvin", "--policy", "noop"), ("calvin.py",),
                    ("record_calvin.py",), ("record_calvin.py", "--measure")):
        assert fails_in_one_line(*command, "--out", out, words=["calvin_env", "calvin.py"]), command
    calvin.package.cache_clear()
    for tasks, words in ("open_drawr", "open_drawer"), ("turn_on_led,stack_block", "chains judge it"):
        assert fails_in_one_line("eval_calvin.py", "--env", "calvin", "--episodes", 1, "--tasks", tasks,
                                 "--out", out, words=[words])
    assert not out.exists()


def test_what_the_probe_says(monkeypatch):
    """Catches an EGL that ends its process without a word and passes for a working one, and a wrong cause:
    git's or Python's trouble taken for EGL's."""
    monkeypatch.setattr(calvin, "package", lambda: pathlib.Path("/clone"))
    drew = "GL_RENDERER=llvmpipe (256 bits)\ncalvin_env 797142c, scene D: a step takes 2 ms\n"
    for renderer, status, out, said, words in (
            ("egl", 0, "", "", "EGL doesn't draw here .exit status 0: nothing was said.*libegl1"),
            ("egl", 0, drew.split("\n")[1], "", "EGL doesn't draw here"),          # something else drew it
            ("egl", 1, "", "error: a line of ours", "^a line of ours$"),
            ("egl", -11, "", "libEGL: no driver", "status -11: libEGL: no driver.*--renderer tiny"),
            (None, 1, "", "Traceback\nOSError: libX11.so", "calvin_env doesn't run here .*libX11.*install")):
        ended = subprocess.CompletedProcess([], status, out, said)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
        with pytest.raises(common.UserError, match=words) as error:
            calvin.probe(renderer)
        assert "\n" not in str(error.value)
    for renderer, name in ("egl", "EGL, llvmpipe (256 bits)"), ("tiny", "TinyRenderer"), (None, ""):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, drew, ""))
        assert calvin.probe(renderer) == name


@pytest.fixture(scope="module")
def world():
    return calvin.Calvin("D", None)


@SIMULATOR
def test_reset_restores_the_simulator_exactly(world):
    """Catches traces of what was played before in a restored state: then no figure could be had twice."""
    def play(number, steps):
        rng, first = np.random.default_rng(number), world.reset(*calvin.draw_chain("D", number)[:2])
        seen = [first] + [world.step(np.append(rng.uniform(-1, 1, 6), rng.choice([-1, 1])))
                          for _ in range(steps)]
        return np.array([np.concatenate([o["robot_obs"], o["scene_obs"]]) for o in seen])

    straight = play(3, 40)
    play(11, 25)
    assert np.array_equal(play(3, 40), straight) and straight[0, 14] == 1


@SIMULATOR
def test_the_button_bug_is_refused(world, monkeypatch):
    """Catches an evaluation on calvin_env's commits before 797142c, whose button misses its first press."""
    button = type(world.env.scene.buttons[0])
    reset = button.reset

    def forgetful(self, state=None):
        reset(self, state)
        self.state = type(self.state)(0)

    monkeypatch.setattr(button, "reset", forgetful)
    with pytest.raises(common.UserError, match="first press"):
        world.check_button()


@SIMULATOR
def test_no_egl_and_no_git_are_one_line(world, monkeypatch, tmp_path):
    """Catches a plugin that does not load and ends the process as if all were well, git's traceback."""
    import pybullet
    monkeypatch.setattr(pybullet, "loadPlugin", lambda *_: -1)
    with pytest.raises(common.UserError, match="plugin does not load.*libegl1"):
        calvin.Calvin("D", "egl")
    monkeypatch.setattr(calvin, "package", lambda: tmp_path)
    with pytest.raises(common.UserError, match="can't tell the commit.*safe.directory"):
        calvin.commit()


@SIMULATOR
def test_actions_are_not_cut_off(world):
    """Catches a clip at 1, which neither GR-1's evaluation nor calvin_env has."""
    moved = []
    for size in 1, 2:
        world.reset(*calvin.draw_chain("D", 0)[:2])
        before = world.env.robot.target_pos.copy()
        world.step(np.array([0, 0, size, 0, 0, 0, 1.0]))
        moved.append((world.env.robot.target_pos - before)[2])
    assert np.allclose(moved, [0.02, 0.04])


@SIMULATOR
def test_the_expert_and_idleness_in_the_simulator(tmp_path):
    """Catches a protocol that nobody can pass, or that can be passed by doing nothing."""
    for policy, least, most in ("scripted", 8, 10), ("noop", 0, 0):
        status, text = run("eval_calvin.py", "--env", "calvin", "--policy", policy, "--chains", 2,
                           "--workers", 1, "--out", tmp_path / policy)
        assert status == 0 and "PARTIAL (2 of 1000" in text and calvin.FIXED in text, text
        report = json.loads((tmp_path / policy / "report.json").read_text())
        assert least <= sum(episode["length"] for episode in report["episodes"]) <= most, text
    status, text = run("eval_calvin.py", "--env", "calvin", "--policy", "scripted", "--chains", 0,
                       "--episodes", 1, "--tasks", "turn_on_led,open_drawer", "--workers", 1,
                       "--out", tmp_path / "single")
    assert status == 0 and "PARTIAL" not in text and "mean over 2 tasks** | **100.0%**" in text, text


@SIMULATOR
def test_recorded_demonstrations_are_packed_and_replayed(tmp_path):
    """Catches files that prepare_calvin.py can't read, commands that do not lead where the pictures show."""
    raw, packed = tmp_path / "raw", tmp_path / "packed"
    record = ["record_calvin.py", "--out", raw, "--format", "calvin", "--tasks", "turn_on_led", "open_drawer",
              "--demos", 2, "--scenes", "B", "--renderer", "tiny", "--workers", 1]
    for _ in range(2):                                                     # the second finds all done
        status, text = run_apart(*record)
        assert status == 0 and "2 demonstrations" in text, text
    notes = [json.loads(note.read_text()) for note in (raw / "training/segments").glob("*.json")]
    sessions = {segment["session"] for note in notes for segment in note}
    assert len(np.load(raw / "training/ep_start_end_ids.npy")) == len(sessions)   # never parted by a split
    status, text = run("record_calvin.py", "--replay", raw / "training", "--workers", 1)
    assert status == 0 and "scene B: 2 of 2" in text, text
    for actions in "rel_actions", "executed_actions":
        status, text = run("prepare_calvin.py", raw, packed / actions, "--actions", actions)
        assert status == 0 and "2 clips" in text, text
    achieved, executed = (clips.Clips(packed / x / "training") for x in ("rel_actions", "executed_actions"))
    assert achieved.sentences == executed.sentences and set(achieved.tasks) == {"turn_on_led", "open_drawer"}
    assert all(text in calvin.SENTENCES[task]["training"]
               for text, task in zip(executed.sentences, executed.tasks))
    robot, moved = achieved.rows(0)
    inside = np.abs(moved[:-1, :3]) < 0.99                                 # not clipped
    assert np.allclose((moved[:-1, :3] / 50)[inside], np.diff(robot[:, :3], axis=0)[inside], atol=1e-5)


# ------------------------------------------------------------------------------------------ train.py

def training(stage, data, out, *more, **model):
    """A command line of a short run: six steps of four windows."""
    sizes = [f"{key}={value}" for key, value in (SIZES | model).items()]
    return ["train.py", "--stage", stage, "--data", data, "--out", out, "--init", "none", "--steps", 6,
            "--batch", 4, "--eval-every", 3, "--eval-batches", 1, "--log-every", 1, *more, "--model", *sizes]


def read_log(out, key):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="session")
def checkpoints(tabletop_data, tmp_path_factory):
    """A folder with a run of each stage: pretrain/ and finetune/, which started from it."""
    out = tmp_path_factory.mktemp("checkpoints")
    status, text = run(*training("pretrain", tabletop_data / "videos", out / "pretrain", future=1))
    assert status == 0, text
    status, text = run(*training("finetune", tabletop_data / "demonstrations", out / "finetune"),
                       "--init", out / "pretrain")
    assert status == 0, text
    assert all(part in text.split("until trained")[1] for part in ("embed_arm", "action_head", "trunk")), text
    return out


def test_finetuning_starts_from_pretraining(checkpoints, tabletop_data, tmp_path):
    """Catches pre-trained weights that are skipped, or kept in spite of --fresh; a missing log."""
    before = weights.read_weights(checkpoints / "pretrain/model.safetensors")
    assert set(read_log(checkpoints / "finetune", "arm")) == set(range(1, 7))
    for key in "val/arm", "val/rgb_static", "val/rgb_static_ratio", "val/rgb_gripper_ratio":
        assert set(read_log(checkpoints / "finetune", key)) == {3, 6}
    assert (checkpoints / "finetune/000006.png").exists() and (checkpoints / "finetune/resume.pt").exists()
    stored = weights.read_config(checkpoints / "finetune")
    assert stored["train"]["batch"] == 4 and stored["step"] == 6 and stored["model"]["width"] == 32
    for fresh, parts in ("none", set()), ("trunk", {"trunk"}):
        start = training("finetune", tabletop_data / "demonstrations", tmp_path / fresh, "--lr", 1e-12)
        flags = ["--weight-decay", 0, "--init", checkpoints / "pretrain", "--steps", 1, "--fresh", fresh]
        assert run(*start, *flags)[0] == 0
        after = weights.read_weights(tmp_path / fresh / "model.safetensors")
        assert set(before) < set(after)
        assert {name.split(".")[0] for name in before if not same(before[name], after[name])} == parts


def test_scripts_read_the_authors_files(tmp_path, tabletop_data):
    """Catches from_pretrained that works while the commands around it do not; a traceback for a bad file."""
    path = golden_file(tmp_path / "snapshot.pt")[0]
    sizes = dict(cameras=json.dumps(dict.fromkeys(CAMERAS, 32)), copy_gate=False, norm_pixels=True,
                 vision_dim=24, resampler_depth=2, decoder_depth=2, decoder_heads=16)
    data, out = tabletop_data / "demonstrations", tmp_path / "out"
    command = lambda init, *more, **also: training("finetune", data, out, "--init", init, *more,
                                                   **sizes, **also)
    status, text = run(*command(path, "--fresh", "query_act", chunk=2))
    assert status == 0 and "the authors' GR-1" in text, text
    assert "left out 1 (action_queries.weight): to start fresh" in text
    bad = tmp_path / "bad.pt"
    for content, words in ((b"", "not a readable weights file"), (path.read_bytes()[:9000], "not a readable"),
                           (pickle.dumps(Bomb(tmp_path / "bang")), "not a plain weights file")):
        bad.write_bytes(content)
        for script in "eval_calvin.py", "sample.py":
            assert fails_in_one_line(script, "--checkpoint", bad, words=[words])
        assert fails_in_one_line(*command(bad), words=[words])
    assert not (tmp_path / "bang").exists()


def test_benchmark_runs_and_compares_equals(capsys, monkeypatch):
    """Catches a benchmark of two things that do not compute the same, or one that breaks."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)      # else it times two threads as well
    bench.bench_model(small_config(), seconds=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert float(re.search(r"outputs differ by (\S+)", lines[1])[1]) < 1e-5
    names = [line[:54].strip() for line in lines[3:]]
    assert "train, batch 2 [MiB at the peak]" in names and "act, batch 1, 1 thread [ms]" in names
    assert all(float(line.split()[-1]) > 0 for line in lines[4:])         # lines[3]: may need no more memory


def test_training_benchmark(capsys):
    """Catches a benchmark that breaks, and one that forgets how many windows share a frame, or that a step
    has several passes.
    """
    alone, flops = [], []
    for flags in [], ["--windows-per-clip", 4], ["--accumulate", 2]:
        argv = ["--bench", "--batch", 8, *flags, "--model", *(f"{k}={v}" for k, v in SIZES.items())]
        with mock.patch.object(bench, "report", wraps=bench.report) as report:
            rate, text = bench.bench([*map(str, argv)], train.World(), seconds=0.3), capsys.readouterr().out
        numbers = dict(re.findall(r"^ *([a-z][^\n\d]*?)  +(\d+\.?\d*)", text, re.M))
        assert abs(rate - float(numbers["windows a second"])) < 0.01
        assert {"load", "transfer", "forward: image encoder", "backward", "optimizer"} < set(numbers), text
        alone.append(float(numbers["its JPEG decoder alone"]))
        flops.append(report.call_args.args[5])
    assert 4 * 6 / 9 * 0.6 < alone[1] / alone[0] < 4 * 6 / 9 * 1.7          # 6 frames a window; 9 for four
    assert abs(flops[2][0] / flops[0][0] - 1) < 0.01 < abs(flops[1][0] / flops[0][0] - 1)
    with mock.patch.object(bench, "bench", return_value=100.0):
        text = run("train.py", "--estimate")[1]
    assert "2.22 hours an epoch, 111.1 in all" in text and "3.89 hours an epoch, 77.8 in all" in text, text
    batch = lambda *flags: bench.settings(["--preset", "gr1", *flags], train.World())[0].batch
    assert (batch(), batch("--windows-per-clip", "10"), batch("--batch=512")) == (2, 10, 512)


def test_a_benchmark_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch):
    """Catches Ctrl-C that leaves the clips in /tmp, or ends in a traceback."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    there = []

    def stop(*_):
        there.extend(tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(bench, "bench_loader", stop)
    status, text = run("train.py", "--bench", "--model", *(f"{k}={v}" for k, v in SIZES.items()))
    assert status == 130 and there and not list(tmp_path.iterdir()), text


def test_figures_go_where_they_are_asked_for(tabletop_data, tmp_path, monkeypatch):
    """Catches a package that is needed although nobody asked, and a traceback where it is missing."""
    command = lambda *more: training("finetune", tabletop_data / "demonstrations", tmp_path / "out", *more)
    wandb = mock.MagicMock(__spec__="here")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run(*command("--wandb"))[0] == 0
    assert [call.kwargs["step"] for call in wandb.log.call_args_list] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert "val/arm" in wandb.log.call_args.args[0]
    monkeypatch.delitem(sys.modules, "wandb")
    tensorboard = mock.MagicMock(__spec__="here")
    for name in "tensorboard", "torch.utils.tensorboard":
        monkeypatch.setitem(sys.modules, name, tensorboard)
    assert run(*command("--tensorboard"))[0] == 0
    names = [name for name, *_ in tensorboard.SummaryWriter.return_value.method_calls]
    assert "add_scalar" in names and names.index("close") == len(names) - 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fails_in_one_line(*command("--tensorboard"), words=["--tensorboard", "pip install tensorboard"])


def test_a_sentence_is_encoded_the_same_in_any_company():
    """Catches a resumed run that differs in the last bits: the encoder's depend on how many come at once."""
    encode = lambda group: [(item, len(group)) for item in group]
    rows = lambda *items: dict(gr1.in_groups(encode, list(items), 4))
    assert rows("a") | rows(*"bcdefg") == rows(*"abcdefg") == dict.fromkeys("abcdefg", 4)
    assert list(gr1.in_groups(encode, [], 4)) == []


def test_resume_equals_straight(tabletop_data, tmp_path, monkeypatch):
    """Catches a run that, after a power cut, sees other data or noise, or forgets optimizer, schedule or what
    it has not logged yet.
    """
    command = lambda name, *more: training("finetune", tabletop_data / "demonstrations", tmp_path / name,
                                           "--shift", 0.05, "--video-steps", 2, "--log-every", 4, *more,
                                           dropout=0.1)
    status, text = run(*command("straight", "--resume"))      # as a queue that may kill it always starts it
    assert status == 0 and "no run in" in text and (tmp_path / "straight/first_batch.png").exists(), text
    read = clips.Windows.__getitem__
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(clips.Windows, "__getitem__", lambda *at: read(*at) if at[1][0] < 4 else 1 / 0)
        run(*command("cut"))
    assert weights.read_config(tmp_path / "cut")["step"] == 3
    status, text = run(*command("cut", "--resume"))
    assert status == 0 and "at step 3" in text, text
    straight, resumed = (weights.read_weights(tmp_path / x / "model.safetensors") for x in ("straight", "cut"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight | resumed)
    for key in "lr", "arm", "val/arm":
        assert read_log(tmp_path / "cut", key) == read_log(tmp_path / "straight", key)
    assert fails_in_one_line(*command("cut", "--resume", "--lr", 0.5), words=["started with lr", "0.5"])
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert run(*command("moved", "--resume"))[0] == 0
    resume = tmp_path / "moved/resume.pt"
    resume.write_bytes(resume.read_bytes()[:1000])
    assert fails_in_one_line(*command("moved", "--resume"), words=["moved/resume.pt"])
    assert run(*command("moved"))[0] == 0 and (tmp_path / "moved.1/config.json").exists()   # not overwritten


def test_all_machines_resume_or_none(tmp_path):
    """Catches machines without a common disk, of which one goes on and the others start anew beside it."""
    config, world = train.TrainConfig(out=str(tmp_path)), train.World()
    assert not train.can_resume(config, world)
    (tmp_path / "resume.pt").touch()
    assert train.can_resume(config, world)
    world.mean = lambda tensor: tensor / 2               # the other of two has none
    assert refused("a disk they share", train.can_resume, config, world)


def test_more_processes_than_gpus(monkeypatch):
    """Catches a traceback where one of several machines starts more processes than it has GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for key, value in dict(RANK=5, LOCAL_RANK=1, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4).items():
        monkeypatch.setenv(key, str(value))
    assert refused("4 processes on a machine with 2 GPUs: --nproc 2", train.set_up)


# Run by torchrun: a list of command lines of train.py, the last as by hand, on two cores whatever there is.
COMMANDS = f"""
import json, os, runpy, sys
os.cpu_count, os.sched_getaffinity = lambda: 2, lambda _: {{0, 1}}
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist, bench, train
world = train.set_up()
dist.init_process_group = dist.destroy_process_group = lambda *_, **more: None      # one group for all
*first, last = json.loads(sys.argv[1])
for sys.argv in first:
    try:
        bench.bench(sys.argv[1:], world, 0.2) if "--bench" in sys.argv else train.main()
    except (train.common.UserError, train.gr1.ModelError) as refused:
        sys.stdout.write(f"refused: {{refused}}\\n")
    world.barrier()                                           # so the other was told as well, or has done it
sys.argv = last
runpy.run_path(last[0], run_name="__main__")
"""


def descendants(pid):
    """The processes that a process started, and those that they did (where there is a /proc)."""
    children = [int(child) for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children")
                for child in file.read_text().split()]
    return children + [other for child in children for other in descendants(child)]


def torchrun(processes, *commands):
    """Start command lines of `training` by torchrun, one after the other: Popen."""
    commands = [[str(ROOT / command[0]), *map(str, command[1:])] for command in commands]
    script = pathlib.Path(str(commands[0][commands[0].index("--out") + 1]) + ".py")
    script.write_text(COMMANDS)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "bin/torchrun"), "--standalone", "--nproc", str(processes), str(script),
         json.dumps(commands)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SHARED = ["--video-steps", 0, "--shift", 0.1, "--batch", 8, "--windows-per-clip", 2]
REFUSED = {"format version 9": ["--data", "strange"], "no meta.json": ["--data", "empty"],
           "cut off or changed": ["--data", "cut"], "no actions": ["--data", "videos"],
           "multiple of 4": ["--batch", 2], "another shape": ["--init", "two"],
           "JPEG is broken": ["--data", "broken"]}


@pytest.fixture(scope="module")
def two_processes(tabletop_data, tmp_path_factory):
    """What two launches of torchrun leave: a folder of runs, and [status, output, errors] of each launch. The
    first is told to stop; the second trains, is refused what is wrong, goes on with the first's run, measures
    and is refused, at last, as by hand. (A launch imports torch three times, so there are no more.)
    """
    folder = tmp_path_factory.mktemp("two")
    for name in "robot", "strange", "cut", "broken":
        shutil.copytree(tabletop_data / "demonstrations", folder / name)
    shutil.copytree(tabletop_data / "videos", folder / "videos")
    meta = (folder / "robot/meta.json").read_text()
    (folder / "strange/meta.json").write_text(meta.replace('version": 1', 'version": 9'))
    (folder / "cut/00000.bin").write_bytes((folder / "cut/00000.bin").read_bytes()[:-9])
    (folder / "empty").mkdir()
    for shard in (folder / "broken").glob("*.bin"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    command = lambda name, *more, data="robot", **model: training(
        "finetune", folder / data, folder / name, *more, **model)
    long = lambda name, *more: command(name, "--steps", 40, "--eval-every", 40, "--workers", 1, *more,
                                       dropout=0.1)
    signal.alarm(400)                          # see same_start
    told = torchrun(2, long("told"))
    try:
        assert any("step 2  arm" in line for line in told.stdout)
        for process in descendants(told.pid) + [told.pid]:     # as a queue does; torchrun passes it on
            os.kill(process, signal.SIGTERM)
        first = told.communicate(timeout=120)
    finally:
        told.kill()
    wrong = [[flag, folder / value if flag in ("--data", "--init") else value]
             for flag, value in REFUSED.values()]
    launch = torchrun(3, command("two", *SHARED, "--accumulate", 2),
                      *(command("no", *SHARED, *flags, width=64) for flags in wrong),
                      long("straight"), long("told", "--resume"), command("no", "--bench"),
                      command("no", "--preset", "tinny"))
    second = launch.communicate(timeout=240)
    return folder, [told.returncode, *first], [launch.returncode, *second]


def test_two_processes_equal_one(two_processes, tmp_path):
    """Catches processes or passes that see other data, or shift it otherwise, than one alone; gradients or
    losses averaged with wrong weights (parts hold unlike numbers of targets); a surplus process that stops
    the rest.
    """
    folder, _, (_, text, errors) = two_processes
    assert "3 started, 2 train" in text and "2 x cpu" in text and text.count("done:") == 3, text + errors
    assert run(*training("finetune", folder / "robot", tmp_path / "one", *SHARED))[0] == 0
    for key in "arm", "gripper", "rgb_static", "val/arm", "val/rgb_gripper", "grad_norm":
        one, two = (read_log(out, key) for out in (tmp_path / "one", folder / "two"))
        assert one and all(abs(two[step] - one[step]) < 1e-4 * one[step] + 1e-5 for step in one), (one, two)
    assert gr1.GR1.from_pretrained(folder / "two").config.width == SIZES["width"]


def test_two_processes_meet_what_is_wrong(two_processes):
    """Catches a mistake, or a broken file, that one process notices while the other waits for it; one that
    ends in a traceback; a benchmark whose processes take unlike numbers of steps.
    """
    _, _, (status, text, errors) = two_processes
    assert [text.count(words) for words in REFUSED] == [2] * len(REFUSED), text
    assert "on 2 x CPU" in text and "windows a second" in text, text
    said = errors.count("did you mean 'tiny'?")          # twice where the first process is long in ending
    assert status and said in (1, 2) and "Traceback" not in errors, errors


def test_two_processes_that_are_told_to_stop(two_processes):
    """Catches a SIGTERM to all processes at once, and again by torchrun, that kills loader workers, loses
    steps or ends in failure; a resumed run that ends elsewhere.
    """
    folder, (status, text, errors), _ = two_processes
    assert status == 0 and "stopped: after step" in text and "Traceback" not in errors, text + errors
    straight, resumed = (weights.read_weights(folder / x / "model.safetensors") for x in ("straight", "told"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight | resumed)


def test_asked_again_a_run_ends_at_once(monkeypatch):
    """Catches a run that ends unsaved since one wish to stop came twice, and one that cannot be ended."""
    kill, clock = mock.Mock(), iter([10.0, 10.01, 15.5])
    monkeypatch.setattr(train, "STOP", [])
    monkeypatch.setattr(train, "os", mock.Mock(kill=kill, getpid=os.getpid))
    monkeypatch.setattr(train, "time", mock.Mock(monotonic=lambda: next(clock)))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for times in 0, 0, 1:
            train.ask_to_stop(signal.SIGTERM, None)
            assert kill.call_count == times and train.STOP
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert kill.call_args.args == (os.getpid(), signal.SIGTERM)


def test_a_run_that_is_told_to_stop_goes_on_later(tabletop_data, tmp_path, monkeypatch):
    """Catches a SIGTERM that loses steps or ends in failure; a resumed run that ends elsewhere."""
    command = lambda name, *more: training("finetune", tabletop_data / "demonstrations", tmp_path / name,
                                           *more)
    assert run(*command("straight"))[0] == 0
    read = clips.Windows.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(clips.Windows, "__getitem__", lambda *at: (
            at[1][0] == 3 and os.kill(os.getpid(), signal.SIGTERM), read(*at))[1])
        status, text = run(*command("told"))
    assert status == 0 and "stopped: after step 4" in text and "done:" not in text, text
    assert run(*command("told", "--resume"))[0] == 0
    straight, told = (weights.read_weights(tmp_path / x / "model.safetensors") for x in ("straight", "told"))
    assert all(torch.equal(straight[name], told[name]) for name in straight | told)
    for key in "arm", "val/arm":
        assert read_log(tmp_path / "told", key) == read_log(tmp_path / "straight", key)


def test_steps_without_finite_gradients_are_skipped(tabletop_data, tmp_path, monkeypatch):
    """Catches one bad batch that ruins the weights, and a run that goes on for ever without learning."""
    losses, bad = gr1.losses, set()
    step = iter(range(100))
    monkeypatch.setattr(gr1, "losses", lambda *args, **more: {
        name: value * (math.nan if bad and torch.is_grad_enabled() and next(step) in bad else 1)
        for name, value in {"arm": sum(losses(*args, **more).values())}.items()})
    command = lambda name, *more: training("finetune", tabletop_data / "demonstrations", tmp_path / name,
                                           *more)
    bad.update({2, 3})
    assert run(*command("some"))[0] == 0
    assert list(read_log(tmp_path / "some", "skipped").values()) == [0, 0, 1, 2, 2, 2]
    assert all(x.isfinite().all() for x in weights.read_weights(tmp_path / "some/model.safetensors").values())
    bad.update(range(100))
    assert fails_in_one_line(*command("last", "--steps", 10), words=["10 steps", "smaller --lr"])
    assert fails_in_one_line(*command("all", "--steps", 20), words=["10 steps", "smaller --lr"])


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """Catches a checkpoint that is overwritten by half of another."""
    model = small_model()
    weights.save_checkpoint(tmp_path, model)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(state, file):
        pathlib.Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gr1, "save_file", full)
    assert refused("cannot write.*No space left.*whole", weights.save_checkpoint, tmp_path, model)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(gr1, "save_file", mock.Mock(side_effect=OSError))            # an error without words
    assert refused("cannot write.*OSError.*whole", weights.save_checkpoint, tmp_path, model)


def test_schedule_and_the_papers_settings():
    """Catches a rate that follows anything but the step, a jump at its ends, other figures than Table 3's."""
    config = train.TrainConfig(lr=2.0, steps=1000, warmup=0.1, final_lr=0.01)
    rates = [train.learning_rate(step, config) for step in range(1000)]
    assert np.allclose([rates[0], rates[49], rates[99], rates[100], rates[550]], [0.02, 1, 2, 2, 1.01])
    assert 0.02 <= rates[-1] < 0.0201
    assert np.all(np.diff(rates[:100]) > 0) and np.all(np.diff(rates[100:]) < 0)
    other = dataclasses.replace(config, log_every=1, eval_every=7, batch=3, accumulate=4, epochs=9.0, seed=5)
    assert [train.learning_rate(step, other) for step in range(1000)] == rates
    assert train.learning_rate(0, train.TrainConfig(lr=1.0, steps=1, warmup=0.05)) == 1
    for stage, expected in (("pretrain", (1024, 3.6e-4, 50, 0.1)), ("finetune", (512, 1e-3, 20, 0.05))):
        config, *_ = train.parse(["--preset", "gr1", "--stage", stage])
        assert (config.batch, config.lr, config.epochs, config.warmup) == expected
        assert (config.arm_weight, config.gripper_weight, config.video_weight) == (100, 1, 1)
    config, *_ = train.parse("--preset real".split())
    assert (config.batch, config.lr, config.epochs, config.warmup) == (64, 1e-3, 30, 1 / 30)
    config, changes, _ = train.parse("--preset gr1 --future-step 5".split())
    assert changes == dict(future=5) and gr1.preset_config("gr1", **changes).future == 5
    assert "{'" not in run("train.py", "--help")[1]      # a % of a field's comment would print all of it
    config, changes, _ = train.parse("--preset gr1 --steps 7 --lr 0.5 --chunk 10 --no-video".split())
    assert (config.steps, config.epochs, config.lr, changes) == (7, 0, 0.5, dict(chunk=10, video=False))


@pytest.mark.filterwarnings("error::UserWarning")
def test_sample_shows_what_the_model_foresees(tmp_path, tabletop_data, checkpoints):
    """Catches pictures of other predictions than the model's, a rollout or a clip that leaves no picture."""
    model = small_model(norm_pixels=False, copy_gate=True)
    clip = clips.Clips(tabletop_data / "demonstrations").read(0)
    pixels = {c: gr1.to_pixels(torch.tensor(x).permute(0, 3, 1, 2), 32) for c, x in clip["frames"].items()}
    take = sample.Take("x", "lift the block", "", None, clip["frames"], clip["robot_obs"], 15)
    out, robot_obs = sample.foresee(model, pixels, take), torch.tensor(clip["robot_obs"])
    for t in range(len(robot_obs)):
        seen = slice(max(0, t + 1 - model.config.window), t + 1)
        full = model({c: x[None, seen] for c, x in pixels.items()}, [take.sentence], robot_obs[None, seen])
        assert all(same(out[c][0, t], full[c][0, -1], 1e-5) for c in CAMERAS), t
    for name, stage, *flags in (("rollout-00", "finetune", "--show-predictions"),
                                ("clip-*", "pretrain", "--data", tabletop_data / "videos")):
        status, text = run("sample.py", "--checkpoint", checkpoints / stage, *flags, "--episodes", 1,
                           "--out", tmp_path / stage)
        assert status == 0, text
        assert sorted(file.suffix for file in (tmp_path / stage).glob(f"{name}.*")) == [".gif", ".png"], text


# ------------------------------------------------------------------------------------------ scripts, README

def test_commands_say_what_is_wrong(tabletop_data, checkpoints, tmp_path):
    """Catches tracebacks, misspelt flags that are ignored, runs that start although something is wrong."""
    robot, video, out = tabletop_data / "demonstrations", tabletop_data / "videos", tmp_path / "out"
    broken, damaged = tmp_path / "broken", tmp_path / "damaged"
    tabletop.make("demonstrations", broken, 12, "AD", workers=1)
    for shard in broken.glob("*.bin"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    shutil.copytree(checkpoints / "finetune", damaged)
    for half, data in ("training", robot), ("validation", video):
        shutil.copytree(data, tmp_path / "halves" / half)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-8])
    for command in ("train.py", "eval_calvin.py", "sample.py", "tabletop.py", "clips.py A", "calvin.py",
                    "record_calvin.py", "prepare_calvin.py A B"):
        assert fails_in_one_line(*command.split(), "--hepl", words=["--hepl", "did you mean --help?"])
    start = training("finetune", robot, out)
    judge = ["eval_calvin.py", "--episodes", 1, "--chains", 0, "--workers", 1, "--out", out]
    look = ["sample.py", "--checkpoint", checkpoints / "finetune", "--episodes", 1, "--out", out]
    for command, words in (
            (training("finetune", tmp_path / "nowhere", out), ["nowhere", "no such directory"]),
            (training("finetune", video, out), ["videos", "no actions", "--stage pretrain"]),
            (training("finetune", tmp_path / "halves", out), ["halves/validation", "no actions"]),
            (training("finetune", broken, out), ["JPEG is broken", "clips.py"]),
            (training("finetune", broken, out, "--workers", 1), ["JPEG is broken", "clips.py"]),
            (training("pretrain", video, out, "--no-video"), ["--no-video", "[OBS]"]),
            ([*start, "--preset", "tinny"], ["tinny", "did you mean 'tiny'?"]),
            ([*start, "--stage", "fintune"], ["fintune", "finetune"]),
            ([*start, "widht=3"], ["widht", "did you mean 'width'?"]),
            ([*start, "width"], ["KEY=VALUE", "width"]),
            ([*start, 'width="32"'], ["width", "int"]),
            ([*start, "window=0"], ["window", "0"]),
            ([*start, "width=33"], ["width 33", "multiple"]),
            ([*start, 'cameras={"rgb_static":33}'], ["rgb_static", "33"]),
            ([*start, 'cameras={"rgb_tactile":32}'], ["rgb_tactile", "rgb_static"]),
            ([*start, "--batch", 5, "--accumulate", 2], ["--batch 5", "multiple of 2"]),
            ([*start, "--log-every", 0], ["--log-every", "0"]),
            ([*start, "--epochs", -1], ["--epochs", "at least 0"]),
            ([*start, "--lr", -1], ["--lr", "at least 0", "-1"]),
            ([*start, "--beta2", 1], ["--beta2", "below 1"]),
            ([*start, "--weight-decay", -0.5], ["--weight-decay", "at least 0", "-0.5"]),
            ([*start, "--seed", -1], ["--seed", "at least 0", "-1"]),
            ([*start, "--shift", -0.5], ["--shift", "at least 0", "-0.5"]),
            ([*start, "--clip-grad", 0], ["--clip-grad", "above 0"]),
            ([*start, "stage=1"], ["stage"]),
            ([*start, "name=1"], ["name"]),
            ([*start, "--bench", "--estimate"], ["--bench", "--estimate"]),
            ([*start, "--data-fraction", 1.5], ["--data-fraction", "1.5"]),
            ([*start, "--precision", "fp17"], ["fp17", "bf16"]),
            ([*start, "width=64", "--init", checkpoints / "pretrain"], ["another shape", "pretrain"]),
            ([*start, "--init", video], ["videos", "no such file"]),
            (["model.py", "--preset", "grl"], ["grl", "did you mean 'gr1'?"]),
            (["tabletop.py", "--make", "videos"], ["--out"]),
            (["tabletop.py", "--scenes", "AX"], ["--scenes", "ABCD"]),
            ([*judge, "--policy", "noop", "--episodes", 0], ["nothing to play"]),
            ([*judge, "--workers", 0], ["--workers", "1 or more"]),
            ([*judge, "--language", "unseen"], ["--language", "calvin"]),
            ([*judge, "--env", "calvin", "--scene", "A"], ["scene D"]),
            (["eval_calvin.py", "--merge", out], ["episodes.jsonl", "not there"]),
            (["record_calvin.py"], ["--out"]),
            (["record_calvin.py", "--out", out, "--tasks", "open_draw"], ["open_draw", "open_drawer"]),
            (["record_calvin.py", "--out", out, "--scenes", "E"], ["--scenes", "ABCD"]),
            (["record_calvin.py", "--out", out, "--play", 1], ["--play 1", "another task ends"]),
            ([*judge, "--seed", -1], ["--seed", "0 or more"]),
            ([*look, "--instruction", " "], ["instruction", "empty"]),
            ([*judge, "--checkpoint", tmp_path / "nowhere"], ["nowhere", "train.py"]),
            ([*judge, "--checkpoint", checkpoints / "pretrain"], ["finetune"]),
            ([*judge, "--checkpoint", damaged], ["model.safetensors"]),
            ([*look, "--checkpoint", tmp_path / "nowhere"], ["nowhere", "train.py"]),
            ([*look, "--checkpoint", checkpoints / "pretrain"], ["finetune"])):
        assert fails_in_one_line(*command, words=words)
    assert not (out / "model.safetensors").exists()


def test_no_file_imports_a_script():
    """Catches parts that others need but that live in a script, and imports in a circle."""
    scripts = {"train", "sample", "eval_calvin", "record_calvin", "prepare_calvin", "prepare_ego4d"}
    for path in ROOT.glob("*.py"):
        names = {name for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, (ast.Import, ast.ImportFrom))
                 for name in (getattr(node, "module", None), *(alias.name for alias in node.names))}
        timed = {"train"} if path.name == "bench.py" else set()           # whose very step it times
        assert path.name == "test_model.py" or names & scripts <= timed, path


def readme_problems(text):
    """Flags that a command's script lacks, files that aren't there, lines that moved: -> list."""
    found, text = [], text.replace("\\\n", " ")
    for script, flags in re.findall(r"\b(\w+\.py)\b((?: +[^\s`#|&;]+)+)", text):
        if (ROOT / script).exists() and not script.startswith("test_"):
            known = re.findall(r"--[a-z][\w-]*", run(script, "--help")[1])
            used = re.findall(r"(?<=\s)--[a-z][\w-]*", flags)
            found += [f"{script} has no {flag}" for flag in used if flag not in known]
    for name, file, line in re.findall(r"\[`([^`]+)`\]\(([\w./-]+)#L(\d+)\)", text):
        lines = [""] + ((ROOT / file).read_text().splitlines() if (ROOT / file).exists() else [])
        here = lines[int(line)] if int(line) < len(lines) else ""
        word = re.escape(name.split(".")[-1])
        found += [] if re.search(rf"\b{word}\b", here) else [f"{file}:{line} is not {name}"]
    files = re.findall(r"(?<![\w/.*-])\w+\.py\b|(?<=\]\()(?!https?:|#|mailto:)[^)#\s]+", text)
    found += [f"no file {name}" for name in sorted(set(files)) if not (ROOT / name).exists()]
    targets = re.findall(r"^([a-z]\w*):", (ROOT / "Makefile").read_text(), re.M)
    return found + [f"no target {target}" for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M)
                    if target not in targets]


def test_readme_tells_the_truth():
    """Catches commands, files and line numbers that the code has outgrown; a checker that finds nothing."""
    line = (ROOT / "model.py").read_text().split("def attention_mask")[0].count("\n") + 1
    good = f"`python train.py --stage x \\\n --lr 1` [`attention_mask`](model.py#L{line}) [x](http://a/b)"
    bad = ("torchrun --nproc 8 train.py --stage finetune --lrr 1   # so\nsee `modle.py`, [there](LICENCE-X), "
           f"`make dmeo`, [`attention_mask`](model.py#L{line - 1})")
    assert readme_problems(good) == [] and set(readme_problems(bad)) == {
        "train.py has no --lrr", f"model.py:{line - 1} is not attention_mask", "no file modle.py",
        "no file LICENCE-X", "no target dmeo"}
    assert readme_problems((ROOT / "README.md").read_text()) == []
