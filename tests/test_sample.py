"""sample.py: it shows the model's predictions."""
import pytest
import torch

import model as gr1
import sample
from nanogr import clips, policy
from tests.helpers import CAMERAS, run, same, small_model


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
        drawn = policy.pictures(model, {c: full[c][:, -1:] for c in CAMERAS},
                                {c: x[None, t:t + 1] for c, x in pixels.items()})
        assert all(same(out[c][0, t], drawn[c][0, 0], 1e-5) for c in CAMERAS), t
    for name, stage, *flags in (("rollout-00", "finetune", "--show-predictions"),
                                ("clip-*", "pretrain", "--data", tabletop_data / "videos")):
        status, text = run("sample.py", "--checkpoint", checkpoints / stage, *flags, "--episodes", 1,
                           "--out", tmp_path / stage)
        assert status == 0, text
        assert sorted(file.suffix for file in (tmp_path / stage).glob(f"{name}.*")) == [".gif", ".png"], text
