"""
Train GR-1 or GR-2: `--stage pretrain` on video (what will the camera see?), `--stage finetune` on
demonstrations (what should the arm do, and what will it see?). One script, one loop, from one laptop core to
many GPUs:

    python train.py --stage pretrain                  # nothing downloaded: the embedded tabletop, tiny preset
    torchrun --nproc 8 train.py --stage finetune      # starts from out/pretrain, 8 processes
    torchrun --nproc 8 train.py --stage finetune --preset gr1 --data DIR    # the paper's model, packed clips

Reads packed clips (nanogr/clips.py); without --data the tabletop makes them under data/ once. Writes into
--out (default out/STAGE): model.safetensors + config.json (the model), resume.pt (all that --resume needs),
log.jsonl (every logged line), first_batch.png (what the model is shown), sheets STEP.png (held-out frames:
now / predicted / true) and best/ (the model with the least held-out loss). After Ctrl-C or SIGTERM it does
the step to its end, saves all and exits with status 0. --bench and --estimate are in nanogr/bench.py.

GR-2 (--preset gr2-...) reads the codes of its tokenizer, which are written beside the clips once; gr2-tiny's
tokenizer is trained on the tabletop first, into out/tokenizer.

Logged: arm, gripper and one video loss a camera (GR-2: kl; arm_mean, the arm at latent 0), unweighted, and
the gradient's norm, each a mean over all processes and over the steps since the last line; skipped: steps
without a finite gradient, so far; val/... losses on held-out episodes; val/CAMERA_ratio = error of the
predicted frame / error of copying the present one, in patches that change; val/CAMERA_right and _wrong: the
same where the sentence names a block's colour, with this sentence and with another colour in it; equal for a
model that does not read the sentence.
"""
import argparse
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import gr2
import model as gr1
from model import GR1, ModelError, known, to_pixels, total_loss
from nanogr import clips, tokenizer, weights
from nanogr.common import Parser, UserError, check_same, cores, lock, make_room, write_whole
from nanogr.encoders import LAPTOP, build_encoders, same_eye
from nanogr.policy import change_errors, pictures, to_images

# ---------------------------------------------------------------------------------------------- config
@dataclass
class TrainConfig:
    """One training run. Every field is a flag; 0 and "" mean the preset's (see PRESETS) where they say so."""
    stage: str = "finetune"        # pretrain: video only; finetune: robot demonstrations
    preset: str = "tiny"           # tiny, calvin (laptops'), gr1 (the paper's), real (its robot's), gr2-...
    data: str = ""                 # packed clips, or a folder of training/ and validation/; "": the tabletop
    data_fraction: float = 1.0     # share of each task's clips to train on; 0.1: the paper's 10% setting
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
    kl_weight: float = 10.0        # of GR-2's action VAE; a nat costs as much as an arm error of 0.1
    hide_states: float = 0.1       # GR-2: share of the windows without states, as in video that it rolls out
    video_steps: int = -1          # timesteps of a window that foresee, at random; 0: all; -1: the preset's
    video_every: int = 0           # one in so many steps foresees, its loss times as many; 0: the preset's
    shift: float = -1.0            # random shift, share of the image side; -1: the preset's
    reword: float = 0.0            # share of windows told any sentence of their task, if all mean the same
    eye_noise: float = 0.0         # calvin's: added to what its eye says, in shares of its spread
    # the machine
    precision: str = "auto"        # auto: bf16 on a GPU, fp32 on a CPU (bf16 crawls there without AMX)
    compile: str = "auto"          # torch.compile the model's parts: on, off; auto: on a GPU, but for tiny
    workers: int = -1              # loader processes a process; -1: 4 on a GPU, 0 on a CPU
    vision_weights: str = "hub"    # the gr1 preset's frozen MAE, calvin's eye: hub, none (random) or a file
    text_weights: str = ""         # its CLIP, likewise; "": hub, or none where --vision-weights is none
    tokenizer: str = ""            # GR-2's: a VQGAN's file or a directory; "": --init's, or out/tokenizer
    # watching
    held_out: float = 0.02         # share of the episodes, where the data has no validation/
    log_every: int = 50            # steps
    eval_every: int = 500          # held-out losses, sheet and checkpoint
    eval_batches: int = 8          # of at most 64 windows
    resume: bool = False           # go on with the run in --out, if there is one
    wandb: bool = False            # send the figures to Weights & Biases too
    tensorboard: bool = False      # likewise, as TensorBoard's files in --out


# Paper, Table 3 (batch, learning rate, epochs, warm-up); all timesteps foresee. Betas, decay: authors' GR-MG.
PRESETS = {
    ("gr1", "pretrain"): dict(batch=1024, lr=3.6e-4, epochs=50, warmup=5 / 50, beta2=0.999, weight_decay=0,
                              shift=0.05, video_steps=0, video_weight=1, fresh="none"),
    ("gr1", "finetune"): dict(batch=512, lr=1e-3, epochs=20, warmup=1 / 20, beta2=0.999, weight_decay=0,
                              shift=0.05, video_steps=0, video_weight=1, fresh="none"),
    ("tiny", "pretrain"): dict(batch=16, lr=2e-3, steps=1500, warmup=0.05, beta2=0.95, weight_decay=0.01,
                               shift=0, video_steps=0, video_weight=1, fresh="none"),
    # All before [OBS] starts anew: minutes of video teach it to see what moves and to overlook the sentence,
    # which takes longer to mend than to learn (docs/log.md).
    ("tiny", "finetune"): dict(batch=32, lr=2e-3, steps=6000, warmup=0.02, beta2=0.95, weight_decay=0.01,
                               shift=0, video_steps=1, video_weight=1,
                               fresh="trunk,vision,resampler,embed_language,embed_latents,embed_cls"),
}
PRESETS["calvin", "pretrain"] = PRESETS["tiny", "pretrain"]
PRESETS["calvin", "finetune"] = PRESETS["tiny", "finetune"] | dict(batch=240, steps=4800, video_every=5)
PRESETS["real", "pretrain"] = PRESETS["gr1", "pretrain"]         # paper, real robot: batch and epochs differ
PRESETS["real", "finetune"] = PRESETS["gr1", "finetune"] | dict(batch=64, epochs=30, warmup=1 / 30)
# GR-2's optimizer is not published: GR-1's, at a lower rate for L and XL. No shift, for codes are made once,
# and its paper names none. Weight 0.3: cross-entropy starts at ln 1024, not at 1.
for name, share in ("gr2-s", 1), ("gr2-b", 1), ("gr2-l", 384 / 1024), ("gr2-xl", 384 / 1280):
    for stage in "pretrain", "finetune":
        theirs = PRESETS["gr1", stage]
        PRESETS[name, stage] = theirs | dict(lr=theirs["lr"] * share, shift=0, video_weight=0.3)
PRESETS["gr2-tiny", "pretrain"] = PRESETS["tiny", "pretrain"] | dict(batch=32, steps=1000)
PRESETS["gr2-tiny", "finetune"] = PRESETS["tiny", "finetune"] | dict(
    steps=4000, video_weight=0.3, fresh="none")
PATIENCE = 10                    # steps in a row whose gradients may be infinite
STOP = []                        # when Ctrl-C and SIGTERM came [s]
# Model settings worth a flag of their own; --model KEY=VALUE reaches the others (see model.GR1Config).
MODEL_FLAGS = {
    "--window": ("window", dict(type=int, help="timesteps that the model sees")),
    "--future-step": ("future", dict(type=int, help="so many timesteps ahead is foreseen")),
    "--stride": ("stride", dict(type=int, help="the robot's steps from one timestep to the next")),
    "--chunk": ("chunk", dict(type=int, help="so many actions are predicted at each timestep, one a step")),
    "--no-video": ("video", dict(action="store_false", help="the paper's ablation without [OBS]")),
    "--no-norm-pix": ("norm_pixels", dict(action="store_false", help="plain, not patch-normalised pixels")),
    "--action-activation": ("action_activation", dict(action="store_true", help="ReLU in the action head")),
}
LEAST = dict(accumulate=1, windows_per_clip=1, log_every=1, eval_every=1, eval_batches=1, batch=1, steps=0,
             epochs=0, seed=0, lr=0, weight_decay=0, shift=0, video_steps=0, video_every=0, workers=-1,
             kl_weight=0, hide_states=0, eye_noise=0, reword=0)


def family(preset):
    """The module of a preset's model, model.py or gr2.py; both have preset_config, losses, build_encoders."""
    known("preset", preset, [*gr1.PRESETS, *gr2.PRESETS])
    return gr2 if preset in gr2.PRESETS else gr1


def parse(argv=None):
    """Flags -> (TrainConfig, {model settings}, mode: train, bench or estimate); what the preset decides is
    filled in.
    """
    parser = Parser(description=__doc__.split("\n\n")[0],
                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # said once: the comment behind a field of TrainConfig is its flag's help
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", pathlib.Path(__file__).read_text(), re.M))
    for f in dataclasses.fields(TrainConfig):
        flag, about = "--" + f.name.replace("_", "-"), comments.get(f.name, " ").replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=about)
        else:
            choices = dict(stage=["pretrain", "finetune"], precision=["auto", "bf16", "fp32"],
                           compile=["auto", "on", "off"]).get(f.name)
            short = dict(vision_weights=["--mae"], text_weights=["--clip"]).get(f.name, [])
            parser.add_argument(flag, *short, type=f.type, default=f.default, choices=choices, help=about)
    for flag, (key, options) in MODEL_FLAGS.items():
        parser.add_argument(flag, dest=key, default=argparse.SUPPRESS, **options)
    parser.add_argument("--model", nargs="*", default=[], metavar="KEY=VALUE",
                        help="other settings of model.GR1Config")
    parser.set_defaults(mode="train")
    measure = parser.add_mutually_exclusive_group()
    for mode, about in (("bench", "time a step of random weights on synthetic clips, by parts, and end"),
                        ("estimate", "likewise for both stages: what the paper's runs would take here")):
        measure.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=about)
    args = vars(parser.parse_args(argv))
    mode, changes = args.pop("mode"), {key: args.pop(key) for key, _ in MODEL_FLAGS.values() if key in args}
    if args["stage"] == "pretrain" and not changes.get("video", True):
        parser.error("--no-video leaves nothing to pre-train: [OBS] is its only question")
    if args["stage"] == "pretrain" and args["video_every"] > 1:
        parser.error("--video-every is for finetuning: without [OBS] a pre-training step learns nothing")
    for pair in args.pop("model"):
        key, _, value = pair.partition("=")
        try:
            changes[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            parser.error(f"--model wants KEY=VALUE, where VALUE is a JSON value, got '{pair}'")
    config = TrainConfig(**args)
    family(config.preset).preset_config(config.preset, config.stage, **changes)      # misspelt names, early
    for key, value in PRESETS[config.preset, config.stage].items():
        chosen = config.steps or config.epochs if key in ("steps", "epochs") else False
        if getattr(config, key) == getattr(TrainConfig, key) and not chosen:
            setattr(config, key, value)
    for key, least in LEAST.items():
        if not getattr(config, key) >= least:            # nor NaN
            parser.error(f"--{key.replace('_', '-')} must be at least {least}, got {getattr(config, key)}")
    if not 0 < config.data_fraction <= 1:
        parser.error(f"--data-fraction must be above 0 and at most 1, got {config.data_fraction}")
    if not config.clip_grad > 0:
        parser.error(f"--clip-grad must be above 0, got {config.clip_grad}; inf: the gradient as it is")
    if config.eye_noise and (config.preset != "calvin" or config.vision_weights == "none"):
        parser.error("--eye-noise is for --preset calvin's own eye, which knows how far what it says spreads")
    for key in "hide_states", "reword":
        if getattr(config, key) > 1:
            parser.error(f"--{key.replace('_', '-')} is a share, at most 1, got {getattr(config, key)}")
    if not 0 <= config.beta2 < 1:
        parser.error(f"--beta2 must be at least 0 and below 1, got {config.beta2}")
    for package in "wandb", "tensorboard":
        if getattr(config, package) and not importlib.util.find_spec(package):
            parser.error(f"--{package} needs the package {package}: pip install {package}")
    config.out = os.path.normpath(config.out or f"out/{config.stage}")
    config.text_weights = config.text_weights or ("none" if config.vision_weights == "none" else "hub")
    return config, changes, mode


# ------------------------------------------------------------------------------------------- processes
@dataclass
class Processes:
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
            sys.stdout.flush()                           # a pipe's reader, or a queue's log, sees it now


def set_up():
    """
    Join the other processes if torchrun started this one: NCCL on GPUs, gloo on CPUs.

    At most one process a GPU, or a core where there is none, trains; the others leave, for they would only
    slow the first down (8 on 2 cores: 88 windows a second, not 140). The batch is global: it stays the same.
    """
    rank, local, size, here = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    if size > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(f"WORLD_SIZE is {size}, but no launcher says where the other processes are: unset it "
                        "to train on one, or start with torchrun --nproc N train.py")
    gpu = torch.cuda.is_available()
    count = torch.cuda.device_count() if gpu else cores()
    slots = 1 << (count.bit_length() - 1)                # a power of two divides the presets' batches
    if size == here > slots:
        if rank >= slots:
            sys.exit(0)
        if rank == 0:
            print(f"processes: {size} started, {slots} train, the others leave: at most one for each of "
                  f"{count} {'GPUs' if gpu else 'cores'}, and a power of two")
        size = here = slots
    elif gpu and here > count:
        raise UserError(f"{here} processes on a machine with {count} GPUs: --nproc {count}")
    mac = size == 1 and torch.backends.mps.is_available()                  # gloo, for several, knows no MPS
    device = torch.device("cuda", local) if gpu else torch.device("mps" if mac else "cpu")
    if gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        hour = datetime.timedelta(hours=1)               # others may wait so long for clips, or GR-2's codes
        dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=size, timeout=hour)
        if not gpu:
            torch.set_num_threads(max(1, cores() // here))
    return Processes(rank, size, device)


# ------------------------------------------------------------------------------------------------ data
TABLETOP, HERE = {"pretrain": "videos", "finetune": "demonstrations"}, pathlib.Path(__file__).resolve().parent


def tabletop_data(stage, world):
    """Where the tabletop's clips for a stage are; the first process makes them if they are not there yet."""
    path = f"data/tabletop-{TABLETOP[stage]}"
    if world.main and not os.path.exists(f"{path}/meta.json"):
        command = ["-m", "nanogr.worlds.tabletop", "--make", TABLETOP[stage], "--out",
                   os.path.relpath(path, HERE)]
        world.print(f"  making {path} once: python {' '.join(command)}")
        # in a process of its own, which Ctrl-C ends
        if subprocess.run([sys.executable, *command], cwd=HERE).returncode:
            raise UserError("the tabletop could not make its clips, see above")
    return path


def find_data(config, world):
    """Open --data, or the tabletop's clips."""
    path = config.data
    if not path:
        world.print(f"data: no --data given, so the embedded tabletop's {TABLETOP[config.stage]}")
        path = tabletop_data(config.stage, world)
        world.barrier()
    training, validation = clips.open_data(path)
    for data in (training, validation) if validation else (training,):
        if config.stage == "finetune" and not data.has_actions:
            raise UserError(f"{data.directory} has no actions (source: {data.meta['source']}): "
                            "finetuning needs robot demonstrations; use it with --stage pretrain")
    ids, held_out = clips.split(training, 0 if validation else config.held_out)
    ids = clips.share_of_tasks(training, ids, config.data_fraction, config.seed)
    if validation:
        return training, ids, validation, np.arange(len(validation))
    return training, ids, training, held_out if len(held_out) else ids


def training_windows(data, ids, config, model_config, fingerprint="", learns=False):
    """Random windows of clips; of codes, if the fingerprint of their tokenizer is given. learns: with what
    GR-2 draws at random when it learns to act, noise for its latent and windows without states."""
    learns = learns and isinstance(model_config, gr2.GR2Config) and model_config.robot
    return clips.Windows(data, ids, config.batch, model_config.window, model_config.future,
                         list(model_config.cameras), model_config.chunk, config.seed, config.windows_per_clip,
                         config.shift, config.video_steps if model_config.video else 0,
                         model_config.stride, model_config.latent if learns else 0,
                         config.hide_states if learns else 0, fingerprint,
                         max(1, config.video_every) if model_config.video else 0, config.reword)


def held_out_windows(data, ids, config, model_config, world):
    """At most 64 at once, single ones, not shifted, that foresee at all steps."""
    size = max(1, min(64, config.batch) // world.size) * world.size
    plain = dataclasses.replace(config, batch=size, windows_per_clip=1, shift=0, video_steps=0,
                                video_every=1, reword=0)
    return training_windows(data, ids, plain, model_config)


def find_tokenizer(config, world):
    """Set --tokenizer where GR-2 needs one and none is named: that of the checkpoint which the run starts
    from or goes on with, else gr2-tiny's own, which is trained once.
    """
    if config.preset not in gr2.PRESETS:
        return
    if config.tokenizer == "none":
        raise UserError("--tokenizer none, with random weights, is for --bench alone: give a tokenizer")
    source = config.out if config.resume else find_init(config, world)
    if not config.tokenizer and source != "none":
        config.tokenizer = tokenizer.tokenizer_of(source)
    if config.tokenizer:
        return
    if config.preset != "gr2-tiny":
        raise UserError(f"--preset {config.preset} needs --tokenizer FILE, a VQGAN's (docs/gr2.md)")
    config.tokenizer = "out/tokenizer"
    if world.main and not os.path.exists("out/tokenizer/tokenizer.json"):
        if config.data:
            raise UserError("no tokenizer in out/tokenizer: make one with `python -m nanogr.tokenizer --make "
                            "DIR --data VIDEOS DEMONSTRATIONS`, and give --tokenizer DIR")
        folders = [tabletop_data(stage, world) for stage in TABLETOP]
        command = ["-m", "nanogr.tokenizer", "--make", "out/tokenizer", "--data", *folders]
        world.print(f"tokenizer: none yet, training one: python {' '.join(command)}")
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        if subprocess.run([sys.executable, *command], env=os.environ | {"PYTHONPATH": path}).returncode:
            raise UserError("no tokenizer could be made, see above")
    world.barrier()


def encode(model, folder, config, world):
    """The fingerprint of GR-2's tokenizer, whose codes of a data set are then on the disk; "" where each
    frame is encoded when it is needed: GR-1, or a random shift. The processes share the work.
    """
    if not isinstance(model, gr2.GR2) or config.shift:
        return ""
    if config.resume:                                    # before good codes are replaced
        made = weights.read_config(config.out).get("encoders", {})
        tokenizer.same_tokenizer(model.vision, made, config.out)
    tokenizer.encode_clips(folder, model.vision.to(world.device), model.config.cameras,
                           part=world.rank, parts=world.size)
    world.barrier()
    return model.vision.fingerprint


def batches(windows, steps, passes, world, workers):
    """An iterator over this process' parts, `passes` a step, of the batches windows[step]. What a batch holds
    depends on its number alone, not on how many processes and passes share it.
    """
    parts = ((step, world.rank * passes + i, world.size * passes) for step in steps for i in range(passes))
    gpu = world.device.type == "cuda"
    workers = workers if workers >= 0 else 4 * gpu
    return iter(DataLoader(windows, batch_size=None, sampler=parts, num_workers=workers, pin_memory=gpu,
                           worker_init_fn=leave_group, prefetch_factor=2 if workers else None))


def leave_group(worker):
    """A terminal's Ctrl-C, or a queue's SIGTERM to every process, is for the run to obey, which then ends its
    loader's workers.
    """
    if hasattr(os, "setsid"):                            # not on Windows
        os.setsid()
    if signal.getsignal(signal.SIGTERM) is ask_to_stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_device(batch, device):
    move = lambda x: x.to(device, non_blocking=True) if torch.is_tensor(x) else x
    return {k: {c: move(x) for c, x in v.items()} if isinstance(v, dict) else move(v)
            for k, v in batch.items()}


# -------------------------------------------------------------------------------------------- one pass
def see(batch, config):
    """Frames as the model sees them, {camera: (B, N, 3, S, S)}: shifted, resized, normalised."""
    frames = batch["frames"]
    if "shifts" in batch:
        frames = {camera: shift(x, batch["shifts"][camera]) for camera, x in frames.items()}
    return {camera: to_pixels(x, config.cameras[camera]) for camera, x in frames.items()}


def shift(frames, by):
    """DrQ-v2's augmentation: uint8 frames (B, N, 3, H, W), by (B, 2) px up and to the left, borders repeated.
    It is the same for all N frames, as in the official code.
    """
    batch, _, _, height, width = frames.shape
    rows = (torch.arange(height, device=frames.device) + by[:, :1]).clamp(0, height - 1)           # (B, H)
    columns = (torch.arange(width, device=frames.device) + by[:, 1:]).clamp(0, width - 1)          # (B, W)
    which = torch.arange(batch, device=frames.device)[:, None, None]
    return frames[which, :, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 4, 1, 2)


def take_in(batch, model):
    """What the model takes of a batch: frames as `see` says; GR-2: their codes {camera: (B, N, P)}."""
    if "codes" in batch:
        return batch["codes"]
    return as_codes(see(batch, model.config), model)


def as_codes(pixels, model):
    """Frames as the model takes them: GR-2's codes; GR-1 takes them as they are."""
    return model.to_codes(pixels) if isinstance(model, gr2.GR2) else pixels


def predict(net, config, batch, pixels):
    """The model's predictions for a batch that it sees as `pixels`, of which the last are for the losses,
    where the batch asks for them."""
    ahead = config.future * bool(len(batch["video_at"]))
    seen = {camera: x[:, :x.shape[1] - ahead] for camera, x in pixels.items()}
    learns = [batch[key] for key in ("rel_actions", "action_mask", "noise")] if "noise" in batch else []
    return net(seen, batch["sentences"], batch.get("robot_obs"), batch["mask"], batch["video_at"],
               batch.get("frame_at"), *learns)


def weighted(named, config):
    """The sum that is minimised, weighted as config says."""
    return total_loss(named, config.arm_weight, config.gripper_weight, config.video_weight,
                      kl=config.kl_weight, arm_mean=0)


def count_targets(batch):
    """Float tensor (2,): for how many steps of a batch the action, and the future frame, is known."""
    actions, futures = batch.get("action_mask"), batch["future_mask"][:, batch["video_at"]]
    return torch.stack([futures.new_zeros(()) if actions is None else actions.sum(), futures.sum()]).float()


def other_colour(sentence):
    """The sentence with another colour of CALVIN's blocks where it names one; else as it is."""
    return re.sub(r"\b(red|blue|pink)\b", lambda found: dict(red="blue", blue="pink", pink="red")[found[0]],
                  sentence)


@torch.no_grad()
def evaluate(learner, windows, config, world):
    """Mean losses on held-out windows, always the same: {name: float}; a sheet, uint8 (H, W, 3), or None."""
    net, model, model_config = learner.net.eval(), learner.model, learner.model.config
    losses, sums, sheet = family(model_config.preset).losses, {}, None
    video = torch.zeros(3, len(model_config.cameras), 2, device=world.device)
    for batch in batches(windows, range(config.eval_batches), 1, world, config.workers):
        batch = to_device(batch, world.device)
        with learner.autocast:
            pixels = see(batch, model_config)
            seen = as_codes(pixels, model)
            out = predict(net, model_config, batch, seen)
        counts = world.mean(count_targets(batch))
        for name, value in losses(out, batch, seen, model_config, counts=counts).items():
            sums[name] = sums.get(name, 0) + value / config.eval_batches
        if model_config.video:
            told = [other_colour(sentence) for sentence in batch["sentences"]]
            named = torch.tensor([a != b for a, b in zip(told, batch["sentences"])], device=world.device)
            named = batch["future_mask"] & named[:, None]
            with learner.autocast:
                wrong = predict(net, model_config, batch | {"sentences": told}, seen)
            now = {camera: x[:, :model_config.window] for camera, x in pixels.items()}
            future = {camera: x[:, model_config.future:] for camera, x in pixels.items()}
            drawn, misled = (pictures(model, x, now) for x in (out, wrong))
            video += torch.stack([change_errors(frames, now, future, judged, model_config.patch)
                                  for frames, judged in ((drawn, batch["future_mask"]), (drawn, named),
                                                         (misled, named))])
            sheet = draw_sheet(drawn, pixels, model_config) if sheet is None and world.main else sheet
    net.train()
    result = {f"val/{name}": world.mean(value).item() for name, value in sums.items()}
    if model_config.video:
        for kind, errors in zip(("ratio", "right", "wrong"), world.mean(video).tolist()):
            result |= {f"val/{camera}_{kind}": mine / copied
                       for camera, (mine, copied) in zip(model_config.cameras, errors) if copied}
    return result, sheet


def draw_sheet(drawn, pixels, config, count=8):
    """Last step of the first windows: columns; per camera three rows, now / predicted / true future frame."""
    rows = []
    for camera in config.cameras:
        x = pixels[camera][:count]
        last = x[:, config.window - 1], drawn[camera][:count, -1], x[:, -1]
        rows += [to_images(y).cpu().numpy() for y in last]
    return tile(rows)


@torch.no_grad()
def draw_batch(batch, model, count=4):
    """The first runs of frames of a training batch, as the model will see them, a row for each camera."""
    few = {key: {camera: x[:count] for camera, x in batch[key].items()}
           for key in ("frames", "shifts", "codes") if key in batch}
    if "codes" in few:                                   # as its tokenizer paints them
        seen = {camera: model.vision.decode(x.flatten(0, 1).long().to(model.timestep.device)).cpu().unflatten(
            0, x.shape[:2]) for camera, x in few["codes"].items()}
    else:
        seen = see(few, model.config)
    seen = {camera: to_images(x).numpy() for camera, x in seen.items()}
    return tile([row for clip in zip(*seen.values()) for row in clip])


def tile(rows):
    """Rows of images as one, uint8 (H, W, 3): the smaller ones are enlarged."""
    side = max(row.shape[1] for row in rows)
    enlarge = lambda image: np.array(Image.fromarray(image).resize((side, side), 0))
    return np.concatenate([np.concatenate([enlarge(image) for image in row], 1) for row in rows])


# ----------------------------------------------------------------------------------------- build, save
def build(config, changes, world):
    """The model of the preset, from its checkpoint where the run starts from one."""
    kind = family(config.preset)
    model_config = kind.preset_config(config.preset, config.stage, **changes)
    init = "none" if config.resume else find_init(config, world, aloud=True)
    state = None if init == "none" else weights.read_checkpoint(init)
    torch.manual_seed(config.seed)
    encoders = (gr2.build_encoders(model_config, config.tokenizer, config.text_weights) if kind is gr2 else
                build_encoders(model_config, vision_weights=config.vision_weights,
                               text_weights=config.text_weights))
    encoders[1].group = 16                               # CLIP's, see there: a resumed run gets the same bits
    model = (gr2.GR2 if kind is gr2 else GR1)(model_config, *encoders)
    model.trunk.unused_wte.requires_grad_(False)         # DDP would wait for its gradient
    if config.shift:
        model.vision.LARGEST = 0                         # TinyVision's: shifted, no picture comes twice
    if config.eye_noise:
        model.vision.noise = config.eye_noise            # likewise
    if state:
        start_from(state, init, model, config, world)
    elif not config.resume:                              # its weights are in resume.pt
        world.print("init: fresh weights (--init CHECKPOINT starts from another run's)")
    return model


def find_init(config, world, aloud=False):
    """The checkpoint that a new run starts from, or none."""
    found = config.stage == "finetune" and os.path.exists("out/pretrain/config.json")
    preset = family(config.preset).preset_config(config.preset).preset               # "real" is of gr1
    fits = found and weights.read_config("out/pretrain")["model"].get("preset") == preset
    if found and aloud and not (fits or config.init):
        world.print(f"init: out/pretrain is not of preset {preset}, so it is left alone")
    return config.init or ("out/pretrain" if fits else "none")


def start_from(state, init, model, config, world):
    """Load the tensors of checkpoint `init`, but for the parts that this stage adds or that --fresh names."""
    names = {name.split(".")[0] for name in model.trained_state()}
    fresh = [part for part in config.fresh.split(",") if part != "none"]
    for part in fresh:
        if part not in names:
            raise UserError(f"--fresh {part}: no such part; there are {', '.join(sorted(names))}")
    if "timestep" in state and len(state["timestep"]) != model.config.window:
        fresh.append("timestep")                         # pre-trained with another window
    new = weights.finetuning_parts(model.config.cameras)
    if isinstance(model, gr2.GR2):
        new += "no_state", *(f"camera.{camera}" for camera in list(model.config.cameras)[1:])
    same_eye(model.vision, state, init)
    saved = weights.read_config(init)
    if isinstance(model, GR1):
        same_angles(model, state, saved, init, fresh)
    if model.config.preset == "calvin" and "embed_language" not in fresh:
        model.text.known = tuple(saved.get("encoders", {}).get("known", ()))
    try:
        report = weights.load(model, state, init, fresh, new)
    except UserError as error:
        raise UserError(f"{error}; --init none starts fresh") from error
    if isinstance(model, gr2.GR2):
        tokenizer.same_tokenizer(model.vision, saved.get("encoders", {}), init)
    step, steps = saved.get("step"), saved.get("train", {}).get("steps")
    early = f"  it was saved at step {step} of {steps}\n" if step and steps and step < steps else ""
    world.print(f"init: {report}\n{early}  (--init none starts without)")


def learned_by(model, data, ids, config):
    """The sentences that a policy of preset calvin learns by, sorted: those of the clips `ids`, of --init, of
    the run that goes on. None for others, which read any."""
    if model.config.preset != "calvin" or config.stage != "finetune":
        return []
    before = weights.read_config(config.out).get("encoders", {}) if config.resume else {}
    return sorted({*before.get("known", ()), *model.text.known, *(data.sentences[i] for i in ids)})


def same_angles(model, state, saved, init, fresh):
    """UserError if the weights of `init` learned the hand's angles as another `upright` gives them."""
    reads = any(key.removeprefix("model.").startswith("embed_arm") for key in state)
    if not reads or not model.config.robot or "embed_arm" in fresh:
        return
    kind = weights.checkpoint_kind(state, init)[0]
    upright = saved.get("model", {}).get("upright", False)
    if kind == weights.OURS and not saved and model.config.upright:
        raise UserError(f"{init} lies without its config.json, which says how it reads the hand's angles: "
                        "name the directory that train.py wrote; --init none starts fresh")
    if upright != model.config.upright:
        raise UserError(f"{init} reads the hand's angles otherwise: add --model "
                        f"upright={str(upright).lower()}; --init none starts fresh")


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
    if model.config.preset == "calvin" and config.stage == "finetune":
        info["encoders"] = dict(known=list(model.text.known))
    if model.config.preset == "gr1":
        info["encoders"] = dict(vision_weights=config.vision_weights, text_weights=config.text_weights)
    if isinstance(model, gr2.GR2):
        info["encoders"] = dict(tokenizer=os.path.abspath(config.tokenizer), text_weights=config.text_weights,
                                fingerprint=model.vision.fingerprint)
        if model.config.preset == "gr2-tiny":            # small enough to travel with the model
            tokenizer.save_tokenizer(model.vision, out)
    weights.save_checkpoint(out, model, **info)


def save(config, learner, progress, world):
    """Write the model for others, then resume.pt for this run. Random numbers need no keeping: a step's
    depend on seed and step alone (dropout's and noise's on the rank too), and so do its data.
    """
    sums = world.mean(progress.sums.clone())
    if world.main:
        model = learner.model
        save_model(config.out, config, model, progress.step)
        state = dict(step=progress.step, best=progress.best, sums=sums.tolist(),
                     skipped=progress.skipped.tolist(), processes=world.size, clips=progress.clips,
                     model=model.trained_state(), optimizer=learner.optimizer.state_dict(),
                     config=settings(config, model))
        write_whole(os.path.join(config.out, "resume.pt"), lambda file: torch.save(state, file))
    progress.saved = progress.step


def settings(config, model):
    """All that a resumed run must have in common with the run that it goes on with, by name."""
    codes = dict(fingerprint=model.vision.fingerprint) if isinstance(model, gr2.GR2) else {}
    return dataclasses.asdict(config) | dataclasses.asdict(model.config) | codes


def precision(config, world):
    """bf16 or fp32, where --precision leaves it open: bf16 on a GPU that computes in it."""
    able = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return ("bf16" if able else "fp32") if config.precision == "auto" else config.precision


def compiles(config, world):
    """Whether to torch.compile: --compile, as far as there is a C compiler, which that needs."""
    # tiny's whole training takes little longer than to compile it
    pays = world.device.type == "cuda" and config.preset not in LAPTOP
    if config.compile == "off" or config.compile == "auto" and not pays:
        return False
    if any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang", "cl"))):
        return True
    if config.compile == "on":
        raise UserError("--compile on needs a C compiler on the PATH or in CC: install gcc or clang, or take "
                        "--compile off")
    world.print("compile: no C compiler on the PATH or in CC, so the model runs as it is (slower)")
    return False


@dataclass
class Learner:
    """A model and what it takes to train it."""
    model: GR1
    net: torch.nn.Module           # what is called: the model, or DDP around it
    parameters: list               # those that are trained
    optimizer: torch.optim.Optimizer
    autocast: AbstractContextManager
    compiled: bool                 # its parts will be, in the first step


def equip(model, config, world):
    """Ready a model for training on its device: -> Learner."""
    gpu, bf16 = world.device.type == "cuda", precision(config, world) == "bf16"
    model.to(world.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, config.lr, (0.9, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)
    for name in model.frozen() if bf16 else []:          # autocast would cast their weights at every step
        if not isinstance(model, gr2.GR2) or name == "text":             # but codes are of full precision
            getattr(model, name).bfloat16()
    if gpu:
        model.vision.to(memory_format=torch.channels_last)              # as the JPEGs' bytes come
    compiled = compiles(config, world)
    if compiled:
        # by parts: sentences are no tensors, and a part's gradients are averaged while others are computed
        for name in "vision", "resampler", "trunk", "video_head":
            if hasattr(model, name):
                getattr(model, name).compile()
    net = model
    if world.size > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        net.broadcast_buffers = False                    # constant tables; torch warns of the argument
    autocast = torch.autocast(world.device.type, torch.bfloat16) if bf16 else nullcontext()
    if bf16 and not gpu:                                 # the flag is for CPUs too, whose fused attention's
        torch.backends.cuda.enable_flash_sdp(False)      # backward in bf16 takes seven times as long as plain
    return Learner(model, net, parameters, optimizer, autocast, compiled)


def can_resume(config, world):
    """Is there a run in --out? All machines must agree, or they would train different ones together."""
    path = os.path.join(config.out, "resume.pt")
    share = world.mean(torch.tensor(float(os.path.exists(path)), device=world.device)).item()
    if 0 < share < 1:
        raise UserError(f"--resume: not all machines see {path}: --out must be on a disk they share")
    if not share:
        world.print(f"resume: no run in {config.out} yet, so this starts one")
    return share == 1


def fingerprint(data):
    """What tells a data set from another, wherever it lies: a checksum over its index and its clips' own."""
    crc = zlib.crc32(repr(data.sentences).encode())
    for shard in data.shards:
        for key in sorted(shard):
            crc = zlib.crc32(np.ascontiguousarray(shard[key]), crc)
    return f"{crc:08x}"


def load_resume(config, learner, print_of_data, world):
    """Load resume.pt: -> Progress. The settings must be those that the run began with, and so must the clips
    (their fingerprint); where they lie may have changed.
    """
    path = os.path.join(config.out, "resume.pt")
    try:
        state = torch.load(path, map_location=world.device, weights_only=True)
        step, best, sums, skipped, processes = (
            state[key] for key in ("step", "best", "sums", "skipped", "processes"))
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or of an older version ({type(error).__name__}): start "
                        f"anew, with --init {config.out} to keep its weights") from error
    if state.get("clips", print_of_data) != print_of_data:
        raise UserError(f"{config.out} was begun on other clips than those in --data: give the same, or "
                        "another --out")
    free = {"resume", "out", "init", "fresh", "workers", "log_every", "eval_every", "eval_batches", "compile",
            "wandb", "tensorboard", "tokenizer"} | ({"data"} if "clips" in state else set())
    now = settings(config, learner.model)
    upright = now.get("upright") and not now["robot"]    # pre-training reads no angles
    for key, value in dict(stride=1, eye_noise=0.0, reword=0.0, upright=upright).items():  # of earlier runs
        if key in now:                                   # GR-2 has no choice of upright
            state["config"].setdefault(key, value)
    if not state["config"].get("drop_words"):            # a flag that a day's runs had
        state["config"].pop("drop_words", None)
    fixed = [key for key in state["config"] if key not in free]
    before, now = ({key: some.get(key) for key in fixed} for some in (state["config"], now))
    check_same(before, now, config.out,
               ": give the same (settings of the model with --model KEY=VALUE), or another --out")
    weights.load_strictly(learner.model, state["model"], path)
    learner.optimizer.load_state_dict(state["optimizer"])
    world.print(f"resume: {config.out} at step {step}" + (
        f"; {processes} processes trained it, now {world.size}: its batches stay the same, but dropout, "
        "noise and the last bits of sums differ" if processes != world.size else ""))
    sums, skipped = (torch.tensor(x, device=world.device) for x in (sums, skipped))
    return Progress(step, best, skipped, sums, saved=step, clips=print_of_data)


def clear_out(out, world):
    """Move an earlier run in `out` aside, so that nothing is overwritten."""
    world.barrier()                                      # others may still be reading it as --init
    if world.main and os.path.exists(os.path.join(out, "config.json")):
        world.print(f"out: the run that was in {out} is now in {make_room(out, ['[!.]*'])} "
                    "(--resume would have gone on with it)")
    world.barrier()


# --------------------------------------------------------------------------------------------- the run
@dataclass
class Progress:
    """How far a run has come, beside weights and optimizer."""
    step: int                      # steps done
    best: float                    # least weighted held-out loss
    skipped: torch.Tensor          # (2,) steps without a finite gradient: in a row till now, in all
    sums: torch.Tensor             # of the figures since the last line, then how many steps; (1,): 0 steps
    saved: int | None = None       # step of the last checkpoint
    clips: str = ""                # of which data set, see fingerprint


class Later:
    """Values of a small tensor, for later: the call waits for their copy, not for what was asked since."""

    def __init__(self, tensor):
        self.copy, self.ready = tensor.to("cpu", non_blocking=tensor.is_cuda), None     # to pinned memory
        if tensor.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record()

    def __call__(self):
        if self.ready:
            self.ready.synchronize()
        return self.copy.tolist()


def start_wandb(config, world):
    """What sends figures to Weights & Biases, if --wandb asks for it: [function of step and figures]."""
    if not (config.wandb and world.main):
        return []
    import wandb
    try:
        wandb.init(project="nanogr", name=config.out, config=dataclasses.asdict(config))
    except Exception as error:                           # its own kinds: no key, no network, no such project
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--wandb: {said[0]}: run `wandb login`, or leave --wandb out") from None
    return [lambda step, figures: wandb.log(figures, step=step)]


class Log:
    """Prints lines of figures; the first process also keeps them in log.jsonl, and elsewhere if asked."""

    def __init__(self, config, first, world, others=()):
        """What a run that broke off had logged after step `first` is dropped. others: see start_wandb."""
        self.world, self.others, self.open = world, [*others], []
        path = pathlib.Path(config.out, "log.jsonl")
        if not world.main:
            return
        lines = path.read_text().splitlines(True) if first and path.exists() else []
        whole = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first]
        write_whole(path, "".join(whole).encode())
        self.file = open(path, "a")
        self.open.append(self.file)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(config.out)
            self.open.append(writer)
            self.others.append(lambda step, figures: [writer.add_scalar(name, value, step)
                                                      for name, value in figures.items()])

    def __call__(self, step, **figures):
        if self.world.main:
            figures = {k: v if math.isfinite(v) else None for k, v in figures.items()}    # JSON has no NaN
            short = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
            self.world.print("  ".join(f"{k} {short(v)}" for k, v in dict(step=step, **figures).items()))
            self.file.write(json.dumps(dict(step=step, **figures)) + "\n")
            self.file.flush()
            for send in self.others:
                send(step, {k: v for k, v in figures.items() if v is not None})

    def close(self):
        for each in self.open:                           # TensorBoard's writer keeps its last lines till then
            each.close()


def check_batch(config, world):
    """Refuse a batch that the processes cannot share."""
    parts = world.size * config.accumulate * config.windows_per_clip
    if config.batch % parts:
        raise UserError(f"--batch {config.batch} does not divide over {world.size} processes x "
                        f"{config.accumulate} passes x {config.windows_per_clip} windows a clip: choose "
                        f"a multiple of {parts}")


def train_step(step, learner, loader, config, world, skipped):
    """One update from `accumulate` passes: -> (figures by name, skipped steps (2,), Later [share of the
    processes told to stop, skipped steps in a row before this one]). Nothing here waits for the device, but
    for the copies that encoding sentences takes.
    """
    net, optimizer, model = learner.net, learner.optimizer, learner.model
    model_config, losses = model.config, family(model.config.preset).losses
    torch.manual_seed(((config.seed * 1_000_003 + step) * 10_007 + world.rank) % 2 ** 63)     # dropout, noise
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    share = [to_device(next(loader), world.device) for _ in range(config.accumulate)]
    counts = sum(count_targets(batch) for batch in share) / config.accumulate
    *counts, stop = world.mean(torch.cat([counts, counts.new_full((1,), float(bool(STOP)))]))
    news = Later(torch.stack([stop, skipped[0].float()]))
    figures = {}
    for i, batch in enumerate(share):
        waits = world.size > 1 and i < config.accumulate - 1         # gradients are averaged in the last pass
        with net.no_sync() if waits else nullcontext():
            with learner.autocast:
                pixels = take_in(batch, model)
                out = predict(net, model_config, batch, pixels)
                named = losses(out, batch, pixels, model_config, counts)
            named |= {c: named[c] * max(1, config.video_every) for c in model_config.cameras if c in named}
            loss = weighted(named, config) / config.accumulate
            # a loss that is not finite spoils the gradients of all processes, so that all skip the step
            loss.backward(torch.where(loss.detach().isfinite(), 1.0, math.nan))
        for name, value in named.items():
            figures[name] = figures.get(name, 0) + value.detach() / config.accumulate
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters, config.clip_grad)
    bad = ~norm.isfinite()
    optimizer.found_inf = bad.float()                    # fused AdamW then leaves weights and state alone
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return figures | {"grad_norm": norm}, torch.stack([(skipped[0] + 1) * bad, skipped[1] + bad]), news


def run(progress, learner, loader, config, held_out, world, log):
    """The steps from progress.step to config.steps, or until told to stop, with log and checkpoints."""
    bar = tqdm(total=config.steps, initial=progress.step, desc=config.stage,
               disable=not world.main or not sys.stderr.isatty())
    start, since = began, first = time.time(), progress.step
    for step in range(first, config.steps):
        figures, progress.skipped, news = train_step(step, learner, loader, config, world, progress.skipped)
        progress.step = step + 1
        bar.update()
        good = progress.skipped[0] == 0
        new = torch.stack([*figures.values()]).where(good, 0)
        progress.sums = progress.sums + torch.cat([new, good[None]])
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            *means, count = world.mean(progress.sums).tolist()
            seconds = (time.time() - start) / (progress.step - since)
            log(progress.step, **{name: x / count if count else math.nan for name, x in zip(figures, means)},
                lr=learning_rate(step, config), skipped=progress.skipped[1].item(), ms=1000 * seconds,
                samples_per_s=config.batch / seconds)
            progress.sums, start, since = progress.sums.new_zeros(1), time.time(), progress.step
        if learner.compiled and step == first:
            world.print(f"compile: the first step, which compiles, took {time.time() - began:.0f} s")
            start, since = time.time(), progress.step        # the next line's ms leaves this out
        if progress.step % config.eval_every == 0 or progress.step == config.steps:
            check_up(progress, learner, config, held_out, world, log)
            start, since = time.time(), progress.step        # the next line's ms leaves this out
        stop, bad = news()                                   # as all processes knew before this step
        refuse_to_skip(bad, progress, config)
        if stop or STOP and world.size == 1:
            break
    refuse_to_skip(progress.skipped[0].item(), progress, config)
    bar.close()
    if progress.saved != progress.step:
        save(config, learner, progress, world)


def refuse_to_skip(bad, progress, config):
    """End a run that skipped so many steps in a row."""
    if bad >= PATIENCE:                                  # `bad`: how many in a row
        last = f"step {progress.saved} is in {config.out}" if progress.saved else "there is none yet"
        raise UserError(f"no finite gradient in {bad:.0f} steps in a row, all skipped: try a "
                        f"smaller --lr; the last checkpoint: {last}")


def check_up(progress, learner, config, held_out, world, log):
    """Held-out losses, a sheet of held-out frames, checkpoints."""
    figures, sheet = evaluate(learner, held_out, config, world)
    log(progress.step, **figures)
    judged = ("_ratio", "_right", "_wrong")
    loss = weighted({name[4:]: x for name, x in figures.items() if not name.endswith(judged)}, config)
    if loss < progress.best:
        progress.best = loss
        if world.main:
            save_model(os.path.join(config.out, "best"), config, learner.model, progress.step)
    save(config, learner, progress, world)
    if sheet is not None:
        Image.fromarray(sheet).save(os.path.join(config.out, f"{progress.step:06d}.png"))


def ask_to_stop(signum, frame):
    """Handle Ctrl-C and SIGTERM: the run ends after the step it is in; asked again after 5 s, at once.
    (What a queue or a terminal sends to all processes comes a second time, milliseconds later, by torchrun.)
    """
    STOP.append(time.monotonic())
    if STOP[-1] - STOP[0] > 5:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def follow_launcher():
    """End this run, as after SIGTERM, when the torchrun that started it is gone, however that ended."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        STOP.append(time.monotonic())
        time.sleep(60)                                   # the others are gone too: a step may wait for ever
        os._exit(1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def train(config, changes, world):
    """The whole run: data, model, steps."""
    check_batch(config, world)
    data, ids, *apart = find_data(config, world)
    config.resume = config.resume and can_resume(config, world)
    find_tokenizer(config, world)
    model = build(config, changes, world)
    window = (model.config.window - 1) * data.frames_a_timestep(model.config.stride) + 1     # in frames
    places = int(np.maximum(1, data.lengths[ids] - window + 1).sum())
    config.steps, config.epochs = config.steps or math.ceil(config.epochs * places / config.batch), 0.0
    codes = encode(model, data.directory, config, world)
    windows = training_windows(data, ids, config, model.config, codes, learns=True)
    held_out = held_out_windows(*apart, config, model.config, world)
    if world.main:
        os.makedirs(config.out, exist_ok=True)
        held = lock(os.path.join(config.out, ".lock"))
    others = start_wandb(config, world)                  # no mistake of the user's comes later
    if not config.resume:
        clear_out(config.out, world)
    if known := learned_by(model, data, ids, config):
        model.text.known = known
    learner = equip(model, config, world)
    progress = (load_resume(config, learner, fingerprint(data), world) if config.resume else
                Progress(0, math.inf, torch.zeros(2, dtype=torch.int64, device=world.device),
                         torch.zeros(1, device=world.device), clips=fingerprint(data)))
    world.print(f"model: {json.dumps(dataclasses.asdict(model.config))}")
    world.print(f"train: {json.dumps(dataclasses.asdict(config))}")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = held_out.clips is not data or not np.isin(held_out.ids, ids).any()
    said = f"{len(held_out.ids)} clips held out" if own else "none held out, for all are of one recording"
    world.print(f"{parameters:,} trained parameters; {len(ids)} clips, {places:,} windows, {said}; "
                f"{config.steps} steps of {config.batch} windows ({config.steps * config.batch / places:.1f} "
                f"epochs); {world.size} x {world.device.type}, {precision(config, world)}")
    if world.main and not progress.step:
        sheet = draw_batch(windows[0, 0, world.size * config.accumulate], model)
        Image.fromarray(sheet).save(os.path.join(config.out, "first_batch.png"))
    loader = batches(windows, range(progress.step, config.steps), config.accumulate, world, config.workers)
    log = Log(config, progress.step, world, others)
    model.train()
    try:
        run(progress, learner, loader, config, held_out, world, log)
    finally:
        log.close()
        if world.main:
            held.close()
        # workers heed no SIGTERM, and an error's traceback would keep their loader
        getattr(loader, "_shutdown_workers", lambda: None)()
    world.print(f"done: {config.out}/model.safetensors" if progress.step == config.steps else
                f"stopped: after step {progress.step}, as asked; --resume goes on with {config.out}")


def main():
    config, changes, mode = parse()
    signal.signal(signal.SIGINT, signal.SIG_DFL)         # while it waits for other processes, in torch's C++
    world = set_up()
    trains = mode == "train"                             # else Ctrl-C ends it, when its clips are taken away
    signal.signal(signal.SIGINT, ask_to_stop if trains else lambda *_: sys.exit(130))
    signal.signal(signal.SIGTERM, ask_to_stop if trains else signal.SIG_DFL)
    follow_launcher()
    if mode == "train":
        train(config, changes, world)
    else:
        from nanogr import bench                         # here, for it imports this file
        dict(bench=bench.bench, estimate=bench.estimate)[mode](sys.argv[1:], world)
    if world.size > 1:
        dist.destroy_process_group()


# What torch says where a user can do something about it: a word of its message, and what to say instead.
EXPLAINED = {"timed out": "waited too long for this run's other processes: are they all started?",
             "Connection closed by peer": "another process of this run has ended, see above",
             "Connection reset by peer": "another process of this run has ended, see above",
             "DataLoader worker": "a loader process was killed: if its memory or a container's shared memory "
                                  "(--shm-size) ran out, try fewer --workers or a smaller --batch",
             "out of memory": "out of memory: --accumulate N passes need less, or take a smaller --batch"}

if __name__ == "__main__":
    try:
        main()
    except (UserError, ModelError, OSError, RuntimeError) as problem:
        known = not isinstance(problem, RuntimeError)
        said = [(str(problem).strip() or type(problem).__name__).splitlines()[-1]] if known else [
            words for word, words in EXPLAINED.items() if word in str(problem)]
        if not said:
            raise
        if int(os.environ.get("RANK", 0)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)                               # the first process says it, and torchrun ends all
        sys.exit(f"error: {said[0]}")                    # the last line of a loader's traceback
