"""
The tests of model.py, in its order: `python -m pytest test_model.py`. CPU, no network.

Each docstring names the bug that its test would catch. tests/ holds those of all other files. Reads
tests/fixtures/official_small.npz: inputs, weights and outputs of the official model (bytedance/GR-1), small.
"""
import collections
import math
import re

import numpy as np
import pytest
import torch

import model as gr1
from nanogr import bench, encoders, policy
from tests.helpers import (CAMERAS, GATES, Recorded, golden_config, golden_file, random_window, refused,
                           run, same, small_config, small_model)


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


def test_windows_may_share_frames():
    """Catches frames that windows share but that are given to another window, or to another of its steps."""
    model = small_model(norm_pixels=False, copy_gate=True)
    pixels, sentences, robot_obs = random_window(model.config, batch=6)
    runs = {c: torch.cat([x[:3], x[3:]], 1)[:, :6] for c, x in pixels.items()}           # three of six frames
    starts = torch.tensor([0, 2, 1, 1, 0, 2])                                            # two windows of each
    frame_at = (starts + 6 * torch.arange(3).repeat_interleave(2))[:, None] + torch.arange(4)
    apart = {c: torch.stack([x[i // 2, start:start + 4] for i, start in enumerate(starts.tolist())])
             for c, x in runs.items()}
    at = torch.tensor([3, 1])
    shared = model(runs, sentences, robot_obs, video_at=at, frame_at=frame_at)
    for name, value in model(apart, sentences, robot_obs, video_at=at).items():
        assert same(shared[name], value, 1e-5), name


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


def test_the_resampler_is_the_plain_one():
    """Catches a shortcut through the weight matrices that is not exact, forward or backward."""
    layer = gr1.ResamplerLayer(24, heads=2, head_dim=8)
    latents, patches, wanted = torch.randn(3, 5, 24), torch.randn(3, 20, 24), torch.randn(3, 5, 24)
    results = []
    for way in layer.plain, layer.forward:
        given = [x.clone().requires_grad_() for x in (latents, patches)]
        layer.zero_grad()
        out = way(*given)
        (out * wanted).sum().backward()
        results.append([out, *(x.grad for x in given), *(p.grad.clone() for p in layer.parameters())])
    assert all(same(a, b, 1e-4) for a, b in zip(*results))


@pytest.mark.parametrize("told", [False, True])
def test_fast_trunk_equals_the_naive_one(told):
    """Catches a shortcut that is not exact, in values or gradients, and any token that looks ahead."""
    trunk = small_model(told=told).double().trunk
    trunk.unused_wte.requires_grad_(False)
    context, queries = (torch.randn(2, n, 32, dtype=torch.double, requires_grad=True) for n in (40, 36))
    mask, weights = torch.tensor([[True] * 4, [True] * 3 + [False]]), torch.randn_like(queries)
    tokens, at = context.unflatten(1, (4, 10)), torch.arange(4).repeat_interleave(9)
    results = []
    for out in trunk(tokens, queries, at, mask), bench.naive_trunk(trunk, tokens, queries, at, mask):
        leaves = [context, queries, *(p for p in trunk.parameters() if p.requires_grad)]
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True)])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(*results, strict=True))


def test_told_queries_begin_as_the_sentence():
    """Catches another token than the sentence's, or the sentence of another timestep or window."""
    trunk, at = small_model(told=True).trunk, torch.arange(4).repeat_interleave(9)
    tokens, queries = torch.randn(2, 4, 10, 32), torch.randn(2, 36, 32)
    answers = trunk(tokens, queries, at)
    assert not same(answers, small_model().trunk(tokens, queries, at), 1e-2)
    begun = queries + torch.stack([tokens[:, t, 0] for t in at], 1)
    assert same(answers, small_model().trunk(tokens, begun, at), 1e-5)


def test_upright_hand_does_not_jump():
    """Catches roll at pi read as far from -pi, angles mixed up, places turned too, every robot read so."""
    pose = lambda *numbers: torch.tensor([0.1, -0.1, 0.5, *numbers] + [0.0] * 9)
    turned, around = pose(math.pi + 0.1, 0.2, 2), pose(0.1 - math.pi, 0.2, 2 - 2 * math.pi)
    model, plain = small_model(upright=True), small_model()
    assert same(model.encode_state(turned), model.encode_state(around), 1e-5)
    ratio = model.embed_arm.weight.std(0) / plain.embed_arm.weight.std(0)
    assert torch.allclose(ratio, torch.tensor([1.0] * 3 + [20.0] * 3))
    plain.load_state_dict(model.state_dict())
    assert same(model.encode_state(turned), plain.encode_state(pose(0.1, 0.2, 2 - math.pi / 2)), 1e-5)
    assert not same(plain.encode_state(turned), plain.encode_state(around), 1e-2)


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
    batch["video_at"] = torch.tensor(at)
    losses = gr1.losses(out, batch, pixels, config)
    expected = by_hand(out, batch, pixels, config, at)
    assert set(losses) == {"arm", "gripper", *CAMERAS}
    assert all(abs(losses[name].item() - expected[name]) < 1e-4 for name in losses)
    nothing = batch | {key: torch.zeros_like(batch[key]) for key in ("action_mask", "future_mask")}
    assert all(value == 0 for value in gr1.losses(out, nothing, pixels, config).values())
    counts = batch["action_mask"].sum(), batch["future_mask"][:, at].sum()
    few = torch.tensor([0.5, 0.5])                              # one known target in two parts of a batch
    for name, value in gr1.losses(out, batch, pixels, config, few).items():
        assert same(value * 0.5, losses[name] * counts[0 if name in ("arm", "gripper") else 1], 1e-3)


def test_total_loss_by_hand():
    """Catches a weight at the wrong loss, a camera left out, defaults other than the official 100 : 1 : 1."""
    named = dict(arm=2.0, gripper=3.0, rgb_static=5.0, rgb_gripper=7.0)
    assert gr1.total_loss(named) == 100 * 2 + 3 + 5 + 7
    assert gr1.total_loss(named, arm=1, gripper=0.5, video=0.1) == pytest.approx(2 + 1.5 + 1.2)
    assert gr1.total_loss(dict(rgb_static=5.0), video=2) == 10


@pytest.mark.parametrize("robot", [False, True])
def test_one_batch_is_learned(robot):
    """Catches a part that is cut off from the loss: either stage must learn one batch by heart."""
    changes = {} if robot else dict(cameras=dict(rgb_static=32), robot=False, future=1)
    model, config = small_model(**changes).train(), small_config(**changes)
    slopes = torch.rand(4, config.window + config.future, 2, 3, 1, 1)
    ramps = slopes[:, :, 0] * torch.arange(32) + slopes[:, :, 1] * torch.arange(32)[:, None]
    pixels = {c: gr1.to_pixels((ramps * 4).byte(), side) for c, side in config.cameras.items()}
    seen = {c: x[:, :config.window] for c, x in pixels.items()}
    batch = dict(future_mask=torch.ones(4, 4, dtype=bool), video_at=torch.arange(4))
    if robot:
        actions = torch.rand(4, 4, 1, 7) - 0.5
        batch |= dict(rel_actions=torch.cat([actions[..., :6], actions[..., 6:].sign()], -1),
                      robot_obs=torch.randn(4, 4, 15), action_mask=torch.ones(4, 4, 1, dtype=bool))
    optimizer, history = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0), []
    for _ in range(150):
        out = model(seen, ["a", "b", "c", "d"], batch.get("robot_obs"))
        losses = gr1.losses(out, batch, pixels, config)
        history.append({name: value.item() for name, value in losses.items()})
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, start in history[0].items():
        assert history[-1][name] < start / 5, (name, start, history[-1][name])


def test_the_papers_model():
    """Catches a layer too many or too wide; frozen encoders that train, are reset or fill the checkpoints."""
    config = gr1.preset_config("gr1")
    both = encoders.build_encoders(config, "none", "none")
    total = lambda: [sum(p.abs().sum().item() for p in encoder.parameters()) for encoder in both]
    before, model = total(), gr1.GR1(config, *both).train()
    assert total() == before
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    assert sum(n for trained, n in sizes if trained) == 45_988_039
    assert round(sum(n for _, n in sizes) / 1e6) == 195
    assert model.trunk.training and not any(part.training for x in both for part in x.modules())
    assert sum(x.numel() for x in model.trained_state().values()) == 45_988_039
    assert any(name.startswith("vision.") for name in small_model().trained_state())      # trained, so stored
    cls, patches = model.vision(torch.randn(1, 3, 224, 224))
    text = model.text(["open the drawer", "lift the block", "open the drawer"])
    assert cls.shape == (1, 768) and patches.shape == (1, 196, 768) and text.shape == (3, 512)
    assert not (cls.requires_grad or text.requires_grad)
    assert torch.equal(text[0], text[2]) and not torch.allclose(text[0], text[1])


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


def test_settings_that_fail():
    """Catches a misspelt or impossible setting that is ignored, or that fails in torch's words."""
    for words, changes in (
            ("unknown config key 'widht', did you mean 'width'", dict(widht=3)),
            ("'width' must be int, got '32'", dict(width="32")), ("'robot' must be bool", dict(robot=1)),
            ("'window' must be at least 1, got 0", dict(window=0)),
            ("'future' must be at least 0, got -1", dict(future=-1)),
            ("'dropout' must be from 0 to below 1", dict(dropout=1.0)),
            ("width 33 must be a multiple of heads", dict(width=33)),
            ("width 30 must be a multiple of heads 3", dict(width=30, heads=3, decoder_heads=3)),
            ("'cameras' must name a camera", dict(cameras={})),
            ("rgb_static .33 px. does not divide into patches of 16", dict(cameras=dict(rgb_static=33))),
            ("it needs norm_pixels false", dict(copy_gate=True))):
        assert refused(words, small_config, **changes), changes
    assert small_config(dropout=0).dropout == 0 and small_config(future=0).future == 0
    assert refused("unknown preset 'grl', did you mean 'gr1'.*tiny", gr1.preset_config, "grl")
    for changes in dict(robot=True), dict(video=False):
        assert refused("no robot and always predicts video", gr1.preset_config, "gr1", "pretrain", **changes)
