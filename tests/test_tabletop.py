"""nanogr/worlds/tabletop.py: the world, its oracle, its demonstrator."""
import collections

import numpy as np
import pytest

from nanogr import clips
from nanogr.worlds import tabletop
from tests.helpers import CALVIN_TASKS, CAMERAS


def test_tasks_are_calvins():
    """Catches a task under another name than CALVIN's, too few of them, and one sentence for two tasks."""
    assert len(CALVIN_TASKS) == 34 and len(tabletop.TASKS) >= 20 and set(tabletop.TASKS) <= CALVIN_TASKS
    for sentences in tabletop.TASKS, tabletop.NARRATIONS:
        assert all(len(set(phrasings)) >= 4 for phrasings in sentences.values())
        count = collections.Counter(sentence for phrasings in sentences.values() for sentence in phrasings)
        assert max(count.values()) == 1 and all(sentence.strip() == sentence for sentence in count)


def test_demonstrator_succeeds():
    """Catches rules of motion and a demonstrator that drift apart: its clips would teach failures."""
    counts, done = collections.Counter(), collections.Counter()
    for session in range(240):
        world, rng = tabletop.Tabletop("ABCD"[session % 4], session), np.random.default_rng(session)
        for task, _, actions, success in tabletop.play(world, rng, counts, 12, render=False):
            done[task] += success
            assert all(np.abs(action).max() <= 1 and action[6] in (-1, 1) for action in actions)
    assert set(counts) == set(tabletop.TASKS) and min(counts.values()) >= 20
    assert sum(done.values()) / sum(counts.values()) > 0.98
    assert all(done[task] / counts[task] > 0.9 for task in counts)


def test_nudged_demonstrations_say_where_to_go():
    """Catches a drag that is recorded as the robot's action, or that spoils the task."""
    def play(nudges):
        """Steps in which the arm moved against its action, all steps, share of tasks done."""
        rng, counts, against, steps, success = np.random.default_rng(2), collections.Counter(), 0, 0, 0
        for session in range(12):
            world = tabletop.Tabletop("ABCD"[session % 4], session)
            for _, observations, actions, done in tabletop.play(world, rng, counts, 12, False, nudges):
                moves = np.diff([o["robot_obs"][:3] for o in observations], axis=0)
                against += int(((moves * np.stack(actions)[:, :3]).sum(1) < -0.01).sum())
                steps, success = steps + len(actions), success + done
        return against, steps, success / sum(counts.values())

    against, steps, success = play(nudges=1.0)
    assert against > 0.05 * steps and success > 0.97
    assert play(nudges=0.0)[0] == 0                            # undisturbed, the arm goes where it wants to


def test_reset_restores_everything():
    """Catches state outside robot_obs and scene_obs: evaluation would start elsewhere than it says."""
    world, rng, held = tabletop.Tabletop("B", 3), np.random.default_rng(3), set()
    for _ in tabletop.play(world, rng, collections.Counter(), 20, render=False):
        seen, info, other = world.observe(), world.get_info(), tabletop.Tabletop("B", 99)
        again = other.reset(seen["robot_obs"], seen["scene_obs"])
        assert all(np.array_equal(seen[key], again[key]) for key in seen)
        assert all(np.array_equal(info[key], other.get_info()[key]) for key in info)
        held.add(info["held"])
    assert None in held and len(held) > 1                                     # with a block in hand, too
    robot, scene = seen["robot_obs"].copy(), seen["scene_obs"].copy()
    robot[5], scene[[11, 17, 23]] = 0.4, (0.3, -0.2, 0.1)                     # yaw of gripper and blocks
    again = world.reset(robot, scene)
    assert np.array_equal(again["robot_obs"], robot) and np.array_equal(again["scene_obs"], scene)
    shapes = dict(rgb_static=(64, 64, 3), rgb_gripper=(32, 32, 3), robot_obs=(15,), scene_obs=(24,))
    assert all(seen[key].shape == shape for key, shape in shapes.items())
    with pytest.raises(ValueError, match="both"):
        world.reset(seen["robot_obs"])


def test_states_offer_choices():
    """Catches states whose picture alone tells the task, and chains that two policies would not share."""
    for seed in range(40):
        world = tabletop.Tabletop("ABCD"[seed % 4], seed)
        assert sum(tabletop.feasible(world, task) for task in tabletop.TASKS) >= 4, seed
    for task in tabletop.TASKS:
        world.reset(*tabletop.draw_start(world.scene, task, 5))
        assert tabletop.feasible(world, task)
        info = world.get_info()
        assert not any(tabletop.success(other, info, info) for other in tabletop.TASKS)
    chains = [tabletop.draw_chain("D", seed) for seed in (1, 1, 2)]
    assert chains[0][2] == chains[1][2] != chains[2][2]
    assert all(np.array_equal(a, b) for a, b in zip(chains[0][:2], chains[1][:2]))
    world = tabletop.Tabletop("D", 0)
    for robot_obs, scene_obs, tasks in chains:
        world.reset(robot_obs, scene_obs)
        assert len(set(tasks)) == 5 and tabletop.feasible(world, tasks[0])


def test_oracle_by_hand():
    """Catches an oracle that says yes to half a task, another block, or a block still in the gripper."""
    def info(held=None, red=(0, 0, 0.03), on_block=False, in_drawer=False, **joints):
        first = np.array([True, False, False])
        return dict(door=0, drawer=0, bulb=0, led=0, held=held, below_block=np.zeros(3, bool),
                    on_block=first & on_block, blocks=np.array([red, (0.2, 0, 0.03), (-0.2, 0, 0.03)]),
                    in_drawer=first & in_drawer) | joints

    lying, held = info(), info("red")
    for task, start, no, yes in (
            ("open_drawer", lying, info(drawer=0.05), info(drawer=0.12)),
            ("close_drawer", info(drawer=0.14), info(drawer=0.09), info(drawer=0.01)),
            ("move_slider_left", info(door=0.14), info(door=0.14), info(door=0)),
            ("turn_on_led", lying, info(bulb=1), info(led=1)),
            ("lift_red_block_table", lying, info("red", (0, 0, 0.07)), info("red", (0, 0, 0.09))),
            ("lift_red_block_table", lying, info("blue", (0, 0, 0.09)), info("red", (0, 0, 0.09))),
            ("lift_red_block_drawer", info(red=(0, 0, -0.03), in_drawer=True), info("red", (0, 0, 0)), held),
            ("push_red_block_right", lying, info(red=(0.05, 0, 0.03)), info(red=(0.08, 0, 0.03))),
            ("push_red_block_left", lying, info("red", (-0.08, 0, 0.03)), info(red=(-0.08, 0, 0.03))),
            ("place_in_drawer", held, info("red", in_drawer=True), info(in_drawer=True)),
            ("stack_block", held, info("red", on_block=True), info(on_block=True)),
            ("unstack_block", info(on_block=True), info("red"), lying)):
        assert not tabletop.success(task, start, start) and not tabletop.success(task, start, no), task
        assert tabletop.success(task, start, yes), task


def test_tabletop_data(tabletop_data):
    """Catches clips whose states, actions and frames are shifted against each other, videos with a robot."""
    robot, person = (clips.Clips(tabletop_data / kind) for kind in ("demonstrations", "videos"))
    assert len(robot) == len(person) == 12 and not person.has_actions and list(person.cameras) == CAMERAS[:1]
    assert robot.cameras == dict(rgb_static=(64, 64), rgb_gripper=(32, 32))
    against = 0
    for i in range(12):
        assert person.sentences[i] in tabletop.NARRATIONS[person.tasks[i]]
        assert robot.sentences[i] in tabletop.TASKS[robot.tasks[i]]
        states, actions = robot.rows(i)
        assert np.isnan(actions[-1]).all() and np.isfinite(actions[:-1]).all()
        assert np.array_equal(states[1:, 14] < 0, actions[:-1, 6] < 0)        # the gripper obeys
        moves = np.diff(states[:, :3], axis=0) / tabletop.STEP
        free = np.abs(moves - actions[:-1, :3]).max(1) < 0.6                  # but for noise, edges, drags
        assert free.mean() > 0.4
        against += int(((moves * actions[:-1, :3]).sum(1) < -0.25).sum())
    assert against > 5                                                       # the arm was dragged about
    other = tabletop_data.parent / "again"
    tabletop.make("demonstrations", other, 12, "AD", workers=1)
    assert (other / "00001.bin").read_bytes() == (tabletop_data / "demonstrations/00001.bin").read_bytes()


def test_videos_are_of_many_people():
    """Catches videos of one person, whose look is all that is learned; fingers that are not at the hand."""
    rng = np.random.default_rng(0)
    people = [tabletop.draw_person(rng) for _ in range(300)]
    assert {person.skin for person in people} == set(tabletop.SKINS)
    assert {(person.x > 0, person.y > 0) for person in people} == {(a, b) for a in (0, 1) for b in (0, 1)}
    for person in people[:20]:
        world = tabletop.Tabletop("D", 1, person, size=128)
        canvas = tabletop.Canvas(tabletop.Image.new("RGB", (256, 256)))
        u, v = (int(x / 2) for x in canvas.at(*world.position))
        around = world.observe()["rgb_static"][v - 12:v + 13, u - 12:u + 13].astype(int)
        assert np.abs(around - 0.9 * np.array(person.skin)).max(-1).min() < 8, person
