"""The real CALVIN as a world like tabletop.py's: simulator, oracle, sentences, the 1000 evaluation chains.

    python -m nanogr.worlds.calvin                  # is it installed, does it draw, how fast? out/calvin.png
    python -m nanogr.worlds.calvin --renderer tiny  # where there is no EGL; its pictures differ

The simulator is an extra, and the only one: neither calvin_agent nor CALVIN's data set is needed.

    pip install pybullet gym hydra-core omegaconf numpy-quaternion scipy opencv-python-headless GitPython
    pip install --no-deps -e "git+https://github.com/mees/calvin_env.git@797142c#egg=calvin_env"
    apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri        # EGL without a GPU

pybullet has wheels for Python 3.10 and 3.11. All here but `Calvin` and `success` works without any of that.

Reads calvin_chains.txt (a chain a line: number of its initial state, five numbers of tasks),
calvin_sentences.json (CALVIN's 389 training and 34 validation sentences, from mees/calvin, MIT
licence) and calvin_unseen.txt (50 sentences of our own for each task).
In order: tasks and sentences, chains, initial states, the simulator.
"""
import contextlib
import functools
import itertools
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np

from nanogr.common import Parser, UserError, run_script
from nanogr.pictures import write_sheet

HERE = pathlib.Path(__file__).resolve().parent
FIXED = "797142c588c21e76717268b7b430958dbd13bf48"        # the commit that mends the button
STEPS, FPS, CHAIN, CHAINS = 360, 30.0, 5, 1000            # steps an instruction; instructions a chain; chains
INSTALL = "see docs/calvin.md for how to install it"
EGL = ("Without a GPU: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri; or --renderer tiny, whose "
       "scores differ")


# --------------------------------------------------------------------------------- tasks and sentences
BLOCKS = ("red", "blue", "pink")                          # in the order of scene_obs


def _task_names():
    """CALVIN's 34 tasks in the order in which its chains were drawn."""
    names = [f"{verb}_{block}_block_{side}" for verb in ("rotate", "push") for block in BLOCKS
             for side in ("right", "left")]
    names += ["move_slider_left", "move_slider_right", "open_drawer", "close_drawer"]
    names += [f"lift_{block}_block_{place}" for block in BLOCKS for place in ("table", "slider", "drawer")]
    names += ["place_in_slider", "place_in_drawer", "stack_block", "unstack_block"]
    return names + [f"turn_{way}_{light}" for light in ("lightbulb", "led") for way in ("on", "off")] + [
        "push_into_drawer"]


NAMES = _task_names()
SENTENCES = json.loads((HERE / "calvin_sentences.json").read_text())
TASKS = {name: [SENTENCES[name]["validation"]] for name in NAMES}           # what evaluation says


def instruction(task, seed):
    """The sentence that evaluation gives for the task: there is but one."""
    return TASKS[task][0]


@functools.lru_cache
def unseen_sentences():
    """{task: 50 sentences of our own}, none of them CALVIN's; the file tells how to read it."""
    sections = (HERE / "calvin_unseen.txt").read_text().split("\n[")[1:]
    found = {}
    for section in sections:
        name, *lines = section.strip().splitlines()
        for block, side in itertools.product(BLOCKS, ("left", "right")):
            turn = dict(left="counterclockwise", right="clockwise")[side]
            values = dict(block=block, side=side, turn=turn)
            found[name.rstrip("]").format(**values)] = [line.format(**values) for line in lines]
    return found


def unseen_instruction(task, seed):
    """One of our 50 sentences for the task; the seed decides which."""
    return str(np.random.default_rng([seed, 9]).choice(unseen_sentences()[task]))


# ------------------------------------------------------------------------------------------------------------
# chains. CALVIN draws five tasks at random until they follow from each other and no two are of one kind; what
# follows from what is told by a symbolic state, such as dict(led=0, slider="left", red_block="table", ...).

FIXTURES = dict(move_slider_left=("slider", "right", "left"), move_slider_right=("slider", "left", "right"),
                open_drawer=("drawer", "closed", "open"), close_drawer=("drawer", "open", "closed"),
                turn_on_lightbulb=("lightbulb", 0, 1), turn_off_lightbulb=("lightbulb", 1, 0),
                turn_on_led=("led", 0, 1), turn_off_led=("led", 1, 0))
KINDS = (("rotate", "push_red", "push_blue", "push_pink"), ("move_slider",), ("open_drawer", "close_drawer"),
         tuple(f"lift_{block}_block_table" for block in BLOCKS),
         tuple(f"lift_{block}_block_slider" for block in BLOCKS),
         tuple(f"lift_{block}_block_drawer" for block in BLOCKS),
         ("place",), ("turn",), ("push_into_drawer",), ("stack",), ("unstack",))
KIND = [next(i for i, kind in enumerate(KINDS) if name.startswith(kind)) for name in NAMES]


def initial_conditions():
    """The 192 symbolic states that chains start from, in CALVIN's order."""
    places = ("table", "slider_right", "slider_left")
    values = dict(led=(0, 1), lightbulb=(0, 1), slider=("right", "left"), drawer=("closed", "open"),
                  red_block=places, blue_block=places, pink_block=places, grasped=(0,))
    return [dict(zip(values, row)) for row in itertools.product(*values.values())
            if row.count("table") in (1, 2) and max(row.count(place) for place in places[1:]) < 2]


def outcomes(state, task):
    """The symbolic states that `task` may lead to: none if it is impossible, two if it is ambiguous."""
    where = {block: state[f"{block}_block"] for block in BLOCKS}
    table = [block for block in BLOCKS if where[block] == "table"]
    held = next((block for block in BLOCKS if where[block] == "grasped"), None)

    def then(grasped=0, **blocks):
        return state | {f"{block}_block": place for block, place in blocks.items()} | dict(grasped=grasped)

    if (held is not None) != (task in ("place_in_slider", "place_in_drawer", "stack_block")):
        return []
    if task in FIXTURES:
        key, before, after = FIXTURES[task]
        return [state | {key: after}] if state[key] == before else []
    if task == "place_in_slider":          # CALVIN's slip: it means the side that the door shuts
        return [then(**{held: "slider_" + state["slider"]})]
    if task == "place_in_drawer":
        return [then(**{held: "drawer"})] if state["drawer"] == "open" else []
    if task == "stack_block":
        return [then(**{held: "stacked_top", below: "stacked_bottom"}) for below in table]
    if task == "unstack_block":
        stacked = [block for block in BLOCKS if where[block].startswith("stacked")]
        return [then(**dict.fromkeys(stacked, "table"))] if stacked else []
    if task == "push_into_drawer":
        alone = len(table) == 1 and sum(place.startswith("slider") for place in where.values()) == 2
        return [then(**{table[0]: "drawer"})] if alone and state["drawer"] == "open" else []
    verb, block, _, place = task.split("_")
    if verb != "lift":
        return [state] if block in table else []
    there = dict(table="table", slider="slider_" + dict(left="right", right="left")[state["slider"]],
                 drawer="drawer" if state["drawer"] == "open" else "out of reach")
    return [then(grasped=1, **{block: "grasped"})] if where[block] == there[place] else []


def follows(state, tasks):
    """Whether `tasks` (numbers) can be done one after the other from `state`, each in exactly one way."""
    if len({KIND[task] for task in tasks}) < len(tasks):
        return False
    for task in tasks:
        states = outcomes(state, NAMES[task])
        if len(states) != 1:
            return False
        state = states[0]
    return True


def draw_chains_of(job):
    """The first `count` chains of one initial condition, five numbers each; job is (number, count)."""
    number, count = job
    state, rng, chains = initial_conditions()[number], np.random.RandomState(number), []
    while len(chains) < count:
        tasks = rng.permutation(len(NAMES))[:CHAIN].tolist()
        if follows(state, tasks):
            chains.append(tasks)
    return chains


def draw_chains(map_function=map):
    """Draw the 1000 chains anew: int (1000, 6), rows as in calvin_chains.txt. A minute of a core, so they are
    shipped; `map_function` may share the work among processes."""
    n = len(initial_conditions())
    counts = [len(part) for part in np.array_split(np.arange(CHAINS), n)]
    parts = map_function(draw_chains_of, list(enumerate(counts)))
    chains = np.array([[number, *chain] for number, part in enumerate(parts) for chain in part])
    order = list(range(CHAINS))
    np.random.RandomState(0).shuffle(order)
    return chains[order]


@functools.lru_cache
def read_chains():
    """The chains as they are shipped: int (1000, 6)."""
    return np.loadtxt(HERE / "calvin_chains.txt", dtype=int)


def load_chains():
    """The chains in words: list of (number of the initial condition, [five task names])."""
    return [(state, [NAMES[task] for task in tasks]) for state, *tasks in read_chains().tolist()]


# -------------------------------------------------------------------------------------- initial states
HOME = np.array([0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963,
                 -1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0])
SHELF = dict(slider_left=(-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
             slider_right=(7.03416330e-02, 9.24044687e-02, 4.60990009e-01))
SPOTS = ((5.00000896e-02, -1.20000177e-01, 4.59990009e-01), (2.29995412e-01, -1.19995140e-01, 4.59990010e-01))


def fnv(text):
    """The 32-bit hash that CALVIN seeds a state with. It calls it FNV-1, but it starts from 0 (so FNV-0) and
    runs over the text's UTF-16 bytes: textbook FNV-1 swaps two blocks in 107 of the 192 states."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * 16777619 & 0xFFFFFFFF) ^ byte
    return value


def initial_state(condition, seed=None):
    """robot_obs (15,), scene_obs (24,) of a symbolic state. What places and turns the blocks is the hash of
    its text, as in evaluation, or a seed of your own."""
    if seed is None:
        seed = fnv(str(condition.values()))                           # "dict_values([0, 1, 'left', ...])"
    rng = np.random.RandomState(seed % 2**32)
    spots = list(SPOTS)
    rng.shuffle(spots)
    scene = np.zeros(24)
    scene[0] = 0.28 if condition["slider"] == "left" else 0
    scene[1] = 0.22 if condition["drawer"] == "open" else 0
    scene[3] = 0.088 if condition["lightbulb"] else 0
    scene[4:6] = condition["lightbulb"], condition["led"]
    places = [condition[f"{block}_block"] for block in BLOCKS]
    # Red takes the first spot, pink the second, blue what is left: with red and pink both on the table (then
    # blue is not) or with either alone.
    table = [spots[0], spots[1] if places[0] == "table" else spots[0], spots[1]]
    for i, place in enumerate(places):
        scene[6 + 6 * i:9 + 6 * i] = table[i] if place == "table" else SHELF[place]
        scene[11 + 6 * i] = rng.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
    return HOME.copy(), scene


@functools.lru_cache
def ways_to(task):
    """How one comes to begin with `task` (None: with any): [(number of an initial condition, the tasks to be
    done first)], all of the shortest ways. Nothing has to be done first but for the seven tasks that start
    with a block in the hand, in the drawer or on another: for these one task or two."""
    ways = [(number, (), condition) for number, condition in enumerate(initial_conditions())]
    while not (found := [(number, first) for number, first, state in ways
                         if task is None or len(outcomes(state, task)) == 1]):
        ways = [(number, (*first, name), after[0]) for number, first, state in ways for name in NAMES
                if len(after := outcomes(state, name)) == 1]
    return found


def draw_start(scene, task, seed):
    """robot_obs (15,), scene_obs (24,) in which `task` can be done (None: any) once what `draw_first` says is
    done. Drawn as CALVIN draws its 192, but the seed places and turns the blocks: as many unseen states as
    one likes, all in scene D."""
    rng = np.random.default_rng([seed, 3])
    number, _ = draw_way(task, rng)
    return initial_state(initial_conditions()[number], int(rng.integers(2**32)))


def draw_first(task, seed):
    """The tasks that must be done in draw_start's state before `task` can be."""
    return draw_way(task, np.random.default_rng([seed, 3]))[1]


def draw_way(task, rng):
    return ways_to(task)[rng.integers(len(ways_to(task)))]


def draw_chain(scene, number):
    """robot_obs (15,), scene_obs (24,) and the five tasks of evaluation chain 0 .. 999, all in scene D."""
    condition, tasks = load_chains()[number]
    return *initial_state(initial_conditions()[condition]), tasks


# --------------------------------------------------------------------------------------- the simulator
@contextlib.contextmanager
def silence(descriptor):
    """Drop what is written to a file descriptor: C code prints past sys.stdout and sys.stderr."""
    kept = os.dup(descriptor)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


@functools.lru_cache
def package():
    """The directory of calvin_env's clone; UserError if it is not installed as it must be."""
    try:
        with silence(2):                                   # gym asks to be replaced, pybullet tells its age
            import calvin_env.envs.play_table_env
    except ImportError as error:
        raise UserError(f"calvin_env can't be imported ({error}): {INSTALL}") from None
    path = pathlib.Path(calvin_env.__file__).resolve().parents[1]
    if not (path / "conf").is_dir() or not (path / ".git").exists():
        raise UserError(f"{path} lacks conf/ or .git/: calvin_env must be an editable clone; {INSTALL}")
    return path


def commit():
    """calvin_env's commit, "+changes" if its files differ from it."""
    path = package()
    import git                                                          # GitPython, which calvin_env needs
    try:
        repository = git.Repo(path)
        return repository.head.object.hexsha + ("+changes" if repository.index.diff(None) else "")
    except (git.exc.GitError, ValueError) as error:
        last = str(error).strip().splitlines()[-1].strip() if str(error).strip() else repr(error)
        raise UserError(f"git can't tell the commit of {path} ({last}): another user's clone needs `git "
                        f"config --global --add safe.directory {path}`, a damaged one to be cloned anew"
                          ) from None


def configuration(scene, renderer):
    """calvin_env's settings from its own conf/, as the data set's are: long fingers, two cameras at most."""
    conf = package() / "conf"                                           # first: it says what is not installed
    from omegaconf import OmegaConf
    robot = OmegaConf.merge(*(OmegaConf.load(conf / f"robot/{name}.yaml")
                              for name in ("panda", "panda_longer_finger")))
    robot.pop("defaults")                                               # hydra's own, not the robot's
    cameras = {name: OmegaConf.load(conf / f"cameras/cameras/{name}.yaml") for name in ("static", "gripper")}
    settings = OmegaConf.create(dict(
        data_path="data", use_vr=False, cameras=cameras if renderer else {}, robot=robot,
        scene=OmegaConf.load(conf / f"scene/calvin_scene_{scene}.yaml"),
        env=OmegaConf.load(conf / "env/play_table_env.yaml")))
    settings.env.use_egl, settings.env.use_scene_info = renderer == "egl", True
    return settings.env


@functools.lru_cache
def oracle():
    package()
    import hydra
    from omegaconf import OmegaConf
    return hydra.utils.instantiate(OmegaConf.load(package() / "conf/tasks/new_playtable_tasks.yaml"))


def success(task, start, now):
    """CALVIN's oracle: whether the task was done between two `get_info` dicts: bool."""
    return bool(oracle().get_task_info_for_set(start, now, {task}))


class Calvin:
    """One scene, "A".."D". One a process: a second one would silently get the other renderer.

    renderer: "egl", with which CALVIN's data were drawn; "tiny", whose pictures differ by 19 of 255 on
    average; None: physics alone, no pictures. `env` is calvin_env's; look = False: no
    pictures for a while; `seconds`: time spent, by part.
    """

    def __init__(self, scene="D", renderer="egl", seed=0):
        settings = configuration(scene, renderer)
        import hydra
        logging.getLogger("calvin_env").setLevel(logging.CRITICAL)
        self.scene, self.look, self.seconds = scene, True, Counter()
        try:
            self.env = hydra.utils.instantiate(settings)
        except SystemExit:                                              # with status 0, as if all were well
            raise UserError(f"pybullet's EGL plugin does not load. {EGL}") from None
        # Out of its hands, so that its step() leaves the pictures to observe(): those who look at none pay
        # for none, and the report can tell drawing from physics.
        self.cameras, self.env.cameras = self.env.cameras, []
        self.check_button()
        self.reset(seed=seed)
        self.pictures()                                                 # EGL's first have no shadows

    def check_button(self):
        """UserError if a lit LED's button doesn't know that it is on: the first press then does nothing."""
        _, scene_obs, _ = draw_chain("D", 0)
        self.env.reset(HOME, np.concatenate([scene_obs[:5], [1], scene_obs[6:]]))
        if self.env.scene.buttons[0].state.value != 1:
            raise UserError(f"calvin_env is at {commit()[:7]}, whose button misses the first press after a "
                            f"reset, so that scores are wrong: git -C {package()} checkout {FIXED[:7]}")

    def reset(self, robot_obs=None, scene_obs=None, seed=0):
        """Restore a state, or draw one by `seed`; then observe. calvin_env's own reset keeps traces of what
        was before (3 mm in a block's place), so everything is loaded anew: bit-exact, 0.1 s."""
        self.env.seed(seed)
        self.env.scene.np_random = self.env.np_random            # seed() makes a new one, for env alone
        self.env.load()
        self.env.reset(robot_obs, scene_obs)
        # It would still be the last episode's.
        self.env.robot.gripper_action = 1 if robot_obs is None else int(robot_obs[14])
        self.info = self.env.get_info()
        return self.observe()

    def step(self, action):
        """Execute rel_actions (7,); -> what `observe` says then. More than 1 goes further, as it does in the
        official evaluation: neither GR-1's code nor calvin_env cuts it off."""
        start = time.perf_counter()
        action = np.append(action[:6], 1 if action[6] > 0 else -1).astype(float)
        _, _, _, self.info = self.env.step(action)
        self.seconds["physics"] += time.perf_counter() - start
        return self.observe()

    def observe(self):
        """dict: robot_obs (15,), scene_obs (24,), uint8 rgb_static (200,200,3), rgb_gripper (84,84,3)."""
        start = time.perf_counter()
        pictures = self.pictures()
        self.seconds["render"] += time.perf_counter() - start
        return dict(self.env.get_state_obs(), **pictures)

    def pictures(self):
        return {f"rgb_{camera.name}": self.picture(camera) for camera in self.cameras if self.look}

    def picture(self, camera):
        """What camera.render() draws, to the last bit, in 15% less time: without the mask of who is where."""
        p, lens = self.env.p, (camera.fov, camera.aspect, camera.nearval, camera.farval)
        if hasattr(camera, "viewMatrix"):
            view = camera.viewMatrix
        else:                                                           # the gripper's moves along
            place, turn = p.getLinkState(camera.robot_uid, camera.gripper_cam_link,
                                         physicsClientId=self.env.cid)[:2]
            axes = np.reshape(p.getMatrixFromQuaternion(turn), (3, 3))
            view = p.computeViewMatrix(place, place + axes[:, 1], -axes[:, 2])
        seen = p.getCameraImage(camera.width, camera.height, view, p.computeProjectionMatrixFOV(*lens),
                                flags=p.ER_NO_SEGMENTATION_MASK, physicsClientId=self.env.cid)[2]
        return np.ascontiguousarray(np.reshape(seen, (camera.height, camera.width, 4))[..., :3], np.uint8)

    def get_info(self):
        """What the oracle reads, as calvin_env tells it: robot, doors, lights, blocks, contacts."""
        return self.info


def probe(renderer):
    """Try the simulator out in a process of its own, for a wrong EGL ends the process that asks for it.
    -> the renderer's name and what it runs on, for the report; UserError if it can't draw."""
    package()
    run = subprocess.run([sys.executable, "-m", "nanogr.worlds.calvin", "--renderer", renderer or "none",
                          "--out", ""], capture_output=True, text=True, cwd=HERE.parents[1])
    device = re.search(r"GL_RENDERER=(.*)", run.stdout)
    if run.returncode == 0 and "a step takes" in run.stdout and (device or renderer != "egl"):
        return {"egl": f"EGL, {device and device[1].strip()}", "tiny": "TinyRenderer", None: ""}[renderer]
    lines = run.stderr.splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if said:
        raise UserError(said[-1])
    last = lines[-1] if lines else "nothing was said"
    what, cure = ("EGL doesn't draw", EGL) if renderer == "egl" else ("calvin_env doesn't run", INSTALL)
    raise UserError(f"{what} here (exit status {run.returncode}: {last}). {cure}")


def main():
    parser = Parser(description="Try the simulator out.")
    parser.add_argument("--scene", default="D", choices=list("ABCD"))
    parser.add_argument("--renderer", default="egl", choices=["egl", "tiny", "none"])
    parser.add_argument("--out", default="out/calvin.png", help="picture of both cameras ('': none)")
    args = parser.parse_args()
    version = commit()
    world = Calvin(args.scene, None if args.renderer == "none" else args.renderer)
    seen = world.reset(*draw_chain("D", 0)[:2])
    for _ in range(20):
        seen = world.step(np.array([0, 0, 0, 0, 0, 0, 1]))
    physics, render = (1000 * world.seconds[part] / 20 for part in ("physics", "render"))
    print(f"calvin_env {version}, scene {args.scene}: a step takes {physics:.1f} ms, both pictures "
          f"{render:.0f} ms")
    if args.out and world.cameras:
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        write_sheet(args.out, [("both cameras", [seen["rgb_static"], seen["rgb_gripper"]])], side=200)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
