"""
Look at a policy: roll it out in the embedded tabletop, and lay what it foresees beside what the cameras saw.

    python sample.py                                        # out/finetune, scene D, eight rollouts as GIFs
    python sample.py --instruction "push the red block to the left"
    python sample.py --show-predictions                     # predicted frames too, in the GIFs and as sheets
    python sample.py --show-predictions --data DIR          # on recorded clips: nobody acts
    python sample.py --show-predictions --data DIR --checkpoint out/pretrain      # a model without a robot
    python sample.py --roll-out 4 --data DIR                # what it foresees, fed in again, four times

Reads a checkpoint (train.py's or the authors') and maybe packed clips (clips.py). Writes into --out, per
rollout or clip: NAME.gif, the cameras with sentence and outcome; with predictions also NAME.png, a sheet of
about eight moments: true now / predicted t+F / true t+F / error, for each camera. F is how far ahead the
model looks. A roll-out writes NAME.png alone: the true frames, the imagined ones, and their error.
"""
import os
import pathlib
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

import gr2
from model import ModelError, to_pixels
from nanogr import clips, weights
from nanogr.common import Parser, UserError, nearest, run_script
from nanogr.pictures import GRAY, INK, LARGE, SMALL, enlarge, page, write_gif, write_png
from nanogr.policy import Policy, ask, change_errors, pictures, to_images
from nanogr.worlds import tabletop

MOMENTS = 8                    # columns of a sheet
HEAT = 4                       # the error is drawn so many times brighter


def parse():
    parser = Parser(description="Rollouts and predicted frames as pictures.")
    parser.add_argument("--checkpoint",
                        help="directory that train.py wrote, or the authors' file (default: out/finetune)")
    parser.add_argument("--mae", "--tokenizer", metavar="FILE",
                        help="MAE's weights, or GR-2's tokenizer (default: as in training, or the hub's)")
    parser.add_argument("--clip", metavar="FILE", help="likewise CLIP's; none: random, to try things out")
    parser.add_argument("--instruction", help="your sentence for every rollout (default: the tasks')")
    parser.add_argument("--scene", default="D", choices=list(tabletop.SCENES))
    parser.add_argument("--execute", type=int, default=1, metavar="N",
                        help="do N actions of a predicted chunk before asking again (default: 1)")
    parser.add_argument("--ensemble", type=float, metavar="M",
                        help="average the chunks' actions for a step, weighted exp(-M i), i = 0 the oldest")
    parser.add_argument("--show-predictions", action="store_true", help="show what the model foresees")
    parser.add_argument("--data", help="show predictions on these packed clips instead of rollouts")
    parser.add_argument("--roll-out", type=int, metavar="N",
                        help="on --data's clips: foresee N times in a row, each time from what was foreseen")
    parser.add_argument("--temperature", type=float, default=0,
                        help="GR-2's roll-out: draw codes, 1: by its odds (default: 0, the likeliest)")
    parser.add_argument("--episodes", type=int, default=8, help="rollouts or clips (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of starts, sentences and clips (default: 0)")
    parser.add_argument("--out", default="out/sample", help="directory of the pictures (default: out/sample)")
    args = parser.parse_args()
    args.show_predictions |= args.data is not None
    if args.data is not None and args.instruction is not None:
        raise UserError("clips bring their own sentences: give --instruction or --data, not both")
    if args.episodes < 1 or args.seed < 0:
        raise UserError("--episodes must be 1 or more and --seed 0 or more")
    if args.roll_out is not None and (args.roll_out < 1 or args.data is None or args.temperature < 0):
        raise UserError("--roll-out takes 1 or more, and --data with clips to begin with; --temperature 0 or "
                        "more")
    return args


def load_model(args):
    """The model that --checkpoint names, on a GPU if there is one; sets args.checkpoint, args.trained."""
    if args.checkpoint is None and args.show_predictions and os.path.exists("out/pretrain/config.json") \
            and not os.path.exists("out/finetune/config.json"):
        raise UserError("no checkpoint in out/finetune: train one with `train.py --stage finetune`, or "
                        "--checkpoint out/pretrain --data DIR to see what a pre-trained one foresees")
    args.checkpoint = args.checkpoint or "out/finetune"
    args.trained = weights.read_config(args.checkpoint)
    model = gr2.load(args.checkpoint, vision=args.mae, text=args.clip)
    if args.show_predictions and not model.config.video:
        raise UserError(f"{args.checkpoint} was trained without [OBS]: it predicts no frames to show")
    if args.roll_out and not isinstance(model, gr2.GR2) and (model.config.robot or model.config.future > 1):
        raise UserError(f"{args.checkpoint} cannot be rolled out: what a finetuned GR-1 foresees is not the "
                        "next frame of its window, and has no state; give a pre-trained one, or a GR-2")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------------------------- takes
@dataclass
class Take:
    """A rollout or a recorded clip of L steps."""
    name: str                  # of its files
    sentence: str
    outcome: str
    done: bool | None          # the oracle's verdict, None without one
    frames: dict               # {camera: uint8 (L, H, W, 3)}
    robot_obs: np.ndarray      # float32 (L, 15), or None
    fps: float
    every: int                 # frames from one timestep of the model to the next

    @property
    def length(self):
        return len(next(iter(self.frames.values())))


def rollouts(args, model):
    """Takes of the policy in the tabletop. Task, sentence and start follow from seed and number alone."""
    if not set(model.config.cameras) <= {"rgb_static", "rgb_gripper"}:
        raise UserError(f"the tabletop has not all cameras of {list(model.config.cameras)}: use --data")
    policy = Policy(model, args.execute, args.ensemble)
    order = np.random.default_rng(args.seed).permutation(list(tabletop.TASKS))
    known = {sentence: task for task, sentences in tabletop.TASKS.items() for sentence in sentences}
    for i in range(args.episodes):
        seed, task, sentence = args.seed + i, str(order[i % len(order)]), args.instruction
        if sentence is None:
            sentence = tabletop.instruction(task, seed)
        else:
            task = known.get(" ".join(sentence.lower().split()))
        world = tabletop.Tabletop(args.scene, seed)
        world.reset(*tabletop.draw_start(args.scene, task, seed) if task else ())
        yield roll_out(world, policy, task, sentence, f"rollout-{i:02d}")
    if task is None:
        print(f"not judged: the oracle doesn't know '{sentence}'; the nearest that it knows is "
              f"'{nearest(sentence.lower(), known)}'")


def roll_out(world, policy, task, sentence, name):
    """Play one instruction until the oracle says yes or time is up; task None: nobody judges. -> Take"""
    start, seen, done = world.get_info(), [world.observe()], False if task else None
    policy.reset()
    while len(seen) <= tabletop.STEPS and not done:
        seen.append(world.step(policy.step(seen[-1], sentence)))
        done = task and tabletop.success(task, start, world.get_info())
    outcome = {None: "not judged", False: f"not done in {tabletop.STEPS} steps",
               True: f"success after {len(seen) - 1} steps"}[done]
    frames = {camera: np.stack([o[camera] for o in seen]) for camera in policy.model.config.cameras}
    return Take(name, sentence, outcome, done, frames, np.stack([o["robot_obs"] for o in seen]), tabletop.FPS,
                policy.stride)


def recorded(args, model):
    """Takes of clips drawn from a data set: held-out ones, where it or the checkpoint tells which."""
    data, held_out = clips.open_data(args.data)
    if held_out:
        data, ids, kind = held_out, np.arange(len(held_out)), "held-out clip"
    else:
        ids, held_out = clips.split(data, args.trained.get("train", {}).get("held_out", 0))
        ids, kind = (held_out, "held-out clip") if len(held_out) else (ids, "clip")
    lacking = [camera for camera in model.config.cameras if camera not in data.cameras]
    if lacking:
        raise UserError(f"{data.directory} has no camera {lacking[0]}, which {args.checkpoint} needs: "
                        "give other data or another --checkpoint")
    if model.config.robot and not data.has_actions:
        raise UserError(f"{data.directory} has no robot states, which {args.checkpoint} needs: "
                        "give demonstrations, or a pre-trained --checkpoint")
    for i in np.random.default_rng(args.seed).permutation(ids)[:args.episodes].tolist():
        clip = data.read(i, cameras=list(model.config.cameras))
        yield Take(f"clip-{i:05d}", data.sentences[i], f"{kind} {i} of {data.directory}", None,
                   clip["frames"], clip["robot_obs"], data.fps, data.frames_a_timestep(model.config.stride))


# ------------------------------------------------------------------------------------------- foresight
def foresee(model, pixels, take):
    """
    What the model foresees at each step: {camera: normalised pixels (1, L, 3, S, S)}, given the frames
    {camera: (L, 3, S, S)}.

    GR1.forward's lines over a sliding window whose last step is asked: what Policy.predicted_frames does.
    Each frame is encoded once.
    """
    config, answers = model.config, []
    images, language = model.encode_images(pixels), model.encode_language([take.sentence])
    if config.robot:
        state = model.encode_state(torch.from_numpy(take.robot_obs).to(images.device))
    for t in range(take.length):
        window = list(range(t, -1, -take.every))[:config.window][::-1]
        queries, _ = model.queries(torch.arange(0), torch.tensor([len(window) - 1]))
        states = state[None, window] if config.robot else None
        now = {camera: x[None, t:t + 1] for camera, x in pixels.items()}
        out = model.heads(ask(model, queries, language, images[None, window], states), 0, now)
        answers.append(pictures(model, out, now))
    return {camera: torch.cat([answer[camera] for answer in answers], 1) for camera in config.cameras}


@torch.no_grad()
def look_ahead(model, take):
    """-> strips {camera: {label: uint8 (L, S, S, 3)}}, squared errors (cameras, 2), see change_errors."""
    config, F, strips = model.config, ahead(model, take), {}
    device = next(model.parameters()).device
    pixels = {camera: to_pixels(torch.from_numpy(take.frames[camera]).to(device).movedim(-1, 1), side)
              for camera, side in config.cameras.items()}
    drawn = foresee(model, pixels, take)
    for camera, x in pixels.items():
        now, predicted = (to_images(y).cpu().numpy() for y in (x, drawn[camera][0]))
        true = np.concatenate([now[F:], np.full_like(now[:F], 232)])              # past the end: a gray field
        strips[camera] = {"true now": now, f"predicted t+{F}": predicted, f"true t+{F}": true,
                          f"error x {HEAT}": heat(predicted, true)}
    pairs = max(0, take.length - F)                                 # steps whose future frame was seen
    some = lambda which, frames: {camera: x[which] for camera, x in frames.items()}
    errors = change_errors(some(np.s_[:, :pairs], drawn), some(np.s_[None, :pairs], pixels),
                           some(np.s_[None, F:], pixels),
                           torch.ones(1, pairs, dtype=torch.bool, device=device), config.patch)
    return strips, errors.cpu()


def heat(predicted, true):
    """The error of pictures uint8 (L, S, S, 3), HEAT times brighter, in gray."""
    error = HEAT * np.abs(predicted.astype(float) - true).mean(-1, keepdims=True)
    return error.clip(0, 255).astype(np.uint8).repeat(3, -1)


def ahead(model, take):
    """How many of the take's frames ahead a model foresees."""
    return model.config.future * take.every


# -------------------------------------------------------------------------------------------- rolled out
@torch.no_grad()
def imagine(model, pixels, sentence, steps, temperature):
    """Foresee `steps` times in a row after the true frames {camera: (n, 3, S, S)}, each time from what was
    foreseen: -> likewise {camera: (steps, 3, S, S)}. See gr2.roll_out; a pre-trained GR-1's pixels are fed in
    as they are.
    """
    if isinstance(model, gr2.GR2):
        codes = gr2.roll_out(model, model.to_codes(pixels), sentence, steps, temperature)
        return {camera: model.vision.decode(x) for camera, x in codes.items()}
    seen = dict(pixels)
    for _ in range(steps):
        window = {camera: x[None, -model.config.window:] for camera, x in seen.items()}
        last = torch.tensor([len(next(iter(window.values()))[0]) - 1])
        out = model(window, [sentence], video_at=last)
        drawn = pictures(model, out, {camera: x[:, -1:] for camera, x in window.items()})
        seen = {camera: torch.cat([x, drawn[camera][0]]) for camera, x in seen.items()}
    return {camera: x[-steps:] for camera, x in seen.items()}


def draw_roll_out(args, model, take, out):
    """Write the sheet of a take's roll-out; -> errors (N, 2), summed over the cameras, see change_errors: of
    the imagined frames by how often they were fed in, and of repeating the last true one.
    """
    device, every = next(model.parameters()).device, take.every
    steps = min(args.roll_out, (take.length - 1) // every)
    now = min((model.config.window - 1) * every, take.length - 1 - steps * every)     # the last frame given
    first, last = now % every, now // every
    errors, groups = torch.zeros(args.roll_out, 2), []
    if not steps:
        return errors
    frames = {camera: torch.from_numpy(take.frames[camera][first::every]).to(device).movedim(-1, 1)
              for camera in model.config.cameras}
    pixels = {camera: to_pixels(x, model.config.cameras[camera]) for camera, x in frames.items()}
    seen, true = ({camera: x[part] for camera, x in pixels.items()}
                  for part in (np.s_[:last + 1], np.s_[last + 1:last + 1 + steps]))
    imagined = imagine(model, seen, take.sentence, steps, args.temperature)
    kept = {camera: x[-1:].expand(steps, -1, -1, -1) for camera, x in seen.items()}
    for n in range(steps):
        errors[n] = change_errors(*({camera: x[None, n:n + 1] for camera, x in frames.items()}
                                    for frames in (imagined, kept, true)),
                                  torch.ones(1, 1, dtype=torch.bool, device=device),
                                  model.config.patch).sum(0).cpu()
    for camera in pixels:
        rows = {f"{camera}\ntrue": torch.cat([seen[camera][-1:], true[camera]]),
                "imagined": torch.cat([seen[camera][-1:], imagined[camera]])}
        if isinstance(model, gr2.GR2):
            codes = model.to_codes({camera: rows[f"{camera}\ntrue"]})[camera]
            rows["true, through codes"] = model.vision.decode(codes)
        drawn = {label: to_images(x).cpu().numpy() for label, x in rows.items()}
        drawn[f"error x {HEAT}"] = heat(drawn["imagined"], drawn[f"{camera}\ntrue"])
        groups.append([(label, [enlarge(x, 128) for x in images]) for label, images in drawn.items()])
    how = f"drawn at temperature {args.temperature:g}" if args.temperature else "the likeliest"
    notes = [f"checkpoint {args.checkpoint}; {last + 1} true frame{'s' * (last > 0)} given, the last at t; "
             f"{len(pixels)} view{'s' * (len(pixels) > 1)}" + f", codes {how}" * isinstance(model, gr2.GR2)]
    caption = [(take.sentence, LARGE, INK), (take.outcome, SMALL, GRAY), *((x, SMALL, GRAY) for x in notes)]
    heads = [f"t + {n * every}" for n in range(steps + 1)]
    write_png(out / f"{take.name}.png", page(caption, heads, groups))
    return errors


# -------------------------------------------------------------------------------------------- pictures
COLOURS = {True: (20, 128, 60), False: (190, 50, 40), None: GRAY}        # of the outcome, by verdict


def rollout_page(take, caption, t):
    """The cameras side by side, four times their size."""
    first, *others = take.frames
    images = [enlarge(x[t], 4 * x.shape[2]) for x in take.frames.values()]
    return page(caption, [f"{first}, step {t}", *others], [[("", images)]])


def prediction_page(strips, caption, t, past_end):
    """Columns true now, predicted, true future frame; a row a camera."""
    side = max(192, *(len(strip["true now"][0]) for strip in strips.values()))
    rows = [(c, [enlarge(x[t], side) for x in list(strip.values())[:3]]) for c, strip in strips.items()]
    now, predicted, true, _ = strips[rows[0][0]]
    return page(caption, [f"{now}, t = {t}", predicted, true + ": past the end" * past_end], [rows])


def sheet(strips, caption, moments):
    """A column a moment; for each camera a row a strip."""
    side, groups = max(128, *(len(strip["true now"][0]) for strip in strips.values())), []
    for camera, strip in strips.items():
        rows = [(label, [enlarge(x[t], side) for t in moments]) for label, x in strip.items()]
        groups.append([(f"{camera}\n{rows[0][0]}", rows[0][1]), *rows[1:]])
    return page(caption, [f"t = {t}" for t in moments], groups)


def draw_take(args, model, take, out):
    """Write the take's pictures into directory out; -> squared errors (cameras, 2), see look_ahead."""
    caption, F = [(take.sentence, LARGE, INK), (take.outcome, SMALL, COLOURS[take.done])], ahead(model, take)
    if not args.show_predictions:
        write_gif(out / f"{take.name}.gif", [rollout_page(take, caption, t) for t in range(take.length)])
        return torch.zeros(2)
    notes = [f"checkpoint {args.checkpoint}, step {args.trained.get('step', 'unknown')}; "
             f"t+{F}: {F} frame{'s' * (F > 1)}, {F / take.fps:.2f} s, after t"]
    if model.config.norm_pixels:
        notes += ["predictions up to each patch's mean and spread are drawn with those of the last observed "
                  "frame"]
    if model.config.copy_gate and not isinstance(model, gr2.GR2):
        notes += ["of each pixel the model predicts a colour, and how much of the present one to keep"]
    caption += [(note, SMALL, GRAY) for note in notes]
    strips, errors = look_ahead(model, take)
    write_gif(out / f"{take.name}.gif",
              [prediction_page(strips, caption, t, t + F >= take.length) for t in range(take.length)])
    if take.length > F:
        moments = np.unique(np.linspace(0, take.length - F - 1, MOMENTS).round().astype(int))
        note = f"error: |predicted - true|, {HEAT} times brighter (white: {255 // HEAT} of 255 or more)"
        write_png(out / f"{take.name}.png", sheet(strips, caption + [(note, SMALL, GRAY)], moments))
    return errors


def main():
    args = parse()
    torch.manual_seed(args.seed)                         # for codes that are drawn
    model, out, what = load_model(args), pathlib.Path(args.out), "rollouts" if args.data is None else "clips"
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
    print(f"checkpoint {args.checkpoint} (--checkpoint), step {args.trained.get('step', 'unknown')}, seed "
          f"{args.seed}, " + (f"clips of {args.data}" if args.data else f"tabletop scene {args.scene}"))
    if args.roll_out:
        errors = sum(draw_roll_out(args, model, take, out) for take in recorded(args, model))
        print("error of the imagined frame / error of repeating the last true one, in the patches that "
              "change: " + ", ".join(f"{mine / copied:.2f} after {n}"
                                     for n, (mine, copied) in enumerate(errors, 1) if copied > 0)
              + f"\npictures in {out}")
        return
    verdicts, errors = [], torch.zeros(len(model.config.cameras), 2)
    for take in (rollouts if args.data is None else recorded)(args, model):
        errors += draw_take(args, model, take, out)
        verdicts.append(take.done)
        print(f"{take.name}: {take.outcome:<22} {take.sentence}", flush=True)
    if args.show_predictions:
        ratios = [("all cameras", errors.sum(0)), *zip(model.config.cameras, errors)]
        print(f"error of prediction / error of copying the present frame, in the patches that change, over "
              f"{len(verdicts)} {what}: "
              + ", ".join(f"{name} {mine / copied:.2f}" for name, (mine, copied) in ratios if copied > 0)
              + " (below 1: better than 'nothing moves')")
    if None not in verdicts:
        print(f"{sum(verdicts)} of {len(verdicts)} done")
    print(f"pictures in {out}")


if __name__ == "__main__":
    run_script(main, ModelError)
