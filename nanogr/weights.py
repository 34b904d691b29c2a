"""Checkpoint files: read without running code, loaded with every tensor accounted for, written whole.

A checkpoint of train.py is a directory: model.safetensors (all that is trained) and config.json (keys model,
encoders, train, step). The authors' files are torch's; OFFICIAL_NAMES says what their tensors are here.
In order: any weights file, ours, the authors'. Every mistake is a UserError that names what does not fit.
"""
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import re
import struct
import types
import warnings
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanogr.clips import looks_like
from nanogr.common import UserError, read_json, write_whole


class Inert:
    """Stands for whatever a file names beside tensors: takes any arguments and does nothing."""
    __init__ = __setstate__ = __setitem__ = append = extend = add = update = lambda self, *_, **__: None
    __repr__ = lambda self: "an object of some program"


class InertUnpickler(pickle.Unpickler):
    """Makes tensors and plain containers. A pickle runs code by naming what to call: whatever else it names
    is Inert, so that a file's tensors can be had without its optimizer, paths or callbacks.
    """
    REAL = {("collections", "OrderedDict"): collections.OrderedDict, ("torch", "Size"): torch.Size,
            **{("torch._utils", name): getattr(torch._utils, name)
               for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")}}

    def find_class(self, module, name):
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self.REAL.get((module, name), Inert)


# torch.load builds its own unpickler on this one, and makes storages itself
inert_pickle = types.SimpleNamespace(__name__="inert_pickle", Unpickler=InertUnpickler)


def read_weights(path):
    """Tensors of a .safetensors or torch file by name; never runs code that the file may hold."""
    if not os.path.isfile(path):
        raise UserError(f"no such file: {path}")
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")              # torch's guesses; ours is the line that is printed
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:               # it holds more than tensors, as Lightning's files do
                if not zipfile.is_zipfile(path):
                    raise
                state = torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert_pickle)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError,
            AssertionError, MemoryError, RecursionError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is not a readable weights file ({type(error).__name__})") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not a plain weights file; it was not opened further") from error
    for key in "state_dict", "model":                    # where the authors, and MAE's, put them
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    other = [state] if not isinstance(state, dict) else [
        k for k, v in state.items() if not (isinstance(k, str) and torch.is_tensor(v))]
    if other or not state:
        raise UserError(f"{path} is no weights file: it holds "
                        + (f"{str(other[0])[:40]!r}, which is no tensor" if other else "no tensor"))
    return state


# ----------------------------------------------------------------------------------------- checkpoints
def read_checkpoint(path):
    """Tensors by name of a directory that train.py wrote, or of a file, see read_weights. Raises UserError
    if they are no GR-1's: callers read first, and fetch encoders and build a model for a good file only.
    """
    state = read_weights(os.path.join(path, "model.safetensors") if os.path.isdir(path) else path)
    # what DistributedDataParallel and torch.compile put in front of names
    state = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()}
    checkpoint_kind(state, path)
    return state


def read_config(path):
    """config.json of a checkpoint directory (or of its model.safetensors) as a dict with keys model,
    encoders, train, step; {} for any other file.
    """
    if not os.path.exists(path):
        raise UserError(f"no checkpoint in '{path}': no such file or directory; train.py makes one")
    name = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    part = os.path.basename(path)
    if part == "resume.pt":
        raise UserError(f"{path} is for train.py --resume; name the directory that it is in")
    if part == "config.json":
        raise UserError(f"{path} holds settings alone; name the directory that it is in")
    if part == "model.safetensors" and not os.path.isfile(name):
        raise UserError(f"{path}: config.json must lie beside it, as train.py wrote it")
    if os.path.isfile(path) and not (os.path.basename(path) == "model.safetensors" and os.path.isfile(name)):
        return {}
    if not os.path.isfile(name):
        train = "train one with train.py, or name its directory with --checkpoint"
        raise UserError(f"no checkpoint in '{path}': {looks_like(path) or train}")
    config = read_json(name, "take another checkpoint, or train this one again")
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{name} is no checkpoint's: it has no settings under 'model'")
    return config


def save_checkpoint(path, model, **info):
    """Write model.safetensors and config.json into directory path, see common.write_whole."""
    os.makedirs(path, exist_ok=True)
    state = {k: v.contiguous() for k, v in model.trained_state().items()}
    config = json.dumps({"model": dataclasses.asdict(model.config), **info}, indent=1)
    write_whole(os.path.join(path, "model.safetensors"), lambda file: save_file(state, file))
    write_whole(os.path.join(path, "config.json"), config.encode())


def fingerprint(checkpoint):
    """What tells a checkpoint of train.py's or a file of the authors' from any other."""
    path = pathlib.Path(checkpoint)
    step = read_config(checkpoint).get("step")
    content = digest(path / "model.safetensors" if path.is_dir() else path)
    return f"{'' if step is None else f'step {step}, '}{content}"


def digest(path):
    content, path = hashlib.sha256(), path / "tokenizer.safetensors" if path.is_dir() else path
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            content.update(part)
    return f"sha256 {content.hexdigest()[:16]}"


def load(model, state, path, fresh=(), may_miss=()):
    """Load the tensors of a checkpoint into a model, see read_checkpoint. The parts `fresh` start anew though
    the file has them, those of may_miss where it has not.
    Returns the report: what was loaded, what was left out and why, what starts fresh.
    """
    count, (kind, lacks) = len(state), checkpoint_kind(state, path, model.config.cameras)
    if kind == OURS:
        left = {name: STARTS_FRESH for name in state if name.split(".")[0] in fresh}
        state = {name: tensor for name, tensor in state.items() if name not in left}
    elif not hasattr(model, "resampler"):
        raise UserError(f"{path} is {kind}, from which a GR-2 cannot start")
    else:
        state, left = translate(state, model, path, fresh)
    missing = load_strictly(model, state, path, (*lacks, *may_miss, *fresh))
    lines = [f"{count - len(left)} of the {count} tensors in {path}, {kind}"]
    for why in dict.fromkeys(left.values()):
        names = [name for name in left if left[name] == why]
        lines += [f"  left out {len(names)} ({names[0]}{', ...' if names[1:] else ''}): {why}"]
    if missing:
        in_part = {name.split(".")[0] for name in state}                   # the others are told by their part
        names = dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) if name.split(".")[0] in in_part
                              else name.split(".")[0] for name in missing)
        lines += [f"  not loaded, so random until trained: {', '.join(names)}"]
    return "\n".join(lines)


def load_strictly(model, state, source, may_miss=()):
    """Load tensors {name: tensor}; names that start with one of may_miss may be absent, start fresh and are
    returned. UserError names the first tensor that does not fit.
    """
    own = model.trained_state()
    missing = [k for k in own if k not in state]
    wrong = [k for k in missing if not k.startswith(tuple(may_miss))]
    extra = [k for k in state if k not in own]
    if wrong or extra:
        raise UserError(f"{source} is a checkpoint of another model: "
                        + (f"it lacks {wrong[0]}" if wrong else f"this model has no {extra[0]}"))
    for k in state:
        if state[k].shape != own[k].shape:
            raise UserError(f"{source} is a checkpoint of another shape: {k} is {tuple(state[k].shape)}, "
                            f"this model's is {tuple(own[k].shape)}")
    model.load_state_dict(state, strict=False)
    return missing


# ---------------------------------------------------------------------------------- the authors' files
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
        raise UserError(f"{path} is no GR-1 checkpoint, ours or the authors' "
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
    Raises UserError that names the first key or shape which no rule explains.
    """
    ours, left, own = {}, {}, model.trained_state()
    for key, tensor in state.items():
        name = key.removeprefix("model.")
        why = next((why for pattern, why in LEFT_OUT.items() if re.match(pattern, name)), None)
        if name == "decoder_pos_embed" and model.config.video:
            check_positions(tensor, model, f"{path}: {key}")
        if why:
            left[key] = why
            continue
        for part, value in split_qkv(name, tensor).items():
            target = our_name(part)
            anew = target and target.split(".")[0] in fresh
            why = STARTS_FRESH if anew else switched_off(target, model.config)
            if why:
                left[key] = why                          # of attn.c_attn q and kv share their part, so both
                continue
            if target not in own or target in ours:
                raise UserError(f"{path}: this model has no place for {key} {tuple(tensor.shape)}")
            shape = own[target].shape                    # theirs may have more axes, of length 1, in front
            if value.numel() != shape.numel() or value.shape[value.dim() - len(shape):] != shape:
                raise UserError(f"{path} is a checkpoint of another shape: {key} is {tuple(tensor.shape)}, "
                                f"this model's {target} {tuple(shape)}")
            ours[target] = value.reshape(shape)
    return ours, left


def split_qkv(name, tensor):
    """GPT-2's matrices turned to (out, in); c_attn as q and kv: {name: tensor}."""
    tensor = tensor.T if ".h." in name and tensor.dim() == 2 else tensor
    if ".c_attn." not in name or not tensor.dim():
        return {name: tensor}
    parts = zip(("q", "kv"), tensor.tensor_split([len(tensor) // 3]))
    return {name.replace("c_attn", part): value for part, value in parts}


def check_positions(table, model, where):
    """Raise UserError unless the authors' table of sin-cos positions is the one computed here."""
    own = next(getattr(model.video_head, f"positions_{camera}") for camera in model.config.cameras)
    if table.shape[1:] != own.shape or not torch.allclose(table[0].float(), own, atol=1e-2):   # may be bf16
        raise UserError(f"{where} {tuple(table.shape)} is not the table of positions {tuple(own.shape)} "
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
