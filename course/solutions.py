"""
One answer to each exercise in course/exercises.py. Read it after you have tried.

`pytest course/test_exercises.py --solutions` grades this file.
"""
import numpy as np
import torch

from model import attend, patchify, to_pixels


def token_table(config):
    table = [("language", 1, False)]
    if config.robot:
        table.append(("state", 1, False))
    for camera in config.cameras:
        table.append((f"{camera} latents", config.latents, False))
        table.append((f"{camera} CLS", 1, False))
    if config.robot:
        table.append(("[ACT]", config.chunk, True))
    if config.video:
        for camera in config.cameras:
            table.append((f"[OBS] {camera}", config.latents + 1, True))
    return table


def attention_mask(steps, context, query_steps):
    token = torch.arange(steps * context)
    causal = token[:, None] >= token[None, :]                                     # (T * C, T * C)
    asked = token[None, :] // context <= torch.tensor(query_steps)[:, None]       # (R, T * C)
    return torch.cat([causal, asked])


def resampler_layer(layer, latents, patches):
    h = layer.norm_latents(latents)                                               # (N, L, Dv)
    seen = torch.cat([layer.norm_patches(patches), h], dim=1)                     # (N, P + L, Dv)
    keys, values = layer.kv(seen).chunk(2, dim=-1)                                # (N, P + L, E) each
    latents = latents + layer.proj(attend(layer.q(h), keys, values, layer.heads))
    return latents + layer.mlp(layer.norm_mlp(latents))


def video_target(pixels, patch):
    target = patchify(pixels, patch)                                              # (..., P, patch^2 * 3)
    mean, spread = target.mean(-1, keepdim=True), target.std(-1, keepdim=True)
    return (target - mean) / (spread + 1e-6)


@torch.no_grad()
def policy_step(model, observations, sentence):
    window = observations[-model.config.window:]
    pixels = {}
    for camera, side in model.config.cameras.items():
        frames = torch.tensor(np.stack([seen[camera] for seen in window]))        # (T, H, W, 3)
        pixels[camera] = to_pixels(frames.permute(0, 3, 1, 2)[None], side)        # (1, T, 3, S, S)
    robot_obs = torch.tensor(np.stack([seen["robot_obs"] for seen in window]))[None].float()
    out = model(pixels, [sentence], robot_obs)
    arm, gripper = out["arm"][0, -1, 0], out["gripper"][0, -1, 0]
    return [*arm.tolist(), 1.0 if gripper > 0 else -1.0]
