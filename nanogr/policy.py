"""Acting with a GR-1 or GR-2 model, and looking at what it foresees.

    policy = Policy(GR1.from_pretrained("out/finetune"))
    policy.reset()                                          # at a new instruction
    action = policy.step(observation, "open the drawer")    # one of rel_actions, float32 (7,)
"""
import copy
import math
from collections import defaultdict, deque
from functools import partial

import numpy as np
import torch

from model import ModelError, imagenet, patchify, to_pixels


class Policy:
    """Acts step by step with a model: `reset()` at a new instruction, then `step(observation, sentence)`.

    Exactly the action of a full forward over the window, at a fraction of its cost: a frame is encoded once
    and kept while it slides through the window, and of the queries only the last [ACT] is computed. The trunk
    is computed anew at each step: after the window has slid, every frame stands at another timestep, so that
    keys and values of the step before are of no use.
    """

    def __init__(self, model, execute=1, ensemble=None, sample_z=False, graphs=True):
        """execute: so many actions of a predicted chunk are done before the model is asked again. ensemble:
        a number m; every step's action is a mean over all chunks that have one for it, weighted exp(-m i),
        i = 0 the oldest (ACT, Zhao et al. 2023). sample_z: draw a VAE's latent (GR-2) instead of taking 0.
        graphs: on a GPU, replay what a step computes as CUDA graphs, see Graphed.
        """
        if not model.config.robot:
            raise ModelError("this model was pre-trained on video and has no action head: finetune it first "
                             "(train.py --stage finetune)")
        if not 1 <= execute <= model.config.chunk:
            raise ModelError(f"execute must be from 1 to the {model.config.chunk} actions that the model "
                             f"predicts, got {execute}")
        if ensemble is not None and execute > 1:
            raise ModelError("an ensemble asks at every step: leave execute at 1")
        if sample_z and not getattr(model.config, "latent", 0):         # GR-2's
            raise ModelError("this model has no latent to draw")
        self.model, self.execute, self.ensemble, self.sample_z = model.eval(), execute, ensemble, sample_z
        self.device, self.stride = next(model.parameters()).device, model.config.stride
        # asked at every timestep and not between, it need not see what lies between: drawing may be most of
        # what a simulated step costs
        self.blinks = execute == self.stride
        self.every = 1 if self.blinks else self.stride               # frames seen from a timestep to the next
        on = self.device if graphs else torch.device("cpu")
        self.look, self.act = Graphed(partial(look, model), on), Graphed(partial(act, model), on)
        self.reset()

    def another(self):
        """A policy of the same model and settings, with a history of its own."""
        new = copy.copy(self)                            # with the same graphs
        new.reset()
        return new

    def reset(self):
        # a frame's (images (., D), state (D,)): those of the window, and between them what later windows need
        self.history = deque(maxlen=(self.model.config.window - 1) * self.every + 1)
        self.frames, self.sentence, self.language = None, None, None
        self.plan, self.chunks = deque(), deque(maxlen=self.model.config.chunk)

    @property
    def window(self):
        """The window's timesteps of the history, ending now."""
        return list(self.history)[::-self.every][::-1]

    def awake(self, sentence):
        """Whether the next step needs an observation; else it does what was planned, whatever is there."""
        return not (self.blinks and self.plan and sentence == self.sentence)

    def step(self, observation, sentence):
        """observation: dict with uint8 (H, W, 3) images by camera name and robot_obs (15,); sentence: str.
        Returns rel_actions float32 (7,): six of about [-1, 1], not cut off there (nor does the official
        evaluation), gripper -1 (close) or +1 (open).
        """
        return step_together([self], [observation], [sentence])[0]

    def actions(self, observation, sentence):
        """Like step, for the whole predicted chunk: arm (K, 6) and gripper logits (K,) as numpy arrays. Who
        executes as many as a timestep has steps must see timesteps alone here."""
        arm, gripper = act_together([self], [observation], [sentence])
        return arm[0], gripper[0]

    def remember(self, frames, images, state, sentence):
        """Take in one more step: frames {camera: (1, 3, H, W)}, encoded images (., D) and state (D,)."""
        if sentence != self.sentence:
            self.sentence, self.language = sentence, self.model.encode_language([sentence])
            if self.blinks and self.plan:                # it was not to look yet: no timestep lies so near
                self.history.clear()
            self.plan.clear()
            self.chunks.clear()
        self.frames = frames
        self.history.append((images, state))

    def take(self, arm, gripper):
        """Take in a chunk that the model predicts now."""
        if self.ensemble is None:
            self.plan.extend(zip(arm[:self.execute], gripper[:self.execute]))
            return
        self.chunks.append((arm, gripper))
        ages = np.arange(len(self.chunks))[::-1]                             # the oldest chunk comes first
        weight = np.exp(-self.ensemble * np.arange(len(ages)))
        mean = lambda k: np.average([chunk[k][age] for chunk, age in zip(self.chunks, ages)], 0, weight)
        self.plan.append((mean(0), mean(1)))

    @torch.no_grad()
    def predicted_frames(self):
        """What the model foresees after the last frame it looked at: {camera: uint8 (S, S, 3)}, see draw."""
        model, config = self.model, self.model.config
        if not config.video:
            raise ModelError("this model was trained without video prediction (no [OBS])")
        if not self.history:
            raise ModelError("nothing was seen yet: call step before predicted_frames")
        never, last = torch.arange(0), torch.tensor([len(self.window) - 1])
        queries, _ = model.queries(never, last)
        now = {c: to_pixels(self.frames[c], side)[:, None] for c, side in config.cameras.items()}
        out = model.heads(ask(model, queries, *histories([self])), 0, now)
        return {c: to_images(x)[0, 0].cpu().numpy() for c, x in pictures(model, out, now).items()}


def to_action(arm, gripper):
    """A step's arm (6,) and gripper logit -> its rel_actions (7,)."""
    return np.append(arm, 1.0 if gripper > 0 else -1.0).astype(np.float32)


def step_together(policies, observations, sentences):
    """The actions (7,) of B policies of one model after one more observation each; who still has actions of
    an earlier chunk to execute is not asked.
    """
    awake = [each for each in zip(policies, observations, sentences) if each[0].awake(each[2])]
    if awake:
        look_together(*zip(*awake))
    asked = [policy for policy in policies if not policy.plan]
    for policy, arm, gripper in zip(asked, *predict_together(asked)) if asked else ():
        policy.take(arm, gripper)
    return [to_action(*policy.plan.popleft()) for policy in policies]


def act_together(policies, observations, sentences):
    """What B policies of one model predict after one more observation each: arm (B, K, 6) and gripper logits
    (B, K) as numpy arrays.
    """
    look_together(policies, observations, sentences)
    return predict_together(policies)


@torch.no_grad()
def look_together(policies, observations, sentences):
    """B policies of one model take in an observation each. All frames are encoded at once."""
    if not all(sentence.strip() for sentence in sentences):
        raise ModelError("the instruction is empty: say what the robot should do")
    model, device = policies[0].model, policies[0].device
    frames = {c: torch.tensor(np.stack([seen[c] for seen in observations])).to(device).permute(0, 3, 1, 2)
              for c in model.config.cameras}
    robot_obs = np.stack([np.asarray(seen["robot_obs"], np.float32) for seen in observations])
    images, states = policies[0].look(torch.tensor(robot_obs).to(device), *frames.values())
    for i, (policy, sentence) in enumerate(zip(policies, sentences)):
        policy.remember({c: x[i:i + 1] for c, x in frames.items()}, images[i], states[i], sentence)


@torch.no_grad()
def predict_together(policies):
    """What B policies of one model predict now: arm (B, K, 6) and gripper logits (B, K) as numpy arrays.
    Windows of one length are asked at once.
    """
    model, config, by_length = policies[0].model, policies[0].model.config, defaultdict(list)
    for i, policy in enumerate(policies):
        by_length[len(policy.window)].append(i)
    arm = np.empty((len(policies), config.chunk, model.action_head.arm.out_features), np.float32)
    gripper = np.empty((len(policies), config.chunk), np.float32)
    latent = config.latent if policies[0].sample_z else 0
    for rows in by_length.values():
        drawn = [torch.randn(len(rows), latent, device=policies[0].device)] if latent else []
        said = policies[0].act(*histories([policies[i] for i in rows]), *drawn)
        arm[rows], gripper[rows] = (x.float().cpu().numpy() for x in said)
    return arm, gripper


def histories(policies):
    """What B policies with windows of one length know: language (B, D), images (B, T, ., D) and states
    (B, T, D).
    """
    images, states = (torch.stack([torch.stack(x) for x in each])
                      for each in zip(*(zip(*policy.window) for policy in policies)))
    return torch.cat([policy.language for policy in policies]), images, states


# what a step computes, as functions of tensors alone
def look(model, robot_obs, *frames):
    """robot_obs (B, 15), uint8 frames (B, 3, H, W) of each camera -> images (B, ., D), states (B, D)."""
    sides = model.config.cameras
    pixels = {camera: to_pixels(x, sides[camera]) for camera, x in zip(sides, frames)}
    return model.encode_images(pixels), model.encode_state(robot_obs)


def act(model, language, images, states, *drawn):
    """See histories; drawn: a latent (B, z), or none -> arm (B, K, 6), gripper logits (B, K)."""
    return model.action_head(ask(model, model.query_act, language, images, states), *drawn)


def ask(model, queries, language, images, states):
    """Answers (B, R, D) to queries (R, D) put at the last step of B windows, see histories."""
    context = model.context(language, images, states)
    last = torch.full((len(queries),), images.shape[1] - 1, device=queries.device)
    return model.trunk(context, queries.expand(len(images), -1, -1), last)


class Graphed:
    """A function of tensors that returns tensors. On a GPU its kernels are recorded, once for each shape and
    type of the inputs, and replayed as one CUDA graph: a step is hundreds of small kernels, and to ask for
    them one by one takes longer than to compute them. A large batch is computed as it is, and so is all on a
    CPU. The function must not look at a value. Weights may change in place; for a model that was moved,
    compiled or put into another mode since, make a new policy. Not for several threads or streams.
    """
    LARGEST = 4                    # rows: a graph for each batch size holds memory, and more rows need none

    def __init__(self, function, device):
        self.function, self.on_gpu, self.graphs = function, device.type == "cuda", {}
        self.stream = self.pool = None

    @torch.no_grad()
    def __call__(self, *inputs):
        if not self.on_gpu or len(inputs[0]) > self.LARGEST:
            return self.function(*inputs)
        cast_to = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = cast_to, *((x.shape, x.dtype) for x in inputs)
        if key not in self.graphs:
            # a cast that autocast keeps would be gone when it ends, and the graph would still read it
            with torch.autocast("cuda", cast_to, enabled=cast_to is not None, cache_enabled=False):
                self.graphs[key] = self.record([x.clone() for x in inputs])
        graph, held, out = self.graphs[key]
        for mine, given in zip(held, inputs):
            mine.copy_(given)
        graph.replay()
        return tuple(x.clone() for x in out)             # the next replay writes over them

    def record(self, held):
        """-> (graph, the inputs that it reads, the outputs that it writes). All graphs share their memory:
        they are replayed one after the other, and what they write is copied at once.
        """
        with torch.cuda.device(held[0].device):
            if self.stream is None:
                self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            now, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self.stream.wait_stream(now)
            with torch.cuda.stream(self.stream):         # constants and work space, which a first call makes
                self.function(*held)
            now.wait_stream(self.stream)
            try:
                with torch.cuda.graph(graph, self.pool, self.stream):
                    out = self.function(*held)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ModelError("this model's step can't be recorded as a CUDA graph, for something in it "
                                 "waits for the GPU: take Policy(..., graphs=False)") from error
        return graph, held, out


# ------------------------------------------------------------------------------------------- foresight
def pictures(model, out, now):
    """A model's predictions of future frames as normalised pixels {camera: (..., 3, S, S)}; now: likewise the
    frames at which it was asked. GR-2's codes are decoded, GR-1's patches drawn.
    """
    if hasattr(model, "draw"):
        return {camera: model.draw(out[camera]) for camera in model.config.cameras}
    return {camera: draw(out[camera].float(), now[camera], model.config) for camera in model.config.cameras}


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
def change_errors(drawn, now, future, is_true, patch):
    """Does the model foresee better than "nothing will move"? Tensor (cameras, 2): squared error of the
    predicted frame and of copying the present one, summed over the patches that change (by 5 of 255 gray
    levels on average); a ratio below 1 beats copying. drawn, now, future: normalised pixels {camera:
    (B, T, 3, S, S)}, predicted and true; is_true: bool (B, T), whether the clip has that future frame.
    """
    sums = []
    for camera in drawn:
        gray = patchify(imagenet("std", is_true.device).expand_as(now[camera]), patch)          # to 0..1
        seen, before, after = (patchify(x[camera], patch) * gray for x in (drawn, now, future))
        changed = ((after - before).abs().mean(-1) > 5 / 255) & is_true[..., None]
        sums.append(torch.stack([((x - after) ** 2).mean(-1)[changed].sum() for x in (seen, before)]))
    return torch.stack(sums)
