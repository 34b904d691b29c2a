"""
What the lessons measure, a function each: `python course/lab.py NAME`.

    clip DATA             lesson 1: a batch of packed clips, and what an action of 1 moves
    resampler             lesson 3: the plain layer beside the cheap one, at the paper's size
    losses RUN DATA       lesson 4: which loss pulls how hard at the trunk
    sentence RUN DATA     lessons 5 and 6: the same clips with another task's sentence
    confusion             lesson 6: can the arm's last moves alone foretell its next action?
    acting                lesson 7: the policy beside a full forward over the window
    codes TOKENIZER DATA  lesson 9: how much of a picture's codes changes, and what painting them again costs

RUN is a directory that train.py wrote, DATA a directory of packed clips. Nothing is written.
"""
import argparse
import collections
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))          # where model.py is

import numpy as np
import torch

from model import GR1, GR1Config, ModelError, Resampler, losses, preset_config, to_pixels
from nanogr import clips, tokenizer
from nanogr.common import run_script
from nanogr.encoders import build_encoders
from nanogr.policy import Policy, to_action
from nanogr.worlds import tabletop
from train import predict, see

ROBOT_OBS = ["place x [m]", "place y [m]", "place z [m]", "Euler x [rad]", "Euler y [rad]", "Euler z [rad]",
             "gripper width [m]", *(f"joint {i} [rad]" for i in range(1, 8)), "gripper command"]
ACTION = ["move x [0.02 m]", "move y [0.02 m]", "move z [0.02 m]",
          "turn x [0.05 rad]", "turn y [0.05 rad]", "turn z [0.05 rad]", "gripper command"]


# ------------------------------------------------------------------------------------------- lesson 1
def clip(directory):
    """Print a batch, the ranges of states and actions, and how far an action of 1 moves the gripper."""
    data, config = clips.Clips(directory), preset_config("tiny")
    windows = clips.Windows(data, np.arange(len(data)), 4, config.window, config.future, list(config.cameras))
    print(f"{len(data)} clips, {data.fps:g} steps a second. A batch of 4 windows:")
    for name, value in windows[0].items():
        for key, x in (value.items() if isinstance(value, dict) else [("", value)]):
            kind, said = (str(x.dtype)[6:], tuple(x.shape)) if torch.is_tensor(x) else ("str", f"{x[:1]} ...")
            print(f"  {name + ' ' * bool(key) + key:<20} {kind:<8} {said}")
    states, actions = (np.concatenate(x) for x in zip(*map(data.rows, range(len(data)))))
    for title, names, rows in ("robot_obs", ROBOT_OBS, states), ("rel_actions", ACTION, actions):
        print(f"\n{title}, least and greatest")
        for i, name in enumerate(names):
            print(f"  {i:>2} {name:<18} {np.nanmin(rows[:, i]):7.3f} {np.nanmax(rows[:, i]):7.3f}")
    ratios = []
    for i in range(len(data)):
        states, actions = data.rows(i)
        moves, wanted = np.diff(states[:, :3], axis=0), actions[:-1, :3]
        ratios.append(moves[np.abs(wanted) > 0.5] / wanted[np.abs(wanted) > 0.5])
    ratios = np.concatenate(ratios)
    followed = np.abs(ratios / 0.04 - 1) < 0.5
    print(f"\nmetres_per_action {np.median(ratios[followed]):.4f}   (a step lasts two of CALVIN's ticks)\n"
          f"in {followed.mean():.0%} of the moves the arm did as told")


# ------------------------------------------------------------------------------------------- lesson 3
@torch.no_grad()
def resampler():
    """Print shapes, the difference between ResamplerLayer.plain and forward, and their times."""
    config = GR1Config()
    torch.manual_seed(0)
    part = Resampler(config)
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.05)
    patches = torch.randn(8, 196, config.vision_dim)
    latents, layer = part.latents.expand(8, -1, -1), part.layers[0]
    print(f"patches {tuple(patches.shape)}, latents {tuple(latents.shape)} -> {tuple(part(patches).shape)}")
    plain, cheap = layer.plain(latents, patches), layer(latents, patches)
    print(f"difference {(plain - cheap).abs().max() / plain.abs().max():.1e}   (of the greatest output)")
    seconds = collections.defaultdict(list)
    for _ in range(7):
        for name, function in ("plain", layer.plain), ("cheap", layer):
            start = time.perf_counter()
            function(latents, patches)
            seconds[name].append(time.perf_counter() - start)
    plain, cheap = (1000 * float(np.median(seconds[name])) for name in ("plain", "cheap"))
    print(f"a layer, 8 pictures: plain {plain:.0f} ms, cheap {cheap:.0f} ms\nspeedup {plain / cheap:.2f}")


# ------------------------------------------------------------------------------------- lessons 4, 5, 6
def held_out(run, directory, batches=4):
    """The model of `run`, the data, and batches of 32 windows of clips that `run` did not train on."""
    model, data = GR1.from_pretrained(run), clips.Clips(directory)
    _, ids = clips.split(data, 0.02)                                           # as train.py splits them
    windows = clips.Windows(data, ids, 32, model.config.window, model.config.future,
                            list(model.config.cameras))
    return model, data, [windows[step] for step in range(batches)]


def losses_of(model, batch, sentences=None):
    batch = batch | {"sentences": sentences or batch["sentences"]}
    pixels = see(batch, model.config)
    return losses(predict(model, model.config, batch, pixels), batch, pixels, model.config)


def pull(run, directory):
    """Print each loss and the length of its gradient in the trunk, alone and weighted."""
    model, _, batches = held_out(run, directory, 1)
    trunk = [p for name, p in model.trunk.named_parameters() if name != "unused_wte"]
    named, lengths = losses_of(model, batches[0]), {}
    for name, value in named.items():
        gradients = torch.autograd.grad(value, trunk, retain_graph=True)
        lengths[name] = torch.cat([g.flatten() for g in gradients]).norm().item()
    share = lambda arm: 100 * arm * lengths["arm"] / (arm * lengths["arm"] + sum(lengths.values())
                                                      - lengths["arm"])
    print(f"{'':<14}{'loss':>8}{'gradient':>10}")
    for name in named:
        print(f"  {name:<12}{named[name].item():8.4f}{lengths[name]:10.4f}")
    print(f"arm's share of the pull: share_at_1 {share(1):.0f} %, share_at_100 {share(100):.0f} %")


@torch.no_grad()
def sentence(run, directory):
    """Print the held-out losses with the clips' own sentences and with those of other tasks."""
    model, data, batches = held_out(run, directory)
    task_of, rng = dict(zip(data.sentences, data.tasks)), np.random.default_rng(0)
    sums = collections.defaultdict(lambda: np.zeros(2))
    for batch in batches:
        others = [rng.choice([s for s in task_of if task_of[s] != task_of[own]])
                  for own in batch["sentences"]]
        for column, said in enumerate((None, others)):
            for name, value in losses_of(model, batch, said).items():
                sums[name][column] += value.item() / len(batches)
    print(f"{'':<14}{'right':>8}{'another':>9}   another / right")
    for name, (right, other) in sums.items():
        print(f"  {name:<12}{right:8.4f}{other:9.4f}   {name}_ratio {other / right:.3f}")


# ------------------------------------------------------------------------------------------- lesson 6
def last_moves(nudges, sessions, seed):
    """The gripper's last two moves (n, 6) and its next action (n, 3), at a task's steps 1 to 7, in play."""
    before, after, counts, rng = [], [], collections.Counter(), np.random.default_rng(seed)
    for session in range(sessions):
        world = tabletop.Tabletop("ABCD"[session % 4], [seed, session])
        for _, seen, actions, _ in tabletop.play(world, rng, counts, 12, render=False, nudges=nudges):
            moves = np.diff([o["robot_obs"][:3] for o in seen], axis=0) / tabletop.STEP
            for t in range(1, min(len(actions), 8)):
                before.append(np.concatenate([moves[max(0, t - 2)], moves[t - 1]]))
                after.append(actions[t][:3])
    return np.array(before), np.array(after)


def foretold(nudges):
    """Share of the actions' variance that a linear guess from the last two moves explains in new play."""
    (x, y), (new, truth) = last_moves(nudges, 40, 0), last_moves(nudges, 20, 1)
    with_one = lambda x: np.concatenate([x, np.ones((len(x), 1))], 1)
    weights = np.linalg.lstsq(with_one(x), y, rcond=None)[0]
    return 1 - ((with_one(new) @ weights - truth) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum()


def confusion():
    """Print how well the last moves alone foretell the next action, without and with drags."""
    for name, nudges in ("clean", 0.0), ("dragged", tabletop.NUDGES):
        print(f"{name:<8} demonstrations: r2_{name} {foretold(nudges):.2f}")


# ------------------------------------------------------------------------------------------- lesson 7
@torch.no_grad()
def acting(steps=12):
    """Act with random weights; print the window's length, the times of both ways and how they differ."""
    torch.manual_seed(0)
    config = preset_config("tiny")
    model = GR1(config, *build_encoders(config)).eval()
    world, policy, seen, seconds, difference = tabletop.Tabletop("D", 0), Policy(model), [], [], 0.0
    said, observation = "open the drawer", world.observe()
    for step in range(steps):
        seen = [*seen, observation][-config.window:]
        start = time.perf_counter()
        arm, gripper = policy.actions(observation, said)
        middle = time.perf_counter()
        pixels = {c: to_pixels(torch.tensor(np.stack([o[c] for o in seen])).permute(0, 3, 1, 2)[None], side)
                  for c, side in config.cameras.items()}
        out = model(pixels, [said], torch.tensor(np.stack([o["robot_obs"] for o in seen]))[None])
        seconds.append((middle - start, time.perf_counter() - middle))
        difference = max(difference, np.abs(arm - out["arm"][0, -1].numpy()).max())
        print(f"step {step:>2}: window of {len(seen)}, policy {1000 * seconds[-1][0]:5.1f} ms, "
              f"full forward {1000 * seconds[-1][1]:5.1f} ms")
        observation = world.step(to_action(arm[0], gripper[0]))
    print(f"difference {difference:.1e}")
    mine, full = np.median(seconds[config.window:], 0)
    print(f"speedup {full / mine:.2f}   (once the window is full)")


# ------------------------------------------------------------------------------------------- lesson 9
def codes(path, directory, ahead=3, count=500):
    """Print which share of a picture's codes are others `ahead` steps later, and the tokenizer's floor."""
    made, data = tokenizer.open_tokenizer(path), clips.Clips(directory)
    for camera, (ratio, used) in tokenizer.judge(made, data, ahead, count).items():
        now, later = tokenizer.frames_of(data, camera, np.random.default_rng(0), count, ahead)
        first, second = made.encode(now), made.encode(later)
        print(f"{camera}: {first.shape[1]} codes a picture, {used} of {made.codes} in use; the first one's:\n"
              f"{first[0].unflatten(0, (int(first.shape[1] ** 0.5), -1)).numpy()}")
        print(f"codes_that_change {(first != second).float().mean():.3f}   floor {ratio:.2f}")


MEASURES = dict(clip=clip, resampler=resampler, losses=pull, sentence=sentence, confusion=confusion,
                acting=acting, codes=codes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=list(MEASURES))
    parser.add_argument("paths", nargs="*", help="RUN and DATA, see the top of the file")
    args = parser.parse_args()
    MEASURES[args.name](*args.paths)


if __name__ == "__main__":
    run_script(main, ModelError)
