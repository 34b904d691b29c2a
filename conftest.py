"""Fixtures that several test files use. Nothing in the tests needs a GPU or a network."""
import os
import signal
import sys

os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"] = "", "1"        # before torch reads them
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import pytest
import torch

from nanogr.worlds import tabletop
from tests.helpers import run, training


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    signal.alarm(400)                          # what would hang for ever kills the tests instead
    yield
    signal.alarm(0)


@pytest.fixture(scope="session")
def tabletop_data(tmp_path_factory):
    """A folder with twelve clips of each kind: demonstrations/ and videos/."""
    folder = tmp_path_factory.mktemp("tabletop")
    for kind in "demonstrations", "videos":
        tabletop.make(kind, folder / kind, 12, "AD", workers=1)
    return folder


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
