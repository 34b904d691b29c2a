"""nanogr/ablation.py: rows that differ in what they say, a table of what is there."""
import json
import math
import shutil
import types

import pytest
from PIL import Image

from nanogr import ablation
from tests.helpers import SIZES, fails_in_one_line, run


def test_interval_by_hand():
    """Catches a normal quantile where few trainings need Student's, and a spread over n, not n - 1."""
    mean, half = ablation.interval([0.2, 0.4, 0.6])
    assert mean == pytest.approx(0.4) and half == pytest.approx(4.303 * 0.2 / 3 ** 0.5)
    assert math.isnan(ablation.interval([0.3])[1])                             # one training has no spread


def test_three_rows(tabletop_data, checkpoints, tmp_path, monkeypatch):
    """Catches a row that trains another row's model, a cell that mixes them, and work that is done twice."""
    command = ["-m nanogr.ablation", "--init", checkpoints / "pretrain", "--columns", "10%", "--seeds", 1,
               "--steps", 2, "--data", tabletop_data / "demonstrations", "--episodes", 1, "--tasks",
               "open_drawer", "--out", tmp_path / "out"]
    sizes = ["--", "--batch", 4, "--eval-batches", 1, "--model", *(f"{k}={v}" for k, v in SIZES.items())]
    status, text = run(*command, "--shard", "2/3", *sizes)
    assert status == 0, text
    ages = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/model.safetensors")}
    assert len(ages) == 1 and "| neither | - [1.04] |" in (tmp_path / "out/report.md").read_text()
    status, text = run(*command, *sizes)
    assert status == 0 and all(path.stat().st_mtime_ns == age for path, age in ages.items()), text
    made = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("out/*/config.json")}
    rows = [made[f"10--{row}-0"] for row in ("neither", "video", "video---pre-training")]
    assert [row["model"]["video"] for row in rows] == [False, True, True]
    assert [row["train"]["init"] for row in rows] == ["none", "none", str(checkpoints / "pretrain")]
    report = (tmp_path / "out/report.md").read_text()
    assert report.count("(n 1) [") == 3 and report.count("gain of *video + pre-training* over") == 2
    assert "[2.00]" in report and "- steps: 2" in report, report
    table = json.loads((tmp_path / "out/report.json").read_text())["table"]["10%"]
    assert {row: len(values) for row, values in table.items()} == dict.fromkeys(ablation.ROWS, 1)
    assert Image.open(tmp_path / "out/chart.png").width > 200
    for path in tmp_path.glob("out/*/eval"):             # what is in the report is not trained again
        shutil.rmtree(path.parent)
    status, text = run(*command, *sizes)
    assert status == 0 and (tmp_path / "out/report.md").read_text() == report, text
    assert not list(tmp_path.glob("out/*/eval"))
    command[command.index(2)] = 3
    assert fails_in_one_line(*command, *sizes, words=["steps 2, now 3"])
    assert fails_in_one_line(*command[:5], "--columns", "20%", words=["there is no '20%'"])
    assert fails_in_one_line(*command[:5], "--columns", "future 1", "--preset", "gr2-tiny",
                             words=["for GR-1"])


def test_gains_are_seed_by_seed(tmp_path):
    """Catches a gain between trainings of different seeds, and a mean over episodes, not tasks."""
    args = types.SimpleNamespace(out=tmp_path, seeds=3, rows=["neither", "video"], columns=["all"],
                                 earlier={"10%": {"neither": {"1": 0.125}}})
    for row, rates in dict(neither={0: (0.0, 0.2), 2: (0.4, 0.4)}, video={1: (1, 1), 2: (0.5, 0.7)}).items():
        for seed, (a, b) in rates.items():
            tasks = dict(push=dict(rate=a, n=1), lift=dict(rate=b, n=9))
            path = ablation.folder(args, "all", row, seed) / "eval/report.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(dict(tasks=tasks)))
    ablation.report(args, {})
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert {"| | 10% | all |", "| neither | 12.5 (n 1) [1.04] | 25.0 ± 190.7 (n 2) [3.33] |"} <= {*lines}
    assert "| video | - [1.52] | 80.0 ± 254.2 (n 2) [3.82] |" in lines         # 12.71 * 0.2
    assert "| gain of *video* over *neither* | - | 20.0 (n 1) |" in lines, lines
