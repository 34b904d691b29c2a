"""The encoders that stand before GR-1: frozen MAE and CLIP of the paper, and two small ones for a laptop.

GR1(config, vision, text) takes any modules of these shapes:
    vision: images float (N, 3, S, S), ImageNet-normalised -> CLS (N, Dv), patches (N, P, Dv)
    text:   a list of B sentences -> (B, Dt)
`frozen = False` says that a module is trained and saved with the rest.
"""
import contextlib
import functools
import logging
import math
import pathlib
import re
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogr.common import UserError
from nanogr.weights import read_weights


# Presets whose encoders are small ones of our own -> 3x3 convolutions behind the image encoder's first: none
# tells a drawn world's blocks, CALVIN's shaded and shadowed ones take some.
LAPTOP = {"tiny": 0, "gr2-tiny": 0, "calvin": 3}
EYE = pathlib.Path(__file__).resolve().parent.parent / "assets" / "calvin-eye.safetensors"    # calvin's


def build_encoders(config, vision=None, text=None, vision_weights="hub", text_weights="hub", known=()):
    """The encoders of a preset: (vision, text). Each may be given as a module, which stays as it is, or as
    words that say where the weights come from: "hub", "none" (random) or a file; None: as vision_weights and
    text_weights say. Those of LAPTOP are their own; known: sentences for calvin's, see HashText. UserError if
    they can't be had.
    """
    text = build_text(config, text, text_weights, known)
    if config.preset == "calvin" and vision is None:
        return open_eye(config, vision_weights), text
    vision = vision_weights if vision is None else vision
    if config.preset in LAPTOP:
        return tiny_vision(config) if its_own(config, vision) else vision, text
    return fill(MAEVision, vision, "image encoder timm/vit_base_patch16_224.mae", "--mae",
                "mae_pretrain_vit_base.pth"), text


def build_text(config, text=None, text_weights="hub", known=()):
    """The text encoder of a preset, GR-1's or GR-2's, see build_encoders."""
    text = text_weights if text is None else text
    if config.preset in LAPTOP:
        return HashText(config.text_dim, config.preset != "calvin", known) if its_own(config, text) else text
    return fill(CLIPText, text, "text encoder open_clip ViT-B-32-quickgelu 'openai'", "--clip",
                "open_clip_model.safetensors")


def tiny_vision(config):
    """The image encoder of a preset of LAPTOP, with random weights."""
    return TinyVision(config.vision_dim, LAPTOP[config.preset], painted=config.preset == "calvin")


def open_eye(config, source):
    """The preset calvin's image encoder. Its eye is what nanogr/painter.py made, frozen as MAE is: "hub",
    ours; a file; "none": random, and trained with the rest."""
    made = tiny_vision(config)
    if source != "none":
        source, eye = EYE if source == "hub" else source, made.eye()
        made.load_state_dict(matching(eye, read_weights(source), source), strict=False)
        for name, p in made.named_parameters():
            p.requires_grad_(name not in eye)
    return made


def same_eye(vision, state, path):
    """UserError if the checkpoint `path` was trained with another eye than the frozen one of `vision`. To be
    asked before its weights are loaded: they hold its own."""
    if isinstance(vision, TinyVision) and not vision.maps.weight.requires_grad:
        pairs = [(x, state.get(f"vision.{name}", x)) for name, x in vision.eye().items()]
        if not all(mine.shape == theirs.shape and torch.equal(mine.cpu(), theirs) for mine, theirs in pairs):
            raise UserError(f"{path} was trained with another eye: give it with --mae FILE, or --mae none if "
                            "it was trained with the rest")


def its_own(config, encoder):
    """Whether a preset of LAPTOP takes its own encoder; UserError if a file of weights is named."""
    if isinstance(encoder, str) and encoder not in ("hub", "none"):
        raise UserError(f"the {config.preset} preset has encoders of its own: {encoder} is for --preset gr1")
    return isinstance(encoder, str)


def fill(encoder, source, what, flag, example):
    """An encoder with the weights of source, see build_encoders. Where the hub cannot be reached, the error
    says what to download and how to name it; a file's tensors must hold all of the encoder's (a whole CLIP
    holds more)."""
    if not isinstance(source, str):
        return source
    logging.disable(logging.ERROR)                       # a dozen lines of retries say less than one of ours
    try:
        made = encoder(hub=source == "hub")
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot get the {what} from the hub ({type(error).__name__}): give a local file "
                        f"with {flag} FILE (for example {example}), or {flag} none for random weights"
                        ) from error
    finally:
        logging.disable(logging.NOTSET)
    if source not in ("hub", "none"):
        (module,) = made.children()
        module.load_state_dict(matching(module.state_dict(), read_weights(source), source))
    return made


def matching(wanted, state, source):
    """Of a state dict, which may hold more, the tensors that `wanted` names; UserError if they do not fit."""
    missing = [key for key in wanted if key not in state]
    if missing:
        raise UserError(f"{source} is no weights file for this encoder: it lacks {missing[0]}"
                        + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            raise UserError(f"{source} is for another size: {key} has {tuple(state[key].shape)}, not "
                            f"{tuple(tensor.shape)}")
    return {key: state[key] for key in wanted}


class MAEVision(nn.Module):
    """The paper's, frozen MAE ViT-B/16: (N, 3, 224, 224) -> CLS (N, 768), patches (N, 196, 768).
    hub: with timm's weights, which are fetched from the hub; else random ones.
    """
    frozen = True

    def __init__(self, hub=False):
        super().__init__()
        import timm
        self.vit = timm.create_model("vit_base_patch16_224.mae", pretrained=hub, num_classes=0)

    @torch.no_grad()
    def forward(self, images):
        x = self.vit.forward_features(images)            # (N, 197, 768), after the final LayerNorm
        return x[:, 0], x[:, 1:]


class CLIPText(nn.Module):
    """The paper's, CLIP ViT-B/32's text tower, frozen: a list of B sentences -> (B, 512).
    hub: with OpenAI's weights, which open_clip fetches from the hub; else random ones.
    """
    frozen = True
    group = 1                      # sentences encoded at once, always so many, see recall

    def __init__(self, hub=False):
        super().__init__()
        import open_clip
        name = "ViT-B-32-quickgelu"
        self.clip = open_clip.create_model(name, pretrained="openai" if hub else None)
        del self.clip.visual, self.clip.logit_scale
        self.tokenize, self.cache = open_clip.get_tokenizer(name), {}

    @torch.no_grad()
    def forward(self, sentences):
        encode = lambda some: self.clip.encode_text(self.tokenize(some).to(self.clip.text_projection.device))
        return recall(self.cache, sentences, encode, self.group, 10_000)     # Ego4D has millions, CALVIN 400


def recall(memory, keys, compute, group, most):
    """compute(keys) (N, ...), each key's row computed once and kept in the dict `memory`, `most` of them.
    compute gets always `group` keys at once: then a row is the same to the last bit, whatever others are new
    together with it."""
    new = [key for key in dict.fromkeys(keys) if key not in memory]
    if len(memory) + len(new) > most:
        memory.clear()
        new = list(dict.fromkeys(keys))
    for i in range(0, len(new), group):
        some = new[i:i + group]
        rows = compute(some + some[-1:] * (group - len(some)))
        memory.update((key, row.clone()) for key, row in zip(some, rows))         # a view keeps all the group
    return torch.stack([memory[key] for key in keys])


class TinyVision(nn.Module):
    """A small encoder saved with the rest: (N, 3, S, S) -> CLS (N, Dv), keypoints (N, points, Dv).

    A keypoint stands for a patch. It is the spatial softmax (Levine et al. 2016, arXiv 1504.00702) of a
    learned map over cells of 4 px: the mean place, how high the map peaks, and what the cells show there.
    CLS reads where all of them are and how high. A robot needs to know what is where. `depth` residual
    convolutions let a cell see `depth` cells around it. painted: with the finer stem that painter.py teaches.
    """
    frozen = False
    LARGEST = 400_000              # pictures whose points are remembered, 1.8 GB a process; 0: none
    noise = 0.0                    # added in training to what the points say, in their own spread

    def __init__(self, width, depth=0, points=32, painted=False):
        super().__init__()
        cell, self.painted = width // 2, painted         # features of a cell of 4 px: a block is 5 px wide
        if painted:
            self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, cell, 3, 2, 1))
        else:
            self.stem = nn.Conv2d(3, cell, 4, 4)
        # mean and spread of what the points say, over many pictures: a trunk reads differences
        self.register_buffer("middle", torch.zeros(points, 3 + cell), persistent=painted)
        self.register_buffer("spread", torch.ones(points, 3 + cell), persistent=painted)
        self.maps = nn.Conv2d(cell, points, 1)
        self.around = nn.ModuleList(nn.Conv2d(cell, cell, 3, padding=1) for _ in range(depth))
        self.cls = nn.Linear(3 * points, width)
        self.token, self.identity = nn.Linear(3 + cell, width), nn.Parameter(torch.zeros(points, width))
        self.norm, self.memory = nn.LayerNorm(width), {}

    def eye(self):
        """The state dict of what says where a point is and what is there: all but what the trunk is told."""
        others = "cls.", "token.", "norm.", "identity"
        return {name: x for name, x in self.state_dict().items() if not name.startswith(others)}

    def look(self, images):
        """What cells show (N, Dv / 2, H * W), the points' maps (N, points, H * W), these as shares of 1."""
        cells = F.gelu(self.stem(images))
        for conv in self.around:
            cells = cells + F.gelu(conv(cells))
        maps, cells = self.maps(cells).flatten(2), cells.flatten(2)
        # of equal spread, so that none saturates; 3: even a random map's peak outweighs its 256 cells
        return cells, maps, (3 * F.layer_norm(maps, maps.shape[-1:])).softmax(-1)

    def points(self, images):
        """Of each keypoint (N, points, 3 + Dv / 2): the mean place, column and row [8 px from the middle],
        how high its map peaks, what the cells show there."""
        exact = self.painted and images.device.type in ("cpu", "cuda")          # bf16 points half a px aside
        with torch.autocast(images.device.type, enabled=False) if exact else contextlib.nullcontext():
            cells, maps, heat = self.look(images)
            where = heat @ places(math.isqrt(heat.shape[-1]), heat.device)
            return torch.cat([where, maps.amax(-1, keepdim=True), heat @ cells.transpose(1, 2)], -1)

    def measure(self, images):
        """Take the mean and spread of what the points say of batches of images (N, 3, S, S)."""
        with torch.no_grad():
            points = torch.cat([self.points(x) for x in images])
        self.middle, self.spread = points.mean(0), points.std(0) + 0.02          # a point may say nothing new

    @torch.compiler.disable
    def remembered(self, images, group=16):
        """points(images), computed once for each picture: a frozen eye says the same in every epoch."""
        keys = [hash(image.tobytes()) for image in images.contiguous().numpy()]
        at = {key: i for i, key in enumerate(keys)}
        look = lambda some: self.points(images[[at[key] for key in some]])
        return recall(self.memory, keys, look, group, self.LARGEST)

    def forward(self, images):
        frozen = not self.maps.weight.requires_grad
        again = self.training and frozen and self.LARGEST and images.device.type == "cpu"
        points = ((self.remembered if again else self.points)(images) - self.middle) / self.spread
        if self.training and self.noise:
            points = points + self.noise * torch.randn_like(points)
        where_and_peak = torch.cat([points[..., :2].flatten(1), points[..., 2]], 1)
        return self.cls(where_and_peak), self.norm(self.token(points) + self.identity)


def places(side, device=None):
    """Where side * side cells of 4 px are, row by row: column, row (side * side, 2), as in `points`."""
    line = torch.linspace(-side / 4, side / 4, side, device=device)
    return torch.stack([line.repeat(side), line.repeat_interleave(side)], 1)


class HashText(nn.Module):
    """A text encoder that needs no download: words and word pairs, hashed to fixed random directions, summed.
    Knows which words and pairs occur, not what they mean; enough for a closed set of instructions.
    pairs=False: words alone, no commas. CALVIN judges by sentences that no demonstration has: their words are
    known, their pairs are not, and half of what the trunk then reads is noise (docs/log.md).
    known: the sentences that a policy learned by. Any other is taken for the nearest of them: a policy obeys
    its own by heart, and one between two of them badly.
    """
    frozen = True

    def __init__(self, width, pairs=True, known=()):
        super().__init__()
        self.width, self.pairs, self.known = width, pairs, tuple(known)
        self.register_buffer("device_of", torch.zeros(0), persistent=False)

    def forward(self, sentences):
        rows = [self.features(self.nearest(sentence)) for sentence in sentences]
        return torch.tensor(np.stack(rows), dtype=torch.float32, device=self.device_of.device)

    def features(self, sentence):
        words = self.words(sentence)
        pairs = [" ".join(pair) for pair in zip(words, words[1:])] if self.pairs else []
        return sum((direction(text, self.width) for text in words + pairs), np.zeros(self.width))

    def words(self, sentence):
        return sentence.lower().split() if self.pairs else re.findall(r"\w+", sentence.lower())

    def nearest(self, sentence):
        """The known sentence whose features point most nearly the same way; the sentence itself if it is one
        of them, or if none is known. UserError if no word of it is known."""
        if not self.known or sentence in self.known:
            return sentence
        if not {word for each in self.known for word in self.words(each)} & {*self.words(sentence)}:
            raise UserError(f"no word of '{sentence}' is among those that this policy learned by; one of its "
                            f"sentences: {self.known[0]}")
        asked, known = self.features(sentence), np.stack([self.features(each) for each in self.known])
        return self.known[np.argmax(known @ asked / (np.linalg.norm(known, axis=1) + 1e-6))]


@functools.lru_cache(10_000)
def direction(text, width):
    """A random direction that is always this text's: float64 (width,), not to be changed."""
    return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(width)
