"""
Train GR-1: `--stage pretrain` on video (what will the camera see?), `--stage finetune` on demonstrations
(what should the arm do, and what will it see?). One script, one loop, from one laptop core to many GPUs:

    python train.py --stage pretrain                  # nothing downloaded: the embedded tabletop, tiny preset
    torchrun --nproc 8 train.py --stage finetune      # starts from out/pretrain, 8 processes
    torchrun --nproc 8 train.py --stage finetune --preset gr1 --data DIR    # the paper's model, packed clips

Reads packed clips (clips.py); without --data it lets tabletop.py make them under data/ once. Writes into
--out (default out/STAGE): model.safetensors + config.json (the model), resume.pt (all that --resume needs),
log.jsonl (every logged step), sheets STEP.png (held-out frames: now / predicted / true) and best/ (the model
with the least held-out loss). After Ctrl-C or SIGTERM it finishes the step, saves all and ends well.

Logged: arm, gripper and one video loss a camera, unweighted; val/... the same on held-out episodes;
val/CAMERA_ratio = error of the predicted frame / error of copying the present one, in patches that change.
"""
import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import simplejpeg
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import clips
import model as gr1

# ---------------------------------------------------------------------------------------------- config


@dataclass
class TrainConfig:
    """One training run. Every field is a flag; 0 and "" mean the preset's (see PRESETS) where they say so."""
    stage: str = "finetune"        # pretrain: video only; finetune: robot demonstrations
    preset: str = "tiny"           # tiny (a laptop's) or gr1 (the paper's)
    data: str = ""                 # packed clips, or a folder of training/ and validation/; "": the tabletop
    out: str = ""                  # "": out/STAGE
    init: str = ""                 # start from this checkpoint; none: fresh; "": out/pretrain if it is there
    fresh: str = ""                # parts that start anew in spite of init, "a,b" or none; "": the preset's
    seed: int = 0                  # of weights, windows and noise
    # length and size; an epoch is as many windows as the data has places for one
    batch: int = 0                 # windows a step, over all processes; 0: the preset's
    steps: int = 0                 # 0: the preset's steps or epochs
    epochs: float = 0.0            # 0: the preset's
    windows_per_clip: int = 1      # so many windows of a clip overlap and share its encoded frames
    accumulate: int = 1            # split every process' share of the batch into this many passes
    # optimizer: AdamW, warm-up, cosine; the learning rate depends on the step alone
    lr: float = 0.0                # 0: the preset's
    warmup: float = 0.0            # share of the steps; 0: the preset's
    final_lr: float = 0.01         # share of lr at the end
    beta2: float = 0.0             # 0: the preset's
    weight_decay: float = -1.0     # -1: the preset's
    clip_grad: float = 1.0         # gradient norm
    arm_weight: float = 100.0      # the official coefficients; the paper's are 1, 1, 1
    gripper_weight: float = 1.0    # likewise
    video_weight: float = -1.0     # of each camera; -1: the preset's
    video_steps: int = -1          # timesteps of a window that foresee, at random; 0: all; -1: the preset's
    shift: float = -1.0            # random shift, share of the image side; -1: the preset's
    # the machine
    precision: str = "auto"        # auto: bf16 on a GPU, fp32 on a CPU
    compile: bool = False          # torch.compile the model
    workers: int = -1              # loader processes a process; -1: 4 on a GPU, 0 on a CPU
    vision_weights: str = "hub"    # the gr1 preset's frozen MAE: hub, none (random) or a file
    text_weights: str = ""         # its CLIP, likewise; "": hub, or none where --vision-weights is none
    # watching
    held_out: float = 0.02         # share of the episodes, where the data has no validation/
    log_every: int = 50            # steps
    eval_every: int = 500          # held-out losses, sheet and checkpoint
    eval_batches: int = 8          # of at most 64 windows
    resume: bool = False           # go on with the run in --out


# Paper, Table 3 (batch, learning rate, epochs, warm-up); all timesteps foresee. Betas, decay: authors' GR-MG.
PRESETS = {
    ("gr1", "pretrain"): dict(batch=1024, lr=3.6e-4, epochs=50, warmup=5 / 50, beta2=0.999, weight_decay=0,
                              shift=0.05, video_steps=0, video_weight=1, fresh="none"),
    ("gr1", "finetune"): dict(batch=512, lr=1e-3, epochs=20, warmup=1 / 20, beta2=0.999, weight_decay=0,
                              shift=0.05, video_steps=0, video_weight=1, fresh="none"),
    ("tiny", "pretrain"): dict(batch=16, lr=2e-3, steps=1500, warmup=0.05, beta2=0.95, weight_decay=0.01,
                               shift=0, video_steps=0, video_weight=1, fresh="none"),
    # All before [OBS] starts anew: minutes of video teach it to see what moves and to overlook the sentence,
    # which takes longer to mend than to learn (README, "What the tiny preset does differently").
    ("tiny", "finetune"): dict(batch=32, lr=2e-3, steps=6000, warmup=0.02, beta2=0.95, weight_decay=0.01,
                               shift=0, video_steps=1, video_weight=1,
                               fresh="trunk,vision,resampler,embed_language,embed_latents,embed_cls"),
}
UNSET = dict(fresh="", batch=0, lr=0.0, steps=0, epochs=0.0, warmup=0.0, beta2=0.0, weight_decay=-1.0,
             shift=-1.0, video_steps=-1, video_weight=-1.0)
ENCODER = "forward: image encoder"
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12}     # dense bf16 (V100: fp16)
PATIENCE = 10                    # steps in a row whose gradients may be infinite
STOP = threading.Event()         # set by Ctrl-C and SIGTERM
# Model settings worth a flag of their own; --model KEY=VALUE reaches the others (see model.GR1Config).
MODEL_FLAGS = dict(window=int, future=int, chunk=int)


def parse(argv=None):
    """Flags -> (TrainConfig, {model settings}, mode: train, bench or estimate); what the preset decides is
    filled in.
    """
    parser = clips.Parser(description=__doc__.split("\n\n")[0],
                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", pathlib.Path(__file__).read_text(), re.M))
    for f in dataclasses.fields(TrainConfig):
        flag, about = "--" + f.name.replace("_", "-"), comments.get(f.name, " ")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=about)
        else:
            choices = dict(stage=["pretrain", "finetune"], precision=["auto", "bf16", "fp32"]).get(f.name)
            short = dict(vision_weights=["--mae"], text_weights=["--clip"]).get(f.name, [])
            parser.add_argument(flag, *short, type=f.type, default=f.default, choices=choices, help=about)
    for name, kind in MODEL_FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help="model setting; default: the preset's")
    parser.add_argument("--no-video", action="store_true", help="the paper's ablation without [OBS]")
    parser.add_argument("--no-norm-pix", action="store_true",
                        help="predict plain, not patch-normalised pixels")
    parser.add_argument("--action-activation", action="store_true", help="ReLU in the action head")
    parser.add_argument("--bench", action="store_true",
                        help="time a step of random weights on synthetic clips, by parts, and end")
    parser.add_argument("--estimate", action="store_true",
                        help="likewise, for both stages, with what the paper's runs would take here")
    parser.add_argument("--model", nargs="*", default=[], metavar="KEY=VALUE",
                        help="other settings of model.GR1Config")
    args = vars(parser.parse_args(argv))
    changes = {name: args.pop(name) for name in MODEL_FLAGS}
    changes = {k: v for k, v in changes.items() if v is not None}
    if args["no_video"] and args["stage"] == "pretrain":
        parser.error("--no-video leaves nothing to pre-train: [OBS] is its only question")
    changes |= {"video": False} if args.pop("no_video") else {}
    changes |= {"norm_pixels": False} if args.pop("no_norm_pix") else {}
    changes |= {"action_activation": True} if args.pop("action_activation") else {}
    mode = next((mode for mode in ("bench", "estimate") if args[mode]), "train")
    del args["bench"], args["estimate"]
    for pair in args.pop("model"):
        key, _, value = pair.partition("=")
        try:
            changes[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            parser.error(f"--model wants KEY=VALUE with a number, true or false, got '{pair}'")
    config = TrainConfig(**args)
    gr1.preset_config(config.preset, config.stage, **changes)        # names a misspelt preset or key early
    for key, value in PRESETS[config.preset, config.stage].items():
        if getattr(config, key) == UNSET[key] and not (
                key in ("steps", "epochs") and (config.steps or config.epochs)):
            setattr(config, key, value)
    for key, least in dict(accumulate=1, windows_per_clip=1, log_every=1, eval_every=1, eval_batches=1,
                           batch=1, steps=0).items():
        if getattr(config, key) < least:
            parser.error(f"--{key.replace('_', '-')} must be at least {least}, got {getattr(config, key)}")
    config.out = config.out or f"out/{config.stage}"
    config.text_weights = config.text_weights or ("none" if config.vision_weights == "none" else "hub")
    return config, changes, mode


# ---------------------------------------------------------------------------------------------- processes


@dataclass
class World:
    """Which of how many processes this is, and its device."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self):
        return self.rank == 0

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def mean(self, tensor):
        """Average a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def print(self, *words):
        if self.main:
            tqdm.write(" ".join(map(str, words)), file=sys.stdout)


def set_up():
    """
    Join the other processes if torchrun started this one: NCCL on GPUs, gloo on CPUs.

    At most one process a GPU, or a core where there is none, trains; the others leave, for they would only
    slow the first down (8 on 2 cores: 88 windows a second, not 140). The batch is global: it stays the same.
    """
    rank, local, size, here = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    gpu, cores = torch.cuda.is_available(), os.cpu_count() or 1
    slots = torch.cuda.device_count() if gpu else cores
    slots = 1 << (slots.bit_length() - 1)                # a power of two divides the presets' batches
    if size == here > slots:
        if rank >= slots:
            sys.exit(0)
        if rank == 0:
            print(f"processes: {size} started, {slots} train, the others leave: there is one "
                  f"{'GPU' if gpu else 'core'} for each of {slots}")
        size = here = slots
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        # hours, because the others wait here while the first process makes the tabletop's clips
        dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=size,
                                timeout=timedelta(hours=4))
        if not gpu:
            torch.set_num_threads(max(1, cores // here))
    return World(rank, size, device)


# ---------------------------------------------------------------------------------------------- data


def find_data(config, world):
    """Open --data, or the tabletop's clips, which the first process makes if they are not there yet."""
    path, kind = config.data, {"pretrain": "videos", "finetune": "demonstrations"}[config.stage]
    if not path:
        path = f"data/tabletop-{kind}"
        world.print(f"data: no --data given, so the embedded tabletop's {kind} in {path}")
        if world.main and not os.path.exists(f"{path}/meta.json"):
            script = pathlib.Path(__file__).resolve().with_name("tabletop.py")
            world.print(f"  making them once: python tabletop.py --make {kind} --out {path}")
            if subprocess.run([sys.executable, str(script), "--make", kind, "--out", path]).returncode:
                raise clips.ClipsError("tabletop.py could not make its clips, see above")
        world.barrier()
    training, validation = clips.open_data(path)
    if config.stage == "finetune" and not training.has_actions:
        raise clips.ClipsError(f"{path} has no actions (source: {training.meta['source']}): finetuning needs "
                               "robot demonstrations; use it with --stage pretrain")
    if validation:
        return training, np.arange(len(training)), validation, np.arange(len(validation))
    ids, held_out = clips.split(training, config.held_out)
    return training, ids, training, held_out if len(held_out) else ids


def batches(data, ids, model_config, batch, steps, passes, config, world, per_clip=1):
    """An iterator over this process' parts, `passes` a step, of the batches of random windows `steps`. What a
    batch holds depends on its number alone, not on how many processes and passes share it.
    """
    windows = clips.Windows(data, ids, batch, model_config.window, model_config.future,
                            list(model_config.cameras), model_config.chunk, config.seed, per_clip)
    parts = [(step, world.rank * passes + i, world.size * passes) for step in steps for i in range(passes)]
    workers = config.workers if config.workers >= 0 else 4 * (world.device.type == "cuda")
    return iter(DataLoader(windows, batch_size=None, sampler=parts, num_workers=workers,
                           worker_init_fn=ignore_ctrl_c, pin_memory=world.device.type == "cuda",
                           prefetch_factor=4 if workers else None))


def ignore_ctrl_c(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # a terminal sends it to all; the run decides


def to_device(batch, device):
    move = lambda x: x.to(device, non_blocking=True) if torch.is_tensor(x) else x
    return {k: {c: move(x) for c, x in v.items()} if isinstance(v, dict) else move(v)
            for k, v in batch.items()}


# ---------------------------------------------------------------------------------------------- one pass


def predict(net, config, batch, shift=0.0, video_at=None):
    """Run a batch: -> (predictions, pixels {camera: (B, T + future, 3, S, S)}); shift > 0 augments."""
    frames, offsets = batch["frames"], batch.get("offsets")
    if shift:
        frames = {camera: gr1.random_shift(x, shift) for camera, x in frames.items()}
    pixels = {camera: gr1.to_pixels(x, config.cameras[camera]) for camera, x in frames.items()}
    seen = {camera: x[:, :x.shape[1] - config.future] for camera, x in pixels.items()}
    out = net(seen, batch["sentences"], batch.get("robot_obs"), batch["mask"], video_at, offsets)
    steps = config.window + config.future
    return out, {camera: gr1.windows_of(x, offsets, steps) for camera, x in pixels.items()}


def weighted(named, config):
    """The sum that is minimised."""
    weights = {"arm": config.arm_weight, "gripper": config.gripper_weight}
    return sum(weights.get(name, config.video_weight) * value for name, value in named.items())


@torch.no_grad()
def evaluate(net, model_config, data, ids, config, world, autocast):
    """Mean losses on held-out windows, always the same: {name: float}; a sheet, uint8 (H, W, 3), or None."""
    net.eval()
    size = max(1, min(64, config.batch) // world.size) * world.size
    sums, video, sheet = {}, torch.zeros(len(model_config.cameras), 2, device=world.device), None
    for batch in batches(data, ids, model_config, size, range(config.eval_batches), 1, config, world):
        batch = to_device(batch, world.device)
        with autocast:
            out, pixels = predict(net, model_config, batch)
        counts = world.mean(gr1.count_targets(batch))
        for name, value in gr1.losses(out, batch, pixels, model_config, counts=counts).items():
            sums[name] = sums.get(name, 0) + value / config.eval_batches
        if model_config.video:
            video += gr1.change_errors(out, pixels, batch["future_mask"], model_config)
            sheet = draw_sheet(out, pixels, model_config) if sheet is None and world.main else sheet
    net.train()
    result = {f"val/{name}": world.mean(value).item() for name, value in sums.items()}
    if model_config.video:
        errors = zip(model_config.cameras, world.mean(video).tolist())
        result |= {f"val/{camera}_ratio": mine / copied for camera, (mine, copied) in errors if copied}
    return result, sheet


def draw_sheet(out, pixels, config, count=8):
    """Last step of the first windows: columns; per camera three rows, now / predicted / true future frame."""
    rows = []
    for camera in config.cameras:
        now, future = pixels[camera][:count, config.window - 1], pixels[camera][:count, -1]
        drawn = gr1.draw(out[camera][:count, -1].float(), now, config)
        rows += [gr1.to_images(x).cpu().numpy() for x in (now, drawn, future)]
    side = max(config.cameras.values())
    row = lambda images: np.concatenate(
        [np.array(Image.fromarray(x).resize((side, side), 0)) for x in images], 1)
    return np.concatenate([row(images) for images in rows])


# ---------------------------------------------------------------------------------------------- build, save


def build(config, changes, world):
    """The model of the preset, from its checkpoint where the run starts from one."""
    model_config = gr1.preset_config(config.preset, config.stage, **changes)
    found = config.stage == "finetune" and os.path.exists("out/pretrain/config.json")
    fits = found and gr1.read_config("out/pretrain")["model"].get("preset") == model_config.preset
    init = "none" if config.resume else config.init or ("out/pretrain" if fits else "none")
    state = None if init == "none" else gr1.read_checkpoint(init)
    torch.manual_seed(config.seed)
    vision, text = gr1.build_encoders(model_config, config.vision_weights, config.text_weights)
    model = gr1.GR1(model_config, vision, text)
    model.trunk.unused_wte.requires_grad_(False)         # DDP would wait for its gradient
    if state:
        start_from(state, init, model, config, world)
    elif not config.resume:                              # its weights are in resume.pt
        world.print("init: fresh weights (--init CHECKPOINT starts from another run's)")
    return model.to(world.device)


def start_from(state, init, model, config, world):
    """Load the tensors of checkpoint `init`, but for the parts that this stage adds or that --fresh names."""
    names = {name.split(".")[0] for name in model.trained_state()}
    fresh = [part for part in config.fresh.split(",") if part != "none"]
    for part in fresh:
        if part not in names:
            raise gr1.ModelError(f"--fresh {part}: no such part; there are {', '.join(sorted(names))}")
    try:
        report = model.load_pretrained(state, init, fresh, gr1.finetuning_parts(model.config.cameras))
    except gr1.ModelError as error:
        raise gr1.ModelError(f"{error}; --init none starts fresh") from error
    world.print(f"init: {report}\n  (--init none starts without)")


def learning_rate(step, config):
    """Linear warm-up, then cosine down to final_lr of the peak."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def save_model(out, config, model, step):
    """Write the model for others."""
    info = dict(step=step, train=dataclasses.asdict(config))
    if config.preset == "gr1":
        info["encoders"] = dict(vision_weights=config.vision_weights, text_weights=config.text_weights)
    gr1.save_checkpoint(out, model, **info)


def save(config, model, optimizer, step, best):
    """Write the model for others, then resume.pt for this run. Random numbers need no keeping: a step's
    depend on seed, step and rank alone, and so do its data.
    """
    save_model(config.out, config, model, step)
    state = dict(step=step, best=best, model=model.trained_state(), optimizer=optimizer.state_dict(),
                 config=dataclasses.asdict(config) | dataclasses.asdict(model.config))
    gr1.write_whole(os.path.join(config.out, "resume.pt"), lambda file: torch.save(state, file))


def precision(config, world):
    """bf16 or fp32, where --precision leaves it open."""
    auto = "bf16" if world.device.type == "cuda" else "fp32"
    return auto if config.precision == "auto" else config.precision


def equip(model, config, world):
    """What it takes to train: -> (model to call, optimizer, autocast)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, config.lr, (0.9, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)
    net = torch.compile(model) if config.compile else model
    net = DistributedDataParallel(net, gradient_as_bucket_view=True) if world.size > 1 else net
    bf16 = precision(config, world) == "bf16"
    return net, optimizer, torch.autocast(world.device.type, torch.bfloat16) if bf16 else nullcontext()


def load_resume(config, model, optimizer, world):
    """Load resume.pt: -> (step to go on with, best held-out loss). The settings must be the run's first."""
    path = os.path.join(config.out, "resume.pt")
    if not os.path.exists(path):
        raise gr1.ModelError(f"--resume finds no run in {config.out}")
    try:
        state = torch.load(path, map_location=world.device, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise gr1.ModelError(f"{path} is damaged ({type(error).__name__}): start anew, with --init "
                             f"{config.out} to keep its weights") from error
    free = {"resume", "out", "init", "fresh", "workers", "log_every", "eval_every", "eval_batches", "compile"}
    now = dataclasses.asdict(config) | dataclasses.asdict(model.config)
    for key, value in state["config"].items():
        if key not in free and now.get(key) != value:
            raise gr1.ModelError(f"{config.out} was started with {key} {value}, not {now.get(key)}: "
                                 "give the same, or another --out")
    model.load_trained(state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    world.print(f"resume: {config.out} at step {state['step']}")
    return state["step"], state["best"]


def make_room(out, world):
    """Move an earlier run in `out` aside, so that nothing is overwritten."""
    world.barrier()                                      # others may still be reading it as --init
    if world.main and os.path.exists(os.path.join(out, "config.json")):
        n = 1
        while os.path.exists(f"{out}.{n}"):
            n += 1
        os.rename(out, f"{out}.{n}")
        world.print(f"out: the run that was in {out} is now in {out}.{n} "
                    "(--resume would have gone on with it)")
    world.barrier()
    os.makedirs(out, exist_ok=True)


# ---------------------------------------------------------------------------------------------- benchmark


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


def synthesise(folder, cameras, robot, clip_count=8, length=64):
    """Write clips of drifting colour fields, which a JPEG holds about as well as a photograph."""
    rng = np.random.default_rng(0)
    with clips.ShardWriter(folder, 0, list(cameras)) as shard:
        for i in range(clip_count):
            frames = {}
            for name, side in cameras.items():
                field = rng.integers(0, 256, (length + 40, 40, 3), np.uint8)
                images = (Image.fromarray(field[t:t + 40]).resize((side, side), 2) for t in range(length))
                frames[name] = np.stack([np.array(image) for image in images])
            rows = dict(robot_obs=rng.normal(size=(length, 15)).astype(np.float32),
                        rel_actions=rng.uniform(-1, 1, (length, 7)).astype(np.float32)) if robot else {}
            shard.add(frames, f"clip {i}", episode=i, **rows)
    clips.write_meta(folder, "synthetic", 30, "train.py --bench")
    return clips.Clips(folder)


def time_loader(loader, data, per_window, seconds=4):
    """Windows a second that reach the model on one core, and how many its JPEGs could give at most."""
    shard, file = clips.load_shard(data.directory, 0), data.directory / "00000.bin"
    jpegs = [file.read_bytes()[a:b] for a, b in itertools.pairwise(shard["offsets"].tolist()[:800])]
    rates = [0.0, 0.0]
    for _ in range(3):                                   # in turn, for the machine's mood changes
        for i, call in enumerate((lambda: len(next(loader)["sentences"]),
                                  lambda: [simplejpeg.decode_jpeg(x, "RGB") for x in jpegs] and
                                  len(jpegs) / per_window)):
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < seconds / 6:
                count += call()
            rates[i] = max(rates[i], count / (time.perf_counter() - start))
    return rates


def bench(config, changes, world, steps=5):
    """Print where a step's time goes, with random weights and synthetic clips: -> windows a second."""
    config = dataclasses.replace(config, vision_weights="none", text_weights="none", init="none", steps=1)
    model = build(config, changes, world).train()
    native = {"rgb_static": 200, "rgb_gripper": 84} if config.preset == "gr1" else model.config.cameras
    native = {camera: native[camera] for camera in model.config.cameras}
    net, optimizer, autocast = equip(model, config, world)
    with tempfile.TemporaryDirectory() as folder:
        data = synthesise(folder, native, model.config.robot)
        check_size(config, 1, world)
        loader = batches(data, np.arange(len(data)), model.config, config.batch, range(10_000), 1, config,
                         world, config.windows_per_clip)
        per_window = (model.config.window + model.config.future) * len(native)
        loaded, decoded = time_loader(loader, data, per_window)
        watch = Stopwatch(world.device)
        model.vision.register_forward_pre_hook(lambda *_: watch.lap("forward: trunk, heads, losses"))
        model.vision.register_forward_hook(lambda *_: watch.lap(ENCODER))
        model.resampler.register_forward_hook(lambda *_: watch.lap("forward: resampler"))

        def step():
            batch = next(loader)
            watch.lap("load")
            batch = to_device(batch, world.device)
            watch.lap("transfer")
            with autocast:
                out, pixels = predict(net, model.config, batch, config.shift)
                loss = weighted(gr1.losses(out, batch, pixels, model.config), config)
            watch.lap("forward: trunk, heads, losses")
            loss.backward()
            watch.lap("backward")
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip_grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            watch.lap("optimizer")

        step()
        with FlopCounterMode(display=False) as flops:
            step()
        watch.spent.clear()
        gr1.memory(world.device, peak=True)
        for _ in range(steps):
            step()
        peak = gr1.memory(world.device, peak=True)
    total, every = sum(watch.spent.values()), flops.get_total_flops()
    frozen = sum(flops.get_flop_counts().get("GR1.vision", {}).values()) if model.vision.frozen else 0
    rate = steps * config.batch / total
    trained = (every - frozen) * steps / (total - watch.spent.get(ENCODER, 0)) / 1e12
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    top = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)
    print(f"\n{config.preset}, {config.stage}, batch {config.batch}, {config.windows_per_clip} windows a "
          f"clip, {precision(config, world)} on {name}, {torch.get_num_threads()} threads; a step:")
    for what, seconds in watch.spent.items():
        print(f"  {what:<34}{1000 * seconds / steps:>10.1f} ms{100 * seconds / total:>7.1f}%")
    print(f"  {'all':<34}{1000 * total / steps:>10.1f} ms\n"
          f"  windows a second                  {rate:>10.1f}\n"
          f"  TFLOP/s of matrix products        {every * steps / total / 1e12:>10.2f}; "
          f"of the trained part alone {trained:.2f}"
          + (f", {100 * trained * 1e12 / top:.0f}% of the peak" if top else "")
          + f"\n  peak memory                       {peak:>10.0f} MiB\n"
          f"  loader, one core, windows a second{loaded:>10.1f}; its JPEG decoder alone {decoded:.1f}, "
          f"ratio {loaded / decoded:.2f}")
    return rate


def estimate(argv, world):
    """Print what the paper's two runs would take here, from the rates that bench measures."""
    runs = (("pretrain", 50 * 800_000, "pre-training: 50 epochs of 800,000 Ego4D clips"),
            ("finetune", 20 * 1_400_000, "finetuning: 20 epochs of CALVIN ABCD's windows"))
    for stage, windows, what in runs:
        config, changes, _ = parse([*argv, "--stage", stage])
        hours = windows / bench(config, changes, world) / 3600
        print(f"  {what}: {hours:,.1f} hours")


# ---------------------------------------------------------------------------------------------- the run


def check_size(config, windows, world):
    """Settle the number of steps; refuse a batch that the processes cannot share."""
    config.steps, config.epochs = config.steps or math.ceil(config.epochs * windows / config.batch), 0.0
    parts = world.size * config.accumulate * config.windows_per_clip
    if config.batch % parts:
        raise gr1.ModelError(f"--batch {config.batch} does not divide over {world.size} processes x "
                             f"{config.accumulate} passes x {config.windows_per_clip} windows a clip: choose "
                             f"a multiple of {parts}")


def train_step(step, net, optimizer, loader, config, model_config, world, autocast):
    """One update from `accumulate` passes: -> (losses by name, gradient norm, share of the processes told to
    stop), all tensors: nothing here waits for the device. Where a gradient is not finite there is no update.
    """
    # the step's random numbers depend on seed, step and rank alone: a resumed run draws the same
    video_at = np.random.default_rng([config.seed, step]).permutation(model_config.window)
    video_at = video_at[:config.video_steps].tolist() or None                                # None: all
    torch.manual_seed(((config.seed * 1_000_003 + step) * 10_007 + world.rank) % 2 ** 63)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    named, share = {}, [to_device(next(loader), world.device) for _ in range(config.accumulate)]
    counts = sum(gr1.count_targets(batch, video_at) for batch in share) / config.accumulate
    *counts, stop = world.mean(torch.cat([counts, counts.new_tensor([STOP.is_set()])]))
    for i, batch in enumerate(share):
        waits = world.size > 1 and i < config.accumulate - 1         # gradients are averaged in the last pass
        with net.no_sync() if waits else nullcontext():
            with autocast:
                out, pixels = predict(net, model_config, batch, config.shift, video_at)
                parts = gr1.losses(out, batch, pixels, model_config, video_at, counts)
            (weighted(parts, config) / config.accumulate).backward()
        named = {name: named.get(name, 0) + x.detach() / config.accumulate for name, x in parts.items()}
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip_grad)
    optimizer.found_inf = (~norm.isfinite()).float()     # fused AdamW then leaves weights and state alone
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return named, norm, stop


def run(first, best, net, model, optimizer, loader, config, held_out, world, autocast):
    """Steps first .. config.steps - 1, with log, held-out losses, sheets and checkpoints; -> steps done."""
    log = open_log(config.out, first) if world.main else None
    bar = tqdm(total=config.steps, initial=first, desc=config.stage,
               disable=not world.main or not sys.stderr.isatty())
    start, since, stop = time.time(), first, None
    bad = skipped = torch.zeros((), dtype=torch.int64, device=world.device)       # steps: in a row, in all
    for done in range(first + 1, config.steps + 1):
        if stop is not None and stop.item():             # the last step's; by now it is known without waiting
            if world.main:
                save(config, model, optimizer, done - 1, best)
            return done - 1
        named, norm, stop = train_step(done - 1, net, optimizer, loader, config, model.config, world,
                                       autocast)
        bad, skipped = (bad + 1) * ~norm.isfinite(), skipped + ~norm.isfinite()
        bar.update()
        if done % config.log_every == 0 or done == config.steps:
            means = world.mean(torch.stack(list(named.values()))).tolist()
            seconds = (time.time() - start) / (done - since)
            report(dict(step=done, **dict(zip(named, means)), lr=learning_rate(done - 1, config),
                        grad_norm=norm.item(), skipped=skipped.item(), ms=1000 * seconds,
                        samples_per_s=config.batch / seconds), world, log)
            start, since = time.time(), done
            if bad.item() >= PATIENCE:
                raise gr1.ModelError(f"no finite gradient in the last {bad.item()} steps, all skipped: try a "
                                     f"smaller --lr; the last good checkpoint is in {config.out}")
        if done % config.eval_every == 0 or done == config.steps:
            best = watch(done, best, net, model, optimizer, config, held_out, world, autocast, log)
            start, since = time.time(), done                 # the next line's ms leaves this out
    bar.close()
    return config.steps


def watch(done, best, net, model, optimizer, config, held_out, world, autocast, log):
    """Held-out losses, sheet and checkpoints after step `done`: -> the best weighted held-out loss so far."""
    figures, sheet = evaluate(net, model.config, *held_out, config, world, autocast)
    report(dict(step=done, **figures), world, log)
    parts = {name[4:]: value for name, value in figures.items() if not name.endswith("_ratio")}
    loss = weighted(parts, config)
    if world.main and loss < best:
        save_model(os.path.join(config.out, "best"), config, model, done)
    best = min(best, loss)
    if world.main:
        save(config, model, optimizer, done, best)
        if sheet is not None:
            Image.fromarray(sheet).save(os.path.join(config.out, f"{done:06d}.png"))
    return best


def open_log(out, first):
    """log.jsonl, open for more; what a run that broke off had logged after step `first` is dropped."""
    path = pathlib.Path(out, "log.jsonl")
    lines = path.read_text().splitlines(True) if first and path.exists() else []
    whole = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first]
    gr1.write_whole(str(path), lambda file: pathlib.Path(file).write_text("".join(whole)))
    return open(path, "a")


def report(line, world, log):
    """Print one line of figures and add it to log.jsonl."""
    if world.main:
        short = lambda v: str(v) if isinstance(v, int) else f"{v:.4g}"
        world.print("  ".join(f"{name} {short(value)}" for name, value in line.items()))
        log.write(json.dumps(line) + "\n")
        log.flush()


def ask_to_stop(signum, frame):
    """Handle Ctrl-C and SIGTERM: the run ends at the next step; asked twice, at once."""
    STOP.set()
    signal.signal(signum, signal.SIG_DFL)


def main():
    config, changes, mode = parse()
    world = set_up()
    if mode == "estimate":
        return estimate(sys.argv[1:], world)
    if mode == "bench":
        return bench(config, changes, world)
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, ask_to_stop)
    data, ids, *held_out = find_data(config, world)
    model = build(config, changes, world)
    windows = int(np.maximum(1, data.lengths[ids] - model.config.window + 1).sum())
    check_size(config, windows, world)
    if not config.resume:
        make_room(config.out, world)
    net, optimizer, autocast = equip(model, config, world)
    first, best = load_resume(config, model, optimizer, world) if config.resume else (0, math.inf)
    world.print(f"model: {json.dumps(dataclasses.asdict(model.config))}")
    world.print(f"train: {json.dumps(dataclasses.asdict(config))}")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    world.print(f"{parameters:,} trained parameters; {len(ids)} clips, {windows:,} windows, "
                f"{len(held_out[1])} clips held out; {config.steps} steps of {config.batch} windows "
                f"({config.steps * config.batch / windows:.1f} epochs); {world.size} x {world.device.type}, "
                f"{precision(config, world)}")
    loader = batches(data, ids, model.config, config.batch, range(first, config.steps), config.accumulate,
                     config, world, config.windows_per_clip)
    model.train()
    done = run(first, best, net, model, optimizer, loader, config, held_out, world, autocast)
    world.print(f"done: {config.out}/model.safetensors" if done == config.steps else
                f"stopped: after step {done}, as asked; --resume goes on with {config.out}")
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (clips.ClipsError, gr1.ModelError) as problem:
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)                                # the first process says it, and torchrun ends all
        sys.exit(f"error: {str(problem).strip().splitlines()[-1]}")    # the last line of a loader's traceback
