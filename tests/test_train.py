"""train.py: starting, resuming, several processes, being told to stop, schedules."""
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

import gr2
import model as gr1
import train
from nanogr import clips, common, encoders, weights
from nanogr.worlds import tabletop
from tests.helpers import (ROOT, SIZES, Waits, fails_in_one_line, make_data_set, read_log, refused, run, same,
                           training)


def test_shift_is_one_for_a_window():
    """Catches a camera that shakes within a window, black borders, rows taken for columns."""
    frames = torch.empty(200, 3, 3, 20, 20, dtype=torch.uint8)
    frames[:, :, 0], frames[:, :, 1] = torch.arange(20)[:, None], torch.arange(20)          # row, column
    frames[:, :, 2] = torch.arange(3)[:, None, None]                                        # timestep
    dy, dx = by = torch.randint(-2, 3, (2, 200))
    shifted = train.shift(frames, by.T)
    rows, columns = ((torch.arange(20) + d[:, None]).clamp(0, 19) for d in (dy, dx))
    assert (shifted[:, :, 0] == rows[:, None, :, None]).all()
    assert (shifted[:, :, 1] == columns[:, None, None, :]).all()
    assert torch.equal(shifted[:, :, 2], frames[:, :, 2])


def test_targets_are_counted_where_they_are_asked_for():
    """Catches a mean that is divided by steps at which no future frame was asked for, or by padding."""
    batch = dict(future_mask=torch.rand(3, 4) < 0.7, action_mask=torch.rand(3, 4, 2) < 0.6)
    for at in [0, 1, 2, 3], [3, 0], [1]:
        batch["video_at"] = torch.tensor(at)
        counts = batch["action_mask"].sum(), batch["future_mask"][:, at].sum()
        assert train.count_targets(batch).tolist() == [float(count) for count in counts]
    del batch["action_mask"]                                                  # pre-training
    assert train.count_targets(batch).tolist() == [0, batch["future_mask"][:, 1].sum()]


def test_one_step_of_some_foresees_for_all(tmp_path):
    """Catches --video-every that asks at other steps, divides by what was not asked, or weighs too little."""
    data = clips.open_data(make_data_set(tmp_path))[0]
    config = gr1.preset_config("tiny", window=2, cameras=dict(rgb_static=32))
    figures = {}
    for every in 1, 3:
        torch.manual_seed(0)
        model = gr1.GR1(config, *encoders.build_encoders(config))
        settings = train.TrainConfig(batch=4, steps=9, lr=1e-3, video_weight=1, weight_decay=0, shift=0,
                                     video_steps=1, beta2=0.9, video_every=every)
        windows = train.training_windows(data, np.arange(5), settings, config)
        asked = [len(windows[step]["video_at"]) > 0 for step in range(7)]
        assert asked == [step % every == 0 for step in range(7)]
        read = [windows[step]["frames"]["rgb_static"].shape[1] for step in range(7)]
        assert read == [config.window + config.future * one for one in asked]          # no frame for nothing
        learner, none = train.equip(model, settings, train.Processes()), torch.zeros(2, dtype=torch.int64)
        figures[every] = [train.train_step(step, learner, iter([windows[step]]), settings, train.Processes(),
                                           none)[0] for step in range(2)]
    never = train.training_windows(data, np.arange(5), settings, dataclasses.replace(config, video=False))[0]
    assert never["frames"]["rgb_static"].shape[1] == config.window and not len(never["video_at"])
    (often, _), (seldom, unasked) = figures[1], figures[3]
    assert seldom["rgb_static"].item() == pytest.approx(3 * often["rgb_static"].item())
    assert seldom["arm"] == often["arm"] and unasked["rgb_static"] == 0 and unasked["grad_norm"].isfinite()


@pytest.mark.parametrize("preset", ["gr1", "tiny", "gr2-tiny"])
def test_a_training_step_reads_no_value(preset, monkeypatch):
    """Catches a value that is read, a shape that hangs on one: a GPU then idles until the host goes on."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())     # "meta" has none
    monkeypatch.setattr(train, "Later", lambda tensor: tensor)                            # nor any values
    kind, text = train.family(preset), torch.nn.Identity()
    config, B, S, T = kind.preset_config(preset, window=3), 2, 40, 3
    made = (gr2.build_encoders(config, "none", text) if kind is gr2 else
            encoders.build_encoders(config, "none", text))
    with torch.device("meta"):
        model = (gr2.GR2 if kind is gr2 else gr1.GR1)(config, *made).to("meta")
        known, to_act = torch.ones(B, T).bool(), torch.ones(B, T, config.chunk).bool()
        batch = dict(sentences=torch.zeros(B, config.text_dim), robot_obs=torch.zeros(B, T, 15), mask=known,
                     future_mask=known, video_at=torch.arange(T), action_mask=to_act,
                     rel_actions=torch.zeros(B, T, config.chunk, 7))
        if kind is gr2:
            cells = {camera: (side // config.cell) ** 2 for camera, side in config.cameras.items()}
            batch |= dict(codes={camera: torch.zeros(B, T + 1, P).byte() for camera, P in cells.items()},
                          noise=torch.zeros(B, T, config.latent))
        else:
            frames = torch.zeros(B, T + config.future, 3, S, S).byte()
            batch |= dict(frames=dict.fromkeys(config.cameras, frames),
                          shifts=dict.fromkeys(config.cameras, torch.zeros(B, 2).long()))
        parameters = [p for p in model.parameters() if p.requires_grad]
        learner = train.Learner(model, model, parameters, mock.Mock(param_groups=[{}]),
                                contextlib.nullcontext(), compiled=False)
        world = train.Processes(device=torch.device("meta"))
        with Waits() as watch:
            figures, skipped, _ = train.train_step(0, learner, iter([batch]), train.TrainConfig(steps=9),
                                                   world, torch.zeros(2, dtype=torch.int64))
    assert skipped.device.type == "meta" and {"arm", "rgb_static", "grad_norm"} < set(figures)
    assert not watch.found


def test_another_colour_in_the_sentence(tabletop_data):
    """Catches a gauge of the sentence's use that changes other words, other windows, or both predictions."""
    assert train.other_colour("lift the red block, not Fred's blue-ish one") == (
        "lift the blue block, not Fred's pink-ish one")
    assert train.other_colour("the person drags the door left") == "the person drags the door left"

    class Painter(torch.nn.Module):
        """Foresees the true frame if it is told of pink, else the present one."""
        def forward(self, seen, sentences, *_):
            pink = torch.tensor(["pink" in sentence for sentence in sentences])[:, None, None, None]
            now, future = (gr1.patchify(x, 16) for x in (seen["rgb_static"], Painter.future))
            return dict(rgb_static=torch.where(pink, future, now))

    config = gr1.preset_config("tiny", "pretrain", window=2, future=1)
    data = clips.Clips(tabletop_data / "videos")
    windows = clips.Windows(data, np.arange(len(data)), 64, 2, 1, ["rgb_static"])
    see = train.see

    def remember(batch, config):
        pixels = see(batch, config)
        Painter.future = pixels["rgb_static"][:, 1:]
        return pixels

    model = mock.Mock(spec=["config"], config=config)
    learner = mock.Mock(net=Painter(), autocast=contextlib.nullcontext(), model=model)
    with mock.patch.object(train, "see", remember):
        figures, _ = train.evaluate(learner, windows, train.TrainConfig(eval_batches=2), train.Processes())
    assert any("pink" in sentence for step in range(2) for sentence in windows[step]["sentences"])
    assert figures["val/rgb_static_right"] < min(figures["val/rgb_static_wrong"], 0.99)
    assert figures["val/rgb_static_right"] < figures["val/rgb_static_ratio"] < 1      # the colourless: copied


def test_finetuning_starts_from_pretraining(checkpoints, tabletop_data, tmp_path):
    """Catches pre-trained weights that are skipped, or kept in spite of --fresh; a missing log."""
    before = weights.read_weights(checkpoints / "pretrain/model.safetensors")
    assert set(read_log(checkpoints / "finetune", "arm")) == set(range(1, 7))
    for key in "val/arm", "val/rgb_static", "val/rgb_static_ratio", "val/rgb_gripper_ratio":
        assert set(read_log(checkpoints / "finetune", key)) == {3, 6}
    assert (checkpoints / "finetune/000006.png").exists() and (checkpoints / "finetune/resume.pt").exists()
    stored = weights.read_config(checkpoints / "finetune")
    assert stored["train"]["batch"] == 4 and stored["step"] == 6 and stored["model"]["width"] == 32
    for fresh, parts, window in ("none", set(), 4), ("trunk", {"trunk"}, 4), ("none", {"timestep"}, 3):
        start = training("finetune", tabletop_data / "demonstrations", tmp_path / fresh, "--lr", 1e-12,
                         window=window)
        flags = ["--weight-decay", 0, "--init", checkpoints / "pretrain", "--steps", 1, "--fresh", fresh]
        status, text = run(*start, *flags)
        assert status == 0 and "saved at step" not in text, text
        after = weights.read_weights(tmp_path / fresh / "model.safetensors")
        assert set(before) < set(after)
        kept = lambda name: before[name].shape == after[name].shape and same(before[name], after[name])
        assert {name.split(".")[0] for name in before if not kept(name)} == parts
    shutil.copytree(checkpoints / "pretrain", tmp_path / "cut")
    settings = (tmp_path / "cut/config.json").read_text()
    (tmp_path / "cut/config.json").write_text(settings.replace('"steps": 6', '"steps": 60'))
    status, text = run(*training("finetune", tabletop_data / "demonstrations", tmp_path / "of-cut"),
                       "--init", tmp_path / "cut", "--steps", 1)
    assert status == 0 and "it was saved at step 6 of 60" in text, text          # a run that somebody stopped


def test_figures_go_where_they_are_asked_for(tabletop_data, tmp_path, monkeypatch):
    """Catches a package that is needed although nobody asked, and a traceback where it is missing."""
    command = lambda *more: training("finetune", tabletop_data / "demonstrations", tmp_path / "out", *more)
    wandb = mock.MagicMock(__spec__="here")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run(*command("--wandb"))[0] == 0
    assert [call.kwargs["step"] for call in wandb.log.call_args_list] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert "val/arm" in wandb.log.call_args.args[0]
    monkeypatch.delitem(sys.modules, "wandb")
    tensorboard = mock.MagicMock(__spec__="here")
    for name in "tensorboard", "torch.utils.tensorboard":
        monkeypatch.setitem(sys.modules, name, tensorboard)
    assert run(*command("--tensorboard"))[0] == 0
    names = [name for name, *_ in tensorboard.SummaryWriter.return_value.method_calls]
    assert "add_scalar" in names and names.index("close") == len(names) - 1
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    kept = sorted(path.name for path in tmp_path.rglob("*"))
    wandb.init.side_effect = RuntimeError("no API key configured\nsee wandb.ai")
    assert fails_in_one_line(*command("--wandb"), words=["no API key configured: run `wandb login`"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == kept                 # nothing was moved
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fails_in_one_line(*command("--tensorboard"), words=["--tensorboard", "pip install tensorboard"])


def test_resume_equals_straight(tabletop_data, tmp_path, monkeypatch):
    """Catches a run that, after a power cut, sees other data or noise, or forgets optimizer, schedule or what
    it has not logged yet.
    """
    command = lambda name, *more: training("finetune", tabletop_data / "demonstrations", tmp_path / name,
                                           "--shift", 0.05, "--video-steps", 2, "--log-every", 4, *more,
                                           dropout=0.1)
    status, text = run(*command("straight", "--resume"))      # as a queue that may kill it always starts it
    assert status == 0 and "no run in" in text and (tmp_path / "straight/first_batch.png").exists(), text
    read = clips.Windows.__getitem__
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(clips.Windows, "__getitem__", lambda *at: read(*at) if at[1][0] < 4 else 1 / 0)
        run(*command("cut"))
    assert weights.read_config(tmp_path / "cut")["step"] == 3
    status, text = run(*command("cut", "--resume"))
    assert status == 0 and "at step 3" in text, text
    straight, resumed = (weights.read_weights(tmp_path / name / "model.safetensors")
                         for name in ("straight", "cut"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight | resumed)
    for key in "lr", "arm", "val/arm":
        assert read_log(tmp_path / "cut", key) == read_log(tmp_path / "straight", key)
    assert fails_in_one_line(*command("cut", "--resume", "--lr", 0.5), words=["begun with lr", "0.5"])
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert run(*command("moved", "--resume"))[0] == 0
    resume = tmp_path / "moved/resume.pt"
    resume.write_bytes(resume.read_bytes()[:1000])
    assert fails_in_one_line(*command("moved", "--resume"), words=["moved/resume.pt"])
    assert run(*command("moved"))[0] == 0 and (tmp_path / "moved.1/config.json").exists()   # not overwritten


def test_all_machines_resume_or_none(tmp_path):
    """Catches machines without a common disk, of which one goes on and the others start anew beside it."""
    config, world = train.TrainConfig(out=str(tmp_path)), train.Processes()
    assert not train.can_resume(config, world)
    (tmp_path / "resume.pt").touch()
    assert train.can_resume(config, world)
    world.mean = lambda tensor: tensor / 2               # the other of two has none
    assert refused("a disk they share", train.can_resume, config, world)


def test_more_processes_than_gpus(monkeypatch):
    """Catches a traceback where one of several machines starts more processes than it has GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for key, value in dict(RANK=5, LOCAL_RANK=1, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4,
                           MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(key, str(value))
    assert refused("4 processes on a machine with 2 GPUs: --nproc 2", train.set_up)


# Run by torchrun: a list of command lines of train.py, the last as by hand, on two cores whatever there is.
COMMANDS = f"""
import json, os, runpy, sys
os.cpu_count, os.sched_getaffinity = lambda: 2, lambda _: {{0, 1}}
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist, train
from nanogr import bench
world = train.set_up()
dist.init_process_group = dist.destroy_process_group = lambda *_, **more: None      # one group for all
*first, last = json.loads(sys.argv[1])
for sys.argv in first:
    try:
        bench.bench(sys.argv[1:], world, 0.2) if "--bench" in sys.argv else train.main()
    except (train.UserError, train.ModelError) as refused:
        sys.stdout.write(f"refused: {{refused}}\\n")
    world.barrier()                                           # so the other was told as well, or has done it
sys.argv = last
runpy.run_path(last[0], run_name="__main__")
"""


def descendants(pid):
    """The processes that a process started, and those that they did (where there is a /proc)."""
    children = [int(child) for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children")
                for child in file.read_text().split()]
    return children + [other for child in children for other in descendants(child)]


def torchrun(processes, *commands):
    """Start command lines of `training` by torchrun, one after the other: Popen."""
    commands = [[str(ROOT / command[0]), *map(str, command[1:])] for command in commands]
    script = pathlib.Path(str(commands[0][commands[0].index("--out") + 1]) + ".py")
    script.write_text(COMMANDS)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "bin/torchrun"), "--standalone", "--nproc", str(processes), str(script),
         json.dumps(commands)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SHARED = ["--video-steps", 0, "--shift", 0.1, "--batch", 8, "--windows-per-clip", 2]
REFUSED = {"format version 9": ["--data", "strange"], "no meta.json": ["--data", "empty"],
           "cut off or changed": ["--data", "cut"], "no actions": ["--data", "videos"],
           "multiple of 4": ["--batch", 2], "another shape": ["--init", "two"],
           "JPEG is broken": ["--data", "broken"]}


@pytest.fixture(scope="module")
def two_processes(tabletop_data, tmp_path_factory):
    """What two launches of torchrun leave: a folder of runs, and [status, output, errors] of each launch. The
    first is told to stop; the second trains, is refused what is wrong, goes on with the first's run, measures
    and is refused, at last, as by hand. (A launch imports torch three times, so there are no more.)
    """
    folder = tmp_path_factory.mktemp("two")
    for name in "robot", "strange", "cut", "broken":
        shutil.copytree(tabletop_data / "demonstrations", folder / name)
    shutil.copytree(tabletop_data / "videos", folder / "videos")
    meta = (folder / "robot/meta.json").read_text()
    (folder / "strange/meta.json").write_text(meta.replace('version": 1', 'version": 9'))
    (folder / "cut/00000.bin").write_bytes((folder / "cut/00000.bin").read_bytes()[:-9])
    (folder / "empty").mkdir()
    for shard in (folder / "broken").glob("*.bin"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    command = lambda name, *more, data="robot", **model: training(
        "finetune", folder / data, folder / name, *more, **model)
    long = lambda name, *more: command(name, "--steps", 40, "--eval-every", 40, "--workers", 1, *more,
                                       dropout=0.1)
    signal.alarm(400)                          # see same_start
    told = torchrun(2, long("told"))
    try:
        assert any("step 2  arm" in line for line in told.stdout)
        for process in descendants(told.pid) + [told.pid]:     # as a queue does; torchrun passes it on
            os.kill(process, signal.SIGTERM)
        first = told.communicate(timeout=120)
    finally:
        told.kill()
    wrong = [[flag, folder / value if flag in ("--data", "--init") else value]
             for flag, value in REFUSED.values()]
    launch = torchrun(3, command("two", *SHARED, "--accumulate", 2),
                      *(command("no", *SHARED, *flags, width=64) for flags in wrong),
                      long("straight"), long("told", "--resume"), command("no", "--bench"),
                      command("no", "--preset", "tinny"))
    second = launch.communicate(timeout=240)
    return folder, [told.returncode, *first], [launch.returncode, *second]


def test_two_processes_equal_one(two_processes, tmp_path):
    """Catches processes or passes that see other data, or shift it otherwise, than one alone; gradients or
    losses averaged with wrong weights (parts hold unlike numbers of targets); a surplus process that stops
    the rest.
    """
    folder, _, (_, text, errors) = two_processes
    assert "3 started, 2 train" in text and "2 x cpu" in text and text.count("done:") == 3, text + errors
    assert run(*training("finetune", folder / "robot", tmp_path / "one", *SHARED))[0] == 0
    for key in "arm", "gripper", "rgb_static", "val/arm", "val/rgb_gripper", "grad_norm":
        one, two = (read_log(out, key) for out in (tmp_path / "one", folder / "two"))
        assert one and all(abs(two[step] - one[step]) < 1e-4 * one[step] + 1e-5 for step in one), (one, two)
    assert gr1.GR1.from_pretrained(folder / "two").config.width == SIZES["width"]


def test_two_processes_meet_what_is_wrong(two_processes):
    """Catches a mistake, or a broken file, that one process notices while the other waits for it; one that
    ends in a traceback; a benchmark whose processes take unlike numbers of steps.
    """
    _, _, (status, text, errors) = two_processes
    assert [text.count(words) for words in REFUSED] == [2] * len(REFUSED), text
    assert "on 2 x CPU" in text and "windows a second" in text, text
    said = errors.count("did you mean 'tiny'?")          # twice where the first process is long in ending
    assert status and said in (1, 2) and "Traceback" not in errors, errors


def test_two_processes_that_are_told_to_stop(two_processes):
    """Catches a SIGTERM to all processes at once, and again by torchrun, that kills loader workers, loses
    steps or ends in failure; a resumed run that ends elsewhere.
    """
    folder, (status, text, errors), _ = two_processes
    assert status == 0 and "stopped: after step" in text and "Traceback" not in errors, text + errors
    straight, resumed = (weights.read_weights(folder / x / "model.safetensors") for x in ("straight", "told"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight | resumed)


def test_asked_again_a_run_ends_at_once(monkeypatch):
    """Catches a run that ends unsaved since one wish to stop came twice, and one that cannot be ended."""
    kill, clock = mock.Mock(), iter([10.0, 10.01, 15.5])
    monkeypatch.setattr(train, "STOP", [])
    monkeypatch.setattr(train, "os", mock.Mock(kill=kill, getpid=os.getpid))
    monkeypatch.setattr(train, "time", mock.Mock(monotonic=lambda: next(clock)))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for times in 0, 0, 1:
            train.ask_to_stop(signal.SIGTERM, None)
            assert kill.call_count == times and train.STOP
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert kill.call_args.args == (os.getpid(), signal.SIGTERM)


def test_a_run_that_is_told_to_stop_goes_on_later(tabletop_data, tmp_path, monkeypatch):
    """Catches a SIGTERM that loses steps or ends in failure; a resumed run that ends elsewhere."""
    command = lambda name, *more: training("finetune", tabletop_data / "demonstrations", tmp_path / name,
                                           *more)
    assert run(*command("straight"))[0] == 0
    read = clips.Windows.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(clips.Windows, "__getitem__", lambda *at: (
            at[1][0] == 3 and os.kill(os.getpid(), signal.SIGTERM), read(*at))[1])
        status, text = run(*command("told"))
    assert status == 0 and "stopped: after step 4" in text and "done:" not in text, text
    assert run(*command("told", "--resume"))[0] == 0
    straight, told = (weights.read_weights(tmp_path / x / "model.safetensors") for x in ("straight", "told"))
    assert all(torch.equal(straight[name], told[name]) for name in straight | told)
    for key in "arm", "val/arm":
        assert read_log(tmp_path / "told", key) == read_log(tmp_path / "straight", key)


def test_the_data_may_move_but_not_change(tabletop_data, tmp_path):
    """Catches a resumed run that goes on, without a word, on other clips; one that is refused because its
    clips lie elsewhere; two runs that write into one folder; a link to a disk that is renamed itself.
    """
    shutil.copytree(tabletop_data / "demonstrations", tmp_path / "here")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    command = training("finetune", tmp_path / "here", f"{tmp_path}/run/")
    assert run(*command)[0] == 0 and (tmp_path / "disk/model.safetensors").exists()
    status, text = run(*command)
    assert status == 0 and f"{tmp_path}/run is now in {tmp_path}/run.1" in text, text
    assert (tmp_path / "run").is_symlink() and (tmp_path / "run.1/model.safetensors").exists()
    (tmp_path / "here").rename(tmp_path / "there")
    command[command.index(tmp_path / "here")] = tmp_path / "there"
    assert run(*command, "--resume")[0] == 0
    shutil.rmtree(tmp_path / "there")
    tabletop.make("demonstrations", tmp_path / "there", 12, "AD", workers=1, seed=1)
    assert fails_in_one_line(*command, "--resume", words=["other clips", "--data"])
    with common.lock(tmp_path / "disk/.lock"):
        assert fails_in_one_line(*command, words=["another run is writing"])


def test_a_launcher_that_says_too_little(monkeypatch, tabletop_data, tmp_path):
    """Catches a traceback, or waiting for ever, where WORLD_SIZE is set and nothing else."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fails_in_one_line(*training("pretrain", tabletop_data / "videos", tmp_path / "out", future=1),
                             words=["WORLD_SIZE is 2", "torchrun"])


def test_a_mac_or_windows(monkeypatch, tabletop_data, tmp_path):
    """Catches a function that only Unix has, at import or in a loader's worker; half precision, compiling or
    several processes on a Mac's GPU. Imitated: neither system is at hand.
    """
    for name in "pread", "setsid", "sched_getaffinity", "killpg", "fork":
        monkeypatch.delattr(os, name, raising=False)
    train.leave_group(0)
    assert common.cores() >= 1
    hidden = "import sys, os; sys.modules['fcntl'] = None\nfor x in 'pread', 'setsid': delattr(os, x)\n"
    for script in "train", "sample", "eval_calvin", "prepare_calvin", "prepare_ego4d":
        subprocess.run([sys.executable, "-c", f"{hidden}import {script}"], cwd=ROOT, check=True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    world = train.set_up()
    assert world.device.type == "mps" and train.precision(train.TrainConfig(), world) == "fp32"
    assert not train.compiles(train.TrainConfig(), world)


def test_without_a_compiler(monkeypatch):
    """Catches a long trace where torch.compile finds no C compiler; one where nobody asked to compile."""
    gpu = train.Processes(device=torch.device("cuda"))
    config = functools.partial(train.TrainConfig, preset="gr1")
    assert train.compiles(config(compile="on"), train.Processes()) and train.compiles(config(), gpu)
    assert not train.compiles(train.TrainConfig(preset="tiny"), gpu)               # its training is too short
    assert not train.compiles(config(), train.Processes()) and not train.compiles(config(compile="off"), gpu)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert not train.compiles(config(), gpu)
    assert refused("--compile on needs a C compiler", train.compiles, config(compile="on"), gpu)


def test_steps_without_finite_gradients_are_skipped(tabletop_data, tmp_path, monkeypatch):
    """Catches one bad batch that ruins the weights, and a run that goes on for ever without learning."""
    losses, bad = gr1.losses, set()
    step = iter(range(100))
    monkeypatch.setattr(gr1, "losses", lambda *args, **more: {
        name: value * (math.nan if bad and torch.is_grad_enabled() and next(step) in bad else 1)
        for name, value in {"arm": sum(losses(*args, **more).values())}.items()})
    command = lambda name, *more: training("finetune", tabletop_data / "demonstrations", tmp_path / name,
                                           *more)
    bad.update({2, 3})
    assert run(*command("some"))[0] == 0
    assert list(read_log(tmp_path / "some", "skipped").values()) == [0, 0, 1, 2, 2, 2]
    assert all(x.isfinite().all() for x in weights.read_weights(tmp_path / "some/model.safetensors").values())
    bad.update(range(100))
    assert fails_in_one_line(*command("last", "--steps", 10), words=["10 steps", "smaller --lr"])
    assert fails_in_one_line(*command("all", "--steps", 20), words=["10 steps", "smaller --lr"])


def test_schedule_and_the_papers_settings():
    """Catches a rate that follows anything but the step, a jump at its ends, other figures than Table 3's."""
    config = train.TrainConfig(lr=2.0, steps=1000, warmup=0.1, final_lr=0.01)
    rates = [train.learning_rate(step, config) for step in range(1000)]
    assert np.allclose([rates[0], rates[49], rates[99], rates[100], rates[550]], [0.02, 1, 2, 2, 1.01])
    assert 0.02 <= rates[-1] < 0.0201
    assert np.all(np.diff(rates[:100]) > 0) and np.all(np.diff(rates[100:]) < 0)
    other = dataclasses.replace(config, log_every=1, eval_every=7, batch=3, accumulate=4, epochs=9.0, seed=5)
    assert [train.learning_rate(step, other) for step in range(1000)] == rates
    assert train.learning_rate(0, train.TrainConfig(lr=1.0, steps=1, warmup=0.05)) == 1
    for stage, expected in (("pretrain", (1024, 3.6e-4, 50, 0.1)), ("finetune", (512, 1e-3, 20, 0.05))):
        config, *_ = train.parse(["--preset", "gr1", "--stage", stage])
        assert (config.batch, config.lr, config.epochs, config.warmup) == expected
        assert (config.arm_weight, config.gripper_weight, config.video_weight) == (100, 1, 1)
    config, *_ = train.parse("--preset real".split())
    assert (config.batch, config.lr, config.epochs, config.warmup) == (64, 1e-3, 30, 1 / 30)
    config, changes, _ = train.parse("--preset gr1 --future-step 5".split())
    assert changes == dict(future=5) and gr1.preset_config("gr1", **changes).future == 5
    assert "{'" not in run("train.py", "--help")[1]      # a % of a field's comment would print all of it
    config, changes, _ = train.parse("--preset gr1 --steps 7 --lr 0.5 --chunk 10 --no-video".split())
    assert (config.steps, config.epochs, config.lr, changes) == (7, 0, 0.5, dict(chunk=10, video=False))
