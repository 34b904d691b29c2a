"""What the preset calvin's eye learns before it sees an action: to paint the picture again.

    python -m nanogr.painter --data data/calvin --out assets/calvin-eye.safetensors

The paper's encoder is MAE, trained on pictures alone and then frozen. This is the counterpart for TinyVision.
All that a decoder gets of a picture are the keypoints, each a blot of features where its map points; from
these it must paint what differs from the camera's mean picture. So the points go to what moves: arm, blocks,
doors. Left to train with the policy they do not: no point knew where a block was (docs/log.md).

Colours are whitened first. Light and dark vary most, by the arm alone, and a red block of thirty pixels would
count nothing beside it. Keypoints found by painting: Jakab et al. 2018, arXiv 1806.07823.
"""
import math
import pathlib
import sys

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import save
from tqdm import tqdm

from model import preset_config, to_pixels
from nanogr import clips
from nanogr.common import Parser, UserError, run_script, write_whole
from nanogr.encoders import places, tiny_vision

CONFIG = preset_config("calvin")
SIDES = CONFIG.cameras                                  # {camera: px}


class Painter(nn.Module):
    """forward: images (N, 3, S, S) of a camera -> by keypoints alone, what `differs` says of them."""
    def __init__(self, vision, frames, width=32):
        super().__init__()
        self.vision, points, features = vision, len(vision.identity), vision.token.in_features
        self.blots, self.identity = nn.Linear(features, width), nn.Parameter(torch.randn(points, width))
        self.whole, self.paint, self.empty = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        for camera, x in frames.items():
            mean, side = x.mean(0), x.shape[-1] // 4
            rest = (x - mean).movedim(1, 0).flatten(1)                               # (3, N * S * S)
            spread, colours = torch.linalg.eigh(rest @ rest.T / rest.shape[1] + 1e-3 * torch.eye(3))
            self.register_buffer(f"{camera}_mean", mean)
            self.register_buffer(f"{camera}_white", colours * spread ** -0.5 @ colours.T)
            self.whole[camera] = nn.Linear(3 * points, width)
            self.empty[camera] = torch.zeros(width, side, side)
            self.paint[camera] = nn.Sequential(
                nn.Conv2d(width, 64, 3, 1, 1), nn.GELU(), nn.Conv2d(64, 64, 3, 1, 1), nn.GELU(),
                nn.Conv2d(64, 3 * 4 * 4, 1), nn.PixelShuffle(4))
        for name, p in self.named_parameters():
            if name.endswith("weight") and p.dim() > 1:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)

    def differs(self, images, camera):
        """Images minus the camera's mean picture, in colours whose directions vary alike."""
        mean, white = self.get_buffer(f"{camera}_mean"), self.get_buffer(f"{camera}_white")
        return torch.einsum("ij,njhw->nihw", white, images - mean)

    def forward(self, images, camera):
        points, side = self.vision.points(images), images.shape[-1] // 4
        away = 2 * (points[:, :, None, :2] - places(side, images.device))                   # [cells of 4 px]
        blots = torch.exp(-away.pow(2).sum(-1) / 2)                                 # (N, points, side * side)
        canvas = (self.blots(points) + self.identity).transpose(1, 2) @ blots
        whole = self.whole[camera](points[..., :3].flatten(1))[..., None, None]
        return self.paint[camera](canvas.unflatten(2, (side, side)) + whole + self.empty[camera])


def frames_of(data, ids, count, rng):
    """So many random frames of the clips `ids`: {camera: uint8 (count, 3, S, S)}."""
    ids = rng.choice(ids, count)
    steps = rng.integers(data.lengths[ids])
    return {camera: torch.from_numpy(data.single(camera, ids, steps)).movedim(-1, 1) for camera in SIDES}


def train(data, ids, steps, frames, batch=32, lr=2e-3, seed=0):
    """A Painter that saw at each step `batch` of so many frames of the clips `ids`, of each camera."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    seen = frames_of(data, ids, frames, rng)
    some = {camera: to_pixels(x[:4000], SIDES[camera]) for camera, x in seen.items()}
    painter = Painter(tiny_vision(CONFIG), some)
    trained = list(painter.parameters())
    optimizer = torch.optim.AdamW(trained, lr, (0.9, 0.95), weight_decay=1e-4)
    bar = tqdm(range(steps), desc="painter", disable=not sys.stderr.isatty())
    for step in bar:
        for group in optimizer.param_groups:             # warm-up, then cosine
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        which = torch.from_numpy(rng.integers(frames, size=batch))
        losses = [loss(painter, to_pixels(x[which], SIDES[camera]), camera) for camera, x in seen.items()]
        sum(losses).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix({camera: loss.item() for camera, loss in zip(seen, losses)})
    painter.vision.measure(x for images in some.values() for x in images.split(100))
    return painter.eval()


def loss(painter, images, camera):
    """Squared error of what is painted, as a share of what differs from the mean picture at all."""
    target = painter.differs(images, camera)
    return (painter(images, camera) - target).pow(2).mean() / target.pow(2).mean()


def main():
    parser = Parser(description="Train the eye of the preset calvin on the pictures of packed clips.")
    parser.add_argument("--data", required=True, help="data set with CALVIN's cameras at 96 and 48 px")
    parser.add_argument("--out", required=True, metavar="FILE", help="the eye's weights, for train.py --mae")
    parser.add_argument("--steps", type=int, default=3000, help="default: 3000")
    parser.add_argument("--frames", type=int, default=12_000, help="random ones, in memory (default: 12000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.steps, args.frames) < 1 or args.seed < 0:
        parser.error("--steps and --frames must be 1 or more and --seed 0 or more")
    if not args.out.endswith(".safetensors"):
        parser.error("--out names a file that ends in .safetensors")
    data, apart = clips.open_data(args.data)
    if set(SIDES) - set(data.cameras):
        raise UserError(f"{args.data} has the cameras {', '.join(data.cameras)}, not {', '.join(SIDES)}")
    ids, out = clips.split(data, 0 if apart else 0.02)                      # as train.py holds out
    apart, out = (apart, np.arange(len(apart))) if apart else (data, out)
    if not len(out):
        raise UserError(f"{args.data} has one recording: none can be held out to judge by")
    pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    painter = train(data, ids, args.steps, args.frames, seed=args.seed)
    write_whole(args.out, save(painter.vision.eye()))
    with torch.no_grad():
        for camera, x in frames_of(apart, out, 512, np.random.default_rng(1)).items():
            share = loss(painter, to_pixels(x, SIDES[camera]), camera)
            print(f"{camera}: {share:.1%} of what differs from the mean picture is not painted (held out)")
    print(f"eye in {args.out}")


if __name__ == "__main__":
    run_script(main)
