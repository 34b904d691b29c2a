"""nanogr/worlds/calvin.py, record_calvin.py: chains and states equal CALVIN's; the simulator, if there."""
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

import eval_calvin
import record_calvin
from nanogr import clips, common
from nanogr.worlds import calvin, expert
from tests.helpers import CALVIN_TASKS, ROOT, fails_in_one_line, run, run_apart


def has_simulator():
    try:
        return bool(calvin.package())
    except common.UserError:
        return False


SIMULATOR = pytest.mark.skipif(not has_simulator(), reason="calvin_env is not installed, see docs/calvin.md")
GOLDEN = ROOT.parent / "shared/golden"


def test_chains_are_those_that_calvin_draws():
    """Catches a generator or a shipped list that is not CALVIN's, on 25 of the 192 initial conditions."""
    rows, conditions = calvin.read_chains().tolist(), calvin.initial_conditions()
    assert len(conditions) == 192 and len(rows) == 1000
    for number in range(0, 192, 8):
        mine = [row[1:] for row in rows if row[0] == number]
        drawn = calvin.draw_chains_of((number, len(mine)))
        assert len(mine) == 5 + (number < 40) and sorted(drawn) == sorted(mine)
    assert calvin.load_chains()[0][1] == ["rotate_blue_block_right", "move_slider_right",
                                          "lift_red_block_slider", "place_in_slider", "turn_off_lightbulb"]
    assert calvin.fnv("test") == 3910690890                                # not textbook FNV-1
    state = calvin.initial_state(conditions[calvin.load_chains()[0][0]])[1]
    assert state[:6].tolist() == [0.28, 0.22, 0, 0.088, 1, 1]
    assert np.isclose(state[12], (0.05, 0.23), atol=1e-5).any()


def test_calvin_starts_of_single_instructions():
    """Catches starts from which the task can't be done or that repeat, and one that CALVIN has already."""
    first = {task: {tasks for _, tasks in calvin.ways_to(task)} for task in calvin.NAMES}
    assert sum(tasks == {()} for tasks in first.values()) == 27
    assert first["stack_block"] == {(f"lift_{block}_block_{place}",) for block in calvin.BLOCKS
                                    for place in ("table", "slider")}
    assert ("lift_pink_block_table", "stack_block") in first["unstack_block"]
    assert first["lift_red_block_drawer"] == {("push_into_drawer",)}
    known = [calvin.initial_state(condition)[1] for condition in calvin.initial_conditions()]
    seen = [calvin.draw_start("D", "lift_red_block_table", seed)[1] for seed in range(50)]
    assert len({state.tobytes() for state in seen}) == 50
    assert not {state.tobytes() for state in seen} & {state.tobytes() for state in known}
    for state in seen:
        assert np.isclose(state[6], (0.05, 0.23), atol=1e-5).any() and state[7] < 0 and abs(state[11]) < 2
    assert all(calvin.draw_start("D", "open_drawer", seed)[1][1] == 0 for seed in range(20))
    assert np.array_equal(calvin.draw_start("D", None, 3)[1], calvin.draw_start("D", None, 3)[1])


def test_chains_and_states_equal_the_golden_ones():
    """Catches any chain or initial state that differs from calvin_agent's, to the last bit. The golden
    figures are too big for the repository; what equals them has this checksum."""
    text = run("eval_calvin.py", "--list")[1]
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "05b7ca1e2ebc4a081fbb51055c8a52449d8b813c975198faaa250abaa9b72395")
    if not GOLDEN.is_dir():
        return
    listed = json.loads(text)
    assert listed["chains"] == json.loads((GOLDEN / "calvin_sequences.json").read_text())
    golden = np.load(GOLDEN / "calvin_initial_states.npz")
    states = {json.dumps(state["condition"]): state for state in listed["initial_states"]}
    assert len(states) == len(golden["initial_state"]) == 192
    for text, *observations in zip(*(golden[key] for key in ("initial_state", "robot_obs", "scene_obs"))):
        state = states[text]
        assert all(np.array_equal(state[key], x) for key, x in zip(("robot_obs", "scene_obs"), observations))


def test_sentences():
    """Catches a task without its sentences, and unseen ones that training or validation has."""
    assert list(calvin.SENTENCES) == calvin.NAMES and set(calvin.NAMES) == CALVIN_TASKS
    assert sum(len(x["training"]) for x in calvin.SENTENCES.values()) == 389
    known = {text for x in calvin.SENTENCES.values() for text in (x["validation"], *x["training"])}
    unseen = calvin.unseen_sentences()
    assert set(unseen) == CALVIN_TASKS and all(len(texts) == 50 for texts in unseen.values())
    every = [text for texts in unseen.values() for text in texts]
    assert len(set(every)) == 34 * 50 and not known & set(every) and "{" not in "".join(every)
    drawn = {calvin.unseen_instruction("open_drawer", seed) for seed in range(999)}
    assert drawn == set(unseen["open_drawer"])


def test_without_the_simulator(tmp_path, monkeypatch):
    """Catches a traceback, or a file begun, where calvin_env is not installed."""
    calvin.package.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "calvin_env"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "calvin_env", None)
    out = tmp_path / "out"
    for command in (("eval_calvin.py", "--env", "calvin", "--policy", "noop"), ("-m nanogr.worlds.calvin",),
                    ("record_calvin.py",), ("record_calvin.py", "--measure")):
        assert fails_in_one_line(*command, "--out", out, words=["calvin_env", "docs/calvin.md"]), command
    calvin.package.cache_clear()
    for tasks, words in ("open_drawr", "open_drawer"), ("turn_on_led,stack_blok", "stack_block"):
        assert fails_in_one_line("eval_calvin.py", "--env", "calvin", "--episodes", 1, "--tasks", tasks,
                                 "--out", out, words=[words])
    assert not out.exists()


def test_what_the_probe_says(monkeypatch):
    """Catches an EGL that ends its process without a word and passes for a working one, and a wrong cause:
    git's or Python's trouble taken for EGL's."""
    monkeypatch.setattr(calvin, "package", lambda: pathlib.Path("/clone"))
    drew = "GL_RENDERER=llvmpipe (256 bits)\ncalvin_env 797142c, scene D: a step takes 2 ms\n"
    for renderer, status, out, said, words in (
            ("egl", 0, "", "", "EGL doesn't draw here .exit status 0: nothing was said.*libegl1"),
            ("egl", 0, drew.split("\n")[1], "", "EGL doesn't draw here"),          # something else drew it
            ("egl", 1, "", "error: a line of ours", "^a line of ours$"),
            ("egl", -11, "", "libEGL: no driver", "status -11: libEGL: no driver.*--renderer tiny"),
            (None, 1, "", "Traceback\nOSError: libX11.so", "calvin_env doesn't run here .*libX11.*install")):
        ended = subprocess.CompletedProcess([], status, out, said)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
        with pytest.raises(common.UserError, match=words) as error:
            calvin.probe(renderer)
        assert "\n" not in str(error.value)
    for renderer, name in ("egl", "EGL, llvmpipe (256 bits)"), ("tiny", "TinyRenderer"), (None, ""):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, drew, ""))
        assert calvin.probe(renderer) == name


@pytest.fixture(scope="module")
def world():
    return calvin.Calvin("D", None)


@SIMULATOR
def test_reset_restores_the_simulator_exactly(world):
    """Catches traces of what was played before in a restored state: then no figure could be had twice."""
    def play(number, steps):
        rng, first = np.random.default_rng(number), world.reset(*calvin.draw_chain("D", number)[:2])
        seen = [first] + [world.step(np.append(rng.uniform(-1, 1, 6), rng.choice([-1, 1])))
                          for _ in range(steps)]
        return np.array([np.concatenate([o["robot_obs"], o["scene_obs"]]) for o in seen])

    straight = play(3, 40)
    play(11, 25)
    assert np.array_equal(play(3, 40), straight) and straight[0, 14] == 1


@SIMULATOR
def test_the_button_bug_is_refused(world, monkeypatch):
    """Catches an evaluation on calvin_env's commits before 797142c, whose button misses its first press."""
    button = type(world.env.scene.buttons[0])
    reset = button.reset

    def forgetful(self, state=None):
        reset(self, state)
        self.state = type(self.state)(0)

    monkeypatch.setattr(button, "reset", forgetful)
    with pytest.raises(common.UserError, match="first press"):
        world.check_button()


@SIMULATOR
def test_no_egl_and_no_git_are_one_line(world, monkeypatch, tmp_path):
    """Catches a plugin that does not load and ends the process as if all were well, git's traceback."""
    import pybullet
    monkeypatch.setattr(pybullet, "loadPlugin", lambda *_: -1)
    with pytest.raises(common.UserError, match="plugin does not load.*libegl1"):
        calvin.Calvin("D", "egl")
    monkeypatch.setattr(calvin, "package", lambda: tmp_path)
    with pytest.raises(common.UserError, match="can't tell the commit.*safe.directory"):
        calvin.commit()


@SIMULATOR
def test_actions_are_not_cut_off(world):
    """Catches a clip at 1, which neither GR-1's evaluation nor calvin_env has."""
    moved = []
    for size in 1, 2:
        world.reset(*calvin.draw_chain("D", 0)[:2])
        before = world.env.robot.target_pos.copy()
        world.step(np.array([0, 0, size, 0, 0, 0, 1.0]))
        moved.append((world.env.robot.target_pos - before)[2])
    assert np.allclose(moved, [0.02, 0.04])


@SIMULATOR
def test_the_expert_and_idleness_in_the_simulator(tmp_path):
    """Catches a protocol that nobody can pass, or that can be passed by doing nothing."""
    for policy, least, most in ("scripted", 8, 10), ("noop", 0, 0):
        status, text = run("eval_calvin.py", "--env", "calvin", "--policy", policy, "--chains", 2,
                           "--workers", 1, "--out", tmp_path / policy)
        assert status == 0 and "PARTIAL (2 of 1000" in text and calvin.FIXED in text, text
        report = json.loads((tmp_path / policy / "report.json").read_text())
        assert least <= sum(episode["length"] for episode in report["episodes"]) <= most, text
    status, text = run("eval_calvin.py", "--env", "calvin", "--policy", "scripted", "--chains", 0,
                       "--episodes", 1, "--tasks", "turn_on_led,open_drawer", "--workers", 1,
                       "--out", tmp_path / "single")
    assert status == 0 and "PARTIAL" not in text and "mean over 2 tasks** | **100.0%**" in text, text


@SIMULATOR
def test_the_expert_brings_about_what_a_task_needs(world):
    """Catches a single instruction that begins where it can't be done, an expert that drops what another
    holds."""
    args = types.SimpleNamespace(env="calvin", scene="D")
    for task in "place_in_drawer", "lift_red_block_drawer", "open_drawer":
        eval_calvin.set_scene(world, args, task, 7)
        hand = expert.Expert(world)
        assert task in expert.feasible(hand) and not world.look
        assert not task.startswith("place") or next(hand.perform(task))[6] == -1
    eval_calvin.set_scene(world, args, "unstack_block", 7)
    assert max(expert.Expert(world).block(name)[0][2] for name in calvin.BLOCKS) > 0.485
    world.look = True


@SIMULATOR
def test_a_dragged_arm_finds_its_way(world):
    """Catches drags that are recorded as if meant, are not executed, never end, are not made up for."""
    rng, (robot, scene) = np.random.default_rng(0), calvin.draw_start("D", "open_drawer", 0)
    world.reset(robot, scene)
    demo = record_calvin.demonstrate(world, expert.Expert(world), "open_drawer", rng, drags=0.2)
    assert demo.done
    seen, _, executed, _, meant = record_calvin.rows_of(demo)
    moved = np.flatnonzero((executed != meant)[:-1].any(1))
    runs = sorted(np.split(moved, np.flatnonzero(np.diff(moved) > 1) + 1), key=len)
    assert len(runs) == 2, runs
    near, apart = runs
    assert 2 <= len(near) <= 3 and 5 <= len(apart) <= 15
    assert 0.01 < 0.02 * np.linalg.norm(executed[near, :3].sum(0)) < 0.033        # metres; 0.3 of it upwards
    assert np.abs(meant[[near[0], apart[0]], :3]).max(1).tolist() == pytest.approx([0.4, 0.6])  # slow, fast
    came = seen[apart[-1] + 1, :3] - seen[apart[0], :3]                    # the arm lags behind its commands
    went, wanted = (0.02 * x[apart, :3].sum(0) for x in (executed, meant))
    assert np.linalg.norm(came - went) < min(0.05, np.linalg.norm(came - wanted) / 2)


@SIMULATOR
@pytest.mark.parametrize("task", ["open_drawer", "lift_red_block_slider", "push_blue_block_left",
                                  "rotate_pink_block_right", "turn_off_lightbulb"])
def test_the_expert_goes_by_what_is_seen(world, task):
    """Catches a skill that goes by what was done, which no policy can see: an expert that is made anew at
    each step does the task too."""
    world.reset(*calvin.draw_start("D", task, 1))
    start, grip = world.get_info(), 1
    for _ in range(150):
        anew = expert.Expert(world)
        anew.grip = grip
        action = next(anew.perform(task))
        world.step(action)
        grip = int(action[6])
        if calvin.success(task, start, world.get_info()):
            return
    raise AssertionError("not done")


class Learner:
    """In a policy's place: does as `actions` says, a timestep of four steps after the other."""
    stride = 4

    def __init__(self, actions, window=5):
        self.actions, self.steps = actions, 0
        self.model = types.SimpleNamespace(config=types.SimpleNamespace(window=window))

    def reset(self):
        self.steps = 0

    def step(self, observation, sentence):
        assert sentence in calvin.SENTENCES["open_drawer"]["training"]
        self.steps += 1
        return next(self.actions)


@SIMULATOR
def test_the_expert_takes_over_from_a_policy(world):
    """Catches a policy's own actions taught as if right, a clip without what led to the takeover or with
    what the policy did alone or all but, one that waits for a policy that is stuck, an expert that believes
    the gripper to be as it left it."""
    def demonstrate(actions, window=5):
        rng, learner = np.random.default_rng(0), Learner(actions, window)
        world.reset(*calvin.draw_start("D", "open_drawer", 0))
        return learner, record_calvin.demonstrate(world, expert.Expert(world), "open_drawer", rng,
                                                  policy=learner)

    still = 0, 0, 0, 0, 0, 0, -1
    for astray, least, most in ((0.1, 0, 0.15, 0, 0, 0.3, -1), 20, 100), (still, 20, 36):
        learner, demo = demonstrate(itertools.repeat(np.array(astray)))
        assert demo.done and least <= learner.steps <= most and learner.steps % 4 == 0
        seen, _, executed, _, meant = record_calvin.rows_of(demo)
        assert np.isnan(meant[:16]).all() and np.isfinite(meant[16:-1]).all()
        assert np.allclose(executed[:16], astray) and np.allclose(executed[16:-1], meant[16:-1])
        assert (meant[16:-1, 6] == -1).all() and seen[16, 6] < 0.01          # closed it was, and stays so
        assert record_calvin.steps_of(demo) == len(meant) - 17 > 20
    skill = lambda: expert.Expert(world).perform("open_drawer")
    learner, alone = demonstrate(skill())
    assert alone.done and not alone.steps
    for short, kept in (5, False), (40, True):                     # so many steps before it would be done
        begun = itertools.islice(skill(), learner.steps - short)
        _, demo = demonstrate(itertools.chain(begun, itertools.repeat(np.array(still))), window=1)
        assert demo.done and bool(demo.steps) == kept, (short, len(demo.steps))


def test_spare_demonstrations_are_kept(monkeypatch):
    """Catches --spare that keeps what nobody asked for, or more than so many, or ends before all is found."""
    sessions = [["turn_on_led", "turn_on_led", "turn_off_led", "turn_on_led"], ["open_drawer", "turn_on_led"]]
    step = record_calvin.Step(None, dict(robot_obs=np.zeros(15), scene_obs=np.zeros(24)), *np.zeros((2, 7)))
    play = lambda world, seed, *_, **__: [record_calvin.Demo(x, True, [step] * 3) for x in sessions[seed]]
    monkeypatch.setattr(record_calvin, "quiet", lambda: None)
    monkeypatch.setattr(record_calvin.calvin, "Calvin", lambda *_: types.SimpleNamespace())
    monkeypatch.setattr(record_calvin, "play", play)
    for spare, wanted in (0, 2), (1, 3), (9, 5):
        args = types.SimpleNamespace(tasks=["turn_on_led", "open_drawer"], each=1, spare=spare, seed=0,
                                     play=4, split="training", drags=0, policy="", sessions=400)
        found, tried = record_calvin.search(0, "D", args)
        assert len(found) == wanted and {task for _, task, *_ in found} == set(args.tasks)
        assert len(tried["turn_on_led"]) == 4 and len(tried["turn_off_led"]) == 1


def test_a_clip_holds_the_actions_that_were_asked_for(tmp_path):
    """Catches commands with noise in the place of what the expert meant, or of what the arm achieved."""
    given = dict(executed=np.zeros((3, 7)), achieved=np.ones((3, 7)), meant=np.full((3, 7), 2))
    frames = {c: np.zeros((3, 16, 16, 3), np.uint8) for c in ("rgb_static", "rgb_gripper")}
    for actions, wanted in given.items():
        args = types.SimpleNamespace(out=tmp_path / actions, actions=actions, stride=1)
        with record_calvin.ClipWriter(args, 0, "D") as writer:
            writer.add(0, "open_drawer", "open it", frames, np.zeros((3, 15)), np.zeros((3, 24)), **given)
        clips.write_meta(args.out, "test", fps=30, command="")
        assert np.array_equal(clips.Clips(args.out).rows(0)[1][:-1], wanted[:-1])
    args = types.SimpleNamespace(out=tmp_path / "sparse", actions="meant", stride=2)
    with record_calvin.ClipWriter(args, 0, "D") as writer:
        writer.add(0, "open_drawer", "open it", {c: x[::2] for c, x in frames.items()},
                   np.arange(45.0).reshape(3, 15), np.zeros((3, 24)), **given)
    clips.write_meta(args.out, "test", fps=15, command="")
    robot, actions = clips.Clips(args.out).rows(0)
    assert robot[:, 0].tolist() == [0, 30] and actions[:3].tolist() == given["meant"].tolist()
    assert np.isnan(actions[3]).all()


@SIMULATOR
def test_recorded_demonstrations_are_packed_and_replayed(tmp_path):
    """Catches files that prepare_calvin.py can't read, commands that do not lead where the pictures show."""
    raw, packed = tmp_path / "raw", tmp_path / "packed"
    record = ["record_calvin.py", "--out", raw, "--format", "calvin", "--tasks", "turn_on_led", "open_drawer",
              "--demos", 2, "--scenes", "B", "--renderer", "tiny", "--workers", 1]
    for _ in range(2):                                                     # the second finds all done
        status, text = run_apart(*record)
        assert status == 0 and "2 demonstrations" in text, text
    notes = [json.loads(note.read_text()) for note in (raw / "training/segments").glob("*.json")]
    sessions = {segment["session"] for note in notes for segment in note}
    assert len(np.load(raw / "training/ep_start_end_ids.npy")) == len(sessions)   # never parted by a split
    status, text = run("record_calvin.py", "--replay", raw / "training", "--workers", 1)
    assert status == 0 and "scene B: 2 of 2" in text, text
    for actions in "rel_actions", "executed_actions":
        status, text = run("prepare_calvin.py", raw, packed / actions, "--actions", actions)
        assert status == 0 and "2 clips" in text, text
    achieved, executed = (clips.Clips(packed / x / "training") for x in ("rel_actions", "executed_actions"))
    assert achieved.sentences == executed.sentences and set(achieved.tasks) == {"turn_on_led", "open_drawer"}
    assert all(text in calvin.SENTENCES[task]["training"]
               for text, task in zip(executed.sentences, executed.tasks))
    robot, moved = achieved.rows(0)
    inside = np.abs(moved[:-1, :3]) < 0.99                                 # not clipped
    assert np.allclose((moved[:-1, :3] / 50)[inside], np.diff(robot[:, :3], axis=0)[inside], atol=1e-5)
