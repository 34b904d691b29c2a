"""
Judge a policy by CALVIN's rules: single instructions, and chains of five instructions in a row.

    python eval_calvin.py                                   # out/finetune in the embedded tabletop, scene D
    python eval_calvin.py --policy untrained                # baselines: untrained, random, noop, scripted
    python eval_calvin.py --shuffle-language                # every instruction swapped for another task's

The rules: a chain starts from a given state; each of its instructions has a number of steps (360 in CALVIN,
60 in the tabletop, whose demonstrator takes 12) and succeeds as soon as the oracle sees the change of
state that the task asks for, counted from the state at which the instruction was given; the next one follows
from there, without a reset of the world but with the policy's history cleared; the chain ends at the first
failure. Every episode counts.

Reads a checkpoint (train.py's or the authors'). Prints the report and writes it to --out: report.md and
report.json (every episode).
"""
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import clips
import model as gr1
import tabletop

CHAIN = 5                      # instructions


def parse():
    parser = clips.Parser(description="Judge a policy by CALVIN's rules.")
    parser.add_argument("--env", default="tabletop", choices=["tabletop"],
                        help="the world (default: tabletop)")
    parser.add_argument("--checkpoint", default="out/finetune",
                        help="directory that train.py wrote, or the authors' file")
    parser.add_argument("--mae", metavar="FILE", help="MAE's weights (default: as in training, or the hub's)")
    parser.add_argument("--clip", metavar="FILE", help="likewise CLIP's; none: random, to try things out")
    parser.add_argument("--policy", default="model",
                        choices=["model", "untrained", "random", "noop", "scripted"])
    parser.add_argument("--scene", default="D", choices=list(tabletop.SCENES))
    parser.add_argument("--episodes", type=int, default=20,
                        help="single-instruction episodes a task (default: 20)")
    parser.add_argument("--chains", type=int, default=200, help="chains of five instructions (default: 200)")
    parser.add_argument("--shuffle-language", action="store_true",
                        help="give each episode another task's sentence")
    parser.add_argument("--seed", type=int, default=1_000_000,
                        help="of the starting states (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--out", default="out/eval", help="directory of the report (default: out/eval)")
    args = parser.parse_args()
    if args.workers < 1 or min(args.seed, args.episodes, args.chains) < 0:
        parser.error("--workers must be 1 or more, --seed, --episodes and --chains 0 or more")
    return args


# ---------------------------------------------------------------------------------------------- policies


class Baseline:
    """Policies that need no model: random actions, or none at all."""

    def __init__(self, kind, seed=0):
        self.kind, self.rng = kind, np.random.default_rng(seed)

    def seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def reset(self):
        pass

    def step(self, observation, sentence):
        if self.kind == "noop":
            return np.array([0, 0, 0, 0, 0, 0, observation["robot_obs"][14]], np.float32)
        return np.append(self.rng.uniform(-1, 1, 6), self.rng.choice([-1, 1])).astype(np.float32)


class Scripted(Baseline):
    """The demonstrator, which reads the true state and the task's name."""

    def start(self, world, task):
        self.actions = (tabletop.demonstrate(world, task, self.rng) if tabletop.feasible(world, task)
                        else iter(()))

    def step(self, observation, sentence):
        return next(self.actions, np.array([0, 0, 0, 0, 0, 0, observation["robot_obs"][14]], np.float32))


def load_policy(args):
    """The policy that --policy names; "untrained" is the tiny preset with fresh weights."""
    if args.policy in ("random", "noop"):
        return Baseline(args.policy, args.seed)
    if args.policy == "scripted":
        return Scripted("scripted", args.seed)
    if args.policy == "untrained":
        torch.manual_seed(args.seed)
        config = gr1.preset_config("tiny")
        return gr1.Policy(gr1.GR1(config, *gr1.build_encoders(config)))
    return gr1.Policy(gr1.GR1.from_pretrained(args.checkpoint, vision=args.mae, text=args.clip))


# ---------------------------------------------------------------------------------------------- episodes


def follow(world, policy, task, sentence):
    """Let the policy try one instruction: -> steps until the oracle says yes, or None."""
    start, observation = world.get_info(), world.observe()
    policy.reset()
    if isinstance(policy, Scripted):
        policy.start(world, task)
    for step in range(1, tabletop.STEPS + 1):
        observation = world.step(policy.step(observation, sentence))
        if tabletop.success(task, start, world.get_info()):
            return step
    return None


def instruction(task, seed, shuffle):
    """A sentence for the task, or for some other task if shuffle; the seed decides which."""
    if shuffle:
        others = [other for other in tabletop.TASKS if other != task]
        task = str(np.random.default_rng([seed, 8]).choice(others))
    return tabletop.instruction(task, seed)


def play_single(world, policy, args, task, seed):
    world.reset(*tabletop.draw_start(args.scene, task, seed))
    sentence = instruction(task, seed, args.shuffle_language)
    return dict(kind="single", seed=seed, task=task, sentence=sentence,
                steps=follow(world, policy, task, sentence))


def play_chain(world, policy, args, seed):
    *state, tasks = tabletop.draw_chain(args.scene, seed, CHAIN)
    world.reset(*state)
    steps = []
    for i, task in enumerate(tasks):
        steps.append(follow(world, policy, task, instruction(task, seed + i, args.shuffle_language)))
        if steps[-1] is None:
            break
    return dict(kind="chain", seed=seed, tasks=tasks, steps=steps, length=sum(s is not None for s in steps))


def work(job):
    """Play one episode, in a worker: job is (kind, task or None, seed)."""
    kind, task, seed = job
    world = tabletop.Tabletop(WORKER["args"].scene, seed)
    if isinstance(WORKER["policy"], Baseline):
        WORKER["policy"].seed([seed, 2])                      # not on what this worker has played before
    if kind == "single":
        return play_single(world, WORKER["policy"], WORKER["args"], task, seed)
    return play_chain(world, WORKER["policy"], WORKER["args"], seed)


WORKER = {}                    # what a worker process keeps between episodes


def start_worker(args):
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(None):         # the main process has said what it loads
        WORKER.update(args=args, policy=load_policy(args))


# ---------------------------------------------------------------------------------------------- report


def wilson(successes, n, z=1.96):
    """95% interval of a success rate (Wilson's score interval)."""
    p, q = successes / n, z * z / n
    middle, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    return middle - half, middle + half


def bootstrap(values, draws=2000):
    """95% interval of a mean: percentiles of the means of resampled values."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return tuple(np.percentile(values[picks].mean(1), [2.5, 97.5]).tolist())


def summarise(results):
    """Episodes -> the figures of the report."""
    figures = {}
    single, chains = ([r for r in results if r["kind"] == kind] for kind in ("single", "chain"))
    if single:
        tasks = {}
        for task in tabletop.TASKS:
            steps = [r["steps"] for r in single if r["task"] == task]
            done = [s for s in steps if s is not None]
            tasks[task] = dict(successes=len(done), episodes=len(steps), rate=len(done) / len(steps),
                               interval=wilson(len(done), len(steps)),
                               steps=float(np.mean(done)) if done else None)
        figures["tasks"] = tasks
        figures["single"] = dict(
            mean=float(np.mean([t["rate"] for t in tasks.values()])), episodes=len(single),
            interval=bootstrap([r["steps"] is not None for r in single]))
    if chains:
        lengths = [r["length"] for r in chains]
        figures["chains"] = dict(
            n=len(chains), average_length=float(np.mean(lengths)), interval=bootstrap(lengths),
            in_a_row=[float(np.mean([length > k for length in lengths])) for k in range(CHAIN)])
    return figures


def markdown(header, figures):
    lines = ["# " + header["title"], ""] + [f"- {k}: {v}" for k, v in header.items() if k != "title"] + [""]
    if "single" in figures:
        lines += ["| task | success | 95% interval | steps |", "|---|---|---|---|"]
        for task, t in figures["tasks"].items():
            steps = f"{t['steps']:.0f}" if t["steps"] else "-"
            low, high = t["interval"]
            lines += [f"| {task} | {t['rate']:.0%} ({t['successes']}/{t['episodes']}) | "
                      f"{low:.0%} - {high:.0%} | {steps} |"]
        low, high = figures["single"]["interval"]
        lines += [f"| **mean over {len(figures['tasks'])} tasks** | **{figures['single']['mean']:.1%}** | "
                  f"{low:.1%} - {high:.1%} | |", ""]
    if "chains" in figures:
        chains = figures["chains"]
        low, high = chains["interval"]
        lines += ["| chains | 1 | 2 | 3 | 4 | 5 | average length | 95% interval |",
                  "|---|---|---|---|---|---|---|---|",
                  f"| {chains['n']} | " + " | ".join(f"{x:.1%}" for x in chains["in_a_row"])
                  + f" | **{chains['average_length']:.2f}** | {low:.2f} - {high:.2f} |", ""]
    return "\n".join(lines)


def main():
    args = parse()
    load_policy(args)                              # what is wrong is said once, here, not by every worker
    jobs = [("single", task, args.seed + i) for task in tabletop.TASKS for i in range(args.episodes)]
    jobs += [("chain", None, args.seed + i * CHAIN) for i in range(args.chains)]
    if not jobs:
        raise gr1.ModelError("nothing to play: --episodes and --chains are both 0")
    start = time.time()
    with multiprocessing.get_context("spawn").Pool(args.workers, start_worker, (args,)) as pool:
        bar = tqdm(pool.imap_unordered(work, jobs, chunksize=4), total=len(jobs), desc="episodes",
                   disable=not sys.stderr.isatty())
        results = sorted(bar, key=lambda r: (r["kind"], str(r.get("task")), r["seed"]))
    header = dict(title="CALVIN's rules in the embedded tabletop, scene " + args.scene, policy=args.policy)
    if args.policy == "model":
        step = gr1.read_config(args.checkpoint).get("step", "unknown")
        header["checkpoint"] = f"{args.checkpoint}, step {step}"
    header |= {"language": "shuffled: another task's sentence" if args.shuffle_language else "the task's own",
               "starting states": f"unseen, seeds from {args.seed}",
               "steps an instruction": tabletop.STEPS,
               "seconds": round(time.time() - start)}
    figures = summarise(results)
    text = markdown(header, figures)
    print(text)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("report.md", text), ("report.json", json.dumps(
            header | figures | {"episodes": results}, indent=1))):
        clips.write_whole(out / name, content.encode())
    print(f"written to {out}/report.md and report.json")


if __name__ == "__main__":
    try:
        main()
    except (clips.ClipsError, gr1.ModelError) as problem:
        sys.exit(f"error: {problem}")
