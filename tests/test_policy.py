"""nanogr/policy.py: acting equals the full forward; what is drawn of the foreseen."""
from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gr2
import model as gr1
from nanogr import policy
from nanogr.encoders import build_encoders
from tests.helpers import CAMERAS, Waits, refused, same, small_config, small_model


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
        *(dict.fromkeys(CAMERAS, y) for y in (policy.draw(out, x[:, :4], config), x[:, :4], x[:, 2:])),
        torch.full((2, 4), real), config.patch)
    assert errors(now).shape == (2, 2) and (errors(now) > 0).all() and same(*errors(now).T, 1e-4)
    assert (errors(perfect)[:, 0] == 0).all() and same(errors(perfect)[:, 1], errors(now)[:, 1], 1e-4)
    assert (errors(now, real=False) == 0).all()


def test_a_policy_that_looks_at_every_third_step():
    """Catches a window of the wrong frames, a plan that outlives a reset or another sentence, and pictures
    that are drawn or looked at between timesteps.
    """
    model, rng = small_model(stride=3, chunk=4), np.random.default_rng(0)
    acting, always, T = policy.Policy(model, execute=3), policy.Policy(model, execute=3), model.config.window
    always.blinks, always.every = False, 3               # sees all, and takes every third for its window
    always.reset()
    seen, looked = [], []
    for step in range(30):
        if step in (8, 17):
            acting.reset(), always.reset(), seen.clear()
        sentence = "open the drawer" if step < 21 else "lift the block"
        picture = partial(rng.integers, 0, 256, (32, 32, 3), np.uint8)
        observation = dict(rgb_static=picture(), rgb_gripper=picture(), robot_obs=rng.normal(size=15))
        if acting.awake(sentence):
            looked.append(step)
            if step == 21:                               # amid a plan, and so between timesteps
                seen.clear()
            seen.append(observation)
        awake = looked[-1] == step
        action = acting.step(observation if awake else None, sentence)
        if step < 21:
            assert np.abs(action - always.step(observation, sentence)).max() < 1e-5
        if awake:
            batch = {key: torch.tensor(np.stack([x[key] for x in seen[-T:]]))[None] for key in observation}
            frames = {c: gr1.to_pixels(batch[c].movedim(-1, 2), s) for c, s in model.config.cameras.items()}
            with torch.no_grad():
                arm = model(frames, [sentence], batch["robot_obs"].float())["arm"][0, -1].numpy()
        assert np.abs(action[:6] - arm[step - looked[-1]]).max() < 1e-5
    assert looked == [0, 3, 6, 8, 11, 14, 17, 20, 21, 24, 27]


@pytest.mark.parametrize("changes", [dict(chunk=1), dict(chunk=2), dict(norm_pixels=False, copy_gate=True)])
def test_policy_equals_the_full_forward(changes):
    """Catches what a policy may wrongly keep: features at an old place in the window, sentence or episode."""
    model, rng = small_model(**changes), np.random.default_rng(0)
    acting, history, config = policy.Policy(model), [], model.config
    assert refused("call step before", acting.predicted_frames)
    assert refused("no .OBS", policy.Policy(small_model(video=False)).predicted_frames)
    for step in range(25):
        if step in (9, 20):
            acting.reset()
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
        arm, gripper = acting.actions(history[-1], sentence)
        assert arm.shape == (model.config.chunk, 6)
        assert np.abs(arm - out["arm"][0, -1].numpy()).max() < 1e-5
        assert np.abs(gripper - out["gripper"][0, -1].numpy()).max() < 1e-5, step
        for c, frame in acting.predicted_frames().items():
            drawn = policy.to_images(policy.draw(out[c][0, -1], pixels[c][0, -1], config)).numpy().astype(int)
            assert frame.shape == (32, 32, 3) and np.abs(frame - drawn).max() <= 1
            assert (frame == drawn).mean() > 0.99
    action = acting.step(history[0], "x")
    assert action.dtype == np.float32 and action.shape == (7,) and action[6] in (-1, 1)
    assert np.abs(action[:6]).max() > 1                        # not cut off: the official evaluation doesn't


def test_an_eighth_number_of_an_action():
    """Catches an action's length written by hand: README says where an eighth number goes."""
    model = small_model()
    model.action_head.arm = torch.nn.Linear(model.config.width // 2, 7)
    observation = dict(dict.fromkeys(CAMERAS, np.zeros((32, 32, 3), np.uint8)), robot_obs=np.zeros(15))
    action = policy.Policy(model).step(observation, "open the drawer")
    assert action.shape == (8,) and action[7] in (-1, 1)
    frames = {c: torch.zeros(1, 4 + model.config.future, 3, 32, 32) for c in CAMERAS}
    out = model({c: x[:, :4] for c, x in frames.items()}, ["open the drawer"], torch.zeros(1, 4, 15))
    batch = dict(rel_actions=torch.ones(1, 4, 1, 8), action_mask=torch.ones(1, 4, 1, dtype=torch.bool),
                 future_mask=torch.ones(1, 4, dtype=torch.bool), video_at=torch.arange(4))
    named = gr1.losses(out, batch, frames, model.config)
    assert same(named["arm"], torch.nn.functional.smooth_l1_loss(out["arm"], batch["rel_actions"][..., :7]))
    assert same(named["gripper"], -torch.nn.functional.logsigmoid(out["gripper"]).mean())


class Imagined(policy.Graphed):
    """Recorded and replayed as on a GPU, which is imagined: a replay computes on the inputs that it holds and
    writes over the outputs that it holds."""
    def record(self, held):
        class Graph:
            replay = lambda _: [old.copy_(new) for old, new in zip(out, self.function(*held))]
        out = [torch.full_like(x, 7.0) for x in self.function(*held)]
        return Graph(), held, out


def test_a_graph_for_each_shape():
    """Catches a graph that answers for another shape, for its first inputs, or over an earlier answer."""
    model, rng = small_model(), np.random.default_rng(0)
    plain, replayed = policy.Policy(model), policy.Policy(model)
    for name in "look", "act":
        setattr(replayed, name, Imagined(partial(getattr(policy, name), model), torch.device("cuda")))
    for _ in range(8):
        observation = {c: rng.integers(0, 256, (32, 32, 3), np.uint8) for c in CAMERAS}
        observation["robot_obs"] = rng.normal(size=15)
        for mine, known in zip(replayed.actions(observation, "push"), plain.actions(observation, "push")):
            assert np.array_equal(mine, known)
    assert len(replayed.look.graphs) == 1 and len(replayed.act.graphs) == model.config.window
    assert replayed.another().act is replayed.act
    crowd = torch.zeros(policy.Graphed.LARGEST + 1, 15)
    assert len(replayed.look(crowd, *[torch.zeros(len(crowd), 3, 32, 32).byte()] * 2)[1]) == len(crowd)
    assert len(replayed.look.graphs) == 1                # which computes a large batch as it is


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cast", [False, True])
def test_replays_equal_calls_on_a_gpu(cast):
    """Catches graphs that read what is gone: casts of an autocast that has ended, another policy's memory."""
    model, rng = small_model().cuda(), np.random.default_rng(0)
    another = policy.Policy(model)
    plain, replayed = policy.Policy(model, graphs=False), policy.Policy(model)
    for step in range(12):
        seen = {c: rng.integers(0, 256, (32, 32, 3), np.uint8) for c in CAMERAS}
        seen["robot_obs"] = rng.normal(size=15)
        with torch.autocast("cuda", torch.bfloat16, cast):
            if another:
                another.actions(seen, "push")
            for mine, known in zip(replayed.actions(seen, "push"), plain.actions(seen, "push")):
                assert np.abs(mine - known).max() < (0.02 if cast else 1e-4), step
        if step == 8:                                    # all graphs are recorded: one of two policies goes
            another = None
            torch.cuda.empty_cache()


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.4's imitated GPU needs a driver")
@pytest.mark.parametrize("kind, preset", [(gr1, "tiny"), (gr1, "calvin"), (gr2, "gr2-tiny")])
def test_a_step_never_waits_for_the_device(kind, preset):
    """What waits can't be recorded as a CUDA graph. Catches a constant sent anew, a value that is read."""
    config, text = kind.preset_config(preset), torch.nn.Identity()
    gr1.imagenet.cache_clear()
    made = (gr2.build_encoders(config, "none", text) if kind is gr2 else
            build_encoders(config, None, text, "none"))
    model = (gr2.GR2 if kind is gr2 else gr1.GR1)(config, *made).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        model.to("cuda")
        frames = [torch.zeros(2, 3, side + 8, side + 8).byte() for side in config.cameras.values()]
        for time in range(2):                            # what a first call makes is kept
            with Waits() as watch:
                images, states = policy.look(model, torch.zeros(2, 15), *frames)
                windows = (x[:, None].repeat_interleave(config.window, 1) for x in (images, states))
                arm, _ = policy.act(model, torch.zeros(2, config.width), *windows)
        assert arm.shape == (2, config.chunk, 6) and not watch.found
    gr1.imagenet.cache_clear()
