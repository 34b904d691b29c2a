"""
GR-1 in one file: "Unleashing Large-Scale Video Generative Pre-training for Visual Robot Manipulation",
Wu et al. 2023, arXiv 2312.13139 ("paper" below; "official code" is the authors' bytedance/GR-1).

GR-1 is a GPT over timesteps. Each timestep holds a sentence, the robot's state and camera images as context
tokens, and learned query tokens: [ACT] asks "what should the arm do?", [OBS] asks "what will the camera see
a few frames from now?". Pre-training on human video is the same model with one camera and without the robot.

    python model.py [--preset tiny]      prints the token layout, the attention mask and the parameters
    python model.py --bench              times acting and training against the official way to compute them

In this order: config and tokens, mask, small parts, resampler, trunk, heads, encoders, GR1, authors' files,
losses, policy, benchmark.

Glossary of shapes
    B  batch          T  timesteps of the window         C  context tokens of a timestep
    D  model width    R  query tokens of the window      K  actions of a chunk
    P  patches        V  timesteps that [OBS] asks at    L  latents of the resampler
    N  images         S  side of an image [px]           Dv, Dt  features of the image, text encoder
"""
import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import logging
import math
import os
import pathlib
import pickle
import re
import struct
import time
import warnings
import zlib
from collections import defaultdict, deque
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ModelError(Exception):
    """A user's mistake about models or checkpoints: one line that says what is wrong and what to do."""


# ------------------------------------------------------------------------------------------ config and tokens

@dataclass
class GR1Config:
    """Sizes and switches of the model. The defaults are the paper's finetuning model (Sec. 4.1, Table 3)."""
    preset: str = "gr1"            # which encoders belong to it, see build_encoders
    cameras: dict = field(default_factory=lambda: {"rgb_static": 224, "rgb_gripper": 224})  # -> side fed in
    robot: bool = True             # robot state in, [ACT] out; False for video without a robot
    video: bool = True             # [OBS] queries; False is the paper's ablation without video prediction
    window: int = 10               # T, timesteps the model sees
    future: int = 3                # [OBS] predicts the frame this many steps ahead (paper: 1 in pre-training)
    chunk: int = 1                 # K, actions predicted at each step (paper: 1)
    width: int = 384               # D
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1
    vision_dim: int = 768          # features of the image encoder
    text_dim: int = 512            # features of the text encoder
    latents: int = 9               # L
    resampler_depth: int = 3
    resampler_heads: int = 4
    resampler_head_dim: int = 128
    patch: int = 16                # side of a predicted patch [px]
    decoder_depth: int = 2
    decoder_heads: int = 16
    norm_pixels: bool = True       # predict pixels up to each patch's mean and spread, as MAE does
    copy_gate: bool = False        # [OBS] also says, pixel by pixel, what stays as it is; not in the paper
    action_activation: bool = False  # a ReLU between the action head's layers; the official code has none

    def __post_init__(self):
        least = {f.name: int(f.name in ("future", "dropout")) for f in dataclasses.fields(self)
                 if f.type in (int, float)}
        for name, zero in least.items():
            if getattr(self, name) < 1 - zero:
                raise ModelError(f"config key '{name}' must be at least {1 - zero}, "
                                 f"got {getattr(self, name)}")
        if self.copy_gate and self.norm_pixels:
            raise ModelError("copy_gate copies plain pixels: it needs norm_pixels false")
        if not self.cameras or not all(type(side) is int and side > 0 for side in self.cameras.values()):
            raise ModelError(f"config key 'cameras' must give each camera's side in px, got {self.cameras}")
        if self.width % self.heads or self.width % self.decoder_heads or self.width % 4:
            raise ModelError(f"width {self.width} must be a multiple of heads {self.heads}, "
                             f"decoder_heads {self.decoder_heads} and 4")
        bad = [f"{name} ({side} px)" for name, side in self.cameras.items() if side % self.patch]
        if bad:
            raise ModelError(f"camera {bad[0]} does not divide into patches of {self.patch} px")

    @classmethod
    def from_dict(cls, values):
        """Build from a plain dict; an unknown key or a wrong type is a ModelError that names the nearest."""
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in kinds:
                near = difflib.get_close_matches(key, kinds, 1)
                raise ModelError(f"unknown config key '{key}'"
                                 + (f", did you mean '{near[0]}'?" if near else ""))
            if type(value) is not kinds[key] and not (kinds[key] is float and type(value) is int):
                raise ModelError(f"config key '{key}' must be {kinds[key].__name__}, got {value!r}")
        return cls(**values)


PRESETS = {
    "gr1": dict(),                 # the paper: 195 M parameters with its encoders, 46 M of them trained
    "real": dict(),                # the same; what differs is the training, see PRESETS in train.py
    # A laptop's: everything is small and trained, encoder included. Departures from the paper, with reasons:
    # plain pixels as video target (a drawn world is flat, and dividing by a flat patch's spread is noise),
    # a copy gate (four latents cannot carry a whole picture, nor minutes teach to paint one),
    # cameras at their own sizes (upsampling the 32 px gripper view would double the work).
    "tiny": dict(preset="tiny", cameras={"rgb_static": 64, "rgb_gripper": 32}, window=5, width=96, layers=4,
                 heads=4, dropout=0.0, vision_dim=64, text_dim=128, latents=4, resampler_depth=1,
                 resampler_heads=4, resampler_head_dim=16, patch=16, decoder_depth=2, decoder_heads=4,
                 norm_pixels=False, copy_gate=True),
}


def preset_config(name, stage="finetune", /, **changes):
    """GR1Config of a preset, with changes; stage "pretrain" leaves one camera, no robot, the next frame."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        raise ModelError(f"unknown preset '{name}'" + (f", did you mean '{near[0]}'?" if near else "")
                         + f" (there are: {', '.join(PRESETS)})")
    config = GR1Config.from_dict({**PRESETS[name], **changes})
    if stage == "pretrain":
        if changes.get("robot") or changes.get("video") is False:
            raise ModelError("pre-training has no robot and always predicts video: leave these settings out")
        config.cameras = dict(list(config.cameras.items())[:1])
        config.robot, config.future, config.video = False, changes.get("future", 1), True
    return config


def token_table(config):
    """The tokens of one timestep, in order: a list of (name, count, is_query)."""
    table = [("language", 1, False)]
    if config.robot:
        table += [("state", 1, False)]
    for camera in config.cameras:
        table += [(f"{camera} latents", config.latents, False), (f"{camera} CLS", 1, False)]
    if config.robot:
        table += [("[ACT]", config.chunk, True)]
    if config.video:
        table += [(f"[OBS] {camera}", config.latents + 1, True) for camera in config.cameras]
    return table


# ------------------------------------------------------------------------------------------ attention mask

def attention_mask(steps, context, query_steps, device=None):
    """Who may look at whom: bool (steps * context + len(query_steps), steps * context), True = may attend.

    Rows are all context tokens, then the queries; query_steps (R,) int is the timestep of each query. Columns
    are context tokens alone: in the official code every query's column is masked, for itself too, so leaving
    them out is exact. Context is causal token by token (a state sees the sentence of its own step, not the
    other way round); a query sees every context token up to its own step.

    Two steps of three context tokens (a b c) and two queries ([A] [O]) each:

             a0 b0 c0 a1 b1 c1
        a0    #  .  .  .  .  .
        b0    #  #  .  .  .  .
        c0    #  #  #  .  .  .
        a1    #  #  #  #  .  .
        b1    #  #  #  #  #  .
        c1    #  #  #  #  #  #
       [A]0   #  #  #  .  .  .
       [O]0   #  #  #  .  .  .
       [A]1   #  #  #  #  #  #
       [O]1   #  #  #  #  #  #
    """
    column = torch.arange(steps * context, device=device)
    causal = column[:, None] >= column[None, :]
    query_steps = torch.as_tensor(query_steps, device=device)
    return torch.cat([causal, column[None, :] // context <= query_steps[:, None]])


# ------------------------------------------------------------------------------------------ small parts

def patchify(images, patch):
    """Cut images (..., 3, S, S) into (..., P, patch * patch * 3), row by row, channel last, as MAE does."""
    *lead, channels, height, width = images.shape
    x = images.reshape(*lead, channels, height // patch, patch, width // patch, patch)
    n = len(lead)
    x = x.permute(*range(n), n + 1, n + 3, n + 2, n + 4, n)
    return x.reshape(*lead, (height // patch) * (width // patch), patch * patch * channels)


def unpatchify(patches, patch):
    """Inverse of patchify for square images: (..., P, patch * patch * 3) -> (..., 3, S, S)."""
    *lead, count, _ = patches.shape
    side, n = math.isqrt(count), len(lead)
    x = patches.reshape(*lead, side, side, patch, patch, 3)
    x = x.permute(*range(n), n + 4, n, n + 2, n + 1, n + 3)
    return x.reshape(*lead, 3, side * patch, side * patch)


def sincos_positions(side, width):
    """Fixed 2-D sin-cos positions (side * side, width), column first (MAE, pos_embed.py)."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega                       # (side, width / 4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)                                        # (side, width / 2)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, 0)], 1).float()


def windows_of(runs, offsets, steps):
    """The timesteps `steps` (V,) of windows in runs (G, N, ...): -> (B, V, ...), B / G windows of each run.
    offsets (B,): where in its run a window starts; None: the runs are the windows.
    """
    if offsets is None:
        return runs[:, steps]
    run = torch.arange(len(offsets), device=runs.device) // (len(offsets) // len(runs))
    return runs[run[:, None], offsets[:, None] + steps]


def shift(frames, by):
    """DrQ-v2's augmentation: uint8 frames (B, N, 3, H, W), by (B, 2) px up and to the left, borders repeated.
    It is the same for all N frames, as in the official code.
    """
    batch, _, _, height, width = frames.shape
    rows = (torch.arange(height, device=frames.device) + by[:, :1]).clamp(0, height - 1)           # (B, H)
    columns = (torch.arange(width, device=frames.device) + by[:, 1:]).clamp(0, width - 1)          # (B, W)
    which = torch.arange(batch, device=frames.device)[:, None, None]
    return frames[which, :, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 4, 1, 2)


@functools.cache
def imagenet(which, device):
    """The colours' "mean" or "std" (3, 1, 1); sent to a device once, for sending makes the host wait."""
    values = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}[which]
    return torch.tensor(values, device=device).view(3, 1, 1)


def to_pixels(frames, side):
    """uint8 (..., 3, H, W) -> float (..., 3, side, side), bicubic, ImageNet-normalised (official code)."""
    x = frames.flatten(0, -4).float() / 255
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=x.shape[-1] > side)
    return ((x - imagenet("mean", x.device)) / imagenet("std", x.device)).reshape(
        *frames.shape[:-2], side, side)


def to_images(pixels):
    """Inverse of to_pixels' normalisation: float (..., 3, S, S) -> uint8 (..., S, S, 3)."""
    colors = pixels * imagenet("std", pixels.device) + imagenet("mean", pixels.device)
    return (colors.clamp(0, 1) * 255).round().byte().movedim(-3, -1)


def attend(q, k, v, heads, mask=None, dropout=0.0):
    """Multi-head attention of q (B, R, E) over k, v (B, M, E); mask bool (B, 1, R, M), True = may attend."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))     # (B, heads, ., E / heads)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return x.transpose(1, 2).flatten(2)


def mlp(width, activation, bias=True, inner=4):
    return nn.Sequential(nn.Linear(width, inner * width, bias), activation,
                         nn.Linear(inner * width, width, bias))


# ------------------------------------------------------------------------------------------ resampler

class ResamplerLayer(nn.Module):
    """Latents look at patches and at themselves (Flamingo's Perceiver resampler, flamingo_pytorch).

    Keys and values are never computed: q . (K x) is (K^T q) . x, and a mean of all V x is V times that of all
    x. With 36 such queries (heads x latents) for 205 tokens that takes a ninth of the multiplications.
    """

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.norm_patches, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(width, 2 * inner, bias=False)
        self.proj = nn.Linear(inner, width, bias=False)
        self.norm_mlp, self.mlp = nn.LayerNorm(width), mlp(width, nn.GELU(), bias=False)

    def forward(self, latents, patches):
        h = self.norm_latents(latents)
        seen = torch.cat([self.norm_patches(patches), h], 1)                             # (N, P + L, Dv)
        k, v = self.kv.weight.unflatten(0, (2, self.heads, -1))                          # (heads, e, Dv) each
        q = self.q(h).unflatten(-1, (self.heads, -1))                                    # (N, L, heads, e)
        q = torch.einsum("nlhe,hed->nhld", q, k).flatten(1, 2)                           # (N, heads * L, Dv)
        x = F.scaled_dot_product_attention(q, seen, seen, scale=k.shape[1] ** -0.5)
        x = torch.einsum("nhld,hed->nlhe", x.unflatten(1, (self.heads, -1)), v)
        latents = latents + self.proj(x.flatten(2))
        return latents + self.mlp(self.norm_mlp(latents))


class Resampler(nn.Module):
    """Squeezes any number of patches into L latents: (N, P, Dv) -> (N, L, Dv). One for all cameras."""

    def __init__(self, config):
        super().__init__()
        width = config.vision_dim
        self.latents = nn.Parameter(torch.zeros(config.latents, width))
        self.media_position = nn.Parameter(torch.zeros(1, width))
        self.layers = nn.ModuleList(ResamplerLayer(width, config.resampler_heads, config.resampler_head_dim)
                                    for _ in range(config.resampler_depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches):
        patches = patches + self.media_position
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(latents, patches)
        return self.norm(latents)


# ------------------------------------------------------------------------------------------ trunk

class TrunkBlock(nn.Module):
    """A pre-LN GPT-2 block with ReLU, whose keys and values are the first `context` tokens alone."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.mlp = mlp(config.width, nn.ReLU())
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, context, mask, first=0):
        """x (B, M, D) -> (B, M - first, D): rows before `first` are keys only, not wanted themselves."""
        h = self.norm1(x)
        k, v = self.kv(h[:, :context]).chunk(2, -1)
        dropout = self.dropout if self.training else 0.0
        y = attend(self.q(h[:, first:]), k, v, self.heads, mask[:, :, first:], dropout)
        x = x[:, first:] + self.drop(self.proj(y))
        return x + self.drop(self.mlp(self.norm2(x)))


class Trunk(nn.Module):
    """The GPT. No position embedding: the official code disables GPT-2's, timesteps carry the only order."""

    def __init__(self, config):
        super().__init__()
        self.embed_norm = nn.LayerNorm(config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TrunkBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        # GPT-2's word embedding: nothing reads it, but official files carry it and 45,988,039 counts it
        self.unused_wte = nn.Parameter(torch.zeros(1, config.width))

    def forward(self, context, queries, query_steps, mask=None):
        """context (B, T, C, D), queries (B, R, D) at timesteps query_steps (R,), mask bool (B, T) of real
        steps or None -> answers (B, R, D). The last block computes the queries alone: nobody reads the rest.
        """
        batch, steps, tokens, _ = context.shape
        may = attention_mask(steps, tokens, query_steps, context.device)[None, None]     # (1, 1, rows, T * C)
        if mask is not None:
            may = may & mask.repeat_interleave(tokens, 1)[:, None, None]
        n = steps * tokens
        x = self.drop(self.embed_norm(torch.cat([context.flatten(1, 2), queries], 1)))
        for block in self.blocks[:-1]:
            x = block(x, n, may)
        return self.norm(self.blocks[-1](x, n, may, first=n))


# ------------------------------------------------------------------------------------------ heads

class ActionHead(nn.Module):
    """[ACT] -> arm (..., 6) in rel_actions units, gripper logit (...). Official code: no activation."""

    def __init__(self, config):
        super().__init__()
        half = config.width // 2
        self.fc1, self.fc2 = nn.Linear(config.width, half), nn.Linear(half, half)
        self.activation = nn.ReLU() if config.action_activation else nn.Identity()
        self.arm, self.gripper = nn.Linear(half, 6), nn.Linear(half, 1)

    def forward(self, x):
        x = self.activation(self.fc2(self.activation(self.fc1(x))))
        return self.arm(x), self.gripper(x).squeeze(-1)


class DecoderBlock(nn.Module):
    """A plain ViT block (timm's), as in the MAE decoder."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width, nn.GELU())

    def forward(self, x, shared=None):
        """x (N, M, D) -> (N, M, D). shared (P, D): tokens that all N have behind theirs, -> (N, M + P, D)."""
        qkv = self.qkv(self.norm1(x))
        if shared is not None:
            qkv = torch.cat([qkv, self.qkv(self.norm1(shared)).expand(len(x), -1, -1)], 1)
            x = torch.cat([x, shared.expand(len(x), -1, -1)], 1)
        x = x + self.proj(attend(*qkv.chunk(3, -1), self.heads))
        return x + self.mlp(self.norm2(x))


class VideoHead(nn.Module):
    """[OBS] outputs and mask tokens through a small decoder -> the future frame. One for all cameras.

    With copy_gate, pixel by pixel: stays * present + (1 - stays) * painted (paper, official code: painted).
    """

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(DecoderBlock(width, config.decoder_heads)
                                    for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width)
        self.copy_gate, self.patch = config.copy_gate, config.patch
        self.pixels = nn.Linear(width, (4 if config.copy_gate else 3) * config.patch ** 2)
        for camera, side in config.cameras.items():
            positions = sincos_positions(side // config.patch, width)
            self.register_buffer(f"positions_{camera}", positions, persistent=False)

    def forward(self, x, camera, now=None):
        """x (N, L + 1, D) -> (N, P, patch^2 * 3). now (N, 3, S, S): present frames, for the copy gate."""
        masks = self.mask_token + getattr(self, f"positions_{camera}")                     # (P, D)
        x = self.blocks[0](self.embed(x), shared=masks)
        for block in self.blocks[1:]:
            x = block(x)
        x = self.pixels(self.norm(x[:, -len(masks):]))
        if self.copy_gate:
            paint, stays = x.split([3 * self.patch ** 2, self.patch ** 2], -1)
            stays = stays.sigmoid().repeat_interleave(3, -1)                         # channels come last
            x = stays * patchify(now, self.patch) + (1 - stays) * paint
        return x


# ------------------------------------------------------------------------------------------ encoders

class MAEVision(nn.Module):
    """The paper's encoder, frozen MAE ViT-B/16: (N, 3, 224, 224) -> CLS (N, 768), patches (N, 196, 768).
    weights: "hub" (timm's), "none" (random), or a file: timm's or the original mae_pretrain_vit_base.pth.
    Raises ModelError when they cannot be had.
    """
    frozen = True

    def __init__(self, weights="hub"):
        super().__init__()
        import timm
        name = "vit_base_patch16_224.mae"
        self.vit = hub_or_explain(
            lambda: timm.create_model(name, pretrained=weights == "hub", num_classes=0),
            f"image encoder timm/{name}", "--mae", "mae_pretrain_vit_base.pth")
        if weights not in ("hub", "none"):
            load_file_into(self.vit, weights)

    @torch.no_grad()
    def forward(self, images):
        x = self.vit.forward_features(images)            # (N, 197, 768), after the final LayerNorm
        return x[:, 0], x[:, 1:]


class CLIPText(nn.Module):
    """The paper's text encoder: CLIP ViT-B/32's text tower, frozen. A list of B sentences -> (B, 512).
    weights: "hub" (open_clip's "openai"), "none" (random), or open_clip's state dict file (OpenAI's own
    ViT-B-32.pt is a program, not a state dict, and is refused).
    """
    frozen = True
    group = 1                      # sentences encoded at once, see in_groups

    def __init__(self, weights="hub"):
        super().__init__()
        import open_clip
        name = "ViT-B-32-quickgelu"
        clip = hub_or_explain(
            lambda: open_clip.create_model(name, pretrained="openai" if weights == "hub" else None),
            f"text encoder open_clip {name} 'openai'", "--clip", "open_clip_model.safetensors")
        if weights not in ("hub", "none"):
            load_file_into(clip, weights)
        del clip.visual, clip.logit_scale
        self.clip, self.tokenize, self.cache = clip, open_clip.get_tokenizer(name), {}

    @torch.no_grad()
    def forward(self, sentences):
        new = [s for s in dict.fromkeys(sentences) if s not in self.cache]
        if len(self.cache) + len(new) > 10_000:          # Ego4D has millions of sentences, CALVIN 400
            self.cache, new = {}, list(dict.fromkeys(sentences))
        device = self.clip.text_projection.device
        encode = lambda group: self.clip.encode_text(self.tokenize(group).to(device))
        self.cache.update(zip(new, in_groups(encode, new, self.group)))
        return torch.stack([self.cache[s] for s in sentences])


def in_groups(encode, items, size):
    """encode(list) -> rows, called on lists of exactly `size`, the last one filled up: so an item's row is
    the same to the last bit, whatever else was new together with it (a resumed run's cache starts empty).
    """
    for i in range(0, len(items), size):
        group = items[i:i + size]
        yield from encode(group + group[-1:] * (size - len(group)))[:len(group)]


class TinyVision(nn.Module):
    """A small encoder trained with the rest: (N, 3, S, S) -> CLS (N, Dv), keypoints (N, points, Dv).

    A keypoint stands for a patch. It is the spatial softmax (Levine et al. 2016, arXiv 1504.00702) of a
    learned map over cells of 4 px: the mean place, how high the map peaks, and what the cells show there.
    CLS reads where all of them are and how high. A robot needs to know what is where.
    """
    frozen = False

    def __init__(self, width, points=32):
        super().__init__()
        cell = width // 2                                # features of a cell of 4 px: a block is 5 px wide
        self.stem, self.maps = nn.Conv2d(3, cell, 4, 4), nn.Conv2d(cell, points, 1)
        self.cls = nn.Linear(3 * points, width)
        self.token, self.identity = nn.Linear(3 + cell, width), nn.Parameter(torch.zeros(points, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, images):
        cells = F.gelu(self.stem(images))
        maps, cells = self.maps(cells).flatten(2), cells.flatten(2)               # (N, ., H * W)
        heat = (maps - maps.mean(-1, keepdim=True)) / (maps.std(-1, keepdim=True) + 1e-3)  # none saturates
        heat = (3 * heat).softmax(-1)                    # 3: even a random map's peak outweighs its 256 cells
        side = math.isqrt(heat.shape[-1])
        line = torch.linspace(-side / 4, side / 4, side, device=heat.device)      # [8 px from the middle]
        grid = torch.stack([line.repeat(side), line.repeat_interleave(side)], 1)           # column, row
        where, top = heat @ grid, maps.amax(-1, keepdim=True)                     # (N, 32, 2), (N, 32, 1)
        tokens = self.token(torch.cat([where, top, heat @ cells.transpose(1, 2)], -1))
        return self.cls(torch.cat([where.flatten(1), top.flatten(1)], 1)), self.norm(tokens + self.identity)


class HashText(nn.Module):
    """A text encoder that needs no download: words and word pairs, hashed to fixed random directions, summed.
    Knows which words and pairs occur, not what they mean; enough for a closed set of instructions.
    """
    frozen = True

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.register_buffer("device_of", torch.zeros(0), persistent=False)

    def direction(self, text):
        return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(self.width)

    def forward(self, sentences):
        rows = []
        for sentence in sentences:
            words = sentence.lower().split()
            rows.append(sum(map(self.direction, words + [" ".join(pair) for pair in zip(words, words[1:])]),
                            np.zeros(self.width)))
        return torch.tensor(np.stack(rows), dtype=torch.float32, device=self.device_of.device)


def build_encoders(config, vision="hub", text="hub"):
    """The encoders of a preset: (vision, text). One that is given as a module stays; for the gr1 preset a
    string says where the weights come from: "hub", "none" (random) or a file.
    """
    for given in vision, text:
        if config.preset == "tiny" and isinstance(given, str) and given not in ("hub", "none"):
            raise ModelError(f"the tiny preset has encoders of its own: {given} is for --preset gr1")
    if isinstance(vision, str):
        vision = TinyVision(config.vision_dim) if config.preset == "tiny" else MAEVision(vision)
    if isinstance(text, str):
        text = HashText(config.text_dim) if config.preset == "tiny" else CLIPText(text)
    return vision, text


def hub_or_explain(build, what, flag, file):
    """Run build(); where the hub cannot be reached, say in one line what to download and how to name it."""
    logging.disable(logging.ERROR)                       # a dozen lines of retries say less than one of ours
    try:
        return build()
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"cannot get the {what} from the hub ({type(error).__name__}): give a local file with "
            f"{flag} FILE (for example {file}), or {flag} none for random weights") from error
    finally:
        logging.disable(logging.NOTSET)


def load_file_into(module, path):
    """Strictly load a state dict file (safetensors, or a torch file without code) into a module."""
    state = read_weights(path)
    missing = [k for k in module.state_dict() if k not in state]
    if missing:
        raise ModelError(f"{path} is no weights file for this encoder: it lacks {missing[0]}"
                         + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    for k, v in module.state_dict().items():
        if state[k].shape != v.shape:
            raise ModelError(f"{path} is for another size: {k} has {tuple(state[k].shape)}, "
                             f"not {tuple(v.shape)}")
    module.load_state_dict({k: state[k] for k in module.state_dict()})


def read_weights(path):
    """Tensors of a .safetensors or torch file by name; never runs code that the file may hold."""
    if not os.path.isfile(path):
        raise ModelError(f"no such file: {path}")
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")              # torch's guesses; ours is the line that is printed
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError,
            AssertionError, struct.error) as error:
        raise ModelError(f"{path} is not a readable weights file ({type(error).__name__})") from error
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path} is not a plain weights file; it was not opened further") from error
    for key in "state_dict", "model":                    # where the authors, and MAE's, put them
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    other = [state] if not isinstance(state, dict) else [
        k for k, v in state.items() if not (isinstance(k, str) and torch.is_tensor(v))]
    if other or not state:
        raise ModelError(f"{path} is no weights file: it holds "
                         + (f"{str(other[0])[:40]!r}, which is no tensor" if other else "no tensor"))
    return state


# ------------------------------------------------------------------------------------------ GR-1

class GR1(nn.Module):
    """The whole model (paper Sec. 3, Fig. 2). vision: images (N, 3, S, S) -> CLS (N, Dv), patches (N, P, Dv);
    text: list of B sentences -> (B, Dt). Both are arguments, so any module of these shapes will do; one that
    is trained and saved with the rest says so by `frozen = False`.
    """

    def __init__(self, config, vision, text):
        super().__init__()
        self.config, self.vision, self.text = config, vision, text
        D = config.width
        self.embed_language = nn.Linear(config.text_dim, D)
        if config.robot:
            self.embed_arm, self.embed_gripper = nn.Linear(6, D), nn.Linear(2, D)
            self.embed_state = nn.Linear(2 * D, D)
            self.query_act = nn.Parameter(torch.zeros(config.chunk, D))
            self.action_head = ActionHead(config)
        self.resampler = Resampler(config)
        self.embed_latents = nn.ModuleDict({c: nn.Linear(config.vision_dim, D) for c in config.cameras})
        self.embed_cls = nn.ModuleDict({c: nn.Linear(config.vision_dim, D) for c in config.cameras})
        self.timestep = nn.Parameter(torch.zeros(config.window, D))
        self.trunk = Trunk(config)
        if config.video:
            self.query_obs = nn.ParameterDict({c: torch.zeros(config.latents + 1, D) for c in config.cameras})
            self.video_head = VideoHead(config)
        for name in self.frozen():
            getattr(self, name).requires_grad_(False)
        self.init_weights()

    def frozen(self):
        return [name for name in ("vision", "text") if getattr(getattr(self, name), "frozen", True)]

    def train(self, mode=True):
        super().train(mode)
        for name in self.frozen():
            getattr(self, name).eval()                   # dropout and the like stay off
        return self

    def init_weights(self):
        """One table of initial spreads; biases 0, norms 1, frozen encoders untouched.

        Linear maps keep the variance of their input (1 / sqrt(fan in)), except:
            embed_language       1             its input has length 1, so every feature is about 1 / sqrt(Dt)
            embed_arm            5, 0.1        decimetres must matter beside a wrist that hangs at pi rad
            ends of residuals    / sqrt(2 n)   n blocks add up
            learned tokens       0.02          they are normalised before use
            vision.identity      1             the tiny preset's keypoints must differ from the start
        """
        frozen = tuple(f"{name}." for name in self.frozen())
        special = {"embed_language.weight": 1.0, "embed_arm.weight": torch.tensor([5, 5, 5, 0.1, 0.1, 0.1]),
                   "vision.identity": 1.0}
        depth = {"trunk": self.config.layers, "video_head": self.config.decoder_depth,
                 "resampler": self.config.resampler_depth}
        for name, p in self.named_parameters():
            if name.startswith(frozen) or "norm" in name and name.endswith("weight"):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif not name.endswith("weight"):
                nn.init.normal_(p, std=special.get(name, 0.02))
            else:
                std = special.get(name, p[0].numel() ** -0.5)
                if name.endswith(("proj.weight", "mlp.2.weight")):
                    std /= math.sqrt(2 * depth.get(name.split(".")[0], 1))
                p.data.normal_().mul_(std)

    # ---- encode: what each thing is, wherever it stands in the window

    def encode_language(self, sentences):
        """B sentences -> (B, D)."""
        x = self.text(sentences).float()
        return self.embed_language(x / (x.norm(dim=-1, keepdim=True) + 1e-6))

    def encode_state(self, robot_obs):
        """robot_obs (..., 15), CALVIN's units -> (..., D). Absolute pose, not normalised; gripper one-hot."""
        opened = (robot_obs[..., 14:15] > 0).float()
        gripper = self.embed_gripper(torch.cat([1 - opened, opened], -1))
        return self.embed_state(torch.cat([self.embed_arm(robot_obs[..., :6]), gripper], -1))

    def encode_images(self, pixels):
        """{camera: (N, 3, S, S)} -> (N, cameras * (L + 1), D). Costs the most; the same at any timestep."""
        tokens = []
        for camera in self.config.cameras:
            cls, patches = self.vision(pixels[camera])
            tokens += [self.embed_latents[camera](self.resampler(patches)),
                       self.embed_cls[camera](cls)[:, None]]
        return torch.cat(tokens, 1)

    def context(self, language, images, state=None):
        """language (B, D), images (B, T, ., D), state (B, T, D) -> context (B, T, C, D) in table order."""
        steps = images.shape[1]
        tokens = [language[:, None, None].expand(-1, steps, -1, -1)]
        if self.config.robot:
            tokens += [state[:, :, None]]
        return torch.cat(tokens + [images], 2) + self.timestep[:steps, None]

    # ---- the model

    def forward(self, pixels, sentences, robot_obs=None, mask=None, video_at=None, offsets=None):
        """pixels: {camera: (B, T, 3, S, S)}, see to_pixels; sentences: B strings; robot_obs: (B, T, 15);
        mask: bool (B, T), real steps first; video_at (V,): the timesteps to ask [OBS] at, None for all T;
        offsets: where overlapping windows start in runs of frames, see windows_of: pixels are the runs then.
        Returns what the config asks for: arm (B, T, K, 6), gripper logits (B, T, K), and of each camera the
        future frame's pixels (B, V, P, patch^2 * 3).
        """
        runs, steps = next(iter(pixels.values())).shape[:2]
        images = self.encode_images(
            {c: p.flatten(0, 1) for c, p in pixels.items()}).unflatten(0, (runs, steps))
        act_at = torch.arange(steps if offsets is None else self.config.window, device=images.device)
        video_at = act_at if video_at is None else video_at
        state = self.encode_state(robot_obs) if self.config.robot else None
        context = self.context(self.encode_language(sentences), windows_of(images, offsets, act_at), state)
        queries, at = self.queries(act_at, video_at)
        answers = self.trunk(context, queries.expand(len(context), -1, -1), at, mask)
        now = {c: windows_of(p, offsets, video_at) for c, p in pixels.items() if self.config.copy_gate}
        return self.heads(answers, len(act_at), now)

    def queries(self, act_at, video_at):
        """[ACT] for the timesteps act_at (T,), then each camera's [OBS] for video_at (V,): tokens (R, D) and
        their steps (R,). No timestep embedding is added to them (official code): the mask places them.
        """
        asked = [(self.query_act, act_at)] if self.config.robot else []
        if self.config.video:
            asked += [(self.query_obs[camera], video_at) for camera in self.config.cameras]
        return (torch.cat([tokens.repeat(len(at), 1) for tokens, at in asked]),
                torch.cat([at.repeat_interleave(len(tokens)) for tokens, at in asked]))

    def heads(self, answers, steps, now):
        """answers (B, R, D) to queries of `steps` timesteps -> dict of predictions, see forward.
        now: {camera: (B, V, 3, S, S)}, frames at which [OBS] was asked; {} will do without a copy gate.
        """
        config, out, start = self.config, {}, 0
        if config.robot:
            start = steps * config.chunk
            out["arm"], out["gripper"] = self.action_head(
                answers[:, :start].unflatten(1, (steps, config.chunk)))
        if config.video:
            for camera, x in zip(config.cameras, answers[:, start:].chunk(len(config.cameras), 1)):
                x = x.unflatten(1, (-1, config.latents + 1))                               # (B, V, L + 1, D)
                seen = now[camera].flatten(0, 1) if camera in now else None
                patches = self.video_head(x.flatten(0, 1), camera, seen)
                out[camera] = patches.unflatten(0, x.shape[:2])
        return out

    # ---- checkpoints

    def trained_state(self):
        """State dict without the frozen encoders."""
        frozen = tuple(f"{name}." for name in self.frozen())
        return {k: v for k, v in self.state_dict().items() if not k.startswith(frozen)}

    def load_trained(self, state, source, may_miss=()):
        """Strictly load tensors {name: tensor}; names that start with one of may_miss may be absent, start
        fresh and are returned. Raises ModelError that names the first tensor that does not fit.
        """
        own = self.trained_state()
        missing = [k for k in own if k not in state]
        wrong = [k for k in missing if not k.startswith(tuple(may_miss))] if may_miss else missing
        extra = [k for k in state if k not in own]
        if wrong or extra:
            raise ModelError(f"{source} is a checkpoint of another model: "
                             + (f"it lacks {wrong[0]}" if wrong else f"this model has no {extra[0]}"))
        for k in state:
            if state[k].shape != own[k].shape:
                raise ModelError(f"{source} is a checkpoint of another shape: {k} is "
                                 f"{tuple(state[k].shape)}, this model's is {tuple(own[k].shape)}")
        self.load_state_dict(state, strict=False)
        return missing

    @classmethod
    def from_pretrained(cls, path, config=None, vision=None, text=None):
        """Load a checkpoint and print what was done with every tensor of it; its keys tell what it is:
            a directory that train.py wrote, or its model.safetensors
            the authors' GR-1 (bytedance/GR-1: snapshot_ABCD.pt, snapshot_ABC.pt)
            their Ego4D pre-training (bytedance/GR-MG: pretrained.pt); the robot's parts start fresh
        config: overrides the stored one; a file without one gets the gr1 preset. vision, text: see
        build_encoders; None: as the checkpoint was trained. Raises ModelError that names what does not fit.
        """
        stored, state = read_config(path), read_checkpoint(path)
        config = config or (GR1Config.from_dict(stored["model"]) if stored else GR1Config())
        encoders = stored.get("encoders", {})
        vision = encoders.get("vision_weights", "hub") if vision is None else vision
        text = encoders.get("text_weights", "hub") if text is None else text
        model = cls(config, *build_encoders(config, vision, text))
        print("weights: " + model.load_pretrained(state, path))
        return model.eval()

    def load_pretrained(self, state, path, fresh=(), may_miss=()):
        """Load the tensors of a checkpoint, see read_checkpoint and from_pretrained. The parts `fresh` start
        anew though the file has them, those of may_miss where it has not.
        Returns the report: what was loaded, what was left out and why, what starts fresh.
        """
        count, (kind, lacks) = len(state), checkpoint_kind(state, path, self.config.cameras)
        if kind == OURS:
            left = {name: STARTS_FRESH for name in state if name.split(".")[0] in fresh}
            state = {name: tensor for name, tensor in state.items() if name not in left}
        else:
            state, left = translate(state, self, path, fresh)
        missing = self.load_trained(state, path, (*lacks, *may_miss, *fresh))
        lines = [f"{count - len(left)} of the {count} tensors in {path}, {kind}"]
        for why in dict.fromkeys(left.values()):
            names = [name for name in left if left[name] == why]
            lines += [f"  left out {len(names)} ({names[0]}{', ...' if names[1:] else ''}): {why}"]
        if missing:
            names = dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in missing)
            lines += [f"  not loaded, so random until trained: {', '.join(names)}"]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------ authors' files

OURS, STARTS_FRESH = "nanoGR's own", "to start fresh"
ROBOT_PARTS = ("embed_arm", "embed_gripper", "embed_state", "query_act", "action_head")

# Our name, bytedance/GR-1's; # is a layer's number, and a name without .weight or .bias stands for both.
# GPT-2's matrices (.h.) are stored (in, out), and its attn.c_attn holds attn.q and attn.kv.
OFFICIAL_NAMES = """
    embed_language                   embed_lang
    embed_arm                        embed_arm_state
    embed_gripper                    embed_gripper_state
    embed_state                      embed_state
    embed_latents.rgb_static         embed_patch
    embed_latents.rgb_gripper        embed_hand_patch
    embed_cls.rgb_static             embed_img
    embed_cls.rgb_gripper            embed_hand_img
    timestep                         embed_timestep.weight
    query_act                        action_queries.weight
    query_obs.rgb_static             obs_queries.weight
    query_obs.rgb_gripper            obs_hand_queries.weight
    resampler.latents                perceiver_resampler.latents
    resampler.media_position         perceiver_resampler.media_pos_emb
    resampler.norm                   perceiver_resampler.norm
    resampler.layers.#.norm_patches  perceiver_resampler.layers.#.0.norm_media
    resampler.layers.#.norm_latents  perceiver_resampler.layers.#.0.norm_latents
    resampler.layers.#.q             perceiver_resampler.layers.#.0.to_q
    resampler.layers.#.kv            perceiver_resampler.layers.#.0.to_kv
    resampler.layers.#.proj          perceiver_resampler.layers.#.0.to_out
    resampler.layers.#.norm_mlp      perceiver_resampler.layers.#.1.0
    resampler.layers.#.mlp.0         perceiver_resampler.layers.#.1.1
    resampler.layers.#.mlp.2         perceiver_resampler.layers.#.1.3
    trunk.embed_norm                 embed_ln
    trunk.norm                       transformer.ln_f
    trunk.blocks.#.norm1             transformer.h.#.ln_1
    trunk.blocks.#.norm2             transformer.h.#.ln_2
    trunk.blocks.#.q                 transformer.h.#.attn.q
    trunk.blocks.#.kv                transformer.h.#.attn.kv
    trunk.blocks.#.proj              transformer.h.#.attn.c_proj
    trunk.blocks.#.mlp.0             transformer.h.#.mlp.c_fc
    trunk.blocks.#.mlp.2             transformer.h.#.mlp.c_proj
    action_head.fc1                  pred_act_mlps.0
    action_head.fc2                  pred_act_mlps.1
    action_head.arm                  pred_arm_act
    action_head.gripper              pred_gripper_act
    video_head.blocks.#.norm1        decoder_blocks.#.norm1
    video_head.blocks.#.norm2        decoder_blocks.#.norm2
    video_head.blocks.#.qkv          decoder_blocks.#.attn.qkv
    video_head.blocks.#.proj         decoder_blocks.#.attn.proj
    video_head.embed                 decoder_embed
    video_head.blocks.#.mlp.0        decoder_blocks.#.mlp.fc1
    video_head.norm                  decoder_norm
    video_head.blocks.#.mlp.2        decoder_blocks.#.mlp.fc2
    video_head.pixels                decoder_pred
    video_head.mask_token            mask_token
    trunk.unused_wte                 transformer.wte.weight
"""
THEIRS = {theirs: ours for ours, theirs in map(str.split, OFFICIAL_NAMES.strip().splitlines())}

# What the authors' files carry and GR-1 does not need: a pattern of names, and why.
LEFT_OUT = {
    r"(model_clip|text_encoder)\.": "CLIP, frozen: read from its own weights",
    r"model_mae\.": "MAE, frozen: read from its own weights",
    r"transformer\.h\.\d+\.attn\.(masked_)?bias$": "GPT-2's causal mask, made anew",
    r"transformer\.wpe\.": "GPT-2's positions, which the official code never adds",
    r"decoder_pos_embed$": "fixed sin-cos positions, equal to those computed here",
    r"embed_goal_(image|patch)\.": "GR-MG's goal image, which GR-1 has not",
}


def checkpoint_kind(state, path, cameras=()):
    """What a file is, by its keys: -> (words for it, the parts which such a file may lack)."""
    lacks = ("trunk.unused_wte", "vision", "text")       # an encoder that trains along is not the authors'
    if any(name.startswith("trunk.") for name in state):
        return OURS, ()
    if not any(name.removeprefix("model.") == "embed_lang.weight" for name in state):
        raise ModelError(f"{path} is no GR-1 checkpoint, ours or the authors' "
                         f"(it has {', '.join(list(state)[:3])})")
    if not any(name.startswith("model.") for name in state):
        return "the authors' GR-1", lacks
    return "the authors' GR-MG, pre-trained on Ego4D", finetuning_parts(cameras) + lacks


def finetuning_parts(cameras):
    """What finetuning has and pre-training lacks: the robot's parts, and those of cameras after the first."""
    return ROBOT_PARTS + tuple(f"{part}.{camera}" for camera in list(cameras)[1:]
                               for part in ("embed_latents", "embed_cls", "query_obs"))


def translate(state, model, path, fresh=()):
    """The authors' tensors by our names, and why the others are left out: ({ours: tensor}, {theirs: why}).
    Raises ModelError that names the first key or shape which no rule explains.
    """
    ours, left, own = {}, {}, model.trained_state()
    for key, tensor in state.items():
        name = key.removeprefix("model.")
        why = next((why for pattern, why in LEFT_OUT.items() if re.match(pattern, name)), None)
        if name == "decoder_pos_embed" and model.config.video:
            check_positions(tensor, model, f"{path}: {key}")
        for part, value in split_qkv(name, tensor).items() if not why else ():
            target = our_name(part)
            anew = target and target.split(".")[0] in fresh
            why = STARTS_FRESH if anew else switched_off(target, model.config)
            if why:
                continue
            if target not in own or target in ours:
                raise ModelError(f"{path}: this model has no place for {key} {tuple(tensor.shape)}")
            shape = own[target].shape                    # theirs may have more axes, of length 1, in front
            if value.numel() != shape.numel() or value.shape[value.dim() - len(shape):] != shape:
                raise ModelError(f"{path} is a checkpoint of another shape: {key} is {tuple(tensor.shape)}, "
                                 f"this model's {target} {tuple(shape)}")
            ours[target] = value.reshape(shape)
        if why:
            left[key] = why
    return ours, left


def split_qkv(name, tensor):
    """GPT-2's matrices turned to (out, in); c_attn as q and kv: {name: tensor}."""
    tensor = tensor.T if ".h." in name and tensor.dim() == 2 else tensor
    if ".c_attn." not in name or not tensor.dim():
        return {name: tensor}
    parts = zip(("q", "kv"), tensor.tensor_split([len(tensor) // 3]))
    return {name.replace("c_attn", part): value for part, value in parts}


def check_positions(table, model, where):
    """Raise ModelError unless the authors' table of sin-cos positions is the one computed here."""
    own = next(getattr(model.video_head, f"positions_{camera}") for camera in model.config.cameras)
    if table.shape[1:] != own.shape or not torch.allclose(table[0].float(), own, atol=1e-2):   # may be bf16
        raise ModelError(f"{where} {tuple(table.shape)} is not the table of positions {tuple(own.shape)} "
                         "that this model computes")


def switched_off(name, config):
    """Why this config has no tensor `name`, one of ours or None; None if it should have it."""
    part, *rest = name.split(".") if name else [""]
    if part in ROBOT_PARTS and not config.robot:
        return "the robot, which this config leaves out"
    if part in ("query_obs", "video_head") and not config.video:
        return "[OBS], which this config leaves out"
    if part in ("embed_latents", "embed_cls", "query_obs") and rest[0] not in config.cameras:
        return f"camera {rest[0]}, which this config leaves out"
    return None


def our_name(theirs):
    """Our name of the authors' tensor `theirs`, or None."""
    plain, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", theirs, re.DOTALL).groups("")
    number = re.search(r"\.(\d+)\b", plain)
    general = re.sub(r"\.\d+\b", ".#", plain, count=1)
    for name, end in ((theirs, ""), (plain, suffix), (general, suffix)):
        if name in THEIRS:
            return THEIRS[name].replace("#", number[1] if number else "") + end
    return None


# ------------------------------------------------------------------------------------------ checkpoint files

def read_checkpoint(path):
    """Tensors by name of a directory that train.py wrote, or of a file, see read_weights. Raises ModelError
    if they are no GR-1's: callers read first, and fetch encoders and build a model for a good file only.
    """
    state = read_weights(os.path.join(path, "model.safetensors") if os.path.isdir(path) else path)
    checkpoint_kind(state, path)
    return state


def read_config(path):
    """config.json of a checkpoint directory (or of its model.safetensors) as a dict with keys model,
    encoders, train, step; {} for any other file.
    """
    if not os.path.exists(path):
        raise ModelError(f"no checkpoint in '{path}': no such file or directory; train.py makes one")
    name = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if os.path.isfile(path) and not (os.path.basename(path) == "model.safetensors" and os.path.isfile(name)):
        return {}
    if not os.path.isfile(name):
        raise ModelError(f"no checkpoint in '{path}': train one with train.py, or name its directory with "
                         "--checkpoint")
    with open(name) as f:
        try:
            config = json.load(f)
        except ValueError as error:
            raise ModelError(f"{name} is damaged ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ModelError(f"{name} is no checkpoint's: it has no settings under 'model'")
    return config


def save_checkpoint(path, model, **info):
    """Write model.safetensors and config.json into directory path, see write_whole."""
    os.makedirs(path, exist_ok=True)
    state = {k: v.contiguous() for k, v in model.trained_state().items()}
    config = json.dumps({"model": dataclasses.asdict(model.config), **info}, indent=1)
    write_whole(os.path.join(path, "model.safetensors"), lambda file: save_file(state, file))
    write_whole(os.path.join(path, "config.json"), lambda file: pathlib.Path(file).write_text(config))


def write_whole(path, write):
    """Call write(a temporary file's name), see it to the disk, then rename it: no reader meets half a file.
    Raises ModelError when it cannot be written, the disk being full for example; what was there stays.
    """
    temporary = path + ".tmp"
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        said = str(error).splitlines() or [type(error).__name__]
        raise ModelError(f"cannot write {path} ({said[0]}); what it held before is whole, "
                         "train.py --resume goes on from there") from error
    with contextlib.suppress(OSError):                   # the name too, where a disk can; if not, in its time
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ------------------------------------------------------------------------------------------ losses

def video_target(pixels, config):
    """Pixels (..., 3, S, S) -> what [OBS] should say (..., P, patch^2 * 3); norm_pixels: patch by patch."""
    target = patchify(pixels, config.patch)
    if config.norm_pixels:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True).sqrt() + 1e-6)
    return target


def masked_mean(values, mask, count):
    """Sum of values (B, T, ...) over the steps where mask (B, T, ...) holds, by `count` such steps."""
    values = values.flatten(mask.dim()).mean(-1) if values.dim() > mask.dim() else values
    return (values * mask).sum() / count.clamp(min=1e-6)             # a mean over parts may well be below 1


def foreseen_at(batch):
    """The timesteps (V,) at which a batch of clips.Windows asks [OBS]."""
    mask = batch["future_mask"]
    return batch["video_at"] if "video_at" in batch else torch.arange(mask.shape[1], device=mask.device)


def count_targets(batch):
    """Float tensor (2,): for how many steps of a batch the action, and the future frame, is known."""
    actions, futures = batch.get("action_mask"), batch["future_mask"][:, foreseen_at(batch)]
    return torch.stack([futures.new_zeros(()) if actions is None else actions.sum(), futures.sum()]).float()


def losses(out, batch, pixels, config, counts=None):
    """The paper's losses, unweighted, by name: arm (Smooth-L1), gripper (binary cross-entropy) and, a camera,
    video (mean squared error), each a mean over the steps that have a target.
    out: of GR1.forward; batch: from clips.Windows; pixels: {camera: (B, T + future, 3, S, S)}, the frames
    that the model saw and those behind them, or the runs that windows are cut from; counts: of count_targets,
    where this batch is a part of one: the mean over the parts, so that the losses' mean over the parts is
    that of the whole.
    """
    named, at, offsets = {}, foreseen_at(batch), batch.get("offsets")
    actions, futures = count_targets(batch) if counts is None else counts
    if config.robot:
        target, mask = batch["rel_actions"], batch["action_mask"]                 # (B, T, K, 7), (B, T, K)
        arm = F.smooth_l1_loss(out["arm"], target[..., :6], reduction="none")
        named["arm"] = masked_mean(arm, mask, actions)
        gripper = F.binary_cross_entropy_with_logits(out["gripper"], (target[..., 6] > 0).float(),
                                                     reduction="none")
        named["gripper"] = masked_mean(gripper, mask, actions)
    if config.video:
        for camera in config.cameras:
            target = video_target(pixels[camera][:, config.future:], config)     # once for all that share it
            error = (out[camera] - windows_of(target, offsets, at)) ** 2
            named[camera] = masked_mean(error, batch["future_mask"][:, at], futures)
    return named


@torch.no_grad()
def change_errors(out, pixels, future_mask, config):
    """Does the model foresee better than "nothing will move"? Tensor (cameras, 2): squared error of the
    predicted frame and of copying the present one, summed over the patches that change (by 5 of 255 gray
    levels on average); a ratio below 1 beats copying. out, pixels, future_mask: as in losses.
    """
    sums = []
    for camera in config.cameras:
        now, future = pixels[camera][:, :future_mask.shape[1]], pixels[camera][:, config.future:]
        drawn = draw(out[camera].float(), now, config)
        gray = patchify(imagenet("std", now.device).expand_as(now), config.patch)               # to 0..1
        now, future, drawn = (patchify(x, config.patch) * gray for x in (now, future, drawn))
        changed = ((future - now).abs().mean(-1) > 5 / 255) & future_mask[..., None]
        sums.append(torch.stack([((x - future) ** 2).mean(-1)[changed].sum() for x in (drawn, now)]))
    return torch.stack(sums)


# ------------------------------------------------------------------------------------------ policy

class Policy:
    """Acts step by step with a GR1 model: `reset()` at a new instruction, then `step(observation, sentence)`.

    Exactly the action of a full forward over the window, at a fraction of its cost: a frame is encoded once
    and kept while it slides through the window, and of the queries only the last [ACT] is computed.
    """

    def __init__(self, model):
        if not model.config.robot:
            raise ModelError("this model was pre-trained on video and has no action head: finetune it first "
                             "(train.py --stage finetune)")
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.reset()

    def reset(self):
        self.history = deque(maxlen=self.model.config.window)    # a step's (images (., D), state (D,))
        self.frames, self.sentence, self.language = None, None, None

    @torch.no_grad()
    def step(self, observation, sentence):
        """observation: dict with uint8 (H, W, 3) images by camera name and robot_obs (15,); sentence: str.
        Returns rel_actions float32 (7,): six of about [-1, 1], not cut off there (nor does the official
        evaluation), gripper -1 (close) or +1 (open).
        """
        return to_action(*self.actions(observation, sentence))

    @torch.no_grad()
    def actions(self, observation, sentence):
        """Like step, for the whole predicted chunk: arm (K, 6) and gripper logits (K,) as numpy arrays."""
        arm, gripper = act_together([self], [observation], [sentence])
        return arm[0], gripper[0]

    @torch.no_grad()
    def predicted_frames(self):
        """The future frame that the model foresees at the last step: {camera: uint8 (S, S, 3)}, see draw."""
        model, config = self.model, self.model.config
        if not config.video:
            raise ModelError("this model was trained without video prediction (no [OBS])")
        if not self.history:
            raise ModelError("nothing was seen yet: call step before predicted_frames")
        none, last = torch.arange(0), torch.tensor([len(self.history) - 1])
        queries, _ = model.queries(none, last)
        now = {c: to_pixels(self.frames[c], side)[:, None] for c, side in config.cameras.items()}
        out = model.heads(ask([self], queries), 0, now)
        return {c: to_images(draw(out[c][:, 0], now[c][:, 0], config))[0].cpu().numpy() for c in now}


def to_action(arm, gripper):
    """A chunk, arm (K, 6) and gripper logits (K,), -> the rel_actions (7,) to execute now: its first."""
    return np.append(arm[0], 1.0 if gripper[0] > 0 else -1.0).astype(np.float32)


@torch.no_grad()
def act_together(policies, observations, sentences):
    """What B policies of one model predict after one more observation each: arm (B, K, 6) and gripper logits
    (B, K) as numpy arrays. All frames are encoded at once; windows of one length are asked at once.
    """
    if not all(sentence.strip() for sentence in sentences):
        raise ModelError("the instruction is empty: say what the robot should do")
    model, config, device = policies[0].model, policies[0].model.config, policies[0].device
    frames = {c: torch.tensor(np.stack([seen[c] for seen in observations])).to(device).permute(0, 3, 1, 2)
              for c in config.cameras}
    images = model.encode_images({c: to_pixels(x, config.cameras[c]) for c, x in frames.items()})
    robot_obs = np.stack([np.asarray(seen["robot_obs"], np.float32) for seen in observations])
    states, by_length = model.encode_state(torch.tensor(robot_obs, device=device)), defaultdict(list)
    for i, (policy, sentence) in enumerate(zip(policies, sentences)):
        if sentence != policy.sentence:
            policy.sentence, policy.language = sentence, model.encode_language([sentence])
        policy.frames = {c: x[i:i + 1] for c, x in frames.items()}
        policy.history.append((images[i], states[i]))
        by_length[len(policy.history)].append(i)
    arm, gripper = (np.empty((len(policies), config.chunk, *more), np.float32) for more in ((6,), ()))
    for rows in by_length.values():
        answers = model.action_head(ask([policies[i] for i in rows], model.query_act))
        arm[rows], gripper[rows] = (x.float().cpu().numpy() for x in answers)
    return arm, gripper


def ask(policies, queries):
    """Answers (B, R, D) to queries (R, D) put at the last step of B policies' windows of one length."""
    model, length = policies[0].model, len(policies[0].history)
    images, states = (torch.stack([torch.stack(x) for x in each])
                      for each in zip(*(zip(*policy.history) for policy in policies)))
    context = model.context(torch.cat([policy.language for policy in policies]), images, states)
    last = torch.full((len(queries),), length - 1, device=queries.device)
    return model.trunk(context, queries.expand(len(policies), -1, -1), last)


def draw(prediction, now, config):
    """Predicted patches (..., P, patch^2 * 3) -> normalised pixels (..., 3, S, S). What a patch-normalised
    prediction lacks, each patch's mean and spread, is taken from the frame observed `now` (..., 3, S, S),
    never from the future frame, which would leak the answer.
    """
    if config.norm_pixels:
        seen = patchify(now, config.patch)
        prediction = prediction * (seen.var(-1, keepdim=True).sqrt() + 1e-6) + seen.mean(-1, keepdim=True)
    return unpatchify(prediction, config.patch)


# ------------------------------------------------------------------------------------------ benchmark

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


def in_turn(calls, device, seconds=20):
    """Median milliseconds of each call. All are called in turn for about `seconds`, at least three times."""
    times = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[-1]) < 4 or time.perf_counter() - start < seconds:
        for call, spent in zip(calls, times):
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent.append(1000 * (time.perf_counter() - begin))
    return [float(np.median(spent[1:])) for spent in times]                      # the first call warms up


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


def as_the_original(model):
    """A copy of the model that computes its trunk the original's way."""
    copied = copy.deepcopy(model)
    copied.trunk.forward = lambda *inputs: naive_trunk(copied.trunk, *inputs)
    return copied


def acting_calls(ours, theirs, device):
    """-> (the original's way, ours) to act at one more step; each returns arm and gripper (7,).

    The original takes the whole window anew: it encodes every frame and the sentence, and asks every [ACT].
    """
    config, sentence, policy = ours.config, "open the drawer", Policy(ours)
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
                action_mask=mask[..., None].expand(-1, -1, config.chunk))
    with torch.no_grad():
        features = [torch.randn(batch * config.window, *x.shape[1:], device=device)
                    for x in ours.vision(next(iter(pixels.values()))[0, :1])]
    given = GR1(config, Given(features), Given(torch.randn(batch, config.text_dim, device=device)))
    own = given.trained_state()                          # without the encoder that the tiny preset trains
    given.load_trained({k: v for k, v in ours.trained_state().items() if k in own}, "bench")
    given = given.to(device).eval()                      # dropout off

    def step(model):
        out = model({c: x[:, :config.window] for c, x in pixels.items()}, [], data["robot_obs"], mask)
        sum(losses(out, data, pixels, config).values()).backward()
        model.zero_grad()
    original = as_the_original(given)
    return given, (lambda: step(original), lambda: step(given))


def bench(config, batch=2, seconds=20):
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
    variants = [(f"{n} thread{'s' * (n > 1)}", n, False, False) for n in sorted({1, os.cpu_count()})]
    if gpu:
        variants = [(name, threads, name != "float32", name.endswith("compiled"))
                    for name in ("float32", "bfloat16", "bfloat16, ours compiled")]
    for name, n, half, compiled in variants:
        torch.set_num_threads(n)
        if compiled:
            for part in ours.vision, ours.resampler, ours.trunk, given.resampler, given.trunk:
                part.compile()
        with torch.autocast(device.type, torch.bfloat16, half):
            row(f"act, batch 1, {name} [ms]", *in_turn(acting, device, seconds))
            row(f"train, batch {batch}, {name} [ms]", *in_turn(training, device, seconds))
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------ python model.py

def describe(config):
    """Print the token layout of a timestep and the attention mask drawn small."""
    table = token_table(config)
    print(f"tokens of a timestep (x {config.window} timesteps)")
    for name, count, is_query in table:
        print(f"  {name:<22}{count:>4}  {'query' if is_query else 'context'}")
    total = sum(count for _, count, _ in table)
    print(f"  {'total':<22}{total:>4}  x {config.window} = {total * config.window}\n")
    kinds = [(name, is_query) for name, _, is_query in table]
    context = [name for name, is_query in kinds if not is_query]
    asking = [name for name, is_query in kinds if is_query]
    mask = attention_mask(2, len(context), [t for t in range(2) for _ in asking])
    rows = ([f"{name} t+{t}" for t in range(2) for name in context]
            + [f"{name} t+{t}" for t in range(2) for name in asking])
    print("attention mask, two timesteps, one row a kind of token "
          "(# may attend; queries are never attended to)")
    for name, row in zip(rows, mask):
        print(f"  {name:<24}" + " ".join("#" if x else "." for x in row))


def count_parameters(model):
    """Print the parameters by part, trained and frozen; returns (trained, total)."""
    print(f"\n{'parameters':<24}{'trained':>14}{'frozen':>14}")
    rows = {}
    for name, p in model.named_parameters():
        row = rows.setdefault(name.split(".")[0], [0, 0])
        row[0 if p.requires_grad else 1] += p.numel()
    for name, (trained, frozen) in rows.items():
        print(f"  {name:<22}{trained:>14,}{frozen:>14,}")
    trained, frozen = (sum(column) for column in zip(*rows.values()))
    print(f"  {'total':<22}{trained:>14,}{frozen:>14,}   sum {trained + frozen:,}")
    return trained, trained + frozen


def main():
    parser = argparse.ArgumentParser(description="GR-1's tokens, attention mask and parameters",
                                     allow_abbrev=False)
    parser.add_argument("--preset", default="gr1", help="gr1 (the paper's, default) or tiny (a laptop's)")
    parser.add_argument("--stage", default="finetune", choices=["pretrain", "finetune"])
    parser.add_argument("--bench", action="store_true",
                        help="what acting and training cost, computed as the official code does and as here")
    args = parser.parse_args()
    try:
        config = preset_config(args.preset, args.stage)
        describe(config)
        count_parameters(GR1(config, *build_encoders(config, "none", "none")))
        if args.preset == "gr1" and args.stage == "finetune":
            print("  the paper's            46 M trained of 195 M (Sec. 4.1)")
        if args.bench:
            bench(config)
    except ModelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
