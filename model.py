"""GR-1 in one file: "Unleashing Large-Scale Video Generative Pre-training for Visual Robot Manipulation",
Wu et al. 2023, arXiv 2312.13139 ("paper" below; "official code" is the authors' bytedance/GR-1).

GR-1 is a GPT over timesteps. A timestep holds a sentence, the robot's state and the camera images as context
tokens, and learned query tokens: [ACT] asks "what should the arm do?", [OBS] asks "what will the camera see a
few frames from now?". Pre-training on human video is the same model with one camera and without the robot.

    python model.py [--preset tiny] [--stage pretrain]    prints the token layout, the mask, the parameters

In this order: config and tokens, mask, small parts, resampler, trunk, heads, GR1, losses. What surrounds the
model is in nanogr/: the frozen encoders (encoders.py), checkpoints (weights.py), acting (policy.py).

Glossary of shapes
    B  batch          T  timesteps of the window         C  context tokens of a timestep
    D  model width    R  query tokens of the window      K  actions of a chunk
    P  patches        V  timesteps that [OBS] asks at    L  latents of the resampler
    N  images         S  side of an image [px]           Dv, Dt  features of the image, text encoder
    M  any tokens     E  their features                  G  runs of N frames that windows share, see pick
"""
import argparse
import dataclasses
import difflib
import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F


class ModelError(Exception):
    """A user's mistake about the model: one line that says what is wrong and what to do."""


# ----------------------------------------------------------------------------------- config and tokens
@dataclass
class GR1Config:
    """Sizes and switches of the model. The defaults are the paper's finetuning model (Sec. 4.1, Table 3)."""
    preset: str = "gr1"            # which encoders belong to it, see nanogr/encoders.py
    cameras: dict = field(default_factory=lambda: {"rgb_static": 224, "rgb_gripper": 224})  # -> side fed in
    robot: bool = True             # robot state in, [ACT] out; False for video without a robot
    video: bool = True             # [OBS] queries; False is the paper's ablation without video prediction
    window: int = 10               # T, timesteps the model sees
    stride: int = 1                # the robot's steps from one timestep to the next (paper: 1)
    future: int = 3                # [OBS] predicts the frame so many timesteps ahead (paper, pre-training: 1)
    chunk: int = 1                 # K, actions predicted at each timestep, one a step (paper: 1)
    width: int = 384               # D
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1
    vision_dim: int = 768          # Dv
    text_dim: int = 512            # Dt
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
    told: bool = False             # queries begin as their timestep's sentence token; not in the paper
    upright: bool = False          # angles count from how CALVIN's hand hangs; not in the paper

    def __post_init__(self):
        check_config(self)

    @classmethod
    def from_dict(cls, values):
        """Build from a plain dict; a ModelError names the key that is unknown, with the nearest, or wrong."""
        for key in values:
            known("config key", key, [f.name for f in dataclasses.fields(cls)])
        return cls(**values)


PRESETS = {
    "gr1": dict(),                 # the paper: 195 M parameters with its encoders, 46 M of them trained
    "real": dict(),                # the same; what differs is the training, see PRESETS in train.py
    # A laptop's: small, and trained whole, encoder included. It predicts plain pixels (to divide by a flat
    # patch's spread makes noise) through a copy gate (four latents cannot carry a whole picture), and sees
    # cameras at their own sizes (upsampling the 32 px gripper view would double the work).
    "tiny": dict(preset="tiny", cameras={"rgb_static": 64, "rgb_gripper": 32}, window=5, width=96, layers=4,
                 heads=4, dropout=0.0, vision_dim=64, text_dim=128, latents=4, resampler_depth=1,
                 resampler_heads=4, resampler_head_dim=16, patch=16, decoder_depth=2, decoder_heads=4,
                 norm_pixels=False, copy_gate=True),
}
# For CALVIN without a GPU: a frozen eye, no memory; every fourth step is seen, chunks are planned.
PRESETS["calvin"] = PRESETS["tiny"] | dict(preset="calvin", cameras={"rgb_static": 96, "rgb_gripper": 48},
                                           window=1, stride=4, chunk=5, width=128, layers=3, text_dim=256,
                                           latents=2, told=True, upright=True)


def preset_config(name, stage="finetune", /, **changes):      # "/": so that changes may hold any key
    """GR1Config of a preset, with changes. Stage "pretrain" leaves one camera, no robot, the next frame."""
    known("preset", name, PRESETS)
    config = GR1Config.from_dict({**PRESETS[name], **changes})
    if stage == "finetune":
        return config
    if changes.get("robot") or changes.get("video") is False:
        raise ModelError("pre-training has no robot and always predicts video: leave these settings out")
    return dataclasses.replace(config, cameras=dict([*config.cameras.items()][:1]), robot=False, video=True,
                               future=changes.get("future", 1), stride=changes.get("stride", 1))


def token_table(config):
    """The tokens of one timestep, in order: a list of (name, count, is_query)."""
    table = [("language", 1, False)] + [("state", 1, False)] * config.robot
    for camera in config.cameras:
        table += [(f"{camera} latents", config.latents, False), (f"{camera} CLS", 1, False)]
    table += [("[ACT]", config.chunk, True)] * config.robot
    return table + [(f"[OBS] {camera}", config.latents + 1, True) for camera in config.cameras] * config.video


# -------------------------------------------------------------------------------------- attention mask
def attention_mask(steps, context, query_steps, device=None):
    """Who may look at whom: bool (steps * context + len(query_steps), steps * context), True = may attend.

    Rows are all context tokens, then the queries, each at its timestep of query_steps (R,). Context is causal
    token by token: a state sees the sentence of its step, not the other way round. A query sees every context
    token up to its own step. No token sees a query, not even the query itself: the official code forbids it,
    for a query is only a question. Its weight in any softmax would be 0, so queries have no columns here, and
    any can be left out without changing another token: [ACT] in pre-training, [OBS] when acting.

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


# ----------------------------------------------------------------------------------------- small parts
def patchify(images, patch):
    """Cut images (..., 3, S, S) into (..., P, patch * patch * 3), row by row, channel last, as MAE does."""
    x = images.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))     # c, rows, p, columns (k), q
    return torch.einsum("...crpkq->...rkpqc", x).flatten(-3).flatten(-3, -2)


def sincos_positions(side, width):
    """Fixed 2-D sin-cos positions (side * side, width), column first (MAE, pos_embed.py)."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega                       # (side, width / 4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)                                        # (side, width / 2)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, 0)], 1).float()


@functools.cache
def imagenet(which, device):
    """The colours' "mean" or "std" (3, 1, 1); sent to a device once, for sending makes the host wait."""
    values = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}[which]
    return torch.tensor(values, device=device).view(3, 1, 1)


def to_pixels(frames, side):
    """uint8 frames (..., 3, H, W) -> float (..., 3, side, side), ImageNet-normalised.

    Enlarged frames are what the official code feeds (torchvision 0.13's bicubic Resize): CALVIN's always are.
    Where a side shrinks they are smoothed first, as torchvision does since 0.17; the official code does not.
    """
    x = frames.flatten(0, -4).float() / 255
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=max(x.shape[-2:]) > side)
    x = (x - imagenet("mean", x.device)) / imagenet("std", x.device)
    return x.reshape(*frames.shape[:-2], side, side)


def attend(q, k, v, heads, mask=None, dropout=0.0):
    """Multi-head attention of q (B, ., E) over k, v (B, M, E); mask bool (B, 1, ., M), True = may attend."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))     # (B, heads, ., E / heads)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return x.transpose(1, 2).flatten(2)


def mlp(width, activation, bias=True):
    return nn.Sequential(nn.Linear(width, 4 * width, bias), activation, nn.Linear(4 * width, width, bias))


def pick(runs, frame_at, steps):
    """Timesteps `steps` (V,) of B windows -> (B, V, ...). frame_at None: runs (B, T, ...) are the windows.
    Else windows share frames: frame_at (B, T) is each step's index, 0 .. G * N - 1, in runs (G, N, ...)."""
    return runs[:, steps] if frame_at is None else runs.flatten(0, 1)[frame_at[:, steps]]


# ------------------------------------------------------------------------------------------- resampler
class ResamplerLayer(nn.Module):
    """Latents (N, L, Dv) look at patches (N, P, Dv) and at themselves (Flamingo, flamingo_pytorch)."""
    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.norm_patches, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(width, 2 * inner, bias=False)
        self.proj = nn.Linear(inner, width, bias=False)
        self.norm_mlp, self.mlp = nn.LayerNorm(width), mlp(width, nn.GELU(), bias=False)

    def plain(self, latents, patches):
        """What a layer computes. Read it before `forward`, which computes the same cheaper (tested)."""
        h = self.norm_latents(latents)
        seen = torch.cat([self.norm_patches(patches), h], 1)                             # (N, P + L, Dv)
        k, v = self.kv(seen).chunk(2, -1)                                                # (N, P + L, .) each
        latents = latents + self.proj(attend(self.q(h), k, v, self.heads))
        return latents + self.mlp(self.norm_mlp(latents))

    def forward(self, latents, patches):
        """Keys and values are never computed: q . (Wk x) is (Wk^T q) . x, and a weighted mean of all Wv x is
        Wv times that mean of all x. 36 queries (heads x latents) for 205 tokens: a ninth of that work.
        """
        h = self.norm_latents(latents)
        seen = torch.cat([self.norm_patches(patches), h], 1)                             # (N, P + L, Dv)
        Wk, Wv = self.kv.weight.unflatten(0, (2, self.heads, -1))                        # (heads, e, Dv) each
        q = self.q(h).unflatten(-1, (self.heads, -1))                                    # (N, L, heads, e)
        q = torch.einsum("nlhe,hed->nhld", q, Wk).flatten(1, 2)                          # (N, heads * L, Dv)
        x = F.scaled_dot_product_attention(q, seen, seen, scale=Wk.shape[1] ** -0.5)
        x = torch.einsum("nhld,hed->nlhe", x.unflatten(1, (self.heads, -1)), Wv)
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


# ----------------------------------------------------------------------------------------------- trunk
class TrunkBlock(nn.Module):
    """A pre-LN GPT-2 block with ReLU, whose keys and values are the first n_context tokens alone."""
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.mlp = mlp(config.width, nn.ReLU())
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, n_context, mask, first=0):
        """x (B, M, D) -> (B, M - first, D), the tokens from `first` on; those before it are keys only."""
        h = self.norm1(x)
        k, v = self.kv(h[:, :n_context]).chunk(2, -1)
        dropout = self.dropout if self.training else 0.0
        y = attend(self.q(h[:, first:]), k, v, self.heads, mask[:, :, first:], dropout)
        x = x[:, first:] + self.drop(self.proj(y))
        return x + self.drop(self.mlp(self.norm2(x)))


class Trunk(nn.Module):
    """The GPT. No position embedding (official code disables GPT-2's): timestep and mask tell the order."""
    def __init__(self, config):
        super().__init__()
        self.embed_norm = nn.LayerNorm(config.width)
        self.drop, self.told = nn.Dropout(config.dropout), config.told
        self.blocks = nn.ModuleList(TrunkBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        # GPT-2's word embedding: nothing reads it, but official files carry it and 45,988,039 counts it
        self.unused_wte = nn.Parameter(torch.zeros(1, config.width))

    def forward(self, context, queries, query_steps, real=None):
        """context (B, T, C, D), queries (B, R, D) at timesteps query_steps (R,), real bool (B, T): False is
        padding -> answers (B, R, D). The last block computes the queries alone: nobody reads the rest.
        """
        batch, steps, tokens, _ = context.shape
        may = attention_mask(steps, tokens, query_steps, context.device)[None, None]     # (1, 1, rows, T * C)
        if real is not None:
            may = may & real.repeat_interleave(tokens, 1)[:, None, None]
        n, queries = steps * tokens, queries + context[:, query_steps, 0] if self.told else queries
        x = self.drop(self.embed_norm(torch.cat([context.flatten(1, 2), queries], 1)))
        for block in self.blocks[:-1]:
            x = block(x, n, may)
        return self.norm(self.blocks[-1](x, n, may, first=n))


# ----------------------------------------------------------------------------------------------- heads
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
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width, nn.GELU())

    def forward(self, x, blanks=None):
        """x (N, M, D) -> (N, M, D). blanks (P, D): mask tokens, appended to the M tokens of each of the N ->
        (N, M + P, D). They are the same for all N, so their q, k and v are computed once.
        """
        qkv = self.qkv(self.norm1(x))
        if blanks is not None:
            qkv = torch.cat([qkv, self.qkv(self.norm1(blanks)).expand(len(x), -1, -1)], 1)
            x = torch.cat([x, blanks.expand(len(x), -1, -1)], 1)
        x = x + self.proj(attend(*qkv.chunk(3, -1), self.heads))
        return x + self.mlp(self.norm2(x))


class VideoHead(nn.Module):
    """[OBS] answers and a mask token for each patch -> decoder -> the future frame, read off the mask tokens.
    One for all cameras. With copy_gate (not in the paper): stays * present + (1 - stays) * painted.
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
            self.register_buffer(f"positions_{camera}", sincos_positions(side // config.patch, width), False)

    def forward(self, x, camera, now=None):
        """x (N, L + 1, D) -> (N, P, patch^2 * 3). now (N, 3, S, S): present frames, for the copy gate."""
        blanks = self.mask_token + getattr(self, f"positions_{camera}")                    # (P, D)
        x = self.blocks[0](self.embed(x), blanks)
        for block in self.blocks[1:]:
            x = block(x)
        x = self.pixels(self.norm(x[:, -len(blanks):]))
        if self.copy_gate:
            paint, stays = x.split([3 * self.patch ** 2, self.patch ** 2], -1)
            stays = stays.sigmoid().repeat_interleave(3, -1)                         # channels come last
            x = stays * patchify(now, self.patch) + (1 - stays) * paint
        return x


# ------------------------------------------------------------------------------------------------ GR-1
class GR1(nn.Module):
    """The whole model (paper Sec. 3, Fig. 2). vision: images (N, 3, S, S) -> CLS (N, Dv), patches (N, P, Dv);
    text: list of B sentences -> (B, Dt). Any module of these shapes will do; one that is trained and saved
    with the rest says so by `frozen = False`."""
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
        """One table of initial spreads; biases 0, norms 1, frozen encoders untouched. It is ours: the paper
        does not say, and the official code takes the defaults of torch and, in its trunk, of GPT-2.

        Linear maps keep the variance of their input (1 / sqrt(fan in)), except:
            embed_language       1             its input has length 1, so every feature is about 1 / sqrt(Dt)
            embed_arm            5, 0.1        decimetres must matter beside a wrist at pi rad (upright: 5, 2)
            ends of residuals    / sqrt(2 n)   n blocks add up
            learned tokens       0.02          as GPT-2's embeddings and MAE's mask token
            vision.identity      1             the tiny preset's keypoints must differ from the start
        """
        arm = torch.tensor([5, 5, 5] + [2 if self.config.upright else 0.1] * 3)
        special = {"embed_language.weight": 1.0, "embed_arm.weight": arm, "vision.identity": 1.0}
        depth = {"trunk": self.config.layers, "video_head": self.config.decoder_depth,
                 "resampler": self.config.resampler_depth}
        for name, p in self.named_parameters():
            if not p.requires_grad or "norm" in name and name.endswith("weight"):
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
        """robot_obs (..., 15), CALVIN's units -> (..., D). Pose: see GR1Config.upright; gripper one-hot."""
        arm, opened = robot_obs[..., :6], (robot_obs[..., 14:15] > 0).float()
        if self.config.upright:                      # roll pi, which is -pi too, yaw pi / 2: both become 0
            turns = zip(arm[..., 3:].split(1, -1), (0, math.pi, math.pi / 2))    # not a tensor: GPUs wait
            arm = torch.cat([arm[..., :3], *((x + y).remainder(2 * math.pi) - math.pi for x, y in turns)], -1)
        gripper = self.embed_gripper(torch.cat([1 - opened, opened], -1))
        return self.embed_state(torch.cat([self.embed_arm(arm), gripper], -1))

    def encode_images(self, pixels):
        """{camera: (N, 3, S, S)} -> (N, cameras * (L + 1), D). Costs the most; the same at any timestep."""
        tokens = []
        for c in self.config.cameras:
            cls, patches = self.vision(pixels[c])
            tokens += [self.embed_latents[c](self.resampler(patches)), self.embed_cls[c](cls)[:, None]]
        return torch.cat(tokens, 1)

    def context(self, language, images, state=None):
        """language (B, D), images (B, T, ., D), state (B, T, D) -> context (B, T, C, D) in table order."""
        steps = images.shape[1]
        tokens = [language[:, None, None].expand(-1, steps, -1, -1)]
        if self.config.robot:
            tokens += [state[:, :, None]]
        return torch.cat(tokens + [images], 2) + self.timestep[:steps, None]

    # ---- the model
    def forward(self, pixels, sentences, robot_obs=None, mask=None, video_at=None, frame_at=None):
        """pixels: {camera: (B, T, 3, S, S)}, see to_pixels; sentences: B strings; robot_obs: (B, T, 15);
        mask: bool (B, T), False for padding after the real steps; video_at (V,): timesteps to ask [OBS] at,
        None for all T; frame_at (B, T): for windows that share frames, see pick; pixels are (G, N, ...) then.
        Returns what the config asks for: arm (B, T, K, 6), gripper logits (B, T, K), and of each camera the
        future frame's pixels (B, V, P, patch^2 * 3).
        """
        steps = next(iter(pixels.values())).shape[1]
        images = self.encode_images({c: x.flatten(0, 1) for c, x in pixels.items()}).unflatten(0, (-1, steps))
        act_at = torch.arange(steps if frame_at is None else frame_at.shape[1], device=images.device)
        video_at = act_at if video_at is None else video_at
        state = self.encode_state(robot_obs) if self.config.robot else None
        context = self.context(self.encode_language(sentences), pick(images, frame_at, act_at), state)
        queries, at = self.queries(act_at, video_at)
        answers = self.trunk(context, queries.expand(len(context), -1, -1), at, mask)
        now = {c: pick(x, frame_at, video_at) for c, x in pixels.items() if self.config.copy_gate}
        return self.heads(answers, len(act_at), now)

    def queries(self, act_at, video_at):
        """[ACT] for the timesteps act_at (T,), then each camera's [OBS] for video_at (V,): tokens (R, D) and
        their steps (R,). No timestep embedding is added (official code, but `told`): the mask places them.
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
            acts = answers[:, :start].unflatten(1, (steps, config.chunk))
            out["arm"], out["gripper"] = self.action_head(acts)
        if config.video:
            for camera, x in zip(config.cameras, answers[:, start:].chunk(len(config.cameras), 1)):
                x = x.unflatten(1, (-1, config.latents + 1))                               # (B, V, L + 1, D)
                seen = now[camera].flatten(0, 1) if camera in now else None
                patches = self.video_head(x.flatten(0, 1), camera, seen)
                out[camera] = patches.unflatten(0, x.shape[:2])
        return out

    # ---- checkpoints
    def trained_state(self):
        """State dict without the frozen encoders: what checkpoints hold."""
        frozen = tuple(f"{name}." for name in self.frozen())
        return {k: v for k, v in self.state_dict().items() if not k.startswith(frozen)}

    @classmethod
    def from_pretrained(cls, path, config=None, vision=None, text=None):
        """Load a checkpoint and print what was done with each of its tensors. Their names say what it is:
        ours (train.py's), the authors' GR-1 (bytedance/GR-1, snapshot_*.pt) or their Ego4D pre-training
        (bytedance/GR-MG, pretrained.pt, which leaves the robot's parts fresh). config: used instead of the
        stored one; None and none stored: gr1's. vision, text: see build_encoders. Raises common.UserError."""
        from nanogr import encoders, weights             # here: the model itself needs no other file of ours
        stored, state = weights.read_config(path), weights.read_checkpoint(path)
        config = config or GR1Config.from_dict(stored.get("model", {}))
        model = cls(config, *encoders.build_encoders(config, vision, text, **stored.get("encoders", {})))
        print("weights: " + weights.load(model, state, path))
        return model.eval()


# ---------------------------------------------------------------------------------------------- losses
def losses(out, batch, pixels, config, counts=(None, None)):
    """The losses, unweighted, by name: arm (Smooth-L1), gripper (binary cross-entropy) and, for each camera,
    video (mean squared error), each a mean over the steps that have a target.

    out: of GR1.forward; batch: from nanogr.clips.Windows; pixels: {camera: (B, T + future, 3, S, S)}, what
    the model saw and the frames after it. counts: how many actions and how many future frames are known, to
    divide by; None: in this batch. Processes that share a step give their mean: all frames weigh the same.
    """
    named, at = {}, batch["video_at"]
    if config.robot:
        target, mask = batch["rel_actions"], batch["action_mask"]                 # (B, T, K, 7), (B, T, K)
        arm = F.smooth_l1_loss(out["arm"], target[..., :-1], reduction="none")
        named["arm"] = masked_mean(arm, mask, counts[0])
        opened = (target[..., -1] > 0).float()
        gripper = F.binary_cross_entropy_with_logits(out["gripper"], opened, reduction="none")
        named["gripper"] = masked_mean(gripper, mask, counts[0])
    if config.video:
        for camera in config.cameras:
            target = video_target(pixels[camera][:, config.future:], config)     # once for all that share it
            error = (out[camera] - pick(target, batch.get("frame_at"), at)) ** 2
            named[camera] = masked_mean(error, batch["future_mask"][:, at], counts[1])
    return named


def total_loss(named, arm=100.0, gripper=1.0, video=1.0, **others):
    """What is minimised: arm * L_arm + gripper * L_gripper + video * L_video, summed over the cameras.
    The paper weighs 1 : 1 : 1. The defaults are what EDiRobotics/GR1-Training, a third party's code, names as
    the authors'. An arm's error soon is hundredths where the others are tenths: with 1 it would hardly count.
    """
    weights = {"arm": arm, "gripper": gripper, **others}
    return sum(weights.get(name, video) * value for name, value in named.items())


def video_target(pixels, config):
    """Pixels (..., 3, S, S) -> what [OBS] should say (..., P, patch^2 * 3); norm_pixels: patch by patch."""
    target = patchify(pixels, config.patch)
    if config.norm_pixels:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True).sqrt() + 1e-6)
    return target


def masked_mean(values, mask, count=None):
    """Sum of values (B, T, ...) over the steps where mask (B, T, ...) holds, by their number or `count`."""
    values = values.flatten(mask.dim()).mean(-1) if values.dim() > mask.dim() else values
    count = mask.sum().float() if count is None else count
    return (values * mask).sum() / count.clamp(min=1e-6)      # not min=1: processes' mean count may be 0.5


# ---------------------------------------------------------------------------------- settings that fail
def known(what, name, names):
    """Raise ModelError unless `name` is one of `names`; it names the nearest."""
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise ModelError(f"unknown {what} '{name}'" + (f", did you mean '{near[0]}'?" if near else "")
                         + (f" (there are: {', '.join(names)})" if len(names) < 10 else ""))


def check_config(config):
    """Raise ModelError for the first setting with which no model can be built."""
    def must(holds, words):
        if not holds:
            raise ModelError(words)
    for f in dataclasses.fields(config):
        key, value = f"config key '{f.name}'", getattr(config, f.name)
        least = 0 if f.name in ("future", "latent") else 1
        must(type(value) is f.type or f.type is float and type(value) is int,
             f"{key} must be {f.type.__name__}, got {value!r}")
        must(f.type is not int or value >= least, f"{key} must be at least {least}, got {value}")
    must(0 <= config.dropout < 1, f"config key 'dropout' must be from 0 to below 1, got {config.dropout}")
    must(not config.copy_gate or not config.norm_pixels,
         "copy_gate copies plain pixels: it needs norm_pixels false")
    head = getattr(config, "head_width", config.width)
    must(not (config.width % config.heads or config.width % 4 or head % config.decoder_heads), "width "
         f"{config.width} must be a multiple of heads {config.heads} and 4, {head} of {config.decoder_heads}")
    must(config.cameras, "config key 'cameras' must name a camera and its side in px")
    for camera, side in config.cameras.items():
        must(type(side) is int and side > 0 and side % config.patch == 0,
             f"camera {camera} ({side} px) does not divide into patches of {config.patch} px")


# ------------------------------------------------------------------------------------- python model.py
def describe(config, table):
    """Print the token layout of a timestep, see token_table, and the attention mask drawn small."""
    print(f"tokens of a timestep (x {config.window} timesteps)")
    for name, count, is_query in table:
        print(f"  {name:<22}{count:>4}  {'query' if is_query else 'context'}")
    total = sum(count for _, count, _ in table)
    print(f"  {'total':<22}{total:>4}  x {config.window} = {total * config.window}\n")
    context = [name for name, _, is_query in table if not is_query]
    asking = [name for name, _, is_query in table if is_query]
    rows = [f"{name} t+{t}" for kind in (context, asking) for t in range(2) for name in kind]
    print("attention mask of two timesteps, one row a kind of token (# may attend)")
    for name, row in zip(rows, attention_mask(2, len(context), [t for t in range(2) for _ in asking])):
        print(f"  {name:<24}" + " ".join("#" if x else "." for x in row))


def count_parameters(model):
    """Print the parameters by part, trained and frozen; returns (trained, total)."""
    print(f"\n{'parameters':<24}{'trained':>14}{'frozen':>14}")
    rows = {}
    for name, p in model.named_parameters():
        rows.setdefault(name.split(".")[0], [0, 0])[not p.requires_grad] += p.numel()
    for name, (trained, frozen) in rows.items():
        print(f"  {name:<22}{trained:>14,}{frozen:>14,}")
    trained, frozen = map(sum, zip(*rows.values()))
    print(f"  {'total':<22}{trained:>14,}{frozen:>14,}   sum {trained + frozen:,}")
    return trained, trained + frozen


def main():
    from nanogr.encoders import build_encoders
    parser = argparse.ArgumentParser(description="GR-1's tokens, mask and parameters", allow_abbrev=False)
    parser.add_argument("--preset", default="gr1", choices=list(PRESETS), help="default: gr1, the paper's")
    parser.add_argument("--stage", default="finetune", choices=["pretrain", "finetune"])
    args = parser.parse_args()
    config = preset_config(args.preset, args.stage)
    describe(config, token_table(config))
    count_parameters(GR1(config, *build_encoders(config, "none", "none")))


if __name__ == "__main__":
    main()
