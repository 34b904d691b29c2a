"""The preset calvin's eye: what painting teaches it, and that nothing else does."""
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model import GR1, imagenet, preset_config, to_pixels
from nanogr import clips, encoders, painter
from nanogr.common import UserError
from tests.helpers import make_data_set, run, same


def squares(directory, count=60, length=4, seed=0):
    """Clips of a red square somewhere on a floor that is lighter or darker each time: a data set."""
    rng = np.random.default_rng(seed)
    with clips.ShardWriter(directory, 0, list(painter.SIDES)) as writer:
        for episode in range(count):
            frames = {}
            for camera, side in painter.SIDES.items():
                x = frames[camera] = np.empty((length, side, side, 3), np.uint8)
                for frame in x:
                    row, column = rng.integers(4, side - 12, 2)
                    frame[:] = rng.integers(60, 160)
                    frame[row:row + 8, column:column + 8] = 200, 20, 20
            writer.add(frames, "look", episode=episode)
    clips.write_meta(directory, "squares", 5, "a test")
    return directory


def red(images):
    """Where the red of images (N, 3, S, S) is: (N, 2)."""
    x = images * imagenet("std", "cpu") + imagenet("mean", "cpu")
    x = ((x[:, 0] > 0.6) & (x[:, 1] < 0.3)).float()
    line = torch.arange(x.shape[-1]).float()
    return torch.stack([(x.sum(1) * line).sum(1), (x.sum(2) * line).sum(1)], 1) / x.sum((1, 2))[:, None]


def misses(vision, images):
    """By how many px a linear map from the points' places misses the red: median of held-out images."""
    with torch.no_grad():
        inputs = vision.points(images)[..., :2].flatten(1)
    inputs, wanted, part = torch.cat([inputs, torch.ones(len(inputs), 1)], 1), red(images), len(images) // 3
    fit = torch.linalg.lstsq(inputs[part:], wanted[part:], driver="gelsd").solution
    return (inputs[:part] @ fit - wanted[:part]).norm(dim=1).median().item()


def test_painting_teaches_where_things_are(tmp_path):
    """Catches keypoints that learn nothing from being painted: a small red square, not the floor's light,
    must be found far better than before; and numbers that are not brought to mean 0 and spread 1."""
    data = clips.Clips(squares(tmp_path))
    made = painter.train(data, np.arange(len(data)), 150, frames=200, batch=16)
    frames = painter.frames_of(data, np.arange(len(data)), 300, np.random.default_rng(5))
    images = {camera: to_pixels(x, painter.SIDES[camera]) for camera, x in frames.items()}
    torch.manual_seed(0)
    before, after = (misses(vision, images["rgb_static"]) for vision in (
        encoders.tiny_vision(painter.CONFIG), made.vision))
    with torch.no_grad():
        share = painter.loss(made, images["rgb_static"], "rgb_static").item()
        points = torch.cat([made.vision.points(x) for x in images.values()])
    assert share < 0.3 and after < 3 and after < before / 2, (share, after, before)
    brought = (points - made.vision.middle) / made.vision.spread
    assert brought.mean(0).abs().median() < 0.2 and abs(brought.std(0).median() - 1) < 0.2


def test_the_eye_of_calvin_is_frozen_and_kept():
    """Catches an eye that is trained, reset with the other weights, or left out of the checkpoint."""
    config = preset_config("calvin")
    model = GR1(config, *encoders.build_encoders(config))
    eye, state = model.vision.eye(), model.trained_state()
    stored = encoders.read_weights(encoders.EYE)
    assert set(eye) == set(stored) and all(torch.equal(eye[key], stored[key]) for key in stored)
    assert all(f"vision.{key}" in state for key in eye)
    trained = {name for name, p in model.vision.named_parameters() if p.requires_grad}
    assert trained == {"cls.weight", "cls.bias", "token.weight", "token.bias", "norm.weight", "norm.bias",
                       "identity"}
    free = GR1(config, *encoders.build_encoders(config, vision_weights="none"))
    assert all(p.requires_grad for p in free.vision.parameters())
    encoders.same_eye(model.vision, state, "x")
    encoders.same_eye(free.vision, state, "x")
    with pytest.raises(UserError, match="x was trained with another eye"):
        encoders.same_eye(model.vision, free.trained_state(), "x")


def test_a_picture_is_looked_at_once():
    """Catches points of another picture, of another order, and a memory that grows without an end."""
    torch.manual_seed(0)
    config = preset_config("calvin")
    vision = encoders.build_encoders(config)[0]
    images = torch.randn(3, 3, 48, 48)
    plain = vision.eval()(images)
    assert not vision.memory
    with mock.patch.object(vision, "points", wraps=vision.points) as looks:
        for some in ([0, 1], [2, 0, 2], [1]):
            assert all(same(x, y[some], 1e-5) for x, y in zip(vision.train()(images[some]), plain))
        assert len(vision.memory) == 3 and looks.call_count == 2
    vision.LARGEST = 3
    vision(torch.randn(2, 3, 48, 48))
    assert len(vision.memory) == 2
    vision.LARGEST = 0
    assert vision(images) and len(vision.memory) == 2


def test_points_are_the_same_in_any_company():
    """Catches a resumed run that differs in the last bits: convolutions do, by how many come at once."""
    vision, images = encoders.build_encoders(preset_config("calvin"))[0].train(), torch.randn(20, 3, 96, 96)
    alone = [vision.remembered(x[None])[0] for x in images]
    vision.memory = {}
    assert all(map(torch.equal, alone, vision.remembered(images)))


def test_an_eye_comes_from_a_file(tmp_path):
    """Catches a command that makes no file train.py can take, and a file of something else without a word."""
    out = tmp_path / "new" / "eye.safetensors"
    status, said = run("-m nanogr.painter", "--data", squares(tmp_path / "data", 4), "--out", out,
                       "--steps", 2, "--frames", 40)
    assert status == 0 and "rgb_static: " in said and "held out" in said, said
    config = preset_config("calvin")
    vision = encoders.build_encoders(config, vision_weights=str(out))[0]
    assert all(torch.equal(x, encoders.read_weights(out)[key]) for key, x in vision.eye().items())
    save_file({"stem.0.weight": torch.zeros(1)}, out)
    with pytest.raises(UserError, match="it lacks"):
        encoders.build_encoders(config, vision_weights=str(out))
    with pytest.raises(UserError, match="encoders of its own"):              # a checkpoint holds its eye
        encoders.build_encoders(config, str(out))


def test_a_run_starts_from_its_own_eye(tmp_path):
    """Catches an eye of --init in place of --mae's, or the hub's in place of its own, without a word."""
    data, first = make_data_set(tmp_path / "data"), tmp_path / "first"
    start = ["train.py", "--stage", "finetune", "--preset", "calvin", "--data", data, "--batch", 2,
             "--steps", 1]
    status, said = run(*start, "--init", "none", "--mae", "none", "--out", first)
    assert status == 0, said
    again = [*start, "--init", first, "--fresh", "none", "--out", tmp_path / "again"]
    status, said = run(*again)
    assert status == 1 and said.strip().endswith("--mae none if it was trained with the rest")
    assert run(*again, "--mae", "none")[0] == 0
