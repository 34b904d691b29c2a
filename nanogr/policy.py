"""Acting with a GR-1 model, and looking at what it foresees.

    policy = Policy(GR1.from_pretrained("out/finetune"))
    policy.reset()                                          # at a new instruction
    action = policy.step(observation, "open the drawer")    # one of rel_actions, float32 (7,)
"""
import math
from collections import defaultdict, deque

import numpy as np
import torch

from model import ModelError, imagenet, patchify, to_pixels


class Policy:
    """Acts step by step with a GR1 model: `reset()` at a new instruction, then `step(observation, sentence)`.

    Exactly the action of a full forward over the window, at a fraction of its cost: a frame is encoded once
    and kept while it slides through the window, and of the queries only the last [ACT] is computed. The trunk
    is computed anew at each step: after the window has slid, every frame stands at another timestep, so that
    keys and values of the step before are of no use.
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

    def step(self, observation, sentence):
        """observation: dict with uint8 (H, W, 3) images by camera name and robot_obs (15,); sentence: str.
        Returns rel_actions float32 (7,): six of about [-1, 1], not cut off there (nor does the official
        evaluation), gripper -1 (close) or +1 (open).
        """
        return to_action(*self.actions(observation, sentence))

    def actions(self, observation, sentence):
        """Like step, for the whole predicted chunk: arm (K, 6) and gripper logits (K,) as numpy arrays."""
        arm, gripper = act_together([self], [observation], [sentence])
        return arm[0], gripper[0]

    def remember(self, frames, images, state, sentence):
        """Take in one more step: frames {camera: (1, 3, H, W)}, encoded images (., D) and state (D,)."""
        if sentence != self.sentence:
            self.sentence, self.language = sentence, self.model.encode_language([sentence])
        self.frames = frames
        self.history.append((images, state))

    @torch.no_grad()
    def predicted_frames(self):
        """The future frame that the model foresees at the last step: {camera: uint8 (S, S, 3)}, see draw."""
        model, config = self.model, self.model.config
        if not config.video:
            raise ModelError("this model was trained without video prediction (no [OBS])")
        if not self.history:
            raise ModelError("nothing was seen yet: call step before predicted_frames")
        never, last = torch.arange(0), torch.tensor([len(self.history) - 1])
        queries, _ = model.queries(never, last)
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
        policy.remember({c: x[i:i + 1] for c, x in frames.items()}, images[i], states[i], sentence)
        by_length[len(policy.history)].append(i)
    arm = np.empty((len(policies), config.chunk, model.action_head.arm.out_features), np.float32)
    gripper = np.empty((len(policies), config.chunk), np.float32)
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


# ------------------------------------------------------------------------------------------- foresight
def draw(prediction, now, config):
    """Predicted patches (..., P, patch^2 * 3) -> normalised pixels (..., 3, S, S). What a patch-normalised
    prediction lacks, each patch's mean and spread, is taken from the frame observed `now` (..., 3, S, S),
    never from the future frame, which would leak the answer.
    """
    if config.norm_pixels:
        seen = patchify(now, config.patch)
        prediction = prediction * (seen.var(-1, keepdim=True).sqrt() + 1e-6) + seen.mean(-1, keepdim=True)
    return unpatchify(prediction, config.patch)


def unpatchify(patches, patch):
    """Inverse of patchify for square images: (..., P, patch * patch * 3) -> (..., 3, S, S)."""
    side = math.isqrt(patches.shape[-2])
    x = patches.unflatten(-1, (patch, patch, 3)).unflatten(-4, (side, side))
    return torch.einsum("...rkpqc->...crpkq", x).flatten(-4, -3).flatten(-2)


def to_images(pixels):
    """Undo to_pixels' normalisation: float (..., 3, S, S) -> uint8 (..., S, S, 3)."""
    colors = pixels * imagenet("std", pixels.device) + imagenet("mean", pixels.device)
    return (colors.clamp(0, 1) * 255).round().byte().movedim(-3, -1)


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
