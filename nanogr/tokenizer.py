"""GR-2's picture codes: a frozen network that writes a picture as a few whole numbers, and reads it again.

    python -m nanogr.tokenizer --make DIR --data D1 D2     train the tiny one on packed clips (minutes)
    python -m nanogr.tokenizer --encode DATA --tokenizer DIR_OR_FILE       write a data set's codes beside it

TinyTokenizer (gr2-tiny's): a code for 8 x 8 px, finite scalar quantization. VQGAN (gr2-s to -xl): a code for
16 x 16 px, the network of taming-transformers with its names, read from a public file and never trained here.
Both have, beside codes (how many there are), cell (px) and dim (length of a code's vector):

    encode(images (N, 3, S, S), normalised as model.to_pixels does) -> codes int64 (N, P), row by row
    vectors(codes (...)) -> what the codes stand for (..., dim)
    decode(codes (N, P)) -> images (N, 3, S, S), normalised
    fingerprint          checksum of all weights: codes of one tokenizer mean nothing to another
"""
import functools
import json
import math
import os
import pathlib
import sys
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from model import imagenet, to_pixels
from nanogr import clips
from nanogr.common import Parser, UserError, run_script, write_whole
from nanogr.policy import change_errors
from nanogr.weights import read_config, read_weights

LEVELS = (8, 5, 5, 5)          # of FSQ: 1000 codes
SIDES = dict(rgb_static=64, rgb_gripper=32)            # px of what the tiny one learns: gr2-tiny's cameras


SOME = 32                      # pictures that go through a VQGAN at once: its first level takes 26 MB of each


def fingerprint(module):
    """Checksum over a module's tensors, 8 hex digits."""
    crc = 0
    for name, tensor in sorted(module.state_dict().items()):
        crc = zlib.crc32(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


# ------------------------------------------------------------------------------------------------ tiny
class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.conv2(F.gelu(self.conv1(F.gelu(x))))


class TinyTokenizer(nn.Module):
    """A convolutional autoencoder whose middle is rounded: finite scalar quantization (Mentzer et al. 2023,
    arXiv 2309.15505). Each of 4 channels takes one of 8, 5, 5, 5 values; no codebook that could collapse.
    """
    frozen, codes, cell, dim = True, math.prod(LEVELS), 8, len(LEVELS)

    def __init__(self, width=64):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, 2, 1), nn.GELU(), nn.Conv2d(width // 2, width, 4, 2, 1), nn.GELU(),
            nn.Conv2d(width, width, 4, 2, 1), ResBlock(width), nn.GELU(), nn.Conv2d(width, self.dim, 1))
        up = nn.Upsample(scale_factor=2)
        self.decoder = nn.Sequential(
            nn.Conv2d(self.dim, width, 3, 1, 1), ResBlock(width), up, nn.Conv2d(width, width, 3, 1, 1),
            nn.GELU(), up, nn.Conv2d(width, width // 2, 3, 1, 1), nn.GELU(), up,
            nn.Conv2d(width // 2, 3, 3, 1, 1))
        levels = torch.tensor(LEVELS)
        self.register_buffer("levels", levels, False)
        self.register_buffer("basis", torch.cumprod(torch.cat([torch.ones(1).long(), levels[:-1]]), 0), False)

    fingerprint = functools.cached_property(fingerprint)

    def quantize(self, x):
        """(..., dim) -> the nearest allowed values, -1 to 1; the gradient passes as if none was rounded."""
        half = (self.levels - 1) * 1.001 / 2
        shift = (self.levels % 2 == 0) * 0.5             # an even number of values has none in the middle
        x = torch.tanh(x + torch.atanh(shift / half)) * half - shift
        return (x + (x.round() - x).detach()) / (self.levels // 2)

    def vectors(self, codes):
        places = codes[..., None] // self.basis % self.levels
        return (places - self.levels // 2) / (self.levels // 2)

    def to_codes(self, vectors):
        """Inverse of vectors."""
        half = self.levels // 2
        return ((vectors * half + half).round().long() * self.basis).sum(-1)

    @torch.no_grad()
    def encode(self, images):
        return self.to_codes(self.quantize(self.encoder(images).movedim(1, -1))).flatten(1)

    @torch.no_grad()
    def decode(self, codes):
        side = math.isqrt(codes.shape[1])
        return self.decoder(self.vectors(codes).unflatten(1, (side, side)).movedim(-1, 1))

    def forward(self, images):
        """Images (N, 3, S, S) as they come back, for training."""
        return self.decoder(self.quantize(self.encoder(images).movedim(1, -1)).movedim(-1, 1))


# ----------------------------------------------------------------------------------------------- VQGAN
def norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


class VQResBlock(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, out, 3, 1, 1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, 1, 1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class VQAttention(nn.Module):
    """One head over all places."""
    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))         # (N, P, width)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.proj_out(h.unflatten(2, x.shape[2:]))


class Resize(nn.Module):
    """Half the side (padded right and below alone), or twice."""
    def __init__(self, width, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, 1 if up else 2, 1 if up else 0)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Blocks of one resolution, then the change to the next; attention in the coarsest alone."""
    def __init__(self, width, out, blocks, attends, resize=None):
        super().__init__()
        self.block = nn.ModuleList(VQResBlock(width if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(VQAttention(out) for _ in range(blocks if attends else 0))
        if resize:
            setattr(self, resize, Resize(out, resize == "upsample"))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for resize in "downsample", "upsample":
            x = getattr(self, resize)(x) if hasattr(self, resize) else x
        return x


class Middle(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (VQResBlock(width, width), VQAttention(width),
                                                   VQResBlock(width, width))

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, widths, z):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, 1, 1)
        self.down = nn.ModuleList(
            Level(widths[max(0, i - 1)], width, 2, i == last, "downsample" if i < last else None)
            for i, width in enumerate(widths))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], z, 3, 1, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """up.4 is the coarsest, and comes first."""
    def __init__(self, widths, z):
        super().__init__()
        last = len(widths) - 1
        self.conv_in, self.mid = nn.Conv2d(z, widths[-1], 3, 1, 1), Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(widths[min(last, i + 1)], width, 3, i == last, "upsample" if i else None)
            for i, width in enumerate(widths))
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, 1, 1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """taming-transformers' f16 VQGAN (Esser et al. 2021, arXiv 2012.09841), by its names. unit_length: codes
    and what is compared with them are scaled to length 1, as LlamaGen's are. width: of the first level.
    """
    frozen, cell = True, 16

    def __init__(self, codes=1024, dim=256, unit_length=False, width=128, z=256):
        super().__init__()
        self.codes, self.dim, self.unit_length = codes, dim, unit_length
        widths = [width * times for times in (1, 1, 2, 2, 4)]
        self.encoder, self.decoder = Encoder(widths, z), Decoder(widths, z)
        self.quantize = nn.ModuleDict(dict(embedding=nn.Embedding(codes, dim)))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, dim, 1), nn.Conv2d(dim, z, 1)

    fingerprint = functools.cached_property(fingerprint)

    def book(self):
        book = self.quantize["embedding"].weight
        return F.normalize(book, dim=-1) if self.unit_length else book

    def vectors(self, codes):
        return self.book()[codes]

    @torch.no_grad()
    def encode(self, images):
        return torch.cat([self.encode_some(x) for x in images.split(SOME)])

    @torch.no_grad()
    def decode(self, codes):
        return torch.cat([self.decode_some(x) for x in codes.split(SOME)])

    def encode_some(self, images):
        std, mean = (imagenet(which, images.device) for which in ("std", "mean"))
        x = self.quant_conv(self.encoder(2 * (images * std + mean) - 1)).flatten(2).transpose(1, 2)
        # the nearest, |x - e|^2 less |x|^2; where all e have length 1, that of x does not matter
        return (self.book().square().sum(-1) - 2 * x @ self.book().T).argmin(-1)              # (N, P)

    def decode_some(self, codes):
        side = math.isqrt(codes.shape[1])
        x = self.vectors(codes).transpose(1, 2).unflatten(2, (side, side))
        x = (self.decoder(self.post_quant_conv(x)).clamp(-1, 1) + 1) / 2
        return (x - imagenet("mean", x.device)) / imagenet("std", x.device)


def our_name(theirs):
    """taming's name of a tensor, LlamaGen's or taming's; None for what a tokenizer does not need."""
    if theirs.startswith("loss.") or theirs == "quantize.codebook_used":
        return None
    side, _, rest = theirs.partition(".")
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    parts = rest.split(".")
    if parts[0] == "mid" and parts[1] in middle:
        parts[1] = middle[parts[1]]
    if parts[0] == "conv_blocks":                        # LlamaGen lists a decoder from the coarsest on
        parts[0], parts[1] = ("down", parts[1]) if side == "encoder" else ("up", str(4 - int(parts[1])))
        parts[2] = "block" if parts[2] == "res" else parts[2]
    return ".".join([side, *parts])


# ----------------------------------------------------------------------------------------------- files
def open_tokenizer(path):
    """A tokenizer from a directory that save_tokenizer wrote, or a public VQGAN's file, in eval mode.
    UserError if it is neither; what a file holds beside tensors is not run, see weights.read_weights.
    """
    folder = pathlib.Path(path)
    if folder.is_dir():
        if not (folder / "tokenizer.safetensors").is_file():
            raise UserError(f"no tokenizer in {path}: python -m nanogr.tokenizer --make makes one")
        state, made = read_weights(str(folder / "tokenizer.safetensors")), TinyTokenizer()
    else:
        found = read_weights(path)
        names = {name: our_name(name) for name in found}
        state = {ours: found[name] for name, ours in names.items() if ours}
        book, first = state.get("quantize.embedding.weight"), state.get("encoder.conv_in.weight")
        if book is None or first is None or book.dim() != 2:
            raise UserError(f"{path} is no VQGAN's file: it has {', '.join(list(found)[:3])}")
        llamagen = any(".conv_blocks." in name for name in names)
        if len(book) > 2 ** 16:
            raise UserError(f"{path} has {len(book)} codes: more than 65,536 do not fit into uint16")
        z = state["encoder.conv_out.weight"].shape[0] if "encoder.conv_out.weight" in state else 256
        with torch.device("meta"):
            made = VQGAN(*book.shape, llamagen, first.shape[0], z)
    own = made.state_dict()
    wrong = [f"lacks {name}" for name in own if name not in state] + [
        f"has {name}, which it should not" for name in state if name not in own] + [
        f"has {name} of shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own if name in state and state[name].shape != own[name].shape]
    if wrong:
        raise UserError(f"{path} is another tokenizer's: it {wrong[0]}")
    made.load_state_dict(state, assign=True)
    return made.eval().requires_grad_(False)


def tokenizer_of(path):
    """Where the tokenizer of a checkpoint is: in its folder (gr2-tiny's), or where its config says."""
    folder, named = path if os.path.isdir(path) else os.path.dirname(path), read_config(path)
    inside = os.path.exists(os.path.join(folder, "tokenizer.safetensors"))
    named = str(folder if inside else named.get("encoders", {}).get("tokenizer", ""))
    if not os.path.exists(named):
        raise UserError(f"the tokenizer of {path} is not at hand ('{named}'): give it with --tokenizer")
    return named


def same_tokenizer(tokenizer, made, path):
    """UserError unless this tokenizer is the one by which `path` was trained; made: what its config says."""
    if made.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{path} was trained on codes of the tokenizer {made['fingerprint']}, which was in "
                        f"{made.get('tokenizer')}; this one is {tokenizer.fingerprint}: give that one")


def save_tokenizer(tokenizer, directory, **info):
    """Write tokenizer.safetensors and tokenizer.json into a directory."""
    os.makedirs(directory, exist_ok=True)
    state = {name: tensor.contiguous().cpu() for name, tensor in tokenizer.state_dict().items()}
    write_whole(pathlib.Path(directory, "tokenizer.safetensors"), lambda file: save_file(state, file))
    info = dict(levels=LEVELS, fingerprint=tokenizer.fingerprint, **info)
    write_whole(pathlib.Path(directory, "tokenizer.json"), json.dumps(info, indent=1).encode())


def encode_clips(directory, tokenizer, sides, batch=64, part=0, parts=1):
    """Write the codes of all frames of a data set beside its shards, see clips.read_codes. sides: {camera:
    px} of the pictures that are encoded. Shards that have them of this tokenizer are left alone; of the
    others this does the part-th of so many parts.
    """
    wrong = [f"{camera} {side}" for camera, side in sides.items() if side < 1 or side % tokenizer.cell]
    if wrong:
        raise UserError(f"pictures of {', '.join(wrong)} px do not divide into cells of {tokenizer.cell} px")
    data, device = clips.Clips(directory), next(tokenizer.parameters()).device
    places = {camera: (side // tokenizer.cell) ** 2 for camera, side in sides.items()}
    quiet = not sys.stderr.isatty()
    for number in tqdm(range(part, len(data.shards), parts), desc=f"codes of {directory}", disable=quiet):
        if clips.has_codes(data, number, tokenizer.fingerprint, places):
            continue
        codes = {camera: [] for camera in sides}
        for i in range(data.first[number], data.first[number + 1]):
            for camera, frames in data.read(i, cameras=list(sides))["frames"].items():
                for some in torch.from_numpy(frames).to(device).movedim(-1, 1).split(batch):
                    codes[camera].append(tokenizer.encode(to_pixels(some, sides[camera])).cpu().numpy())
        clips.write_codes(data, number, tokenizer.fingerprint,
                          {camera: np.concatenate(x).astype(np.uint16) for camera, x in codes.items()})


# -------------------------------------------------------------------------------------- the tiny one, made
def frames_of(data, camera, rng, count, ahead=0):
    """So many frames of random clips, and with `ahead` those so many steps later: normalised (count, 3, S, S)
    each."""
    if not (data.lengths > ahead).any():
        raise UserError(f"{data.directory} has no clip of more than {ahead} frames")
    ids = rng.choice(np.flatnonzero(data.lengths > ahead), count)
    starts = rng.integers(data.lengths[ids] - ahead)
    side = SIDES.get(camera, SIDES["rgb_static"])
    pixels = [to_pixels(torch.from_numpy(data.single(camera, ids, starts + later)).movedim(-1, 1), side)
              for later in sorted({0, ahead})]
    return pixels if ahead else pixels[0]


def train_tiny(datasets, steps=6000, batch=24, seed=0, lr=8e-3):
    """A TinyTokenizer that saw `batch` random frames of each camera of all Clips `datasets` at each step.

    What it loses is weighed by how much a pixel differs from its camera's mean picture: a block is half a
    percent of a picture, and an average over all pixels would give it up for the table's grain.
    """
    torch.manual_seed(seed)
    made, rng = TinyTokenizer().to(memory_format=torch.channels_last), np.random.default_rng(seed)   # faster
    sources = [(data, camera) for data in datasets for camera in data.cameras]
    means = [frames_of(data, camera, rng, 500).mean(0) for data, camera in sources]
    pixels = sum(mean.numel() for mean in means)
    optimizer = torch.optim.AdamW(made.parameters(), lr, (0.9, 0.95), weight_decay=0.0)
    bar = tqdm(range(steps), desc="tokenizer", disable=not sys.stderr.isatty())
    for step in bar:
        for group in optimizer.param_groups:             # warm-up, then cosine
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
        loss = 0
        for (data, camera), mean in zip(sources, means):
            x = frames_of(data, camera, rng, batch)
            weight = 0.2 + (x - mean).abs().amax(1, keepdim=True).clamp(max=1)
            x = x.contiguous(memory_format=torch.channels_last)
            loss = loss + ((made(x) - x) ** 2 * weight).mean() * mean.numel() / pixels
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=loss.item())
    return made.eval().requires_grad_(False)


@torch.no_grad()
def judge(tokenizer, data, ahead=3, count=1000):
    """-> {camera: (floor, codes in use)} on random frames of Clips `data`. The floor: error of the frame
    `ahead` steps later through the tokenizer, over that of the present frame, where it changes, see
    policy.change_errors: no prediction in codes can be better.
    """
    rng, found = np.random.default_rng(1), {}
    for camera in data.cameras:
        now, later = frames_of(data, camera, rng, count, ahead)
        codes = tokenizer.encode(later)
        frames = [{camera: x[:, None]} for x in (tokenizer.decode(codes), now, later)]
        mine, copied = change_errors(*frames, torch.ones(count, 1, dtype=torch.bool), 16)[0].tolist()
        found[camera] = mine / copied if copied else math.nan, len(codes.unique())
    return found


def main():
    parser = Parser(description="Train GR-2's tiny tokenizer, or write a data set's codes.")
    parser.add_argument("--make", metavar="DIR", help="train the tiny tokenizer on --data, write it into DIR")
    parser.add_argument("--encode", metavar="DATA", help="write the codes of a data set beside its clips")
    parser.add_argument("--data", nargs="+", default=[], help="data sets to train on: human and robot video")
    parser.add_argument("--tokenizer", help="with --encode: a directory of --make, or a VQGAN's file")
    parser.add_argument("--side", type=int,
                        help="with --encode: px (default: 224 for a VQGAN, else gr2-tiny's 64 and 32)")
    parser.add_argument("--steps", type=int, default=6000, help="default: 6000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if [bool(x) for x in (args.make, args.data, args.encode, args.tokenizer)] not in (
            [True, True, False, False], [False, False, True, True]):
        parser.error("either --make DIR --data D1 D2, or --encode DATA --tokenizer DIR_OR_FILE")
    if args.encode:
        tokenizer, cameras = open_tokenizer(args.tokenizer), clips.Clips(args.encode).cameras
        usual = {} if isinstance(tokenizer, VQGAN) else SIDES
        sides = {camera: usual.get(camera, 224) if args.side is None else args.side for camera in cameras}
        encode_clips(args.encode, tokenizer.to("cuda" if torch.cuda.is_available() else "cpu"), sides)
        print(f"codes of tokenizer {tokenizer.fingerprint} beside the shards of {args.encode}")
        return
    if args.steps < 1 or args.seed < 0:
        parser.error("--steps must be 1 or more and --seed 0 or more")
    opened = [clips.open_data(path) for path in args.data]
    training, held_out = zip(*((data, apart or data) for data, apart in opened))
    short = [data.directory for data in held_out if not (data.lengths > 3).any()]
    if short:
        raise UserError(f"{short[0]} has no clip of more than 3 frames, by which to judge a tokenizer")
    made, figures = train_tiny(training, args.steps, seed=args.seed), {}
    save_tokenizer(made, args.make, steps=args.steps, seed=args.seed, data=args.data)
    for data in held_out:
        for camera, (ratio, used) in judge(made, data).items():
            figures[f"{data.directory} {camera}"] = dict(floor=round(ratio, 3), codes=used)
            print(f"{data.directory}, {camera}: floor {ratio:.3f}, {used} of {made.codes} codes in use")
    save_tokenizer(made, args.make, steps=args.steps, seed=args.seed, data=args.data, figures=figures)
    print(f"tokenizer {made.fingerprint} in {args.make}")


if __name__ == "__main__":
    run_script(main)
