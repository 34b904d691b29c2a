"""
All that is timed here. Weights are random, clips synthetic; nothing is read or kept.

    python train.py --bench --preset gr1 --batch 2     # where a training step's time goes, in what memory
    python train.py --estimate                         # hours that the paper's runs would take
    python -m nanogr.bench                             # acting and training, the original's way and ours

The first two take any other flags of train.py and time its own step: so this file imports train.py, which
imports this one only when it is asked to measure.
"""
import copy
import dataclasses
import itertools
import math
import pathlib
import tempfile
import time

import numpy as np
import simplejpeg
import torch
import torch.nn as nn
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import gr2
import train
from model import GR1, PRESETS, ModelError, losses, preset_config, to_pixels
from nanogr import clips, weights
from nanogr.common import Parser, cores, run_script
from nanogr.encoders import LAPTOP, build_encoders
from nanogr.policy import Policy

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12}     # dense bf16 (V100: fp16)
CALVIN_SIZES = {"rgb_static": 200, "rgb_gripper": 84}
# stage, windows an epoch, epochs: 800,000 Ego4D clips of ten frames, a window each; CALVIN ABCD, every window
PAPER = (("pretrain", 800_000, 50), ("finetune", 1_400_000, 20))


# ------------------------------------------------------------------------------------------- measuring
def in_turn(calls, seconds, device=torch.device("cpu")):
    """Seconds that each call takes, a list for each of `calls`. All are called in turn, for a machine's speed
    drifts, for about `seconds` and at least three times; the first round warms up and does not count.
    """
    times, start = [[] for _ in calls], time.perf_counter()
    while len(times[-1]) < 4 or time.perf_counter() - start < seconds:
        for call, spent in zip(calls, times):
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - begin)
    return [spent[1:] for spent in times]


def memory(device, peak=False, new_peak=False):
    """MiB in use, or at the peak: the GPU's, or this process' (on Linux; else nan). new_peak: forget it."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        if new_peak:
            torch.cuda.reset_peak_memory_stats()
        return used / 2 ** 20
    try:
        lines = dict(x.split(":", 1) for x in pathlib.Path("/proc/self/status").read_text().splitlines())
        if new_peak:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) / 1024
    except (OSError, KeyError):
        return math.nan


# ------------------------------------------------------------------------ train.py --bench, --estimate
def settings(argv, world):
    """train.parse, but where nobody says --batch that of gr1 is one which most machines hold."""
    config, changes, _ = train.parse(argv)
    if config.preset not in LAPTOP and not any(word.split("=")[0] == "--batch" for word in argv):
        parts = world.size * config.accumulate * config.windows_per_clip
        each = 32 if world.device.type == "cuda" else 1 if config.preset in gr2.PRESETS else 2
        config.batch = parts * max(1, each * world.size // parts)
        world.print(f"batch: {config.batch} windows to measure with (--batch N chooses)")
    train.check_batch(config, world)
    vision = config.vision_weights if config.preset == "calvin" else "none"  # its eye is at hand, and frozen
    return dataclasses.replace(config, vision_weights=vision, text_weights="none", tokenizer="none",
                               init="none", steps=10 ** 6), changes


def bench(argv, world, seconds=10):
    """Print where a step's time goes: -> windows a second. On several processes each measures its share."""
    config, changes = settings(argv, world)
    model = train.build(config, changes, world).train()
    model.vision.LARGEST = 0                             # TinyVision's: pictures that were not seen before
    with tempfile.TemporaryDirectory() as folder:
        data = synthesise(folder, model.config)
        loader_rates = bench_loader(data, config, model.config, seconds / 5)
        codes = made_up_codes(data, model) if isinstance(model, gr2.GR2) and not config.shift else ""
        windows = train.training_windows(data, np.arange(len(data)), config, model.config, codes, learns=True)
        loader = train.batches(windows, range(10 ** 6), config.accumulate, world, config.workers)
        table, flops = bench_parts(model, loader, config, world, seconds / 2)
        spent, peak = bench_step(model, loader, config, world, seconds)
    report(config, world, table, spent, peak, flops, *loader_rates)
    if isinstance(model, gr2.GR2):
        bench_gr2(model, world, seconds / 5)
    return config.batch / spent


def estimate(argv, world):
    """Print what the paper's two runs would take here, from the rates that bench measures."""
    for stage, windows, epochs in PAPER:
        hours = windows / bench(["--preset", "gr1", *argv, "--stage", stage], world) / 3600
        world.print(f"{stage}: {epochs} epochs of {windows:,} windows: {hours:,.2f} hours an epoch, "
                    f"{epochs * hours:,.1f} in all")


def made_up_codes(data, model):
    """Write random codes beside the clips, for the tokenizer's own would take longer than all else: -> the
    fingerprint of the tokenizer that they are to be of.
    """
    rng, frames = np.random.default_rng(0), int(data.lengths.sum())
    clips.write_codes(data, 0, model.vision.fingerprint, {
        camera: rng.integers(0, model.config.codes, (frames, (side // model.config.cell) ** 2), np.uint16)
        for camera, side in model.config.cameras.items()})
    return model.vision.fingerprint


def bench_gr2(model, world, seconds):
    """Print how many frames a second become codes and pictures again, and how long acting takes."""
    side, device = next(iter(model.config.cameras.values())), world.device
    images = torch.randn(32 if device.type == "cuda" else 2, 3, side, side, device=device)
    codes = model.vision.encode(images)
    ways = lambda: model.vision.encode(images), lambda: model.vision.decode(codes)
    encode, decode = in_turn(ways, seconds, device)
    world.print(f"tokenizer, frames of {side} px a second {len(images) / np.median(encode):>14.1f}\n"
                f"  and painted again                   {len(images) / np.median(decode):>14.1f}")
    if model.config.robot:
        policy, seen = Policy(model), {camera: np.zeros((side, side, 3), np.uint8)
                                       for camera, side in model.config.cameras.items()}
        act = lambda: policy.step(seen | {"robot_obs": np.zeros(15)}, "open the drawer")
        act()
        policy.history.extend(list(policy.history) * policy.history.maxlen)              # a whole window
        spent = 1000 * np.median(in_turn([act], seconds, device))
        world.print(f"act, one step, batch 1 [ms]           {spent:>14.1f}")


def synthesise(folder, model_config, clip_count=2, length=500):
    """Write clips of drifting colour fields, which a JPEG holds about as well as a photograph. They are long:
    of windows at an end, which are few then, fewer frames are read.
    """
    rng, sides = np.random.default_rng(0), model_config.cameras
    if model_config.preset not in LAPTOP:
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


def bench_loader(data, config, model_config, seconds):
    """Windows a second: decoded and nothing else; that reach the model, on one core; with two workers."""
    content, offsets = pathlib.Path(data.directory, "00000.bin").read_bytes(), data.shards[0]["offsets"]
    jpegs = [content[a:b] for a, b in itertools.pairwise(offsets[:400 * len(data.cameras) + 1])]
    run = model_config.window + config.windows_per_clip - 1 + model_config.future * model_config.video
    frames = run * len(data.cameras) / config.windows_per_clip                 # that are decoded for a window
    some = dataclasses.replace(config, batch=8 * config.windows_per_clip, video_every=1)       # all alike
    windows = train.training_windows(data, np.arange(len(data)), some, model_config)

    def decode():
        for jpeg in jpegs:
            simplejpeg.decode_jpeg(jpeg, "RGB")

    def taking(workers):
        loader = train.batches(windows, range(10 ** 6), 1, train.Processes(), workers)
        return lambda: next(loader)

    by_two = taking(2)
    for _ in range(5):                                   # four lie ready at first
        by_two()
    (by_two,), (alone, loaded) = in_turn([by_two], seconds), in_turn([decode, taking(0)], seconds)
    return len(jpegs) / frames / min(alone), some.batch / min(loaded), some.batch / np.mean(by_two)


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
    hooks = [] if isinstance(model, gr2.GR2) else [
        model.vision.register_forward_pre_hook(lap("forward: trunk, heads, losses")),
        model.vision.register_forward_hook(lap("forward: image encoder")),
        model.resampler.register_forward_hook(lap("forward: resampler"))]

    def step():
        for _ in range(config.accumulate):
            batch = next(loader)
            watch.lap("load")
            batch = train.to_device(batch, world.device)
            watch.lap("transfer")
            with learner.autocast:
                pixels = train.take_in(batch, model)
                watch.lap("pixels: shift, resize, normalise")
                out = train.predict(model, model.config, batch, pixels)
                losses = train.family(config.preset).losses
                loss = train.weighted(losses(out, batch, pixels, model.config), config)
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
    frozen = sum(counts.get(f"{type(model).__name__}.{name}", 0) for name in model.frozen())
    assert not model.vision.frozen or isinstance(model, gr2.GR2) or counts["GR1.vision"]
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
    memory(world.device, new_peak=True)
    spent = steps(1)
    if spent < seconds:                                  # else one will do
        spent = steps(math.ceil(seconds / spent))
    return spent, memory(world.device, peak=True)


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


# ------------------------------------------------------------------------------ python -m nanogr.bench
def naive_trunk(trunk, context, queries, query_steps, mask=None):
    """What Trunk computes without dropout, as the official code does it: every token, in order of time, is
    query, key and value, and what may not be seen is hidden behind -inf (there -1e4: the same for all who see
    any key). Shapes as in Trunk.forward.
    """
    batch, steps, tokens, _ = context.shape
    n, device = steps * tokens, context.device
    query_steps = torch.as_tensor(query_steps, device=device)
    at = torch.cat([torch.arange(steps, device=device).repeat_interleave(tokens), query_steps])
    order = at.argsort(stable=True)                    # of a timestep, the context comes before the queries
    is_key = (order < n).expand(batch, -1)
    if mask is not None:
        is_key = is_key & mask[:, at[order]]
    may = torch.ones(len(order), len(order), device=device).tril().bool() & is_key[:, None]
    queries = queries + context[:, query_steps, 0] if trunk.told else queries
    x = trunk.embed_norm(torch.cat([context.flatten(1, 2), queries], 1)[:, order])
    for block in trunk.blocks:
        h = block.norm1(x)
        q, k, v = (t.unflatten(-1, (block.heads, -1)).transpose(1, 2)
                   for t in (block.q(h), *block.kv(h).chunk(2, -1)))
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~may[:, None], -math.inf)
        x = x + block.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return trunk.norm(x)[:, order.argsort()][:, n:]


class Given(nn.Module):
    """A frozen encoder that gives one answer to everything, so that only the rest of the model is timed."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, inputs):
        return self.answer


def as_the_original(model):
    """A copy of the model that computes its trunk the original's way."""
    copied = copy.deepcopy(model)
    copied.trunk.forward = lambda *inputs: naive_trunk(copied.trunk, *inputs)
    return copied


def acting_calls(ours, theirs, device):
    """-> (the original's way, ours) to act at one more step; each returns arm and gripper (7,).

    The original takes the whole window anew: it encodes every frame and the sentence, and asks every [ACT].
    """
    config, sentence = ours.config, "open the drawer"
    policy = Policy(ours, execute=ours.config.stride)                           # sees timesteps alone
    theirs.config = dataclasses.replace(config, video=False)                     # it asks no [OBS] either
    frames = {c: torch.randint(256, (config.window, side, side, 3), dtype=torch.uint8)
              for c, side in config.cameras.items()}
    pixels = {c: to_pixels(x.permute(0, 3, 1, 2)[None], x.shape[1]) for c, x in frames.items()}
    states = torch.randn(config.window, 15)
    seen = [{c: x[t].numpy() for c, x in frames.items()} | {"robot_obs": states[t].numpy()}
            for t in range(config.window)]

    @torch.no_grad()
    def original():
        getattr(theirs.text, "cache", {}).clear()
        out = theirs({c: x.to(device) for c, x in pixels.items()}, [sentence], states[None].to(device))
        return torch.cat([out["arm"][0, -1], out["gripper"][0, -1, :, None]], -1).float().cpu()

    def here(observation=seen[-1]):
        arm, gripper = policy.actions(observation, sentence)
        return torch.tensor(np.concatenate([arm, gripper[:, None]], -1))

    for observation in seen[:-1]:
        here(observation)
    return original, here


def training_calls(ours, batch, device):
    """-> (model, (the original's way, ours) to compute losses and gradients). Image features are given."""
    config = ours.config
    pixels = {c: torch.randn(batch, config.window + config.future, 3, side, side, device=device)
              for c, side in config.cameras.items()}
    mask = torch.ones(batch, config.window, dtype=torch.bool, device=device)
    data = dict(robot_obs=torch.randn(batch, config.window, 15, device=device), future_mask=mask,
                rel_actions=torch.randn(batch, config.window, config.chunk, 7, device=device),
                action_mask=mask[..., None].expand(-1, -1, config.chunk),
                video_at=torch.arange(config.window, device=device))
    with torch.no_grad():
        features = [torch.randn(batch * config.window, *x.shape[1:], device=device)
                    for x in ours.vision(next(iter(pixels.values()))[0, :1])]
    given = GR1(config, Given(features), Given(torch.randn(batch, config.text_dim, device=device)))
    own = given.trained_state()                          # without the encoder that the tiny preset trains
    weights.load_strictly(given, {k: v for k, v in ours.trained_state().items() if k in own}, "bench")
    given = given.to(device).eval()                      # dropout off

    def step(model):
        out = model({c: x[:, :config.window] for c, x in pixels.items()}, [], data["robot_obs"], mask)
        sum(losses(out, data, pixels, config).values()).backward()
        model.zero_grad()
    original = as_the_original(given)
    return given, (lambda: step(original), lambda: step(given))


def bench_model(config, batch=2, seconds=20):
    """Print what acting and a training step cost with the original's window and trunk, and with ours.
    Encoders, resampler and heads are the same on both sides.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu, threads = device.type == "cuda", torch.get_num_threads()
    torch.manual_seed(0)
    ours = GR1(config, *build_encoders(config, "none", "none")).to(device).eval()
    acting = acting_calls(ours, as_the_original(ours), device)
    given, training = training_calls(ours, batch, device)
    original, here = (call() for call in acting)
    print(f"\n{torch.cuda.get_device_name() if gpu else 'CPU'}, medians of calls in turn; outputs differ by "
          f"{(original - here).abs().max():.0e}\n{'':<54}{'original':>10}{'here':>10}{'ratio':>8}")

    def row(name, original, here):
        ratio = original / here if here else math.nan
        print(f"{name:<54}{original:>10,.1f}{here:>10,.1f}{ratio:>8.1f}", flush=True)

    before, peaks = memory(device, new_peak=True), []
    for call in reversed(training):                      # ours first: a process keeps what it once needed
        call()
        peaks.append(memory(device, peak=True, new_peak=True) - before)
    row(f"train, batch {batch} [MiB at the peak]", *reversed(peaks))
    variants = [(f"{n} thread{'s' * (n > 1)}", n, False, False) for n in sorted({1, cores()})]
    if gpu:
        variants = [(name, threads, name != "float32", name.endswith("compiled"))
                    for name in ("float32", "bfloat16", "bfloat16, ours compiled")]
    for name, n, half, compiled in variants:
        torch.set_num_threads(n)
        if compiled:
            for part in ours.vision, ours.resampler, ours.trunk, given.resampler, given.trunk:
                part.compile()
        with torch.autocast(device.type, torch.bfloat16, half):
            if gpu:
                acting = acting_calls(ours, as_the_original(ours), device)   # a history of this precision
            for what, calls in ("act, batch 1", acting), (f"train, batch {batch}", training):
                row(f"{what}, {name} [ms]", *(1000 * np.median(x) for x in in_turn(calls, seconds, device)))
    torch.set_num_threads(threads)


def main():
    parser = Parser(description="Time acting and training, the original's way and ours.")
    parser.add_argument("--preset", default="gr1", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, default=2, help="windows of the training step (default: 2)")
    args = parser.parse_args()
    bench_model(preset_config(args.preset), args.batch)


if __name__ == "__main__":
    run_script(main, ModelError)
