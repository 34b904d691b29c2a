"""nanogr/bench.py: it times what it says."""
import os
import re
import signal
from unittest import mock

import train
from nanogr import bench
from tests.helpers import SIZES, run, small_config


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
        once = lambda calls, *_: [[1.0] if call() is None else [1.0] for call in calls]      # each takes 1 s
        with mock.patch.object(bench, "report", wraps=bench.report) as report, \
                mock.patch.object(bench, "in_turn", once):
            rate = bench.bench([*map(str, argv)], train.Processes(), seconds=0.3)
        text = capsys.readouterr().out
        numbers = dict(re.findall(r"^ *([a-z][^\n\d]*?)  +(\d+\.?\d*)", text, re.M))
        assert abs(rate - float(numbers["windows a second"])) < 0.01
        assert {"load", "transfer", "forward: image encoder", "backward", "optimizer"} < set(numbers), text
        alone.append(float(numbers["its JPEG decoder alone"]))
        flops.append(report.call_args.args[5])
    assert abs(alone[1] / alone[0] / (4 * 6 / 9) - 1) < 0.01              # 6 frames a window; 9 for four
    assert abs(flops[2][0] / flops[0][0] - 1) < 0.01 < abs(flops[1][0] / flops[0][0] - 1)
    with mock.patch.object(bench, "bench", return_value=100.0):
        text = run("train.py", "--estimate")[1]
    assert "2.22 hours an epoch, 111.1 in all" in text and "3.89 hours an epoch, 77.8 in all" in text, text
    batch = lambda *flags: bench.settings(["--preset", "gr1", *flags], train.Processes())[0].batch
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


def test_benchmark_of_gr2(capsys):
    """Catches a benchmark that takes a GR-2 for a GR-1: no resampler, and codes that lie on the disk."""
    sizes = dict(width=32, layers=2, head_width=32, act_width=16, act_depth=1, window=2)
    sizes = [f"{key}={value}" for key, value in sizes.items()]
    argv = ["--bench", "--preset", "gr2-tiny", "--batch", "4", "--model", *sizes]
    rate = bench.bench(argv, train.Processes(), seconds=0.2)
    text = capsys.readouterr().out
    assert rate > 0 and "tokenizer, frames of 64 px a second" in text and "gr2-tiny, finetune" in text, text
