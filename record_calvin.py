"""CALVIN's demonstrations without its 500 GB: a scripted expert for all 34 tasks in the real simulator.

    python record_calvin.py --measure --scenes ABCD --demos 400     # how often does the expert succeed?
    python record_calvin.py --out data/calvin --demos 3400          # record: packed clips (clips.py)
    python record_calvin.py --out data/raw --format calvin          # record: CALVIN's own files, a frame each
    python record_calvin.py --out data/more --policy out/finetune   # that begins, the expert takes over
    python record_calvin.py --replay data/raw/training              # do its commands lead there again?

The simulator is an extra, see docs/calvin.md; the expert and its skills are in nanogr/worlds/expert.py.
It plays without a reset from whatever state it finds, choosing among the tasks that make sense there, rare
ones first; physics alone, 2 ms a step, but for what a --policy looks at. What succeeds is drawn afterwards,
90 ms a frame, from stored states. A killed run goes on where it was: start it again.

In order: play, recording, looking, main.
"""
import io
import itertools
import json
import pathlib
import shlex
import sys
from collections import Counter, namedtuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import gr2
from model import ModelError
from nanogr import clips, weights
from nanogr.common import Crew, Parser, UserError, cores, nearest, parse_part, quiet, run_script, write_whole
from nanogr.pictures import write_sheet
from nanogr.policy import Policy
from nanogr.worlds import calvin
from nanogr.worlds import expert as experts


# ------------------------------------------------------------------------------------------------ play
def start_play(world, seed):
    """Put the world into a state to play from. In scene D it is like one of evaluation's, with the blocks a
    bit aside and turned otherwise; in the others calvin_env's own reset draws blocks, we draw fixtures."""
    rng = np.random.default_rng([seed, 0])
    if world.scene == "D":
        robot, scene = calvin.draw_start(world.scene, None, seed)
        blocks = scene[6:].reshape(3, 6)
        blocks[:, :2] += rng.uniform(-0.02, 0.02, (3, 2)) * (blocks[:, 1:2] < 0)     # of those on the table
        return world.reset(robot, scene)
    seen = world.reset(seed=seed)
    travel, lit = experts.fixtures_of(world.env).door_travel, int(rng.integers(2))
    scene = seen["scene_obs"].copy()
    scene[:6] = rng.choice([0, travel]), rng.choice([0, 0.22]), 0, 0.088 * lit, lit, rng.integers(2)
    return world.reset(seen["robot_obs"], scene, seed)


FREE = (-0.3, -0.35, 0.57), (0.3, -0.12, 0.68)           # a box where nothing is in the arm's way [m]

Demo = namedtuple("Demo", "task done steps")
# pose: of all joints and bodies, see `pose_of`; executed: rel_actions, with noise and drags; meant: without
Step = namedtuple("Step", "pose observation executed meant")


def shove(kind, place, rng):
    """How an arm at `place` is moved aside, see demonstrate: for how many steps, where to, how it turns."""
    if kind == "far":
        return int(rng.integers(5, 16)), rng.uniform(*FREE), rng.uniform(-1, 1, 3)
    angle, steps = rng.uniform(0, 2 * np.pi), int(rng.integers(2, 4))
    return steps, place + rng.uniform(0.01, 0.03) * np.array([np.cos(angle), np.sin(angle), 0.3]), 0


LED = 1, 26                    # timesteps that a policy has before the expert takes over: from, to below
STILL = 0.02                   # what moves less in PAUSE timesteps is stuck [joints: rad, fingers: m]
PAUSE = 4
SOON = 12                      # an expert's demonstration with fewer steps: the policy had all but done it


def begin(world, expert, policy, task, start, held, rng, remember):
    """Let a policy begin the task, with world.look off but when it looks: -> (its last steps, so many as its
    window looks back, whether it did the task).

    The expert shall take over when the arm stands still, after LED timesteps at the latest, but not while it
    has got hold of a block: to let go of that would be a wrong lesson. start, held: the world's state and the
    block in the gripper when the task was given. `meant` is NaN: what a policy does is
    to be seen, not to be learned."""
    steps, rows = [], slice(6, 14)                             # of robot_obs
    sentence, most = str(rng.choice(calvin.SENTENCES[task]["training"])), policy.stride * rng.integers(*LED)
    back, pause = policy.stride * (policy.model.config.window - 1), policy.stride * PAUSE
    policy.reset()
    state = world.observe()
    while True:
        world.look = True
        seen = world.observe()
        world.look = False
        for _ in range(policy.stride):
            action = policy.step(seen, sentence)
            steps.append(Step(remember(world), state, np.clip(action, -1, 1), np.full(7, np.nan)))
            state = world.step(action)
            expert.grip = int(action[6])
            if calvin.success(task, start, world.get_info()):
                return [], True
        before = steps[-pause].observation["robot_obs"] if pause < len(steps) else np.inf
        stuck = np.abs(state["robot_obs"] - before)[rows].max() < STILL
        if len(steps) >= calvin.STEPS or (stuck or len(steps) >= most) and expert.held() in (None, held):
            return steps[-back:] if back else [], False


def demonstrate(world, expert, task, rng, noise=0, drags=0, remember=lambda world: None,
                longest=calvin.STEPS, policy=None):
    """Let the expert do the task: -> Demo, whose steps go one to three beyond the success.

    noise: standard deviation added to the expert's fast motions. drags: chance, at each step of a motion,
    that something moves the arm aside: once while it is fast and above the table, to a random place of FREE
    with the hand turned, for 5 to 15 steps; once while it is slow, near things, 1 to 3 cm in 2 or 3 steps.
    The expert makes up for all, and tries again what it missed: so it is seen to come from many places, and
    what it means to do next does not follow from what was done last. policy: it begins, see `begin`, and the
    expert shows what to do where that leads: into states that a policy causes and an expert never sees
    (DAgger, Ross et al. 2011). What it did alone is a Demo without steps.
    """
    start, steps, done, left = world.get_info(), [], False, int(rng.integers(1, 4))
    held = expert.held()
    if policy:
        steps, done = begin(world, expert, policy, task, start, held, rng, remember)
        if done:
            return Demo(task, done, steps)
    led = len(steps)
    observation, dragged, to_come = world.observe(), 0, {"far", "near"}   # dragged for so many more
    for action in expert.perform(task, held):
        if len(steps) == led + longest or (done and left == 0):
            break
        left -= done
        executed, place, speed = np.array(action, float), expert.robot.target_pos, np.abs(action[:3]).max()
        slow = np.isclose(speed, expert.slow)                  # not the last, shorter step of a fast motion
        fast = speed > expert.slow and not slow
        kind = "near" if slow and not done else "far" if fast and place[1] < -0.1 and place[2] > 0.5 else ""
        if kind in to_come and not dragged and rng.random() < drags:
            to_come.remove(kind)
            dragged, away, turn = shove(kind, place, rng)
        if dragged:
            dragged, way = dragged - 1, (away - place) / 0.02
            executed[:3], executed[3:6] = way / max(1, np.abs(way).max()), turn
        elif noise and fast:
            executed[:3] = np.clip(executed[:3] + rng.normal(0, noise, 3), -1, 1)
        rows = (np.append(np.clip(x[:6], -1, 1), x[6]) for x in (executed, action))
        steps.append(Step(remember(world), observation, *rows))
        observation = world.step(executed)
        done = done or calvin.success(task, start, world.get_info())
    steps.append(Step(remember(world), observation, *np.full((2, 7), np.nan)))
    return Demo(task, done, [] if policy and done and len(steps) - led <= SOON else steps)


def steps_of(demo):
    """How many steps the expert took, None if it failed."""
    return int(sum(np.isfinite(step.meant[0]) for step in demo.steps)) if demo.done else None


def play(world, seed, counts, n_tasks=8, asked=calvin.NAMES, **options):
    """A session without resets: yields Demos, but for what a policy did alone, and counts their tasks; a
    failure ends it. The last of `n_tasks` is one of those `asked` for."""
    start_play(world, seed)
    rng = np.random.default_rng([seed, 1])
    expert = experts.Expert(world, fast=rng.uniform(0.6, 0.95), slow=rng.uniform(0.4, 0.6))
    noise = rng.choice([0, rng.uniform(0, 0.2)])              # half of the sessions go straight
    for i in range(n_tasks):
        tasks = [task for task in experts.feasible(expert) if i + 1 < n_tasks or task in asked]
        if not tasks:
            return
        rare = np.array([1 / (1 + counts[task]) ** 2 for task in tasks])
        task = tasks[rng.choice(len(tasks), p=rare / rare.sum())]
        demo = demonstrate(world, expert, task, rng, noise, **options)
        counts[task] += 1
        if demo.steps:
            yield demo
        if not demo.done:
            return
        for action in expert.settle():      # and no more: a door stays ajar, as it does in a chain
            world.step(action)


def measure(scene, seed, n, drags):
    """Play `n` demonstrations in a scene, physics alone: -> {task: [steps, or None where it failed]}."""
    quiet()
    world, counts, tried, session = calvin.Calvin(scene, None), Counter(), {}, 0
    while sum(counts.values()) < n:
        for demo in play(world, seed + session, counts, drags=drags):
            tried.setdefault(demo.task, []).append(steps_of(demo))
        session += 1
    return tried


# ------------------------------------------------------------------------------------------- recording
SIZES = [200, 84]              # sides of CALVIN's pictures [pixels]
SESSIONS = 400                 # of play for a shard at most


def bodies_of(world):
    """Simulator's numbers: of what has joints (robot, table), of the blocks."""
    scene = world.env.scene
    return ((world.env.robot.robot_uid, scene.fixed_objects[0].uid),
            [block.uid for block in scene.movable_objects])


def pose_of(world):
    """All that a picture shows, to be drawn later, maybe in another process: joints, blocks, lights."""
    p, cid, (jointed, blocks) = world.env.p, world.env.cid, bodies_of(world)
    angles = [[state[0] for state in p.getJointStates(
        body, range(p.getNumJoints(body, physicsClientId=cid)), physicsClientId=cid)] for body in jointed]
    places = [p.getBasePositionAndOrientation(block, physicsClientId=cid) for block in blocks]
    return angles, places, [light.get_state() for light in world.env.scene.lights]


def draw_pose(world, pose):
    """The pictures of a pose. The world is left in it: its play must be over."""
    p, cid, (jointed, blocks) = world.env.p, world.env.cid, bodies_of(world)
    angles, places, lights = pose
    for body, each in zip(jointed, angles):
        for i, angle in enumerate(each):
            p.resetJointState(body, i, angle, physicsClientId=cid)
    for block, (place, turn) in zip(blocks, places):
        p.resetBasePositionAndOrientation(block, place, turn, physicsClientId=cid)
    for light, state in zip(world.env.scene.lights, lights):
        light.reset(state)
    return world.pictures()


def achieved(robot_obs, following, grip):
    """CALVIN's rel_actions: by how much the *measured* pose changed. The arm lags behind its commands, so
    these replay less well than what was executed."""
    move = np.clip((following[:3] - robot_obs[:3]) / 0.02, -1, 1)
    turn = np.clip(experts.wrap(following[3:6] - robot_obs[3:6]) / 0.05, -1, 1)
    return np.array([*move, *turn, grip])


def seed_of(args, index):
    """The first of a shard's SESSIONS seeds; the two splits have none in common."""
    return (2 * args.seed + (args.split == "validation")) * 10**9 + index * SESSIONS


def load_policy(path):
    """A checkpoint that looks at its timesteps alone, and does all that it planned in between."""
    torch.set_num_threads(1)                                   # --workers share the cores
    model = gr2.load(path)
    return Policy(model, execute=model.config.stride)


def search(index, scene, args):
    """A shard's demonstrations, --each of each of --tasks, nothing drawn but what a --policy looks at: ->
    [(session, task, poses, rows_of it)] and, of all that was tried on the way, {task: [steps, or None where
    it failed]}."""
    quiet()
    policy = load_policy(args.policy) if args.policy else None
    world, counts, found, tried = calvin.Calvin(scene, args.renderer if policy else None), Counter(), [], {}
    world.look = False                                        # only the policy looks
    wanted, seed = Counter(args.tasks * args.each), seed_of(args, index)
    for session in range(args.sessions):
        asked = list(+wanted)
        for demo in play(world, seed + session, counts, args.play, asked, drags=args.drags, remember=pose_of,
                         policy=policy):
            tried.setdefault(demo.task, []).append(steps_of(demo))
            if demo.done and demo.task in args.tasks and wanted[demo.task] > -args.spare:
                wanted[demo.task] -= 1
                found.append((session, demo.task, [step.pose for step in demo.steps], rows_of(demo)))
        if not +wanted:
            break
    else:
        print(f"shard {index}, scene {scene}: {args.sessions} sessions of play gave too few of "
              f"{dict(+wanted)}", file=sys.stderr)
    return found, tried


def draw(index, scene, args, searched):
    """Draw and write a shard. In another process than the search: that loads the simulator anew for each
    session, which leaks 12 MB where there is EGL, as with a --policy; here nothing is loaded twice. -> tried
    """
    quiet()
    world, rng = calvin.Calvin(scene, args.renderer), np.random.default_rng([seed_of(args, index), 2])
    found, tried = searched
    with WRITERS[args.format](args, index, scene) as writer:
        for session, task, poses, rows in found:
            pictures = [draw_pose(world, pose) for pose in poses[::args.stride]]
            frames = {camera: np.stack([smaller(x[camera], size) for x in pictures])
                      for camera, size in zip(pictures[0], args.sizes)}
            writer.add(session, task, str(rng.choice(calvin.SENTENCES[task]["training"])), frames, *rows)
    return tried


def smaller(picture, size):
    """A square picture in `size` pixels a side, made smaller as the policy makes what it sees."""
    if len(picture) == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


def rows_of(demo):
    """A Demo's rows: robot_obs (L, 15), scene_obs (L, 24), and executed, achieved, meant (L, 7). The last
    frame shows what the last action led to: its own actions are NaN."""
    robot, scene = (np.stack([step.observation[key] for step in demo.steps])
                    for key in ("robot_obs", "scene_obs"))
    executed, meant = (np.stack([getattr(step, key) for step in demo.steps]) for key in ("executed", "meant"))
    moved = [achieved(*row) for row in zip(robot, robot[1:], executed[:-1, 6])]
    return robot, scene, executed, np.stack([*moved, executed[-1]]), meant


class ClipWriter:
    """A shard of packed clips, see clips.py: a frame every --stride steps; its rel_actions, one a step, are
    those that --actions says."""

    def __init__(self, args, index, scene):
        self.shard = clips.ShardWriter(args.out, index, ["rgb_static", "rgb_gripper"], stride=args.stride)
        self.args, self.first = args, index * SESSIONS

    def add(self, session, task, sentence, frames, robot_obs, scene_obs, executed, achieved, meant):
        rows, stride = dict(executed=executed, achieved=achieved, meant=meant), self.args.stride
        rows = np.pad(rows[self.args.actions].astype(np.float32), [(0, -len(meant) % stride), (0, 0)],
                      constant_values=np.nan)                  # so many of the last frame too
        self.shard.add(frames=frames, sentence=sentence, task=task, episode=self.first + session,
                       robot_obs=robot_obs[::stride].astype(np.float32), rel_actions=rows)

    def __enter__(self):
        self.shard.__enter__()
        return self

    def __exit__(self, *error):
        self.shard.__exit__(*error)


class CalvinWriter:
    """A shard in CALVIN's own files: a frame each, numbered from index * 20000; its segments in a note of its
    own, written last, of which `finish_calvin` makes the annotations. One key is ours: executed_actions, what
    the expert commanded, beside CALVIN's rel_actions, what the arm achieved."""

    FRAMES = 20000

    def __init__(self, args, index, scene):
        self.out, self.next, self.segments = home(args), index * self.FRAMES, []
        self.scene, self.first = scene, index * SESSIONS
        self.note = self.out / "segments" / f"{index:05d}.json"
        self.note.parent.mkdir(parents=True, exist_ok=True)

    def add(self, session, task, sentence, frames, robot_obs, scene_obs, executed, achieved, meant):
        first, n = self.next, len(robot_obs) - 1               # this format has an action for every frame
        rows = dict(robot_obs=robot_obs, scene_obs=scene_obs, rel_actions=achieved, executed_actions=executed,
                    actions=np.concatenate([robot_obs[1:, :6], executed[:-1, 6:]], axis=1), **frames)
        for t in range(n):
            np.savez_compressed(self.out / f"episode_{first + t:07d}.npz",
                                **{key: values[t] for key, values in rows.items()})
        self.segments.append(dict(first=first, last=first + n - 1, task=task, sentence=sentence,
                                  scene=self.scene, session=self.first + session))
        self.next += n

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is None:
            write_whole(self.note, json.dumps(self.segments).encode())


WRITERS = dict(clips=ClipWriter, calvin=CalvinWriter)


def home(args):
    """The directory of what this run records: a split's own in CALVIN's format, which has both in one."""
    return pathlib.Path(args.out) / (args.split if args.format == "calvin" else "")


def is_done(args, index):
    if args.format == "clips":
        return clips.shard_is_done(args.out, index)
    return (home(args) / "segments" / f"{index:05d}.json").exists()


def read_segments(out):
    """The segments of all shards in CALVIN's files: dicts of first, last, task, sentence, scene."""
    return [segment for note in sorted((out / "segments").glob("*.json"))
            for segment in json.loads(note.read_text())]


def replay(scene, out):
    """Restore each demo's first state and execute its commands blindly: -> {task: [steps or None]}."""
    quiet()
    world, tried = calvin.Calvin(scene, None), {}
    for segment in read_segments(out):
        if segment["scene"] != scene:
            continue
        frames = [np.load(out / f"episode_{i:07d}.npz") for i in range(segment["first"], segment["last"] + 1)]
        world.reset(frames[0]["robot_obs"], frames[0]["scene_obs"])
        start, steps = world.get_info(), None
        commands = [frame["executed_actions"] for frame in frames]
        for t, command in enumerate(commands + [[0, 0, 0, 0, 0, 0, commands[-1][6]]] * 20, 1):
            world.step(command)
            if calvin.success(segment["task"], start, world.get_info()):
                steps = t
                break
        tried.setdefault(segment["task"], []).append(steps)
    return tried


def finish_calvin(out):
    """Write what makes the frames in `out` a CALVIN data set: recordings (one a session), annotations. What
    only CALVIN's own loaders ask for is not there: statistics.yaml, scene_info.npy, .hydra/."""
    segments = read_segments(out)
    if not segments:
        raise UserError(f"{out}: no demonstration was found in any session of play")
    pairs = np.array([(segment["first"], segment["last"]) for segment in segments])
    sessions = [list(each) for _, each in itertools.groupby(segments, key=lambda segment: segment["session"])]
    recordings = np.array([(each[0]["first"], each[-1]["last"]) for each in sessions])
    annotations = dict(                    # without CALVIN's "emb": the sentences in MiniLM's vectors
        language=dict(ann=[segment["sentence"] for segment in segments],
                      task=[segment["task"] for segment in segments]),
        info=dict(indx=[tuple(pair) for pair in pairs.tolist()], episodes=[]))
    (out / "lang_annotations").mkdir(exist_ok=True)
    for path, content in ((out / "ep_start_end_ids.npy", recordings),
                          (out / "lang_annotations/auto_lang_ann.npy", annotations)):
        file = io.BytesIO()
        np.save(file, content, allow_pickle=True)              # CALVIN's format has a pickle here
        write_whole(path, file.getvalue())
    print(f"{out}: {len(segments)} demonstrations, {(np.diff(pairs) + 1).sum()} frames")


# --------------------------------------------------------------------------------------------- looking
MOMENTS = 6                    # pictures of a demonstration


def examples(args):
    """{task: its first demonstration's static pictures, MOMENTS of them} of what was recorded in --out."""
    found = {}
    if args.format == "clips":
        data = clips.Clips(args.out)
        for task in sorted(set(data.tasks)):
            pictures = data.read(data.tasks.index(task), cameras=["rgb_static"])["frames"]["rgb_static"]
            found[task] = pictures[np.linspace(0, len(pictures) - 1, MOMENTS).astype(int)]
        return found
    out = home(args)
    for segment in read_segments(out):
        moments = np.linspace(segment["first"], segment["last"], MOMENTS).astype(int)
        if segment["task"] not in found:
            found[segment["task"]] = [np.load(out / f"episode_{t:07d}.npz")["rgb_static"] for t in moments]
    return found


# ----------------------------------------------------------------------------- processes, checks, main
def answer(connection, function, job):
    connection.send(function(*job))


def in_processes(functions, jobs, workers):
    """Do each job in processes of their own (a second simulator in one would draw differently), `workers` at
    a time: function(*job) for the first of `functions`, then function(*job, what the one before returned).
    Yields (job, what the last one returned) as they end."""
    todo, doing = [(job, 0, ()) for job in jobs][::-1], {}
    with Crew("finished shards are kept: run it again") as crew:
        while todo or crew:
            while todo and len(crew) < workers:
                job, stage, given = todo.pop()
                doing[crew.hire(answer, functions[stage], (*job, *given))] = job, stage
            for worker, result in crew.hear():
                job, stage = doing.pop(worker)
                if stage + 1 == len(functions):
                    yield job, result
                else:
                    todo.append((job, stage + 1, (result,)))
                crew.dismiss(worker)


def print_success(tried_by_scene):
    """A line a task: how often it was done of how often it was tried, in each scene, and its mean length."""
    for task in [name for name in calvin.NAMES if any(name in tried for tried in tried_by_scene.values())]:
        runs = {scene: tried.get(task, []) for scene, tried in tried_by_scene.items()}
        steps = [n for each in runs.values() for n in each if n is not None]
        cells = [f"{scene} {sum(n is not None for n in each):3}/{len(each):<3}"
                 for scene, each in runs.items()]
        print(f"{task:26} {'  '.join(cells)}  {np.mean(steps) if steps else float('nan'):4.0f} steps")
    for scene, tried in tried_by_scene.items():
        every = [n for each in tried.values() for n in each]
        done = sum(n is not None for n in every)
        print(f"scene {scene}: {done} of {len(every)} at the first try, {done / max(1, len(every)):.1%}")


def add_up(results):
    """[(scene, tried)] -> {scene: tried of all its shards}."""
    total = {}
    for scene, tried in sorted(results, key=lambda result: result[0]):
        for task, steps in tried.items():
            total.setdefault(scene, {}).setdefault(task, []).extend(steps)
    return total


def measure_all(args):
    each = -(-args.demos // args.workers)
    jobs = [(scene, args.seed * 10**9 + part * 10**6, each, args.drags) for scene in args.scenes
            for part in range(args.workers)]
    print_success(add_up([(job[0], tried) for job, tried in in_processes([measure], jobs, args.workers)]))


def replay_all(args):
    out = pathlib.Path(args.replay)
    scenes = sorted({segment["scene"] for segment in read_segments(out)})
    if not scenes:
        raise UserError(f"{out}/segments holds no demonstrations in CALVIN's files to replay")
    jobs = [(scene, out) for scene in scenes]
    print_success(add_up([(job[0], tried) for job, tried in in_processes([replay], jobs, args.workers)]))


def record_all(args):
    """Record the shards of this machine's part that are not there yet, then what joins them."""
    per_shard = args.each * len(args.tasks)
    shards = -(-args.demos // per_shard)
    actions = args.actions if args.format == "clips" else "executed"           # CALVIN's files have both
    clips.claim(home(args), format=args.format, split=args.split, actions=actions, tasks=args.tasks,
                each=args.each, play=args.play, sizes=args.sizes, scenes=args.scenes, seed=args.seed,
                renderer=args.renderer, **dict(drags=args.drags) if args.drags else {},
                **dict(stride=args.stride) if args.stride > 1 else {},
                **dict(policy=weights.fingerprint(args.policy)) if args.policy else {},
                **dict(spare=args.spare) if args.spare else {},
                **dict(sessions=args.sessions) if args.sessions < SESSIONS else {})
    mine = range(args.part - 1, shards, args.parts)
    todo = [(index, args.scenes[index % len(args.scenes)], args) for index in mine
            if not is_done(args, index)]
    notes = home(args) / "tried"                   # so that a resumed run reports all its parts
    notes.mkdir(exist_ok=True)
    with tqdm(total=len(mine) * per_shard, initial=(len(mine) - len(todo)) * per_shard, unit="demo") as bar:
        for (index, scene, _), tried in in_processes([search, draw], todo, args.workers):
            write_whole(notes / f"{index:05d}.json", json.dumps([scene, tried]).encode())
            bar.update(per_shard)
    print_success(add_up([json.loads(note.read_text()) for note in sorted(notes.glob("*.json"))]))
    if not all(is_done(args, index) for index in range(shards)):
        print(f"part {args.shard} is done; once all parts are in {args.out}, start the command again there")
        return
    if args.format == "calvin":
        finish_calvin(home(args))
    else:
        command = shlex.join(sys.argv)
        clips.write_meta(args.out, "calvin expert", fps=calvin.FPS / args.stride, command=command)
        print("\n".join(clips.summary(args.out)))
    write_sheet(home(args) / "sheet.png", sorted(examples(args).items()), side=100)
    print(f"wrote {home(args) / 'sheet.png'}")


def parse():
    parser = Parser(description="A scripted expert in the real simulator, and its demonstrations.")
    parser.add_argument("--out", help="directory of the data set")
    parser.add_argument("--measure", action="store_true", help="record nothing, print the expert's success")
    parser.add_argument("--replay", metavar="DIR", help="record nothing, execute the commands of DIR, "
                        "CALVIN's files of one split that this recorded, blindly")
    parser.add_argument("--demos", type=int, default=3400, help="how many, at least (default: %(default)s)")
    parser.add_argument("--scenes", default="ABCD", help="letters (default: ABCD)")
    parser.add_argument("--tasks", nargs="+", default=list(calvin.NAMES), metavar="TASK",
                        help="which, a name twice: twice as often (default: all 34)")
    parser.add_argument("--each", type=int, default=1, help="demos of a task in a shard (default: 1)")
    parser.add_argument("--spare", type=int, default=0, metavar="N",
                        help="and up to N more of a task, of what was done on the way to the rarer ones")
    parser.add_argument("--sessions", type=int, default=SESSIONS, metavar="N",
                        help="of play for a shard at most: a --policy that does a task itself leaves few of "
                        "it to show, and what is still lacking then is said (default: %(default)s)")
    parser.add_argument("--play", type=int, default=8, metavar="N",
                        help="tasks done one after the other before a new state is drawn; 1: all start from "
                        "the arm's home (default: 8)")
    parser.add_argument("--format", default="clips", choices=list(WRITERS),
                        help="clips.py's or CALVIN's files (default: clips)")
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES, metavar=("STATIC", "GRIPPER"),
                        help="clips: pixels of the pictures' sides, smaller for a laptop (default: CALVIN's, "
                        "200 84)")
    parser.add_argument("--stride", type=int, default=1, metavar="S",
                        help="clips: draw every S-th step only, for a policy that looks so often; all "
                        "actions are kept (default: 1)")
    parser.add_argument("--drags", type=float, default=0.0, metavar="P",
                        help="chance, at each step of a motion, that something moves the arm aside, once on "
                        "its way and once near things (default: 0; try 0.03)")
    parser.add_argument("--policy", default="", metavar="DIR",
                        help="clips: this checkpoint begins the tasks, and the expert takes over where it "
                        "is stuck: what to do where a policy goes astray")
    parser.add_argument("--actions", default="meant", choices=["meant", "executed", "achieved"],
                        help="clips: what the expert meant to do, what it did for noise and drags, or what "
                        "the arm achieved, CALVIN's convention (default: meant)")
    parser.add_argument("--split", default="training", choices=["training", "validation"],
                        help="validation: states that training has not (default: training)")
    parser.add_argument("--renderer", default="egl", choices=["egl", "tiny"])
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: all cores)")
    parser.add_argument("--shard", default="1/1", metavar="I/N",
                        help="record the I-th of N parts, I = 1 .. N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.part, args.parts = parse_part(parser, args.shard)
    unknown = [task for task in args.tasks if task not in calvin.NAMES]
    if unknown:
        parser.error(f"--tasks: there is no {unknown[0]}; did you mean {nearest(unknown[0], calvin.NAMES)}?")
    if not args.scenes or not set(args.scenes) <= set("ABCD"):
        parser.error("--scenes takes letters of ABCD, for instance ABC")
    least = min(args.demos, args.each, args.play, args.stride, args.workers, args.sessions)
    if least < 1 or min(args.seed, args.spare) < 0 or args.sessions > SESSIONS:
        parser.error("--demos, --each, --play, --stride and --workers must be 1 or more, --seed and --spare "
                     f"0 or more, --sessions 1 to {SESSIONS}")
    if args.stride > 1 and args.format != "clips":
        parser.error("--stride needs --format clips: CALVIN's files have a picture for each step")
    if not args.measure and args.out is None and args.replay is None:
        parser.error("--out DIR says where to record, --measure only looks how well the expert does")
    never = [task for task in args.tasks if args.play == 1 and calvin.draw_first(task, 0)]
    if never and not args.measure:
        parser.error(f"--play 1: {never[0]} can't be the first thing done, it starts where another task ends")
    if not 0 <= args.drags < 1:
        parser.error(f"--drags is a chance, from 0 to below 1, got {args.drags}")
    if args.drags and not args.measure and (args.format, args.actions) != ("clips", "meant"):
        parser.error("--drags needs --format clips and --actions meant: else drags would be recorded as the "
                     "expert's own")
    if args.policy and (args.measure or args.replay):
        parser.error("--policy is for recording alone: leave out --measure and --replay")
    if args.policy and (args.format, args.actions) != ("clips", "meant"):
        parser.error("--policy needs --format clips and --actions meant: what it does is not to be "
                     "learned")
    if min(args.sizes) < 1 or (args.format == "calvin" and args.sizes != SIZES):
        parser.error("--sizes must be 1 or more; CALVIN's files have CALVIN's own, 200 84")
    most = args.each * len(args.tasks) + args.spare * len(set(args.tasks))
    if args.format == "calvin" and most * (calvin.STEPS + 4) > CalvinWriter.FRAMES:
        parser.error(f"--each {args.each}, --spare {args.spare}: a shard of CALVIN's files holds "
                     f"{CalvinWriter.FRAMES} frames")
    return args


def main():
    args = parse()
    if args.measure or args.replay:
        calvin.probe(None)
        (measure_all if args.measure else replay_all)(args)
    else:
        looks_every = load_policy(args.policy).stride if args.policy else args.stride
        if looks_every % args.stride:
            raise UserError(f"--stride {args.stride}: {args.policy} looks every {looks_every} steps, and the "
                            "expert takes over where it would look: take that or a divisor")
        calvin.probe(args.renderer)                            # says what is wrong once, here
        record_all(args)


if __name__ == "__main__":
    run_script(main, ModelError)
