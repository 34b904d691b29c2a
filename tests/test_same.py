"""Training is the same as before the code was moved into rooms: the same losses from the same seed.

tests/fixtures/same_losses.json holds what train.py logged for the two runs below. The code met the figures of
commit ac992d3, the last with everything in one folder. Twice both runs were made anew: the tabletop's videos
came to show many people; a layer norm took over from mean and spread in the tiny preset's keypoints, which
moved figures by at most 0.13%. Made on a CPU, torch 2.14, float32; another number of threads and other vector
instructions move the figures by 3e-7 of themselves.
"""
import json

import pytest

from tests.helpers import ROOT, read_log, run, training


def test_training_is_the_same_as_before(tabletop_data, tmp_path):
    """Catches another start, another draw of windows or shifts, another loss, step or schedule than before:
    all the tests of the parts may pass, and checkpoints load, while a run learns something else.
    """
    golden = json.loads((ROOT / "tests/fixtures/same_losses.json").read_text())
    flags = ["--steps", 4, "--batch", 8, "--eval-every", 4, "--shift", 0.1, "--video-steps", 2]
    shared = ["--windows-per-clip", 2, "--accumulate", 2, "--init", tmp_path / "pretrain"]
    status, text = run(*training("pretrain", tabletop_data / "videos", tmp_path / "pretrain",
                                 *flags, future=1))
    assert status == 0, text
    status, text = run(*training("finetune", tabletop_data / "demonstrations", tmp_path / "finetune",
                                 *flags, *shared, chunk=2))
    assert status == 0, text
    for stage, figures in golden.items():
        for name, before in figures.items():
            assert list(read_log(tmp_path / stage, name).values()) == pytest.approx(before, rel=1e-4), name
