"""sample.py: it shows the model's predictions."""
import pytest
import torch

import model as gr1
import sample
from nanogr import clips, policy
from tests.helpers import CAMERAS, fails_in_one_line, run, same, small_model


@pytest.mark.filterwarnings("error::UserWarning")
def test_sample_shows_what_the_model_foresees(tmp_path, tabletop_data, checkpoints):
    """Catches pictures of other predictions than the model's, a rollout or a clip that leaves no picture."""
    model = small_model(norm_pixels=False, copy_gate=True)
    clip = clips.Clips(tabletop_data / "demonstrations").read(0)
    pixels = {c: gr1.to_pixels(torch.tensor(x).permute(0, 3, 1, 2), 32) for c, x in clip["frames"].items()}
    take = sample.Take("x", "lift the block", "", None, clip["frames"], clip["robot_obs"], 15, 1)
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


def test_a_pretrained_gr1_is_rolled_out(tmp_path, tabletop_data, checkpoints):
    """Catches an imagined frame that is not fed in again, and a roll-out of what foresees no next frame."""
    model = small_model(future=1, robot=False, cameras=dict(rgb_static=32), norm_pixels=False, copy_gate=True)
    pixels = dict(rgb_static=torch.randn(6, 3, 32, 32))
    imagined = sample.imagine(model, pixels, "do it", 2, 0)["rgb_static"]
    seen = pixels["rgb_static"]
    for n in range(2):
        window = {"rgb_static": seen[None, -4:]}
        foreseen = policy.pictures(model, model(window, ["do it"]), window)["rgb_static"][0, -1]
        assert same(imagined[n], foreseen, 1e-5)
        seen = torch.cat([seen, foreseen[None]])
    status, text = run("sample.py", "--roll-out", 3, "--data", tabletop_data / "videos", "--episodes", 2,
                       "--out", tmp_path, "--checkpoint", checkpoints / "pretrain")
    assert status == 0 and "after 3" in text and len(list(tmp_path.glob("clip-*.png"))) == 2, text
    assert fails_in_one_line("sample.py", "--roll-out", 3, "--data", tabletop_data / "demonstrations",
                             "--checkpoint", checkpoints / "finetune", words=["cannot be rolled out"])
    assert fails_in_one_line("sample.py", "--roll-out", 3, words=["--data"])
