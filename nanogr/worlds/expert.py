"""A scripted expert for CALVIN's 34 tasks, in all four scenes of the real simulator (calvin.py).

It reads the true state and acts through rel_actions alone. record_calvin.py records it, eval_calvin.py judges
it (--policy scripted) as a ceiling for what can be done by these actions.

How a skill is written. A skill is a method of `Expert`: a generator that yields rel_actions, each of which
the world has executed by the time the generator goes on. It is a paragraph of four kinds of sentence:
    yield from self.clear()                  leave what the last task ended at, and rise
    yield from self.go(place, yaw=ACROSS)    move the tips to `place`; `speed`; how `near` is near enough
    yield from self.close(), self.open()     the gripper
    yield from self.finish_with(place, ...)  a last motion to be ended even if the oracle says yes halfway: a
                                             door left ajar would be in the next task's way
It reads the true state through `self.block`, `self.door`, `self.held` and the fixtures' places, which come
from the scene's own joints, so that a skill fits all four scenes. Nothing is planned: the simulator's arm
follows straight lines, and what goes wrong is tried again for as long as the oracle says no.

In order: what the expert knows and does; which tasks make sense in a state.
"""
import functools
from collections import namedtuple

import numpy as np

from nanogr.worlds import calvin

BLOCKS = calvin.BLOCKS
ACROSS = np.pi / 2             # yaw of the gripper at which its fingers open along x
TIP = 0.005                    # the fingertips go this far below a block's centre [m]
HIGH = 0.57                    # z at which nothing is in the arm's way
FULL_HANDS = ("place_in_drawer", "place_in_slider", "stack_block")     # they start with a block held
WHERE = dict(table="table", floor="table", drawer="drawer", left="slider", right="slider")


# ------------------------------------------------------------------------------- what the expert knows
Fixtures = namedtuple("Fixtures", "button switch_x handle_x door_travel drawer_x shelf_x sizes")


def fixtures_of(env):
    """Places [m] of the scene's fixtures with all joints at 0, from their joints as they stand."""
    p, table = env.p, env.scene.fixed_objects[0].uid
    joints = {p.getJointInfo(table, i, physicsClientId=env.cid)[1].decode(): i
              for i in range(p.getNumJoints(table, physicsClientId=env.cid))}
    place = {name: np.array(p.getLinkState(table, i, computeForwardKinematics=1, physicsClientId=env.cid)[4])
             for name, i in joints.items()}
    angle = {name: p.getJointState(table, i, physicsClientId=env.cid)[0] for name, i in joints.items()}
    shelves = {side: np.mean([corner[0] for corner in env.scene.surfaces[f"slider_{side}"]])
               for side in ("left", "right")}
    sizes = {block.name.removeprefix("block_"): p.getCollisionShapeData(
        block.uid, -1, physicsClientId=env.cid)[0][3][0] for block in env.scene.movable_objects}
    return Fixtures(button=place["base__button"] + [0, 0, angle["base__button"]],
                    switch_x=place["base__switch"][0],
                    handle_x=place["base__slide"][0] + angle["base__slide"] + 0.14,
                    door_travel=p.getJointInfo(table, joints["base__slide"], physicsClientId=env.cid)[9],
                    drawer_x=place["base__drawer"][0], shelf_x=shelves, sizes=sizes)


def wrap(angle):
    return (angle + np.pi) % (2 * np.pi) - np.pi


class Expert:
    """Does any of the 34 tasks. `fast`, `slow`: shares of the full action, far from things and near them."""

    def __init__(self, world, rng, fast=0.6, slow=0.4):
        self.world, self.rng, self.fast, self.slow = world, rng, fast, slow
        self.robot, self.fixtures = world.env.robot, fixtures_of(world.env)
        self.grip = 1                      # what the gripper was told last: 1 open, -1 closed
        self.grasp_pitch = 0.0             # of what it holds
        self.unfinished = None             # a motion that the oracle's yes interrupted
        self.leaves = {}                   # where it leaves a door: {name: state}

    # ---- what it sees

    def block(self, name):
        """A block's place (3,) and yaw."""
        seen = self.world.info["scene_info"]["movable_objects"][f"block_{name}"]
        return np.array(seen["current_pos"]), self.world.env.p.getEulerFromQuaternion(seen["current_orn"])[2]

    def touched_by(self, name):
        """What touches a block, as the simulator's numbers."""
        contacts = self.world.info["scene_info"]["movable_objects"][f"block_{name}"]["contacts"]
        return {contact[2] for contact in contacts}

    def door(self, name):
        return self.world.info["scene_info"]["doors"][f"base__{name}"]["current_state"]

    def door_soon(self, name):
        """Where a door will be when the unfinished motion, which a next task starts with, is done."""
        return self.leaves.get(name, self.door(name))

    def held(self):
        """The block that hangs in the gripper, or None."""
        return next((name for name in BLOCKS if self.touched_by(name) == {self.robot.robot_uid}), None)

    def tip(self):
        return np.array(self.world.info["robot_info"]["tcp_pos"])

    def where(self, name):
        place, _ = self.block(name)
        if place[2] < 0.42:
            return "drawer" if place[2] > 0.3 else "floor"
        if place[1] < 0:
            return "table"
        return min(("left", "right"), key=lambda side: abs(place[0] - self.fixtures.shelf_x[side]))

    # ---- how it moves

    def go(self, place, yaw=None, pitch=0.0, speed=None, near=0.006, patience=5):
        """Move the tips to `place` and turn the hand to (pi, pitch, yaw); None: the yaw it has. It ends when
        the command is there and the arm `near`, or has been given `patience` steps to come."""
        place, speed, waited = np.asarray(place, float), speed or self.fast, 0
        while True:
            now = self.robot.target_orn
            turn = np.array([wrap(np.pi - now[0]), pitch - now[1], 0 if yaw is None else wrap(yaw - now[2])])
            way = place - self.robot.target_pos
            if np.linalg.norm(way) < 1e-3 and np.abs(turn).max() < 1e-2:
                waited += 1
                if waited >= patience or np.linalg.norm(self.tip() - place) < near:
                    return
            way = way / 0.02
            way = way * min(1, speed / max(np.abs(way).max(), 1e-9))
            yield np.array([*way, *np.clip(turn / 0.05, -speed, speed), self.grip])

    def hold(self, grip, steps):
        self.grip = grip
        for _ in range(steps):
            yield np.array([0, 0, 0, 0, 0, 0, grip])

    def close(self, steps=10):
        yield from self.hold(-1, steps)

    def open(self, steps=10):
        yield from self.hold(1, steps)

    def up(self, height, **options):
        x, y, z = self.robot.target_pos
        yield from self.go([x, y, z + height], **options)

    def clear(self, height=HIGH, keep=False):
        """Leave whatever the arm is at: let go, unless it should `keep` what it holds; back off; rise."""
        if not keep and self.grip == -1 and any(self.robot.robot_uid in self.touched_by(b) for b in BLOCKS):
            yield from self.open(8)
        start = self.robot.target_pos.copy()
        if not keep and any(np.linalg.norm(self.block(b)[0] - self.tip()) < 0.05 for b in BLOCKS):
            height = max(height, self.tip()[2] + 0.1)         # what it let go of is between its fingers
        if np.linalg.norm(start - self.tip()) > 0.02:         # the command went where the arm can't
            start = self.tip()
        if start[1] > -0.12 and start[2] > 0.425:             # inside the cabinet: first out, then up
            yield from self.go([start[0], -0.17, max(start[2], 0.56)], pitch=self.robot.target_orn[1],
                               near=0.03, patience=4)
            start = self.robot.target_pos.copy()
        if start[2] < height:
            yield from self.go([start[0], start[1], height], near=0.03, patience=4)

    def ready(self):
        if self.grip != 1:
            yield from self.open(5)

    def finish(self):
        if self.unfinished is not None:
            yield from self.unfinished()
            self.unfinished, self.leaves = None, {}

    def settle(self):
        """Command the pose that the arm has. Actions add to the last command, which no state tells: where it
        was out of reach, what follows could not be done again from the state."""
        robot = self.world.info["robot_info"]
        _, pitch, yaw = robot["tcp_orn"]
        yield from self.go(robot["tcp_pos"], yaw=yaw, pitch=pitch, patience=2)

    def finish_with(self, *motion, leaves, **options):
        """Do the motion now, the rest of it at the next task's start. leaves: {door: its state then}."""
        self.unfinished, self.leaves = functools.partial(self.go, *motion, **options), leaves
        yield from self.finish()

    # ---- blocks

    def grasp_yaw(self, name):
        """The yaw at which the fingers take a block by two of its sides, away from its neighbours: the
        nearest to ACROSS of those that the wrist reaches."""
        place, yaw = self.block(name)
        size, skew = self.fixtures.sizes[name], 0.6
        yaws = [(yaw + turn + askew, abs(askew)) for turn in (0, np.pi) for askew in (0, skew, -skew)]
        if size < 0.06:                                       # short enough to be taken the long way too
            yaws += [(yaw + turn, 0.15 if size > 0.045 else 0) for turn in (np.pi / 2, -np.pi / 2)]

        def cost(option):                                     # (angle, what is held against it)
            angle, malus = option
            off = abs(wrap(angle - ACROSS))
            spread = 0.05 * np.array([np.sin(angle), -np.cos(angle), 0])
            hits = sum(self.overlap(other, place + finger) for other in BLOCKS if other != name
                       for finger in (spread, -spread))
            return off + malus + 100 * hits + (99 if off > 1.9 else 0)

        return min(yaws, key=cost)[0]

    def overlap(self, name, place, margin=0.018):
        """By how many metres a finger that comes down at `place` would meet the block."""
        middle, yaw = self.block(name)
        (x, y, z), (c, s) = place - middle, (np.cos(yaw), np.sin(yaw))
        along, aside = self.fixtures.sizes[name] / 2 - abs(c * x + s * y), 0.02 - abs(c * y - s * x)
        return max(0, margin + min(along, aside)) if abs(z) < 0.03 else 0

    def lift(self, name, height=0.1):
        yield from self.clear()
        yield from self.ready()
        yaw, (place, _) = self.grasp_yaw(name), self.block(name)
        yield from self.go([*place[:2], max(place[2] + 0.09, 0.5)], yaw=yaw, near=0.01)
        place, _ = self.block(name)
        yield from self.go(place - [0, 0, TIP], yaw=yaw, speed=self.slow, near=0.005)
        self.grasp_pitch = 0.0
        yield from self.close()
        yield from self.up(height, yaw=yaw, speed=self.slow, near=0.01)

    lift_table = lift

    def lift_drawer(self, name):
        yield from self.lift(name, height=0.12)

    def lift_slider(self, name, pitch=-1.0):
        # The arm can't reach into the cabinet from above: the hand leans, and slides in along its axis.
        yield from self.clear(0.6)
        yield from self.ready()
        (place, _), axis = self.block(name), self.axis(pitch)
        yield from self.go([place[0], -0.2, 0.6], yaw=ACROSS, pitch=pitch, near=0.03)
        yield from self.go(place - 0.15 * axis + [0, 0, 0.01], yaw=ACROSS, pitch=pitch, near=0.01)
        yield from self.go(place - 0.004 * axis + [0, 0, 0.002], yaw=ACROSS, pitch=pitch, speed=self.slow)
        self.grasp_pitch = pitch
        yield from self.close()
        x, y, z = self.robot.target_pos
        yield from self.go([x, y, z + 0.045], yaw=ACROSS, pitch=pitch, speed=self.slow, near=0.01)
        yield from self.go([x, -0.16, 0.57], yaw=ACROSS, pitch=pitch, speed=self.slow, near=0.02)

    def axis(self, pitch):
        """The direction in which the hand points."""
        return np.array([0, np.sin(-pitch), -np.cos(pitch)])

    def push(self, name, side, blow=0.15):
        yield from self.clear()
        self.grip = -1
        (x, y, _), beside = self.block(name)[0], side * (0.067 + self.fixtures.sizes[name] / 2)
        yield from self.go([x - beside, y, 0.53], yaw=ACROSS, near=0.02)
        yield from self.go([x - beside, y, 0.452], yaw=ACROSS, speed=self.slow, near=0.01)
        # A blow rather than a push: the block should slide free of the hand before the oracle says yes, for
        # push_into_drawer, if it comes next, counts only from a moment at which the robot touches no block.
        yield from self.go([x - beside + side * blow, y, 0.452], yaw=ACROSS, speed=1, near=0.1)
        yield from self.go([x - beside, y, 0.452], yaw=ACROSS, speed=1, near=0.02)
        yield from self.go([x + side * 0.14, y, 0.452], yaw=ACROSS, speed=self.slow, near=0.01)

    def rotate(self, name, side):
        yield from self.clear()
        yield from self.ready()
        yaw, (place, start) = self.grasp_yaw(name), self.block(name)
        yield from self.go([*place[:2], 0.53], yaw=yaw, near=0.01)
        yield from self.go(place - [0, 0, 0.004], yaw=yaw, speed=self.slow, near=0.005)
        yield from self.close(8)
        for _ in range(90):                # until the block has turned, not the hand: it slips
            if abs(wrap(self.block(name)[1] - start)) > np.deg2rad(68):
                break
            yield np.array([0, 0, 0, 0, 0, -0.5 * side, -1])
        yield from self.open(8)

    def push_into_drawer(self):
        table = [name for name in BLOCKS if self.where(name) == "table"]
        name = min(table or BLOCKS, key=lambda name: self.block(name)[0][1])
        yield from self.clear(0.56)
        self.grip = -1
        if abs(self.block(name)[0][0] - self.fixtures.drawer_x) > 0.12:       # it would fall beside it
            yield from self.carry(name, self.free_x(name))
            yield from self.clear()
            self.grip = -1
        x, y, _ = self.block(name)[0]
        yield from self.go([x, y + 0.075, 0.56], yaw=ACROSS, near=0.02)
        yield from self.go([x, y + 0.075, 0.455], yaw=ACROSS, speed=self.slow, near=0.01)
        yield from self.go([x, -0.19, 0.455], yaw=ACROSS, speed=self.slow, near=0.01)
        yield from self.go([x, -0.10, 0.5], yaw=ACROSS, speed=self.slow, near=0.01)

    def free_x(self, name):
        """Where behind the drawer no other block is: in its middle, if that is free."""
        others = [self.block(other)[0] for other in BLOCKS if other != name]
        return max(self.fixtures.drawer_x + np.array([0, -0.08, 0.08]), key=lambda x: min(
            0.12, *(np.linalg.norm(place - [x, -0.12, 0.46]) for place in others)))

    def carry(self, name, x):
        yield from self.lift(name)
        z = 0.465 + self.tip()[2] - self.block(name)[0][2]               # the block hangs a bit lower
        yield from self.go([x, -0.12, self.tip()[2]], yaw=ACROSS, near=0.02)
        yield from self.go([x, -0.12, z], yaw=ACROSS, speed=self.slow, near=0.005)
        yield from self.open(8)

    def place_in_drawer(self):
        yield from self.clear(0.56, keep=True)
        x, y = self.fixtures.drawer_x + self.rng.uniform(-0.06, 0.06), -0.065 - self.door("drawer")
        yield from self.go([x, y, 0.56], yaw=ACROSS, near=0.02)
        yield from self.go([x, y, 0.41], yaw=ACROSS, speed=self.slow, near=0.02)
        yield from self.open(15)

    def place_in_slider(self, pitch=-1.0):
        yield from self.clear(0.6, keep=True)
        side = "left" if self.door("slide") < self.fixtures.door_travel / 2 else "right"
        there = [self.block(name)[0][0] for name in BLOCKS
                 if self.where(name) == side and name != self.held()]
        spots = self.fixtures.shelf_x[side] + self.rng.uniform(-0.02, 0.02) + np.array([0, -0.075, 0.075])
        x = max(spots, key=lambda spot: min([abs(spot - other) for other in there], default=0))
        goal, axis = np.array([x, 0.085, 0.475]), self.axis(pitch)
        yield from self.go([x, -0.2, 0.6], yaw=ACROSS, pitch=pitch, near=0.02)
        yield from self.go(goal - 0.16 * axis + [0, 0, 0.02], yaw=ACROSS, pitch=pitch, near=0.01)
        yield from self.go(goal + [0, 0, 0.02], yaw=ACROSS, pitch=pitch, speed=self.slow, near=0.008)
        yield from self.go(goal, yaw=ACROSS, pitch=pitch, speed=self.slow)
        yield from self.open(14)
        yield from self.go(goal - 0.16 * axis, yaw=ACROSS, pitch=pitch, speed=self.slow, near=0.02)

    def stack_block(self):
        held = self.held() or min(BLOCKS, key=lambda b: np.linalg.norm(self.block(b)[0] - self.tip()))
        others, pitch = [b for b in BLOCKS if b != held], self.grasp_pitch
        below = max([b for b in others if self.where(b) == "table"] or others, key=self.fixtures.sizes.get)
        (place, yaw), hand = self.block(below), self.robot.target_orn[2]
        yaw = ACROSS if pitch else yaw if abs(wrap(yaw - hand)) < np.pi / 2 else yaw + np.pi
        yield from self.clear(0.58, keep=True)
        yield from self.go([*place[:2], 0.58], yaw=yaw, pitch=pitch)
        offset, (place, _) = self.block(held)[0] - self.tip(), self.block(below)      # it hangs a bit aside
        goal = place + [0, 0, 0.043] - offset
        yield from self.go(goal + [0, 0, 0.04], pitch=pitch, speed=self.slow, near=0.005)
        yield from self.go(goal, pitch=pitch, speed=0.25, near=0.003)
        yield from self.open(12)
        back = 0.1 * self.axis(pitch) if pitch else 0
        yield from self.go(goal + [0, 0, 0.12] - back, pitch=pitch, speed=0.3, near=0.02)

    def unstack_block(self):
        table = [name for name in BLOCKS if self.where(name) == "table"]
        yield from self.lift(max(table or BLOCKS, key=lambda name: self.block(name)[0][2]))

    # ---- fixtures

    def open_drawer(self):
        yield from self.clear()
        self.grip = -1
        x, y = self.fixtures.drawer_x + self.rng.uniform(-0.03, 0.03), -0.212 - self.door("drawer")
        yield from self.go([x, y, 0.48], yaw=ACROSS, near=0.015)
        yield from self.go([x, y, 0.36], yaw=ACROSS, speed=self.slow, near=0.008)     # hooks it from inside
        yield from self.finish_with([x, -0.44, 0.36], yaw=ACROSS, speed=self.slow, patience=3,
                                    leaves=dict(drawer=0.44 - 0.212))

    def close_drawer(self):
        yield from self.clear()
        self.grip = -1
        x, y = self.fixtures.drawer_x + self.rng.uniform(-0.03, 0.03), -0.307 - self.door("drawer")
        yield from self.go([x, y, 0.48], yaw=ACROSS, near=0.015)
        yield from self.go([x, y, 0.365], yaw=ACROSS, speed=self.slow, near=0.01)
        yield from self.finish_with([x, -0.242, 0.365], yaw=ACROSS, speed=self.slow, patience=3,
                                    leaves=dict(drawer=0))

    def move_slider(self, side):
        # side: 1 to the right. The handle is pushed from its other side; the door's joint grows to the left.
        yield from self.clear(0.55)
        self.grip = -1
        handle, travel = self.fixtures.handle_x, self.fixtures.door_travel
        x = handle - self.door("slide") - side * 0.055
        yield from self.go([x, -0.12, 0.55], yaw=ACROSS, near=0.02)
        yield from self.go([x, -0.09, 0.50], yaw=ACROSS, near=0.02)
        yield from self.go([x, -0.03, 0.50], yaw=ACROSS, speed=self.slow, near=0.01)
        end = travel if side < 0 else 0
        yield from self.finish_with([handle - end - side * 0.03, -0.03, 0.50], yaw=ACROSS, speed=self.slow,
                                    near=0.01, patience=3, leaves=dict(slide=end))

    def press_button(self):
        yield from self.clear(0.52)
        self.grip = -1
        x, y, _ = self.fixtures.button
        yield from self.go([x, y, 0.53], yaw=ACROSS, near=0.015)
        yield from self.go([x, y, 0.455], yaw=ACROSS, speed=self.slow, near=0.01)
        yield from self.go([x, y, 0.53], yaw=ACROSS, speed=self.slow, near=0.02)

    turn_on_led = turn_off_led = press_button

    def switch(self):
        """Where the switch's bar is: it slides up and back."""
        share = self.world.info["scene_info"]["switches"]["base__switch"]["joint_state"] / 0.088
        return np.array([self.fixtures.switch_x, 0.02 + 0.044 * share, 0.527 + 0.076 * share])

    def turn_on_lightbulb(self):
        yield from self.clear(0.55)
        self.grip = -1
        x, y, z = self.switch() - [0.012, 0, 0]
        yield from self.go([x, -0.10, 0.56], yaw=ACROSS, near=0.02)
        yield from self.go([x, -0.08, z - 0.045], yaw=ACROSS, near=0.02)              # under the bar
        yield from self.go([x, y + 0.01, z - 0.045], yaw=ACROSS, speed=self.slow, near=0.01)
        yield from self.go([x, y + 0.05, z + 0.09], yaw=ACROSS, speed=self.slow, near=0.01)

    def turn_off_lightbulb(self, pitch=-0.5):
        # From above the arm would end 8 cm short: the hand leans.
        yield from self.clear(0.55)
        self.grip = -1
        x, y, z = self.switch()
        yield from self.go([x, -0.06, z + 0.06], yaw=ACROSS, pitch=pitch, near=0.02)
        yield from self.go([x, y - 0.02, z + 0.06], yaw=ACROSS, pitch=pitch, near=0.02)
        yield from self.go([x, y - 0.02, z + 0.03], yaw=ACROSS, pitch=pitch, speed=self.slow, near=0.02)
        yield from self.go([x, y - 0.06, z - 0.08], yaw=ACROSS, pitch=pitch, speed=self.slow, near=0.01)

    # ---- tasks

    def attempt(self, task):
        """One go at a task: the generator of the skill that its name says."""
        if hasattr(self, task):
            return getattr(self, task)()
        verb, name, *_, last = task.split("_")
        side = dict(right=1, left=-1).get(last)
        if verb == "move":
            return self.move_slider(side)
        return getattr(self, verb)(name, side) if side else getattr(self, f"{verb}_{last}")(name)

    def perform(self, task, held=None):
        """A generator of rel_actions float (7,) that do `task`, again and again as long as it is asked. held:
        the block that was in the gripper when the task was given, if it may have been lost since."""
        held = held or self.held()
        while True:
            yield from self.finish()
            if task in FULL_HANDS and held and self.held() is None:      # dropped, or misplaced
                yield from self.attempt(f"lift_{held}_block_{WHERE[self.where(held)]}")
            yield from self.attempt(task)


# ------------------------------------------------------------------------------ which tasks make sense
def accessible(expert, side):
    """Whether the door leaves this side of the cabinet open."""
    state, travel = expert.door_soon("slide"), expert.fixtures.door_travel
    return state < 0.02 if side == "left" else state > travel - 0.02


def drawer_is_open(expert):
    return expert.door_soon("drawer") > 0.18


def with_full_hands(expert, held):
    """The tasks that make sense with a block in the gripper."""
    others = [name for name in BLOCKS if name != held]
    tasks = ["place_in_drawer"] if drawer_is_open(expert) else []
    if any(accessible(expert, side) and all(expert.where(name) != side for name in others)
           for side in ("left", "right")):
        tasks.append("place_in_slider")
    if any(expert.where(name) == "table" and expert.block(name)[0][2] < 0.475 for name in others):
        tasks.append("stack_block")
    return tasks


def with_fixtures(expert):
    lights = expert.world.info["scene_info"]["lights"]
    return ["open_drawer" if expert.door_soon("drawer") < 0.05 else "close_drawer",
            "move_slider_right" if expert.door_soon("slide") > expert.fixtures.door_travel - 0.05
            else "move_slider_left",
            *(f"turn_{'off' if light['logical_state'] else 'on'}_{name}" for name, light in lights.items())]


def can_be_pushed(expert, name, side):
    """Is there room for the hand behind the block, and for the block where it is to go?"""
    place, button = expert.block(name)[0], expert.fixtures.button
    others = [expert.block(b)[0][:2] for b in BLOCKS if b != name and expert.where(b) == "table"]
    behind, goal = place[:2] - [0.1 * side, 0], place[:2] + [0.15 * side, 0]
    free = all(np.linalg.norm(goal - other) > 0.12 and np.linalg.norm(behind - other) > 0.1
               for other in others)
    on_button = any(abs(x - button[0]) < 0.1 and abs(place[1] - button[1]) < 0.09
                    for x in np.linspace(behind[0], goal[0], 5))
    return free and not on_button and -0.33 < goal[0] < 0.36 and abs(behind[0]) < 0.38


def with_block(expert, name):
    """The tasks that make sense with one block, which nothing stands on."""
    place, where = expert.block(name)[0], expert.where(name)
    if where == "drawer":
        return [f"lift_{name}_block_drawer"] if drawer_is_open(expert) and place[2] < 0.4 else []
    if where in ("left", "right"):
        return [f"lift_{name}_block_slider"] if accessible(expert, where) and place[1] > 0.05 else []
    others = [expert.block(b)[0][:2] for b in BLOCKS if b != name and expert.where(b) == "table"]
    alone = all(np.linalg.norm(place[:2] - other) > 0.13 for other in others)
    if where == "floor" or not alone or not 0.445 < place[2] < 0.475:
        return []
    tasks = [f"lift_{name}_block_table", f"rotate_{name}_block_left", f"rotate_{name}_block_right"]
    tasks += [f"push_{name}_block_{word}" for word, side in (("left", -1), ("right", 1))
              if can_be_pushed(expert, name, side)]
    behind = abs(place[0] - expert.fixtures.drawer_x) < 0.17 and place[1] < -0.06          # the open drawer
    if behind and drawer_is_open(expert):
        tasks.append("push_into_drawer")
    return tasks


def feasible(expert):
    """The tasks that make sense in the present state."""
    held = expert.held()
    if held:
        return with_full_hands(expert, held)
    stacked = any(expert.where(name) == "table" and expert.block(name)[0][2] > 0.485 for name in BLOCKS)
    blocks = [] if stacked else [task for name in BLOCKS for task in with_block(expert, name)]
    return with_fixtures(expert) + ["unstack_block"] * stacked + blocks
