"""
GR-2 in one short file: what changes from GR-1. Read model.py first.

"GR-2: A Generative Video-Language-Action Model with Web-Scale Knowledge for Robot Manipulation", Cheang et
al. 2024, arXiv 2410.06158. Its authors released neither code nor weights, and the paper leaves much open
(layers, loss weights, the conditional VAE): what was chosen here, and why, is in docs/gr2.md.

    picture in    codes of a frozen tokenizer (nanogr/tokenizer.py), not MAE's features: a code's vector, a
                  linear map, a fixed place, a camera's vector. No resampler: a cell of it is a token.
    picture out   a softmax over codes for each cell of the next frame, not pixels. The next frame is the next
                  of the window, `stride` frames on: so what is foreseen can be fed in again (roll_out).
    action out    a conditional VAE: a latent says which of several good ways is meant, and one [ACT] answers
                  with k actions in a row. When acting, the latent is 0, its most likely value.

The mask, the trunk, the language, the state, the timesteps and the order of tokens are GR-1's.

    python gr2.py [--preset gr2-tiny] [--stage pretrain]    prints the token layout, the mask, the parameters

Shapes are model.py's, and: P codes of a picture, m merged side (m * m codes are one token), K codes in the
book, k actions of a chunk, z latent.
"""
import argparse
import dataclasses
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

import model as gr1
from model import (GR1, DecoderBlock, GR1Config, ModelError, Trunk, check_config, count_parameters, describe,
                   known, masked_mean, pick, sincos_positions)
from nanogr import weights
from nanogr.encoders import build_text
from nanogr.tokenizer import VQGAN, TinyTokenizer, open_tokenizer, same_tokenizer, tokenizer_of


# ----------------------------------------------------------------------------------- config and tokens
@dataclass
class GR2Config:
    """Sizes and switches. The defaults are our fit to the paper's 95 M trained parameters (docs/gr2.md)."""
    preset: str = "gr2-b"
    cameras: dict = field(default_factory=lambda: {"rgb_static": 224, "rgb_gripper": 224})  # -> side fed in
    robot: bool = True             # robot state in, [ACT] out; False for video without a robot
    video: bool = True             # [OBS] queries
    window: int = 5                # T, timesteps the model sees
    stride: int = 3                # frames from one timestep to the next; [OBS] asks for the next timestep's
    chunk: int = 5                 # k, actions predicted from each timestep, one a frame
    width: int = 768               # D
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1
    text_dim: int = 512            # Dt
    codes: int = 1024              # K, the tokenizer's
    code_dim: int = 256            # length of a code's vector, the tokenizer's
    cell: int = 16                 # a code stands for so many px squared, the tokenizer's
    merge: int = 1                 # m: so many codes squared are one token
    head_width: int = 576          # of the blocks that answer [OBS]: one for all sizes, see docs/gr2.md
    decoder_depth: int = 2
    decoder_heads: int = 16
    act_width: int = 128           # of the action VAE
    act_depth: int = 4             # of its encoder, and of its decoder
    act_heads: int = 8
    latent: int = 32               # z; 0: no VAE, [ACT] is decoded as it is
    copy_gate: bool = False        # [OBS] also says how likely each code stays as it is

    future, norm_pixels, resampler_depth = 1, False, 1   # what GR-1's code asks for and GR-2 has no choice in

    @property
    def patch(self):
        return self.cell * self.merge                    # side of a token [px]

    def __post_init__(self):
        check_config(self)
        if self.head_width % 4 or self.act_width % self.act_heads:
            raise ModelError(f"head_width {self.head_width} must be a multiple of 4, act_width "
                             f"{self.act_width} of act_heads {self.act_heads}")

    told = upright = False         # GR-1's switches of these names
    from_dict = classmethod(GR1Config.from_dict.__func__)


PRESETS = {                        # trained parameters in pre-training; the paper's 30, 95, 312 and 719 M
    "gr2-s": dict(preset="gr2-s", width=384),                                            # GR-1's trunk
    "gr2-b": dict(),                                                                     # GPT-2's
    "gr2-l": dict(preset="gr2-l", width=1024, layers=24, heads=16),                      # GPT-2 medium's
    "gr2-xl": dict(preset="gr2-xl", width=1280, layers=36, heads=20),                    # GPT-2 large's
    "gr2-tiny": dict(preset="gr2-tiny", cameras={"rgb_static": 64, "rgb_gripper": 32}, window=3, width=96,
                     layers=4, heads=4, dropout=0.0, text_dim=128, codes=1000, code_dim=4, cell=8, merge=2,
                     head_width=96, decoder_heads=4, act_width=64, act_depth=2, act_heads=4, latent=8,
                     copy_gate=True),
}


def preset_config(name, stage="finetune", /, **changes):
    """GR2Config of a preset, with changes. Stage "pretrain" leaves one camera, no robot, every frame."""
    known("preset", name, PRESETS)
    config = GR2Config.from_dict({**PRESETS[name], **changes})
    if stage == "finetune":
        return config
    if changes.get("robot") or changes.get("video") is False:
        raise ModelError("pre-training has no robot and always predicts video: leave these settings out")
    first, stride = list(config.cameras.items())[:1], changes.get("stride", 1)
    return dataclasses.replace(config, cameras=dict(first), stride=stride, robot=False, video=True)


def token_table(config):
    """The tokens of one timestep, in order: a list of (name, count, is_query)."""
    count = {camera: (side // config.patch) ** 2 for camera, side in config.cameras.items()}
    table = [("language", 1, False)] + [("state", 1, False)] * config.robot
    table += [(f"{camera} codes", n, False) for camera, n in count.items()]
    table += [("[ACT]", 1, True)] * config.robot
    return table + [(f"[OBS] {camera}", n, True) for camera, n in count.items()] * config.video


def merge_cells(x, m):
    """Cells (N, P, E) of a square picture, row by row -> (N, P / m^2, m^2 E): m x m neighbours as one."""
    side = math.isqrt(x.shape[1]) // m
    x = x.unflatten(1, (side, m, side, m))                                   # rows, i, columns, j
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


def unmerge_cells(x, m):
    """Inverse of merge_cells: (N, P / m^2, m^2 E) -> (N, P, E)."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(2, (m, m, -1)).unflatten(1, (side, side))                # rows, columns, i, j
    return x.transpose(2, 3).flatten(1, 4)


# ----------------------------------------------------------------------------------------------- heads
class CodeHead(nn.Module):
    """[OBS] answers (N, P / m^2, D) -> logits over codes (N, P, K) of the next frame. One for all cameras.

    The codes of a picture are answered at once, not one after the other: the mask, the speed and the policy
    stay GR-1's. Two blocks in which the cells see each other let them agree.
    """
    def __init__(self, config):
        super().__init__()
        width, self.merge, self.copy_gate = config.head_width, config.merge, config.copy_gate
        self.embed = nn.Linear(config.width, config.merge ** 2 * width)
        self.blocks = nn.ModuleList(DecoderBlock(width, config.decoder_heads)
                                    for _ in range(config.decoder_depth))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, config.codes)
        if config.copy_gate:
            self.embed_now, self.stays = nn.Linear(config.code_dim, width), nn.Linear(width, 1)
        for camera, side in config.cameras.items():
            self.register_buffer(f"places_{camera}", sincos_positions(side // config.cell, width), False)

    def forward(self, x, camera, now=None, vectors=None):
        """now (N, P), vectors (N, P, code_dim): the present frame's codes, for the copy gate."""
        x = unmerge_cells(self.embed(x), self.merge) + getattr(self, f"places_{camera}")
        x = x + self.embed_now(vectors) if self.copy_gate else x
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits = self.logits(x)
        return logits.scatter_add(-1, now[..., None], self.stays(x)) if self.copy_gate else logits


class ActionVAE(nn.Module):
    """[ACT]'s answer (..., 1, D) -> arm (..., k, 6) in rel_actions units, gripper logits (..., k).

    In training an encoder sees the true actions and says by a latent which of several good ways they take;
    the decoder gets the latent beside the answer. Its cost, the KL from N(0, I) in nats, keeps it honest:
    what the answer tells anyway, the latent need not. `forward` never calls the encoder: the latent is 0.
    """
    def __init__(self, config):
        super().__init__()
        width, self.latent = config.act_width, config.latent
        blocks = lambda: nn.ModuleList(DecoderBlock(width, config.act_heads) for _ in range(config.act_depth))
        if config.latent:
            self.embed_actions, self.unknown = nn.Linear(7, width), nn.Parameter(torch.zeros(width))
            self.encoder_places = nn.Parameter(torch.zeros(1 + config.chunk, width))   # of CLS, actions
            self.encoder, self.encoder_norm = blocks(), nn.LayerNorm(width)
            self.posterior = nn.Linear(width, 2 * config.latent)
            self.embed_latent = nn.Linear(config.latent, width)
        self.embed_act = nn.Linear(config.width, width)
        self.places = nn.Parameter(torch.zeros(config.chunk, width))
        self.blocks, self.norm = blocks(), nn.LayerNorm(width)
        self.arm, self.gripper = nn.Linear(width, 6), nn.Linear(width, 1)

    def forward(self, act, z=None):
        """act (..., 1, D), z (..., z) or None for zeros -> arm (..., k, 6), gripper logits (..., k)."""
        x = self.embed_act(act).flatten(0, -3)                                           # (N, 1, width)
        if self.latent:
            z = act.new_zeros(*act.shape[:-2], self.latent) if z is None else z
            x = torch.cat([x, self.embed_latent(z.flatten(0, -2))[:, None]], 1)
        x = torch.cat([x, self.places.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, -len(self.places):]).unflatten(0, act.shape[:-2])
        return self.arm(x), self.gripper(x).squeeze(-1)

    def encode(self, actions, is_known):
        """actions (..., k, 7), is_known bool (..., k): the others count as unknown, whatever stands there ->
        mean, log variance (..., z)."""
        x = torch.where(is_known[..., None], self.embed_actions(actions), self.unknown).flatten(0, -3)
        x = F.pad(x, (0, 0, 1, 0)) + self.encoder_places                             # CLS is a place alone
        for block in self.encoder:
            x = block(x)
        return self.posterior(self.encoder_norm(x[:, 0])).unflatten(0, actions.shape[:-2]).chunk(2, -1)

    def learn(self, act, actions, is_known, noise):
        """Training: noise (..., z) from N(0, I) -> dict of arm and gripper for a latent drawn from what the
        encoder says; kl [nats] (...); arm_mean, the arm for latent 0, as it will act."""
        mean, log_variance = self.encode(actions, is_known)
        arm, gripper = self(act, mean + (0.5 * log_variance).exp() * noise)
        kl = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).sum(-1)
        with torch.no_grad():
            arm_mean, _ = self(act)
        return dict(arm=arm, gripper=gripper, kl=kl, arm_mean=arm_mean)


# ------------------------------------------------------------------------------------------------ GR-2
class GR2(GR1):
    """The whole model. vision: a tokenizer, see nanogr/tokenizer.py; text: list of B sentences -> (B, Dt)."""
    def __init__(self, config, vision, text):
        nn.Module.__init__(self)                         # none of GR-1's parts, but its methods
        for key, own in dict(codes=vision.codes, code_dim=vision.dim, cell=vision.cell).items():
            if getattr(config, key) != own:
                raise ModelError(f"the tokenizer's {key} is {own}, the model's {getattr(config, key)}: take "
                                 f"the model's tokenizer, or add --model {key}={own}")
        self.config, self.vision, self.text = config, vision, text
        D, cameras = config.width, config.cameras
        self.embed_language = nn.Linear(config.text_dim, D)
        if config.robot:
            self.embed_arm, self.embed_gripper = nn.Linear(6, D), nn.Linear(2, D)
            self.embed_state, self.no_state = nn.Linear(2 * D, D), nn.Parameter(torch.zeros(D))
            self.query_act, self.action_head = nn.Parameter(torch.zeros(1, D)), ActionVAE(config)
        self.embed_codes = nn.Linear(config.code_dim * config.merge ** 2, D)
        self.camera = nn.ParameterDict({camera: torch.zeros(D) for camera in cameras})
        self.timestep = nn.Parameter(torch.zeros(config.window, D))
        self.trunk = Trunk(config)
        if config.video:
            self.query_obs = nn.ParameterDict({camera: torch.zeros(D) for camera in cameras})
            self.video_head = CodeHead(config)
        for camera, side in cameras.items():
            self.register_buffer(f"places_{camera}", sincos_positions(side // config.patch, D), False)
        for name in self.frozen():
            getattr(self, name).requires_grad_(False)
        self.init_weights()

    def to_codes(self, pictures):
        """{camera: pixels (..., 3, S, S), see to_pixels, or codes (..., P)} -> {camera: codes}."""
        with torch.autocast(self.timestep.device.type, enabled=False):       # codes are of full precision
            return {camera: self.vision.encode(x.flatten(0, -4)).unflatten(0, x.shape[:-3])
                    if x.is_floating_point() else x.long() for camera, x in pictures.items()}

    def encode_state(self, robot_obs):
        """robot_obs (..., 15) -> (..., D); NaN: not known, as in an imagined step."""
        unknown = robot_obs[..., :1].isnan()
        return torch.where(unknown, self.no_state, super().encode_state(robot_obs.nan_to_num()))

    def encode_images(self, pictures):
        """{camera: codes (N, P) or pixels (N, 3, S, S)} -> (N, tokens of all cameras, D)."""
        codes = self.to_codes({camera: pictures[camera] for camera in self.config.cameras})
        return torch.cat([self.embed_codes(merge_cells(self.vision.vectors(x), self.config.merge))
                          + self.camera[camera] + getattr(self, f"places_{camera}")
                          for camera, x in codes.items()], 1)

    def forward(self, pictures, sentences, robot_obs=None, mask=None, video_at=None, frame_at=None,
                actions=None, is_known=None, noise=None):
        """GR1.forward's, but pictures may be codes (B, T, P); robot_obs NaN: not known. In training, actions
        (B, T, k, 7), is_known (B, T, k) and noise (B, T, z) are for the VAE's encoder; in eval mode they
        change nothing. Returns arm (B, T, k, 6), gripper logits (B, T, k), of each camera logits over the
        next frame's codes (B, V, P, K); in training with actions also kl (B, T) and arm_mean, see ActionVAE.
        """
        out = super().forward(self.to_codes(pictures), sentences, robot_obs, mask, video_at, frame_at)
        if self.config.robot:
            act, learns = out.pop("act"), self.training and noise is not None
            out |= (self.action_head.learn(act, actions, is_known, noise) if learns else
                    dict(zip(("arm", "gripper"), self.action_head(act))))
        return out

    def queries(self, act_at, video_at):
        """As GR-1's; an [OBS] is its camera's vector at a place of the picture."""
        asked = [(self.query_act, act_at)] if self.config.robot else []
        if self.config.video:
            asked += [(self.query_obs[camera] + getattr(self, f"places_{camera}"), video_at)
                      for camera in self.config.cameras]
        return (torch.cat([tokens.repeat(len(at), 1) for tokens, at in asked]),
                torch.cat([at.repeat_interleave(len(tokens)) for tokens, at in asked]))

    def heads(self, answers, steps, now):
        """As GR-1's, but [ACT]'s answers (B, T, 1, D) stay as they are: {"act": ., camera: logits}."""
        config, out = self.config, {}
        if config.robot:
            out["act"], answers = answers[:, :steps, None], answers[:, steps:]
        if config.video:
            sizes = [len(getattr(self, f"places_{camera}")) for camera in config.cameras]
            asked, seen = answers.shape[1] // sum(sizes), self.to_codes(now) if config.copy_gate else {}
            for camera, x in zip(config.cameras, answers.split([asked * size for size in sizes], 1)):
                x = x.unflatten(1, (asked, -1))                                    # (B, V, P / m^2, D)
                codes = seen[camera].flatten(0, 1) if config.copy_gate else None
                vectors = self.vision.vectors(codes) if config.copy_gate else None
                logits = self.video_head(x.flatten(0, 1), camera, codes, vectors)
                out[camera] = logits.unflatten(0, x.shape[:2])
        return out

    def draw(self, logits):
        """Logits (..., P, K) -> normalised pixels (..., 3, S, S) of the likeliest codes."""
        codes = logits.argmax(-1)
        return self.vision.decode(codes.flatten(0, -2)).unflatten(0, codes.shape[:-1])

    @classmethod
    def from_pretrained(cls, path, config=None, vision=None, text=None):
        """Load a checkpoint of train.py's and print what was done with its tensors. vision: a tokenizer or
        where it lies; None: where the checkpoint says. text: see encoders.build_text. Raises UserError."""
        stored, state = weights.read_config(path), weights.read_checkpoint(path)
        config = config or GR2Config.from_dict(stored.get("model", {}))
        made, tokenizer = stored.get("encoders", {}), vision or tokenizer_of(path)
        tokenizer = tokenizer if isinstance(tokenizer, nn.Module) else open_tokenizer(tokenizer)
        same_tokenizer(tokenizer, made, path)
        model = cls(config, tokenizer, build_text(config, text, made.get("text_weights", "hub")))
        print("weights: " + weights.load(model, state, path))
        return model.eval()


def build_encoders(config, tokenizer, text="hub"):
    """A preset's (tokenizer, text encoder). tokenizer: a path, or "none" for random weights."""
    if tokenizer == "none":
        made = TinyTokenizer() if config.preset == "gr2-tiny" else VQGAN(config.codes, config.code_dim)
        return made.eval(), build_text(config, text)
    return open_tokenizer(tokenizer), build_text(config, text)


def load(path, vision=None, text=None):
    """The model of any checkpoint, GR-1's or GR-2's, see their from_pretrained."""
    ours = weights.read_config(path).get("model", {}).get("preset") in PRESETS
    return (GR2 if ours else GR1).from_pretrained(path, vision=vision, text=text)


# ---------------------------------------------------------------------------------------------- losses
def losses(out, batch, codes, config, counts=(None, None)):
    """GR-1's, but video is the cross-entropy [nats] of the next frame's codes, and with a VAE: kl [nats], a
    mean over known actions, and arm_mean, arm's error for latent 0 (logged, not minimised).

    codes: {camera: (B, T + 1, P)}, what the model saw and the frame after it.
    """
    named = gr1.losses(out, batch, {}, dataclasses.replace(config, video=False), counts)
    if "kl" in out:
        mask = batch["action_mask"]
        named["kl"] = masked_mean(out["kl"][..., None].expand(mask.shape), mask, counts[0])
        wrong = F.smooth_l1_loss(out["arm_mean"], batch["rel_actions"][..., :-1], reduction="none")
        named["arm_mean"] = masked_mean(wrong, mask, counts[0])
    for camera in config.cameras if config.video else ():
        at, logits = batch["video_at"], out[camera]                                          # (B, V, P, K)
        target = pick(codes[camera][:, config.future:], batch.get("frame_at"), at).long()    # (B, V, P)
        error = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(target.shape)
        named[camera] = masked_mean(error, batch["future_mask"][:, at], counts[1])
    return named


# ------------------------------------------------------------------------------------------- rolled out
@torch.no_grad()
def roll_out(model, codes, sentence, steps, temperature=0.0, top_k=100):
    """What the model imagines after the true frames it is given, a timestep after the other.

    codes: {camera: (n, P)}, n >= 1 true frames, `stride` apart -> {camera: (steps, P)} imagined ones. Each is
    fed in again. The robot's states are unknown, to true frames too: no imagined step has one. temperature 0:
    the likeliest codes; else they are drawn, each from its top_k likeliest.
    """
    seen, T = {camera: x.long() for camera, x in codes.items()}, model.config.window
    for _ in range(steps):
        window = {camera: x[None, -T:] for camera, x in seen.items()}
        n = len(next(iter(window.values()))[0])
        states = torch.full((1, n, 15), math.nan, device=model.timestep.device)
        out = model(window, [sentence], states, video_at=torch.tensor([n - 1], device=states.device))
        seen = {camera: torch.cat([x, choose(out[camera][0, 0], temperature, top_k)[None]])
                for camera, x in seen.items()}
    return {camera: x[-steps:] for camera, x in seen.items()}


def choose(logits, temperature, top_k):
    """Logits (P, K) -> codes (P,)."""
    if not temperature:
        return logits.argmax(-1)
    best, which = logits.topk(min(top_k, logits.shape[-1]))
    return which.gather(-1, (best / temperature).softmax(-1).multinomial(1))[:, 0]


def main():
    parser = argparse.ArgumentParser(description="GR-2's tokens, mask and parameters", allow_abbrev=False)
    parser.add_argument("--preset", default="gr2-b", choices=list(PRESETS), help="default: gr2-b")
    parser.add_argument("--stage", default="finetune", choices=["pretrain", "finetune"])
    args = parser.parse_args()
    config = preset_config(args.preset, args.stage)
    describe(config, token_table(config))
    count_parameters(GR2(config, *build_encoders(config, "none", "none")))


if __name__ == "__main__":
    main()
