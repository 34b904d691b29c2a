"""
Your turn: five parts of GR-1 to write. `pytest course/test_exercises.py` grades them against model.py.

Each function says what it takes and returns. Replace its `raise` by your lines; two to twelve will do.
Look at model.py afterwards, not before. One answer to each is in course/solutions.py.
"""
import numpy as np                                       # noqa: F401
import torch                                             # what you will need most

from model import attend, patchify, to_pixels            # noqa: F401    small parts that you may use


def todo(what):
    """What an exercise raises until it is written."""
    return NotImplementedError(f"{what}. It is in course/exercises.py.")


# ------------------------------------------------------------------------------------------- lesson 2
def token_table(config):
    """The tokens of one timestep, in order: a list of (name, count, is_query).

    config.robot: is there a robot; config.cameras: a dict whose keys are the cameras' names;
    config.latents: L; config.chunk: K; config.video: is [OBS] asked.

    Names and order: "language", "state", then for each camera "CAMERA latents" (L of them) and "CAMERA CLS",
    then "[ACT]" (K of them), then for each camera "[OBS] CAMERA" (L + 1 of them). "state" and "[ACT]" are
    there only with a robot, "[OBS]" only with video. [ACT] and [OBS] are queries.
    """
    raise todo("Write token_table: list the tokens of a timestep (lesson 2, course/2_tokens.md)")


def attention_mask(steps, context, query_steps):
    """Who may look at whom: bool (steps * context + R, steps * context), True = may attend.

    steps: T; context: C, context tokens of a timestep; query_steps: a list of R numbers, the timestep of each
    query. Rows: all context tokens, step by step, then the queries. Columns: the context tokens.
    A context token sees itself and every one before it. A query sees all context tokens of its own timestep
    and of those before.
    """
    raise todo("Write attention_mask: compare tokens' and timesteps' numbers (lesson 2, course/2_tokens.md)")


# ------------------------------------------------------------------------------------------- lesson 3
def resampler_layer(layer, latents, patches):
    """One layer of the resampler, plain: latents (N, L, Dv), patches (N, P, Dv) -> latents (N, L, Dv).

    layer has the parts: norm_latents, norm_patches, q (Dv -> E), kv (Dv -> 2 E: keys, then values), proj
    (E -> Dv), norm_mlp, mlp, and heads, their number. attend(q, k, v, heads) is multi-head attention.

    Queries come from the normalised latents. Keys and values come from the normalised patches, followed by
    the normalised latents. Then the MLP. Both steps are residual.
    """
    raise todo("Write resampler_layer: norm, cat, attend, proj, mlp (lesson 3, course/3_resampler.md)")


# ------------------------------------------------------------------------------------------- lesson 4
def video_target(pixels, patch):
    """What [OBS] should say: pixels (..., 3, S, S) -> (..., P, patch * patch * 3), patch by patch.

    patchify(pixels, patch) cuts the picture. Of each patch subtract the mean over all its numbers and divide
    by their standard deviation (of a sample: n - 1) plus 1e-6.
    """
    raise todo("Write video_target: normalise each patch by itself (lesson 4, course/4_losses.md)")


# ------------------------------------------------------------------------------------------- lesson 7
@torch.no_grad()
def policy_step(model, observations, sentence):
    """The action to execute now: a list of 7 floats, by one full forward over the window.

    observations: all that was seen since the instruction came, oldest first. Each is a dict with uint8
    (H, W, 3) arrays by camera name and robot_obs (15,). The model sees the last model.config.window of them.
    model.config.cameras: {camera: side in px}. model(pixels, [sentence], robot_obs) wants pixels
    {camera: (1, T, 3, S, S)}, made by to_pixels(frames uint8 (1, T, 3, H, W), side), and robot_obs
    (1, T, 15), float; it returns "arm" (1, T, K, 6) and "gripper" logits (1, T, K).

    Take the first action of the chunk at the last timestep. Its gripper is +1 where the logit is above 0,
    else -1.
    """
    raise todo("Write policy_step: last window, one forward, last timestep (lesson 7, course/7_acting.md)")
