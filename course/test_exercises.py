"""
The graders of course/exercises.py: `pytest course/test_exercises.py`. They compare with model.py.

Until an exercise is written its grader fails and says what to write. With --solutions, in CI, or together
with the project's other tests they grade course/solutions.py instead (see course/conftest.py).
"""
import inspect
import itertools
import os

import exercises
import numpy as np
import pytest
import solutions
import torch

import model as gr1
from nanogr.encoders import build_encoders
from nanogr.policy import Policy

NAMES = ["token_table", "attention_mask", "resampler_layer", "video_target", "policy_step"]


@pytest.fixture
def written(grades_solutions):
    """A function that calls an exercise; where it is not written, the test fails with its words alone."""
    def call(name, *arguments):
        try:
            return getattr(solutions if grades_solutions else exercises, name)(*arguments)
        except NotImplementedError as error:
            words = str(error)
        pytest.fail(words, pytrace=False)
    return call


def differ(mine, right, where):
    """The grader's word for a wrong answer: how many numbers differ, and the first."""
    mine = torch.as_tensor(mine)
    assert mine.shape == right.shape, f"{where}: shape {tuple(mine.shape)}, should be {tuple(right.shape)}"
    wrong = ((mine.double() - right.double()).abs() > 1e-4).nonzero()
    first = tuple(wrong[0].tolist()) if len(wrong) else ()
    assert not len(wrong), (f"{where}: {len(wrong)} of {right.numel()} numbers differ; at {first} yours is "
                            f"{mine[first].item()}, right is {right[first].item()}")


def test_token_table(written):
    """Catches a token that is missing, misplaced or of the wrong kind, in either stage."""
    stages = ("finetune", {}), ("pretrain", {}), ("finetune", dict(video=False)), ("finetune", dict(chunk=10))
    for preset, (stage, changes) in itertools.product(("gr1", "tiny"), stages):
        config = gr1.preset_config(preset, stage, **changes)
        mine, right = [tuple(row) for row in written("token_table", config)], gr1.token_table(config)
        for i, row in enumerate(right):
            assert mine[i:i + 1] == [row], f"{preset}, {stage}, {changes}: row {i} should be {row}"
        assert len(mine) == len(right), f"{preset}, {stage}, {changes}: rows too many"


def test_attention_mask(written):
    """Catches a mask that is off by one token or timestep, queries whose order is taken for their place."""
    for steps, context, query_steps in ((2, 3, [0, 0, 1, 1]), (5, 12, [4]), (4, 7, [3, 1]),
                                        (10, 22, range(10))):
        right = gr1.attention_mask(steps, context, torch.tensor(query_steps))
        differ(written("attention_mask", steps, context, list(query_steps)), right,
               f"{steps} timesteps of {context} tokens, queries at {list(query_steps)}")


def test_resampler_layer(written):
    """Catches a norm too few, keys without latents, keys and values swapped, a missing residual."""
    torch.manual_seed(0)
    layer = gr1.ResamplerLayer(24, 2, 8)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    for count in 196, 4:
        latents, patches = torch.randn(3, 5, 24), torch.randn(3, count, 24)
        mine = written("resampler_layer", layer, latents, patches)
        differ(mine, layer(latents, patches), f"{count} patches")


def test_video_target(written):
    """Catches a mean over all patches or over each channel, and the spread of n for that of n - 1."""
    torch.manual_seed(0)
    for shape, patch in ((2, 3, 32, 32), 16), ((2, 4, 3, 24, 24), 8):
        pixels = torch.randn(shape) + torch.linspace(0, 9, shape[-1])
        config = gr1.GR1Config(cameras={"rgb_static": shape[-1]}, patch=patch)
        differ(written("video_target", pixels, patch), gr1.video_target(pixels, config), f"pixels {shape}")


def test_policy_step(written):
    """Catches a window that does not slide, the wrong timestep, and a gripper left as a logit."""
    torch.manual_seed(0)
    config = gr1.preset_config("tiny", window=3, chunk=2)
    model, rng, seen = gr1.GR1(config, *build_encoders(config)).eval(), np.random.default_rng(0), []
    policy = Policy(model)
    for step in range(8):
        seen.append({c: rng.integers(0, 256, (s, s, 3), np.uint8) for c, s in config.cameras.items()}
                    | dict(robot_obs=rng.normal(size=15).astype(np.float32)))
        right = torch.tensor(policy.step(seen[-1], "open the drawer"))
        differ(np.asarray(written("policy_step", model, list(seen), "open the drawer"), np.float32), right,
               f"action after {step + 1} observations")


@pytest.mark.parametrize("name", NAMES)
def test_stub_says_what_to_do(name):
    """Catches a stub that fails without naming exercise and lesson; in CI, one that is shipped solved."""
    stub = getattr(exercises, name)
    if "raise todo(" not in inspect.getsource(stub) and not os.environ.get("CI"):
        pytest.skip("you have written it")
    with pytest.raises(NotImplementedError, match=rf"Write {name}.*lesson \d, course/\d_\w+\.md.*exercises"):
        stub(*[None] * len(inspect.signature(stub).parameters))
