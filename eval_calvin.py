"""
Judge a policy by CALVIN's rules: single instructions, and chains of five instructions in a row.

    python eval_calvin.py                                   # out/finetune in the embedded tabletop, scene D
    python eval_calvin.py --policy untrained                # baselines: untrained, random, noop, scripted
    python eval_calvin.py --shuffle-language                # every instruction swapped for another task's

    python eval_calvin.py --env calvin --checkpoint DIR     # CALVIN's 1000 chains in its own simulator
    python eval_calvin.py --env calvin --chains 0 --episodes 20         # single instructions, from new states
    python eval_calvin.py --env calvin --shard 1/4 --out A  # a quarter of them, say on one of four machines
    python eval_calvin.py --env calvin --resume --out A     # goes on after a crash
    python eval_calvin.py --merge A B C D --out out/all     # one report of all shards
    python eval_calvin.py --list                            # the chains and their initial states, as JSON

The rules: a chain starts from a given state; each of its instructions has a number of steps (360 in CALVIN,
60 in the tabletop, whose demonstrator takes 12) and succeeds as soon as the oracle sees the change of
state that the task asks for, counted from the state at which the instruction was given; the next one follows
from there, without a reset of the world but with the policy's history cleared; the chain ends at the first
failure. Every episode counts. CALVIN's own simulator is an extra: see calvin.py.

Reads a checkpoint (train.py's or the authors'). Prints the report, writes it to --out: report.md, report.json
(every episode); during the run episodes.jsonl, a line an episode after a line with the settings, from which
--resume goes on.
"""
import argparse
import collections
import contextlib
import json
import math
import multiprocessing
import pathlib
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import gr2
import model as gr1
from model import ModelError
from nanogr import pictures, weights
from nanogr.common import (Crew, Parser, UserError, check_same, cores, lock, make_room, nearest, parse_part,
                           quiet, run_script, write_whole)
from nanogr.encoders import build_encoders
from nanogr.policy import Policy, step_together
from nanogr.worlds import calvin, expert, tabletop

CHAIN = 5                      # instructions
FILM_STEPS = 4                 # a GIF shows every fourth step
WRITTEN = ("report.md", "report.json", "*-[0-9][0-9][0-9].gif", "episodes.jsonl")       # into --out
# Each has STEPS, TASKS, instruction, success, draw_start, draw_first, draw_chain.
RULES = dict(tabletop=tabletop, calvin=calvin)
RECYCLE = 50                   # chains of a worker, then it is replaced: resetting calvin_env leaks 12 MB


def parse():
    parser = Parser(description="Judge a policy by CALVIN's rules.")
    parser.add_argument("--env", default="tabletop", choices=list(RULES),
                        help="the world (default: tabletop)")
    parser.add_argument("--checkpoint", default="out/finetune",
                        help="directory that train.py wrote, or the authors' file")
    parser.add_argument("--mae", "--tokenizer", metavar="FILE",
                        help="MAE's weights, or GR-2's tokenizer (default: as in training, or the hub's)")
    parser.add_argument("--clip", metavar="FILE", help="likewise CLIP's; none: random, to try things out")
    parser.add_argument("--policy", default="model",
                        choices=["model", "untrained", "random", "noop", "scripted"])
    parser.add_argument("--preset", default="tiny", choices=[*gr1.PRESETS, *gr2.PRESETS],
                        help="of --policy untrained (default: tiny)")
    parser.add_argument("--execute", type=int, default=1, metavar="N",
                        help="do N actions of a predicted chunk before asking again (default: 1)")
    parser.add_argument("--ensemble", type=float, metavar="M",
                        help="average the chunks' actions for a step, weighted exp(-M i), i = 0 the oldest")
    parser.add_argument("--sample-z", action="store_true", help="GR-2: draw the latent (default: it is 0)")
    parser.add_argument("--scene", default="D", choices=list(tabletop.SCENES))
    parser.add_argument("--episodes", type=int, metavar="K",
                        help="single-instruction episodes a task (default: 20; calvin: 0)")
    parser.add_argument("--tasks", metavar="A,B,...",
                        help="their tasks (default: all; calvin: seven start where the expert's work ends)")
    parser.add_argument("--chains", type=int, metavar="N",
                        help="the first N chains of five instructions (default: 200; calvin: all 1000)")
    parser.add_argument("--steps", type=int,
                        help="steps an instruction (default: 60; calvin: 360, and no other is comparable)")
    parser.add_argument("--shuffle-language", action="store_true",
                        help="give each episode another task's sentence")
    parser.add_argument("--language", default="validation", choices=["validation", "unseen"],
                        help="calvin: its validation sentences, or one of 50 others a task (default: its)")
    parser.add_argument("--seed", type=int, default=1_000_000,
                        help="of starting states, unseen sentences, random policies (default: %(default)s)")
    parser.add_argument("--renderer", default="egl", choices=["egl", "tiny"],
                        help="calvin: what draws; figures of one don't hold for the other (default: egl)")
    parser.add_argument("--gif", type=int, default=0, metavar="K",
                        help="calvin: write the first K chains, and episodes of each task, as GIFs, with "
                             "what the policy foresees")
    parser.add_argument("--serve", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                        help="one model for all workers, in batches (default: where there is a GPU)")
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: all cores)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="play the I-th of N parts, I = 1 .. N")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.add_argument("--merge", nargs="+", metavar="DIR",
                        help="play nothing, report on these runs' episodes")
    parser.add_argument("--list", action="store_true", help="print CALVIN's chains and initial states")
    parser.add_argument("--redraw", action="store_true", help="with --list: draw the chains anew (a minute)")
    parser.add_argument("--out", help="directory of the report (default: out/eval, out/eval-calvin, or "
                        "out/eval-merged)")
    args = parser.parse_args()
    for name, tables, calvins in ("episodes", 20, 0), ("chains", 200, calvin.CHAINS):
        if getattr(args, name) is None:
            setattr(args, name, calvins if args.env == "calvin" else tables)
    if args.out is None:
        args.out = "out/eval" + ("-merged" if args.merge else "-calvin" if args.env == "calvin" else "")
    if args.steps is None:
        args.steps = RULES[args.env].STEPS
    if min(args.workers, args.steps) < 1 or min(args.seed, args.episodes, args.chains) < 0:
        parser.error("--workers and --steps must be 1 or more, --seed, --episodes and --chains 0 or more")
    if args.env == "calvin" and (args.scene != "D" or args.chains > calvin.CHAINS):
        parser.error(f"CALVIN has {calvin.CHAINS} chains, all in scene D, whose initial states they have")
    if args.env == "tabletop" and args.language != "validation":
        parser.error("--language unseen is for --env calvin")
    args.serve = args.serve and looks(args)
    if args.env == "tabletop" and args.gif:
        parser.error("--gif is for --env calvin; sample.py films the tabletop")
    args.tasks = parse_tasks(parser, args)
    args.part, args.parts = parse_part(parser, args.shard)
    args.device = None             # what draws; calvin.probe finds out
    return args


def parse_tasks(parser, args):
    """--tasks as settings store it: "all" or their names in the world's order."""
    named, known = (args.tasks or "all").split(","), RULES[args.env].TASKS
    for task in named if named != ["all"] else []:
        if task not in known:
            parser.error(f"--tasks: {args.env} has no {task!r}; did you mean {nearest(task, known)}?")
    return ", ".join(task for task in known if task in named) or "all"


# -------------------------------------------------------------------------------------------- policies
class Baseline:
    """Policies that need no model: random actions, or none at all."""

    def __init__(self, kind, seed=0):
        self.kind, self.rng = kind, np.random.default_rng(seed)

    def seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def reset(self):
        pass

    def awake(self, sentence):
        return True

    def step(self, observation, sentence):
        if self.kind == "noop":
            return np.array([0, 0, 0, 0, 0, 0, observation["robot_obs"][14]], np.float32)
        return np.append(self.rng.uniform(-1, 1, 6), self.rng.choice([-1, 1])).astype(np.float32)


class Scripted(Baseline):
    """The demonstrator, which reads the true state and the task's name."""

    def seed(self, seed):
        super().seed(seed)
        self.expert = None                                    # it remembers what the gripper was told

    def start(self, world, task):
        if isinstance(world, calvin.Calvin):
            self.expert = self.expert or expert.Expert(world)
            self.actions = self.expert.perform(task)
        else:
            self.actions = (tabletop.demonstrate(world, task, self.rng) if tabletop.feasible(world, task)
                            else iter(()))

    def step(self, observation, sentence):
        return next(self.actions, np.array([0, 0, 0, 0, 0, 0, observation["robot_obs"][14]], np.float32))


def device_of(args):
    """On a GPU only if it --serves: workers have none of their own."""
    return "cuda" if args.serve and torch.cuda.is_available() else "cpu"


def load_policy(args):
    """The policy that --policy names; "untrained" is --preset with fresh weights."""
    device = device_of(args)
    if args.policy in ("random", "noop"):
        return Baseline(args.policy, args.seed)
    if args.policy == "scripted":
        return Scripted("scripted", args.seed)
    if args.policy == "untrained":
        torch.manual_seed(args.seed)
        kind, cls, build = ((gr2, gr2.GR2, gr2.build_encoders) if args.preset in gr2.PRESETS else
                            (gr1, gr1.GR1, build_encoders))
        config = kind.preset_config(args.preset)
        model = cls(config, *build(config, args.mae or "none", args.clip or "none"))
    else:
        model = gr2.load(args.checkpoint, vision=args.mae, text=args.clip)
    return Policy(model.to(device), args.execute, args.ensemble, args.sample_z)


# ----------------------------------------------------------------------------------- one model for all
class Remote:
    """A worker's side of a policy that lives in the main process, where one model serves all workers."""

    def __init__(self, connection):
        self.connection = connection
        self.reset()

    def reset(self):
        self.fresh, self.asleep_at = True, None

    def awake(self, sentence):
        return sentence != self.asleep_at

    def step(self, observation, sentence):
        seen = {key: x for key, x in observation.items() if key.startswith("rgb") or key == "robot_obs"}
        self.connection.send(("step", (seen, sentence, self.fresh)))
        self.fresh = False
        action, awake = self.connection.recv()
        self.asleep_at = None if awake else sentence
        return action

    def foresight(self):
        self.connection.send(("foresight", None))
        return self.connection.recv()


class Server:
    """The main process's side: a history for each worker, one model for all. Who asks at the same moment
    shares a batch, and a batch's size changes the last bits of a float: what a policy does near a threshold
    may differ between two such runs, as it does between two kinds of GPU. The report says so."""

    def __init__(self, policy):
        self.policy, self.policies = policy, {}

    def answers(self, asked):
        """asked: list of (connection, question, content), at most one of each connection; -> what to send:
        list of (connection, answer)."""
        for connection, _, _ in asked:
            if connection not in self.policies:
                self.policies[connection] = self.policy.another()
        found = [(connection, foresight(self.policies[connection])) for connection, question, _ in asked
                 if question == "foresight"]
        steps = [(connection, *content) for connection, question, content in asked if question == "step"]
        for connection, _, _, fresh in steps:
            if fresh:
                self.policies[connection].reset()
        if not steps:
            return found
        connections, observations, sentences, _ = zip(*steps)
        policies = [self.policies[connection] for connection in connections]
        actions = step_together(policies, observations, sentences)
        awake = [policy.awake(sentence) for policy, sentence in zip(policies, sentences)]
        return found + list(zip(connections, zip(actions, awake)))

    def forget(self, connection):
        self.policies.pop(connection, None)


def foresight(policy):
    """What a policy predicts after its last look: (steps ahead, images), or None if it doesn't predict."""
    if isinstance(policy, Remote):
        return policy.foresight()
    if isinstance(policy, Policy) and policy.model.config.video:
        return policy.model.config.future * policy.stride, list(policy.predicted_frames().values())
    return None


# -------------------------------------------------------------------------------------------- episodes
def follow(world, policy, task, sentence, longest, film=None):
    """Let the policy try one instruction, for `longest` steps: -> steps until the oracle says yes, or None.
    `film`, a list, takes what was seen and foreseen now and then."""
    rules = calvin if isinstance(world, calvin.Calvin) else tabletop
    draws, awake = world.look, True
    start, observation = world.get_info(), world.observe()
    policy.reset()
    if isinstance(policy, Scripted):
        policy.start(world, task)
    for step in range(1, longest + 1):
        begin = time.perf_counter()
        seen = observation if awake else seen
        action = policy.step(observation, sentence)
        awake = policy.awake(sentence)
        world.seconds["policy"] += time.perf_counter() - begin
        if film is not None and step % FILM_STEPS == 1:
            film.append(shot(seen, policy, f"{sentence}, step {step}"))
        world.look = draws and awake
        observation = world.step(action)
        world.look = draws
        if rules.success(task, start, world.get_info()):
            return step
    return None


def instruction(task, seed, args):
    """A sentence for the task, or for some other task with --shuffle-language; the seed decides which."""
    rules = RULES[args.env]
    if args.shuffle_language:
        others = [other for other in rules.TASKS if other != task]
        task = str(np.random.default_rng([seed, 8]).choice(others))
    return (calvin.unseen_instruction if args.language == "unseen" else rules.instruction)(task, seed)


def set_scene(world, args, task, seed):
    """Put the world into a state in which `task` can be done, and leave world.look off. In CALVIN no initial
    state allows seven of the tasks: there the scripted expert first does what does, from other states until
    it succeeds. Its time counts as a reset's."""
    world.look, rules, spent = False, RULES[args.env], world.seconds.copy()
    for number in range(seed, seed + 100 * 10**9, 10**9):
        world.reset(*rules.draw_start(args.scene, task, number))
        helper = Scripted("scripted")
        helper.seed(number)
        if all(follow(world, helper, other, "", rules.STEPS) for other in rules.draw_first(task, number)):
            world.seconds = spent
            return
    raise UserError(f"the expert, asked a hundred times, brought about no state in which to {task}")


def play_single(world, policy, args, task, seed):
    """Play one instruction from a state that `seed` draws, such that the task can be done in it."""
    number, sentence = seed - args.seed, instruction(task, seed, args)
    film = [] if number < args.gif else None
    set_scene(world, args, task, seed)
    world.look = film is not None or looks(args)
    steps = follow(world, policy, task, sentence, args.steps, film)
    if film:
        write_film(pathlib.Path(args.out) / f"{task}-{number:03d}.gif", film,
                   "not done" if steps is None else f"done after {steps} steps")
    return dict(kind="single", seed=seed, task=task, sentence=sentence, steps=steps)


def play_chain(world, policy, args, seed):
    """Play the chain that `seed` draws in the tabletop; in CALVIN it is the chain's number."""
    *state, tasks = RULES[args.env].draw_chain(args.scene, seed)
    world.reset(*state)
    first = seed if args.env == "tabletop" else args.seed + seed * CHAIN
    steps, sentences = [], [instruction(task, first + i, args) for i, task in enumerate(tasks)]
    film = [] if seed < args.gif else None
    world.look = film is not None or looks(args)
    for task, sentence in zip(tasks, sentences):
        steps.append(follow(world, policy, task, sentence, args.steps, film))
        if steps[-1] is None:
            break
    length = sum(s is not None for s in steps)
    if film:
        write_film(pathlib.Path(args.out) / f"chain-{seed:03d}.gif", film,
                   f"{length} of {CHAIN} instructions done")
    return dict(kind="chain", seed=seed, tasks=tasks, sentences=sentences, steps=steps, length=length)


def shot(observation, policy, caption):
    """What the cameras see and, of a policy that predicts, foresee: (caption, {row: [images]})."""
    rows = {"now": [observation[camera] for camera in ("rgb_static", "rgb_gripper")]}
    foreseen = foresight(policy)
    if foreseen:
        rows[f"predicted t+{foreseen[0]}"] = foreseen[1]
    return caption, rows


def write_film(path, film, outcome):
    """Write an episode's shots as a GIF; what became of it stands below each sentence."""
    text = lambda caption: [(caption, pictures.LARGE, pictures.INK), (outcome, pictures.SMALL, pictures.GRAY)]
    pages = [pictures.page(text(caption), ["rgb_static", "rgb_gripper"],
                           [[(row, [pictures.enlarge(image, 200) for image in images])]
                            for row, images in rows.items()])
             for caption, rows in film]
    pictures.write_gif(path, pages)


def play(job, world, policy, args):
    """Play one episode; job is (kind, task or None, seed)."""
    kind, task, seed = job
    if isinstance(policy, Baseline):
        # not on what this worker has played before; in CALVIN a chain's seed is but its number
        policy.seed([args.seed, seed, 2] if args.policy == "random" else [seed, 2])
    if args.sample_z:
        torch.manual_seed(args.seed + seed)
    before, start = collections.Counter(world.seconds), time.perf_counter()
    result = play_chain(world, policy, args, seed) if kind == "chain" else \
        play_single(world, policy, args, task, seed)
    seconds = {part: world.seconds[part] - before[part] for part in world.seconds}
    seconds["oracle, reset"] = time.perf_counter() - start - sum(seconds.values())
    return result | dict(seconds={part: round(value, 3) for part, value in seconds.items()})


# --------------------------------------------------------------------------------------------- workers
def work(connection, args):
    """A worker process: one world, one episode after the other; says None when it is ready for the next."""
    quiet()
    torch.set_num_threads(1)
    policy, world = Remote(connection) if args.serve else load_policy(args), None
    connection.send(("result", None))
    while (job := connection.recv()) is not None:
        if args.env == "tabletop":
            world = tabletop.Tabletop(args.scene, job[2])
        world = world or calvin.Calvin(args.scene, renderer(args))
        connection.send(("result", play(job, world, policy, args)))


def looks(args):
    return args.policy in ("model", "untrained")


def renderer(args):
    """What draws: nothing for a policy that doesn't look, unless somebody else wants to."""
    return args.renderer if looks(args) or args.gif else None


def play_all(args, jobs):
    """Play the jobs on --workers processes: yields results as they come. A worker's death is a UserError."""
    todo, given = collections.deque(jobs), {}                 # given: how many jobs a worker has had
    with contextlib.redirect_stdout(None):                    # what was loaded has been said
        server = Server(load_policy(args)) if args.serve else None
    with Crew("finished episodes are kept: --resume") as crew:
        while todo or crew:
            while todo and len(crew) < min(args.workers, len(jobs)):
                given[crew.hire(work, args)] = 0
            asked = []
            for worker, (kind, content) in crew.hear():
                if kind != "result":
                    asked.append((worker, kind, content))
                    continue
                if content is not None:
                    yield content
                if todo and (args.env == "tabletop" or given[worker] < RECYCLE):
                    given[worker] += 1
                    crew.tell(worker, todo.popleft())
                else:
                    crew.tell(worker, None)
                    crew.dismiss(worker)
                    if server:
                        server.forget(worker)
            for worker, answer in server.answers(asked) if asked else ():
                crew.tell(worker, answer)


# ---------------------------------------------------------------------------------------------- report
def wilson(successes, n, z=1.96):
    """95% interval of a success rate (Wilson's score interval)."""
    p, q = successes / n, z * z / n
    middle, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values, draws=2000):
    """95% interval of a mean: percentiles of the means of resampled values."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return tuple(np.percentile(values[picks].mean(1), [2.5, 97.5]).tolist())


def rates(attempts):
    """{task: steps or None of each attempt} -> the table's figures by task, in the order of the tasks."""
    table = {}
    for task, steps in attempts.items():
        done = [s for s in steps if s is not None]
        table[task] = dict(successes=len(done), episodes=len(steps), rate=len(done) / len(steps),
                           interval=wilson(len(done), len(steps)),
                           steps=float(np.mean(done)) if done else None)
    return table


def summarise(results):
    """Episodes -> the figures of the report. The table of tasks counts single instructions or, where there
    are none, those that chains came to."""
    figures, attempts = {}, collections.defaultdict(list)
    single, chains = ([r for r in results if r["kind"] == kind] for kind in ("single", "chain"))
    for r in single:
        attempts[r["task"]].append(r["steps"])
    for r in chains if not single else []:
        for task, steps in zip(r["tasks"], r["steps"]):
            attempts[task].append(steps)
    figures["tasks"] = rates(dict(sorted(attempts.items())))
    if single:
        figures["single"] = dict(
            mean=float(np.mean([t["rate"] for t in figures["tasks"].values()])), episodes=len(single),
            interval=bootstrap([r["steps"] is not None for r in single]))
    if chains:
        lengths = [r["length"] for r in chains]
        figures["chains"] = dict(
            n=len(chains), average_length=float(np.mean(lengths)), interval=bootstrap(lengths),
            in_a_row=[float(np.mean([length > k for length in lengths])) for k in range(CHAIN)])
    return figures


def timing(results, longest):
    """Where the time went: seconds by part, steps, and steps a second of one process."""
    seconds = sum((collections.Counter(r["seconds"]) for r in results), collections.Counter())
    each = [s for r in results for s in (r["steps"] if r["kind"] == "chain" else [r["steps"]])]
    steps = sum(longest if s is None else s for s in each)
    return dict(seconds={part: round(value, 1) for part, value in seconds.items()}, steps=steps,
                steps_per_second=round(steps / sum(seconds.values()), 1))


def row_of_chains(name, in_a_row, average, interval=None):
    between = f"{interval[0]:.2f} - {interval[1]:.2f}" if interval else ""
    return f"| {name} | " + " | ".join(f"{x:.1%}" for x in in_a_row) + f" | **{average:.2f}** | {between} |"


def markdown(header, figures):
    lines = ["# " + header["title"], ""] + [f"- {k}: {v}" for k, v in header.items() if k != "title"] + [""]
    if "chains" in figures:
        chains = figures["chains"]
        lines += ["| chains | 1 | 2 | 3 | 4 | 5 | average length | 95% interval |",
                  "|---|---|---|---|---|---|---|---|",
                  row_of_chains(*(chains[k] for k in ("n", "in_a_row", "average_length", "interval")))]
        lines += [row_of_chains(name, *figures["paper"][name]) for name in figures.get("paper", ())] + [""]
    if figures["tasks"]:
        lines += ["| task | success | 95% interval | steps |", "|---|---|---|---|"]
    for task, t in figures["tasks"].items():
        steps, (low, high) = f"{t['steps']:.0f}" if t["steps"] else "-", t["interval"]
        lines += [f"| {task} | {t['rate']:.0%} ({t['successes']}/{t['episodes']}) | "
                  f"{low:.0%} - {high:.0%} | {steps} |"]
    if "single" in figures:
        low, high = figures["single"]["interval"]
        lines += [f"| **mean over {len(figures['tasks'])} tasks** | **{figures['single']['mean']:.1%}** | "
                  f"{low:.1%} - {high:.1%} | |"]
    return "\n".join([*lines, ""])


# ------------------------------------------------------------------------------------------------ runs
# GR-1's rows of the paper's Tables 1 and 2: the share of chains with 1 .. 5 done in a row, average length.
PAPER = {"paper, ABCD -> D": ((.949, .896, .844, .789, .731), 4.21),
         "paper, ABC -> D": ((.854, .712, .596, .497, .401), 3.06),
         "paper, 10% of the data": ((.778, .533, .332, .218, .139), 2.00)}
PAPER_UNSEEN = {"paper, unseen language": ((.764, .555, .381, .270, .196), 2.17)}


def settings(args):
    """What must be equal for two runs' episodes to belong together; the report's header is made of it."""
    language = "unseen: one of 50 paraphrases a task" if args.language == "unseen" else "the task's own"
    language += ", of another task (shuffled)" if args.shuffle_language else ""
    said = {"env": args.env, "scene": args.scene, "policy": args.policy, "language": language,
            "seed": args.seed, "episodes a task": args.episodes, "tasks": args.tasks,
            "chains": args.chains, "steps an instruction": args.steps}
    if args.episodes and any(map(needs_help, tasks_of(said))):
        said["seven tasks"] = "begin where the expert's work ends"
    if looks(args):
        said["acting"] = (f"one model for all workers on {device_of(args)}, in batches whose last bits "
                          "depend on timing" if args.serve else "a model for each worker, on cpu")
    if args.policy == "model":
        said["checkpoint"] = weights.fingerprint(args.checkpoint)
        if known := weights.read_config(args.checkpoint).get("encoders", {}).get("known"):
            said["sentences"] = f"a strange one is taken for the nearest of the {len(known)} learned"
        said |= {name: weights.digest(pathlib.Path(path)) if path != "none" else "none: random weights"
                 for name, path in (("MAE", args.mae), ("CLIP", args.clip)) if path}          # or a tokenizer
    if looks(args):
        said |= {"actions executed of a chunk": args.execute} if args.execute > 1 else {}
        said |= {"ensemble of chunks, m": args.ensemble} if args.ensemble is not None else {}
        said |= {"latent": "drawn"} if args.sample_z else {}
    if args.policy == "untrained":
        said["preset"] = args.preset
    if args.env == "tabletop":
        return said
    # Here, before any worker finds out the hard way. What exactly draws may differ between machines whose
    # episodes are to be merged: each episode says it.
    drawn, _, args.device = calvin.probe(renderer(args)).partition(", ")
    return said | {"calvin_env": calvin.commit(),
                   "renderer": drawn if looks(args) else "none: the policy doesn't look"}


def tasks_of(said):
    """The names of the tasks that settings name."""
    return RULES[said["env"]].TASKS if said["tasks"] == "all" else said["tasks"].split(", ")


def needs_help(task):
    """Whether no initial state of CALVIN's allows the task, see set_scene; never one of the tabletop's."""
    return task in calvin.NAMES and bool(calvin.draw_first(task, 0))


def jobs_of(said):
    """All episodes of the run that has these settings: what every shard together plays."""
    tasks = [task for task in tasks_of(said) if "seven tasks" in said or not needs_help(task)]     # old runs
    jobs = [("single", task, said["seed"] + i) for task in tasks for i in range(said["episodes a task"])]
    first, apart = (0, 1) if said["env"] == "calvin" else (said["seed"], CHAIN)
    return jobs + [("chain", None, first + i * apart) for i in range(said["chains"])]


def key(result):
    return result["kind"], result.get("task"), result["seed"]


def read_episodes(directory):
    """What a run has written: -> (settings, list of episodes). A last line cut off by a kill is left out."""
    path = pathlib.Path(directory) / "episodes.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is not there: {directory} holds no run to merge")
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
    try:
        said, *results = [json.loads(line) for line in whole]
        return said["settings"], results
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it and play that part again") from None


def begin(args, said):
    """Open --out's episodes.jsonl, locked: -> (episodes that are there, file to append to)."""
    path = pathlib.Path(args.out) / "episodes.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = lock(path)
    if not args.resume and path.read_bytes().count(b"\n") > 1:
        aside = make_room(path.parent, WRITTEN)
        print(f"out: the run that was in {path.parent} is now in {aside} (--resume would have gone on with "
              "it)", file=sys.stderr)
        file = lock(path)
    if not args.resume:
        file.truncate(0)                                       # settings without an episode, at most
    if not path.stat().st_size:
        file.write(to_line(dict(settings=said)))
    before, results = read_episodes(args.out)
    check_same(before, said, args.out)
    file.truncate(path.read_bytes().rfind(b"\n") + 1)         # what a kill cut off
    return results, file


def to_line(content):
    return json.dumps(content).encode() + b"\n"


def run(args):
    """Play this shard's episodes, those excepted that a resumed run finds done: -> settings, episodes."""
    if args.policy != "scripted":
        load_policy(args)                          # what is wrong is said once, here, not by every worker
    said = settings(args)
    if args.env == "calvin" and renderer(args) == "tiny":
        print("WARNING: TinyRenderer's pictures differ from those of CALVIN's data by 19 of 255, so scores "
              "do too; EGL's are the ones to compare", file=sys.stderr)
    mine = jobs_of(said)[args.part - 1::args.parts]
    if not mine:
        raise UserError("nothing to play: --episodes and --chains are both 0, or --shard is empty")
    results, file = begin(args, said)
    done = {key(result) for result in results}
    todo = [job for job in mine if job not in done]
    with file, tqdm(total=len(mine), initial=len(mine) - len(todo), desc="episodes",
                    disable=not sys.stderr.isatty()) as bar:
        for result in play_all(args, todo):
            result |= dict(device=args.device)
            file.write(to_line(result))
            results.append(result)
            bar.update()
    return said, results


def merge(args):
    """Join the episodes of several runs in --out: -> settings, episodes; none may be there twice."""
    said, results = read_episodes(args.merge[0])
    for directory in args.merge[1:]:
        other, more = read_episodes(directory)
        check_same(other, said, directory)
        results += more
    count = collections.Counter(map(key, results))
    if max(count.values(), default=0) > 1:
        raise UserError(f"{sum(n > 1 for n in count.values())} episodes are there twice, such as "
                        f"{max(count, key=count.get)}: give each shard once")
    if not results:
        raise UserError(f"{', '.join(args.merge)}: no episode was finished yet")
    path = pathlib.Path(args.out) / "episodes.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path):
        if path.stat().st_size:
            before, there = read_episodes(args.out)
            check_same(before, said, args.out)
            if not set(map(key, there)) <= set(count):
                raise UserError(f"{args.out} holds episodes that these don't: choose another --out")
        write_whole(path, b"".join(map(to_line, [dict(settings=said), *results])))
    return said, results


def title(said, results):
    """The report's first line: PARTIAL unless every episode of the run, all 1000 chains of CALVIN's, is
    there."""
    there, whole = len({key(result) for result in results}), len(jobs_of(said))
    name = "CALVIN's rules in the embedded tabletop, scene " + said["scene"]
    if said["env"] == "calvin":
        name = f"CALVIN{'' if said['chains'] else ', single instructions'}, scene {said['scene']}"
        whole += calvin.CHAINS - said["chains"] if said["chains"] else 0
    if said.get("renderer") == "TinyRenderer":
        name += ", drawn by TinyRenderer: no score of CALVIN's"
    return name if there == whole else f"PARTIAL ({there} of {whole} episodes): {name}"


def report(args, said, results):
    """Print the report and write it to --out."""
    results = sorted(results, key=lambda r: (r["kind"], str(r.get("task")), r["seed"]))
    figures = summarise(results)
    header = dict(title=title(said, results)) | {name: value for name, value in said.items() if name != "env"}
    if said["env"] == "calvin" and said["policy"] == "model" and said["chains"] \
            and said["steps an instruction"] == calvin.STEPS and "shuffled" not in said["language"]:
        figures["paper"] = PAPER_UNSEEN if said["language"].startswith("unseen") else PAPER
    time_spent = timing(results, said["steps an instruction"])
    header |= {"steps": time_spent["steps"], "steps a second of a process": time_spent["steps_per_second"],
               "seconds, by part": ", ".join(f"{k} {v}" for k, v in time_spent["seconds"].items())}
    devices = sorted({r["device"] for r in results if r.get("device")})
    header |= {"drawn by": "; ".join(devices)} if devices else {}
    text, out = markdown(header, figures), pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("report.md", text), ("report.json", json.dumps(
            header | figures | {"timing": time_spent, "episodes": results}, indent=1))):
        write_whole(out / name, content.encode())
    print(f"{text}\nwritten to {out}/report.md and report.json")


def list_chains(args):
    """Print CALVIN's chains and initial states as JSON, drawn anew on --workers processes with --redraw."""
    if args.redraw:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            rows = calvin.draw_chains(pool.map)
        if not np.array_equal(rows, calvin.read_chains()):
            raise UserError("the generator and fixtures/calvin_chains.txt differ: numpy's legacy "
                            "random numbers have changed; the file is right")
    conditions = calvin.initial_conditions()
    states = [calvin.initial_state(condition) for condition in conditions]
    print(json.dumps(dict(
        chains=[[conditions[state], tasks] for state, tasks in calvin.load_chains()],
        initial_states=[dict(condition=condition, robot_obs=robot.tolist(), scene_obs=scene.tolist())
                        for condition, (robot, scene) in zip(conditions, states)])))


def main():
    args = parse()
    if args.list:
        return list_chains(args)
    report(args, *(merge(args) if args.merge else run(args)))


if __name__ == "__main__":
    run_script(main, ModelError)
