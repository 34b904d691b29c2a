"""CALVIN's demonstrations without its 500 GB: a scripted expert for all 34 tasks in the real simulator.

    python record_calvin.py --measure --scenes ABCD --demos 400     # how often does the expert succeed?
    python record_calvin.py --out data/calvin --demos 3400          # record: packed clips (clips.py)
    python record_calvin.py --out data/raw --format calvin          # record: CALVIN's own files, a frame each
    python record_calvin.py --replay data/raw/training              # do its commands lead there again?

The simulator is an extra, see calvin.py. The expert plays without a reset from whatever state it finds,
choosing among the tasks that make sense there, rare ones first; physics alone, 2 ms a step. What succeeds is
drawn afterwards, 90 ms a frame, from stored states. A killed run goes on where it was: start it again.

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
In order: what the expert knows, the expert, play, recording.
"""
import difflib
import functools
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shlex
import sys
from collections import Counter, namedtuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import calvin
import clips

BLOCKS = calvin.BLOCKS
ACROSS = np.pi / 2             # yaw of the gripper at which its fingers open along x
TIP = 0.005                    # the fingertips go this far below a block's centre [m]
HIGH = 0.57                    # z at which nothing is in the arm's way
FULL_HANDS = ("place_in_drawer", "place_in_slider", "stack_block")     # they start with a block held
WHERE = dict(table="table", floor="table", drawer="drawer", left="slider", right="slider")


# ------------------------------------------------------------------------------------------------------------
# what the expert knows

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

    def go(self, place, yaw=None, pitch=0.0, speed=None, near=0.006, patience=20):
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
            self.unfinished = None

    def finish_with(self, *motion, **options):
        """Do the motion now, and whatever is left of it before the next task."""
        self.unfinished = functools.partial(self.go, *motion, **options)
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
        yield from self.finish_with([x, -0.44, 0.36], yaw=ACROSS, speed=self.slow, patience=3)

    def close_drawer(self):
        yield from self.clear()
        self.grip = -1
        x, y = self.fixtures.drawer_x + self.rng.uniform(-0.03, 0.03), -0.307 - self.door("drawer")
        yield from self.go([x, y, 0.48], yaw=ACROSS, near=0.015)
        yield from self.go([x, y, 0.365], yaw=ACROSS, speed=self.slow, near=0.01)
        yield from self.finish_with([x, -0.242, 0.365], yaw=ACROSS, speed=self.slow, patience=3)

    def move_slider(self, side):
        # side: 1 to the right. The handle is pushed from its other side; the door's joint grows to the left.
        yield from self.clear(0.55)
        self.grip = -1
        handle, travel = self.fixtures.handle_x, self.fixtures.door_travel
        x = handle - self.door("slide") - side * 0.055
        yield from self.go([x, -0.12, 0.55], yaw=ACROSS, near=0.02)
        yield from self.go([x, -0.09, 0.50], yaw=ACROSS, near=0.02)
        yield from self.go([x, -0.03, 0.50], yaw=ACROSS, speed=self.slow, near=0.01)
        end = handle - (travel if side < 0 else 0) - side * 0.03
        yield from self.finish_with([end, -0.03, 0.50], yaw=ACROSS, speed=self.slow, near=0.01, patience=3)

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

    def perform(self, task):
        """A generator of rel_actions float (7,) that do `task`, again and again as long as it is asked."""
        held = self.held()
        while True:
            yield from self.finish()
            if task in FULL_HANDS and held and self.held() is None:      # dropped, or misplaced
                yield from self.attempt(f"lift_{held}_block_{WHERE[self.where(held)]}")
            yield from self.attempt(task)


# ------------------------------------------------------------------------------------------------------------
# play

def accessible(expert, side):
    """Whether the door leaves this side of the cabinet open."""
    state, travel = expert.door("slide"), expert.fixtures.door_travel
    return state < 0.02 if side == "left" else state > travel - 0.02


def with_full_hands(expert, held):
    """The tasks that make sense with a block in the gripper."""
    others = [name for name in BLOCKS if name != held]
    tasks = ["place_in_drawer"] if expert.door("drawer") > 0.18 else []
    if any(accessible(expert, side) and all(expert.where(name) != side for name in others)
           for side in ("left", "right")):
        tasks.append("place_in_slider")
    if any(expert.where(name) == "table" and expert.block(name)[0][2] < 0.475 for name in others):
        tasks.append("stack_block")
    return tasks


def with_fixtures(expert):
    lights = expert.world.info["scene_info"]["lights"]
    return ["open_drawer" if expert.door("drawer") < 0.05 else "close_drawer",
            "move_slider_right" if expert.door("slide") > expert.fixtures.door_travel - 0.05
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
        return [f"lift_{name}_block_drawer"] if expert.door("drawer") > 0.18 and place[2] < 0.4 else []
    if where in ("left", "right"):
        return [f"lift_{name}_block_slider"] if accessible(expert, where) and place[1] > 0.05 else []
    others = [expert.block(b)[0][:2] for b in BLOCKS if b != name and expert.where(b) == "table"]
    alone = all(np.linalg.norm(place[:2] - other) > 0.13 for other in others)
    if where == "floor" or not alone or not 0.445 < place[2] < 0.475:
        return []
    tasks = [f"lift_{name}_block_table", f"rotate_{name}_block_left", f"rotate_{name}_block_right"]
    tasks += [f"push_{name}_block_{word}" for word, side in (("left", -1), ("right", 1))
              if can_be_pushed(expert, name, side)]
    if expert.door("drawer") > 0.18 and abs(place[0] - expert.fixtures.drawer_x) < 0.17 and place[1] < -0.06:
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
    travel, lit = fixtures_of(world.env).door_travel, int(rng.integers(2))
    scene = seen["scene_obs"].copy()
    scene[:6] = rng.choice([0, travel]), rng.choice([0, 0.22]), 0, 0.088 * lit, lit, rng.integers(2)
    return world.reset(seen["robot_obs"], scene, seed)


REST = 6                       # steps between two tasks: the arm arrives where its last command was

Demo = namedtuple("Demo", "task done steps")
Step = namedtuple("Step", "pose observation action")           # pose: of all joints and bodies, see `pose_of`


def demonstrate(world, expert, task, rng, noise=0, remember=lambda world: None, longest=calvin.STEPS):
    """Let the expert do the task: -> Demo, whose steps go one to three beyond the success. `noise`: standard
    deviation added to its fast motions, which it makes up for: so it is seen to come from many places."""
    start, steps, done, left = world.get_info(), [], False, int(rng.integers(1, 4))
    observation = world.observe()
    for action in expert.perform(task):
        if len(steps) == longest or (done and left == 0):
            break
        left -= done
        if noise and np.abs(action[:3]).max() > expert.slow:
            action[:3] += rng.normal(0, noise, 3)
        steps.append(Step(remember(world), observation, np.append(np.clip(action[:6], -1, 1), action[6])))
        observation = world.step(action)
        done = done or calvin.success(task, start, world.get_info())
    steps.append(Step(remember(world), observation, np.full(7, np.nan)))
    return Demo(task, done, steps)


def play(world, seed, counts, n_tasks=8, asked=calvin.NAMES, **options):
    """A session without resets: yields Demos and counts their tasks; a failure ends it. The last of `n_tasks`
    is one of those `asked` for."""
    start_play(world, seed)
    rng = np.random.default_rng([seed, 1])
    expert = Expert(world, rng, fast=rng.uniform(0.6, 0.95), slow=rng.uniform(0.4, 0.6))
    noise = rng.choice([0, rng.uniform(0, 0.2)])              # half of the sessions go straight
    for i in range(n_tasks):
        tasks = [task for task in feasible(expert) if i + 1 < n_tasks or task in asked]
        if not tasks:
            return
        weights = np.array([1 / (1 + counts[task]) ** 2 for task in tasks])
        task = tasks[rng.choice(len(tasks), p=weights / weights.sum())]
        demo = demonstrate(world, expert, task, rng, noise, **options)
        counts[task] += 1
        yield demo
        if not demo.done:
            return
        for action in expert.finish():                         # under no sentence: the oracle has said yes
            world.step(action)
        for _ in range(REST):
            world.step([0, 0, 0, 0, 0, 0, expert.grip])


def quiet():
    """No prints from EGL and calvin_env, which announce themselves on starting and on ending."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def measure(scene, seed, n):
    """Play `n` demonstrations in a scene, physics alone: -> {task: [steps, or None where it failed]}."""
    quiet()
    world, counts, tried, session = calvin.Calvin(scene, None), Counter(), {}, 0
    while sum(counts.values()) < n:
        for demo in play(world, seed + session, counts):
            tried.setdefault(demo.task, []).append(len(demo.steps) - 1 if demo.done else None)
        session += 1
    return tried


# ------------------------------------------------------------------------------------------------------------
# recording

SIZES = [200, 84]              # sides of CALVIN's pictures [pixels]
SESSIONS = 400                 # of play for a shard at most; a task that is still lacking then is reported


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
    turn = np.clip(wrap(following[3:6] - robot_obs[3:6]) / 0.05, -1, 1)
    return np.array([*move, *turn, grip])


def seed_of(args, index):
    """The first of a shard's SESSIONS seeds; the two splits have none in common."""
    return (2 * args.seed + (args.split == "validation")) * 10**9 + index * SESSIONS


def search(index, scene, args):
    """A shard's demonstrations, --each of each of --tasks, physics alone: -> [Demo], {task: [steps, or None
    where it failed]} of all that was tried on the way."""
    quiet()
    world, counts, found, tried = calvin.Calvin(scene, None), Counter(), [], {}
    wanted, seed = Counter(args.tasks * args.each), seed_of(args, index)
    for session in range(SESSIONS):
        asked = list(+wanted)
        for demo in play(world, seed + session, counts, args.play, asked, remember=pose_of):
            tried.setdefault(demo.task, []).append(len(demo.steps) - 1 if demo.done else None)
            if demo.done and wanted[demo.task] > 0:
                wanted[demo.task] -= 1
                found.append(demo)
        if not +wanted:
            break
    else:
        print(f"shard {index}, scene {scene}: {SESSIONS} sessions of play gave too few of {dict(+wanted)}",
              file=sys.stderr)
    return found, tried


def draw(index, scene, args, searched):
    """Draw and write a shard. In another process than the search: that loads the simulator anew for each
    session, which leaks 12 MB where there is EGL; here nothing is loaded twice. -> tried"""
    quiet()
    world, rng = calvin.Calvin(scene, args.renderer), np.random.default_rng([seed_of(args, index), 2])
    demos, tried = searched
    with WRITERS[args.format](args, index, scene) as writer:
        for demo in demos:
            pictures = [draw_pose(world, step.pose) for step in demo.steps]
            frames = {camera: np.stack([smaller(x[camera], size) for x in pictures])
                      for camera, size in zip(pictures[0], args.sizes)}
            writer.add(demo.task, str(rng.choice(calvin.SENTENCES[demo.task]["training"])), frames,
                       *rows_of(demo))
    return tried


def smaller(picture, size):
    """A square picture in `size` pixels a side."""
    if len(picture) == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))


def rows_of(demo):
    """A Demo's rows: robot_obs (L, 15), scene_obs (L, 24), executed (L, 7), achieved (L, 7). The last frame
    shows what the last action led to: its own actions are NaN."""
    robot, scene = (np.stack([step.observation[key] for step in demo.steps])
                    for key in ("robot_obs", "scene_obs"))
    executed = np.stack([step.action for step in demo.steps])
    moved = [achieved(*row) for row in zip(robot, robot[1:], executed[:-1, 6])]
    return robot, scene, executed, np.stack([*moved, executed[-1]])


class ClipWriter:
    """A shard of packed clips, see clips.py; its rel_actions are those that --actions says."""

    def __init__(self, args, index, scene):
        self.shard = clips.ShardWriter(args.out, index, ["rgb_static", "rgb_gripper"])
        self.args, self.episode = args, index * 10**6

    def add(self, task, sentence, frames, robot_obs, scene_obs, executed, achieved):
        rows = executed if self.args.actions == "executed" else achieved
        self.shard.add(frames=frames, sentence=sentence, task=task, episode=self.episode,
                       robot_obs=robot_obs.astype(np.float32), rel_actions=rows.astype(np.float32))
        self.episode += 1

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
        self.scene = scene
        self.note = self.out / "segments" / f"{index:05d}.json"
        self.note.parent.mkdir(parents=True, exist_ok=True)

    def add(self, task, sentence, frames, robot_obs, scene_obs, executed, achieved):
        first, n = self.next, len(robot_obs) - 1               # this format has an action for every frame
        rows = dict(robot_obs=robot_obs, scene_obs=scene_obs, rel_actions=achieved, executed_actions=executed,
                    actions=np.concatenate([robot_obs[1:, :6], executed[:-1, 6:]], axis=1), **frames)
        for t in range(n):
            np.savez_compressed(self.out / f"episode_{first + t:07d}.npz",
                                **{key: values[t] for key, values in rows.items()})
        self.segments.append(dict(first=first, last=first + n - 1, task=task, sentence=sentence,
                                  scene=self.scene))
        self.next += n

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is None:
            clips.write_whole(self.note, json.dumps(self.segments).encode())


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
    """Write what makes the frames in `out` a CALVIN data set: recordings (one a demo), annotations."""
    segments = read_segments(out)
    pairs = np.array([(segment["first"], segment["last"]) for segment in segments])
    annotations = dict(                    # without CALVIN's "emb": the sentences in MiniLM's vectors
        language=dict(ann=[segment["sentence"] for segment in segments],
                      task=[segment["task"] for segment in segments]),
        info=dict(indx=[tuple(pair) for pair in pairs.tolist()], episodes=[]))
    (out / "lang_annotations").mkdir(exist_ok=True)
    for path, content in ((out / "ep_start_end_ids.npy", pairs),
                          (out / "lang_annotations/auto_lang_ann.npy", annotations)):
        file = io.BytesIO()
        np.save(file, content, allow_pickle=True)              # CALVIN's format has a pickle here
        clips.write_whole(path, file.getvalue())
    print(f"{out}: {len(segments)} demonstrations, {(np.diff(pairs) + 1).sum()} frames")


# ------------------------------------------------------------------------------------------------------------
# looking

MOMENTS, SIDE = 6, 100                                         # pictures of a demonstration, their side


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


def contact_sheet(path, found):
    """Write a PNG: a row of pictures for each task, its name above them, two tasks beside each other."""
    wide, high = MOMENTS * SIDE + 12, SIDE + 18
    sheet = Image.new("RGB", (2 * wide, -(-len(found) // 2) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (task, pictures) in enumerate(sorted(found.items())):
        left, top = i % 2 * wide, i // 2 * high
        pen.text((left + 2, top + 3), task, "black")
        for k, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture).resize((SIDE, SIDE)), (left + k * SIDE, top + 16))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    clips.write_whole(pathlib.Path(path), file.getvalue())
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------------------
# processes, checks, main

def answer(connection, function, job):
    connection.send(function(*job))


def in_processes(functions, jobs, workers):
    """Do each job in processes of their own (a second simulator in one would draw differently), `workers` at
    a time: function(*job) for the first of `functions`, then function(*job, what the one before returned).
    Yields (job, what the last one returned) as they end."""
    context, running = multiprocessing.get_context("spawn"), {}
    todo = [(job, 0, ()) for job in jobs][::-1]
    try:
        while todo or running:
            while todo and len(running) < workers:
                (job, stage, given), (ours, theirs) = todo.pop(), context.Pipe(duplex=False)
                process = context.Process(target=answer, args=(theirs, functions[stage], (*job, *given)),
                                          daemon=True)
                process.start()
                theirs.close()                                 # so that its death is the end of ours
                running[ours] = process, job, stage
            for ours in multiprocessing.connection.wait(running):
                process, job, stage = running.pop(ours)
                try:
                    result = ours.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    raise calvin.CalvinError(f"a process died (exit status {process.exitcode}), what it said "
                                             "stands above; finished shards are kept: run it again") from None
                process.join()
                if stage + 1 == len(functions):
                    yield job, result
                else:
                    todo.append((job, stage + 1, (result,)))
    finally:
        for process, _, _ in running.values():
            process.terminate()


def print_success(tried_by_scene):
    """A line a task: how often it was done of how often it was tried, in each scene, and its mean length."""
    for task in calvin.NAMES:
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
    jobs = [(scene, args.seed * 10**9 + part * 10**6, -(-args.demos // args.workers)) for scene in args.scenes
            for part in range(args.workers)]
    print_success(add_up([(job[0], tried) for job, tried in in_processes([measure], jobs, args.workers)]))


def replay_all(args):
    out = pathlib.Path(args.replay)
    scenes = sorted({segment["scene"] for segment in read_segments(out)})
    if not scenes:
        raise calvin.CalvinError(f"{out}/segments holds no demonstrations in CALVIN's files to replay")
    jobs = [(scene, out) for scene in scenes]
    print_success(add_up([(job[0], tried) for job, tried in in_processes([replay], jobs, args.workers)]))


def record_all(args):
    """Record the shards of this machine's part that are not there yet, then what joins them."""
    per_shard = args.each * len(args.tasks)
    shards = -(-args.demos // per_shard)
    clips.claim(home(args), format=args.format, split=args.split, actions=args.actions, tasks=args.tasks,
                each=args.each, play=args.play, sizes=args.sizes, scenes=args.scenes, seed=args.seed,
                renderer=args.renderer)
    mine = range(args.part - 1, shards, args.parts)
    todo = [(index, args.scenes[index % len(args.scenes)], args) for index in mine
            if not is_done(args, index)]
    notes = home(args) / "tried"                   # so that a resumed run reports all its parts
    notes.mkdir(exist_ok=True)
    with tqdm(total=len(mine) * per_shard, initial=(len(mine) - len(todo)) * per_shard, unit="demo") as bar:
        for (index, scene, _), tried in in_processes([search, draw], todo, args.workers):
            clips.write_whole(notes / f"{index:05d}.json", json.dumps([scene, tried]).encode())
            bar.update(per_shard)
    print_success(add_up([json.loads(note.read_text()) for note in sorted(notes.glob("*.json"))]))
    if not all(is_done(args, index) for index in range(shards)):
        print(f"part {args.shard} is done; once all parts are in {args.out}, start the command again there")
        return
    if args.format == "calvin":
        finish_calvin(home(args))
    else:
        clips.write_meta(args.out, "calvin expert", fps=calvin.FPS, command=shlex.join(sys.argv))
        print("\n".join(clips.summary(args.out)))
    contact_sheet(home(args) / "sheet.png", examples(args))


def parse():
    parser = clips.Parser(description="A scripted expert in the real simulator, and its demonstrations.")
    parser.add_argument("--out", help="directory of the data set")
    parser.add_argument("--measure", action="store_true", help="record nothing, print the expert's success")
    parser.add_argument("--replay", metavar="DIR", help="record nothing, execute the commands of DIR, "
                        "CALVIN's files of one split that this recorded, blindly")
    parser.add_argument("--demos", type=int, default=3400, help="how many, at least (default: %(default)s)")
    parser.add_argument("--scenes", default="ABCD", help="letters (default: ABCD)")
    parser.add_argument("--tasks", nargs="+", default=list(calvin.NAMES), metavar="TASK",
                        help="which, a name twice: twice as often (default: all 34)")
    parser.add_argument("--each", type=int, default=1, help="demos of a task in a shard (default: 1)")
    parser.add_argument("--play", type=int, default=8, metavar="N",
                        help="tasks done one after the other before a new state is drawn; 1: all start from "
                        "the arm's home (default: 8)")
    parser.add_argument("--format", default="clips", choices=list(WRITERS),
                        help="clips.py's or CALVIN's files (default: clips)")
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES, metavar=("STATIC", "GRIPPER"),
                        help="clips: pixels of the pictures' sides, smaller for a laptop (default: CALVIN's, "
                        "200 84)")
    parser.add_argument("--actions", default="executed", choices=["executed", "achieved"],
                        help="clips: commands, or CALVIN's convention (default: executed)")
    parser.add_argument("--split", default="training", choices=["training", "validation"],
                        help="validation: states that training has not (default: training)")
    parser.add_argument("--renderer", default="egl", choices=["egl", "tiny"])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--shard", default="1/1", metavar="I/N",
                        help="record the I-th of N parts, I = 1 .. N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.part, args.parts = clips.parse_part(parser, args.shard)
    unknown = [task for task in args.tasks if task not in calvin.NAMES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], calvin.NAMES, 1, 0)[0]
        parser.error(f"--tasks: there is no {unknown[0]}; did you mean {near}?")
    if not args.scenes or not set(args.scenes) <= set("ABCD"):
        parser.error("--scenes takes letters of ABCD, for instance ABC")
    if min(args.demos, args.each, args.play, args.workers) < 1 or args.seed < 0:
        parser.error("--demos, --each, --play and --workers must be 1 or more, --seed 0 or more")
    if not args.measure and args.out is None and args.replay is None:
        parser.error("--out DIR says where to record, --measure only looks how well the expert does")
    if min(args.sizes) < 1 or (args.format == "calvin" and args.sizes != SIZES):
        parser.error("--sizes must be 1 or more; CALVIN's files have CALVIN's own, 200 84")
    if args.format == "calvin" and args.each * len(args.tasks) * (calvin.STEPS + 4) > CalvinWriter.FRAMES:
        parser.error(f"--each {args.each}: a shard of CALVIN's files holds {CalvinWriter.FRAMES} frames")
    return args


def main():
    args = parse()
    if args.measure or args.replay:
        calvin.probe(None)
        (measure_all if args.measure else replay_all)(args)
    else:
        calvin.probe(args.renderer)                            # says what is wrong once, here
        record_all(args)


if __name__ == "__main__":
    try:
        main()
    except (clips.ClipsError, calvin.CalvinError, OSError) as problem:
        sys.exit(f"error: {problem}")
