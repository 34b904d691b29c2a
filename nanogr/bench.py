"""
What a training step costs here, and what the paper's two runs would: the workings of

    python train.py --bench --preset gr1 --batch 2     # where a step's time goes, in what memory
    python train.py --estimate                         # hours that the paper's runs would take

and any other flags of train.py. Weights are random, clips synthetic; nothing is read or kept. What is timed
is train.py's own step: this file imports train.py, which imports this one only when it is asked to measure.
"""
import dataclasses
import itertools
import math
import pathlib
import tempfile
import time

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import clips
import model as gr1
import train

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12}     # dense bf16 (V100: fp16)
CALVIN_SIZES = {"rgb_static": 200, "rgb_gripper": 84}
# stage, windows an epoch, epochs: 800,000 Ego4D clips of ten frames, a window each; CALVIN ABCD, every window
PAPER = (("pretrain", 800_000, 50), ("finetune", 1_400_000, 20))


def settings(argv, world):
    """train.parse, but where nobody says --batch that of gr1 is one which most machines hold."""
    config, changes, _ = train.parse(argv)
    if config.preset != "tiny" and not any(word.split("=")[0] == "--batch" for word in argv):
        parts = world.size * config.accumulate * config.windows_per_clip
        config.batch = parts * max(1, (32 if world.device.type == "cuda" else 2) * world.size // parts)
        world.print(f"batch: {config.batch} windows to measure with (--batch N chooses)")
    train.check_batch(config, world)
    return dataclasses.replace(config, vision_weights="none", text_weights="none", init="none",
                               steps=10 ** 6), changes


def bench(argv, world, seconds=10):
    """Print where a step's time goes: -> windows a second. On several processes each measures its share."""
    config, changes = settings(argv, world)
    model = train.build(config, changes, world).train()
    with tempfile.TemporaryDirectory() as folder:
        data = synthesise(folder, model.config)
        loader_rates = bench_loader(data, config, model.config, seconds / 5)
        windows = train.training_windows(data, np.arange(len(data)), config, model.config)
        loader = train.batches(windows, range(10 ** 6), config.accumulate, world, config.workers)
        table, flops = bench_parts(model, loader, config, world, seconds / 2)
        spent, peak = bench_step(model, loader, config, world, seconds)
    report(config, world, table, spent, peak, flops, *loader_rates)
    return config.batch / spent


def estimate(argv, world):
    """Print what the paper's two runs would take here, from the rates that bench measures."""
    for stage, windows, epochs in PAPER:
        hours = windows / bench(["--preset", "gr1", *argv, "--stage", stage], world) / 3600
        world.print(f"{stage}: {epochs} epochs of {windows:,} windows: {hours:,.2f} hours an epoch, "
                    f"{epochs * hours:,.1f} in all")


# The loader

def synthesise(folder, model_config, clip_count=2, length=500):
    """Write clips of drifting colour fields, which a JPEG holds about as well as a photograph. They are long:
    of windows at an end, which are few then, fewer frames are read.
    """
    rng, sides = np.random.default_rng(0), model_config.cameras
    if model_config.preset != "tiny":
        sides = {camera: CALVIN_SIZES[camera] for camera in sides}
    with clips.ShardWriter(folder, 0, list(sides)) as shard:
        for i in range(clip_count):
            field, frames, rows = rng.integers(0, 256, (length + 40, 40, 3), np.uint8), {}, {}
            for camera, side in sides.items():
                images = (Image.fromarray(field[t:t + 40]).resize((side, side), 2) for t in range(length))
                frames[camera] = np.stack([np.array(image) for image in images])
            if model_config.robot:
                rows = dict(robot_obs=rng.normal(size=(length, 15)).astype(np.float32),
                            rel_actions=rng.uniform(-1, 1, (length, 7)).astype(np.float32))
            shard.add(frames, f"clip {i}", episode=i, **rows)
    clips.write_meta(folder, "synthetic", 30, "train.py --bench")
    return clips.Clips(folder)


def rates(*calls, seconds, rounds=3):
    """How much a second each call does, which returns how much it did. They are called in turn, and the best
    of the rounds counts: the machine's mood changes.
    """
    best = [0.0 for _ in calls]
    for _, (i, call) in itertools.product(range(rounds), enumerate(calls)):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / rounds:
            done += call()
        best[i] = max(best[i], done / (time.perf_counter() - start))
    return best


def bench_loader(data, config, model_config, seconds):
    """Windows a second: decoded and nothing else; that reach the model, on one core; with two workers."""
    content, offsets = pathlib.Path(data.directory, "00000.bin").read_bytes(), data.shards[0]["offsets"]
    jpegs = [content[a:b] for a, b in itertools.pairwise(offsets[:400 * len(data.cameras) + 1])]
    run = model_config.window + config.windows_per_clip - 1 + model_config.future
    frames = run * len(data.cameras) / config.windows_per_clip                 # that are decoded for a window
    some = dataclasses.replace(config, batch=8 * config.windows_per_clip)
    windows = train.training_windows(data, np.arange(len(data)), some, model_config)

    def decode():
        for jpeg in jpegs:
            simplejpeg.decode_jpeg(jpeg, "RGB")
        return len(jpegs) / frames

    def take(workers, skip=0):
        loader = train.batches(windows, range(10 ** 6), 1, train.World(), workers)
        call = lambda: len(next(loader)["sentences"])
        for _ in range(skip):
            call()
        return call

    alone, loaded = rates(decode, take(0), seconds=seconds)
    return alone, loaded, *rates(take(2, skip=6), seconds=seconds)             # four lie ready at first


# The step

class Stopwatch:
    """Seconds by what they were spent on; waits for the device at each lap."""

    def __init__(self, device):
        self.device, self.spent, self.last = device, {}, time.perf_counter()

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0) + now - self.last
        self.last = now


def bench_parts(model, loader, config, world, seconds):
    """A step's seconds by what they are spent on, and the FLOPs of its matrix products: all, of the trained.

    Neither compiled nor overlapped, and not averaged over processes: a step of `train_step` takes less.
    """
    alone = dataclasses.replace(world, rank=0, size=1)
    learner = train.equip(model, dataclasses.replace(config, compile="off"), alone)
    watch, steps = Stopwatch(world.device), 0
    lap = lambda name: lambda *_: watch.lap(name)
    hooks = [model.vision.register_forward_pre_hook(lap("forward: trunk, heads, losses")),
             model.vision.register_forward_hook(lap("forward: image encoder")),
             model.resampler.register_forward_hook(lap("forward: resampler"))]

    def step():
        for _ in range(config.accumulate):
            batch = next(loader)
            watch.lap("load")
            batch = train.to_device(batch, world.device)
            watch.lap("transfer")
            with learner.autocast:
                pixels = train.see(batch, model.config)
                watch.lap("pixels: shift, resize, normalise")
                out = train.predict(model, model.config, batch, pixels)
                loss = train.weighted(gr1.losses(out, batch, pixels, model.config), config)
            watch.lap("forward: trunk, heads, losses")
            loss.backward()
            watch.lap("backward")
        torch.nn.utils.clip_grad_norm_(learner.parameters, config.clip_grad)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")

    step()                                               # longer than those to come, and CLIP is in it
    with FlopCounterMode(display=False) as counter:
        step()
    watch.spent.clear()
    while not steps or sum(watch.spent.values()) < seconds:
        step()
        steps += 1
    for hook in hooks:
        hook.remove()
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    frozen = sum(counts.get(f"GR1.{name}", 0) for name in model.frozen())
    assert not model.vision.frozen or counts["GR1.vision"]
    flops = counts["Global"], counts["Global"] - frozen
    return {what: spent / steps for what, spent in watch.spent.items()}, flops


def bench_step(model, loader, config, world, seconds):
    """Seconds that a training step takes, and the MiB in use at its peak."""
    learner = train.equip(model, config, world)
    skipped = torch.zeros(2, dtype=torch.int64, device=world.device)

    def steps(count):
        start = time.perf_counter()
        for step in range(count):
            train.train_step(step, learner, loader, config, world, skipped)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        spent = torch.tensor(time.perf_counter() - start, device=world.device)
        return world.mean(spent).item() / count          # the same on all, so that all take as many steps

    steps(1)                                             # compiles
    gr1.memory(world.device, new_peak=True)
    spent = steps(1)
    if spent < seconds:                                  # else one will do
        spent = steps(math.ceil(seconds / spent))
    return spent, gr1.memory(world.device, peak=True)


def report(config, world, table, spent, peak, flops, alone, loaded, by_two):
    """Print what was measured. What is trained takes a part of a step's time, which no compiled step tells:
    its products over the whole of it are the least that they are a second.
    """
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    top = next((most for gpu, most in PEAK_FLOPS.items() if gpu in name), None)
    of_peak = lambda rate: f"{rate / 1e12:>10.2f}" + (f"  {rate / top:.0%} of the peak" if top else "")
    total = sum(table.values())
    world.print("\n".join([
        f"\n{config.preset}, {config.stage}, batch {config.batch}, {config.windows_per_clip} windows a clip, "
        f"{train.precision(config, world)} on {world.size} x {name}, {torch.get_num_threads()} threads",
        "parts of a step, one by one [ms], not compiled",
        *(f"  {what:<40}{1000 * part:>10.1f}{part / total:>7.1%}" for what, part in table.items()),
        f"  {'all':<40}{1000 * total:>10.1f}",
        f"a training step [ms]                      {1000 * spent:>10.1f}",
        f"windows a second                          {config.batch / spent:>10.2f}",
        f"peak memory [MiB]                         {peak:>10.0f}",
        f"matrix products [TFLOP/s]                 {of_peak(flops[0] / spent)}",
        f"  of what is trained, at least            {of_peak(flops[1] / spent)}",
        f"loader, one core, windows a second        {loaded:>10.1f}",
        f"  its JPEG decoder alone                  {alone:>10.1f}  ratio {loaded / alone:.2f}",
        f"  with two workers                        {by_two:>10.1f}  ratio {by_two / loaded:.2f}"]))
