"""A scripted expert for CALVIN's 34 tasks, in all four scenes of the real simulator (calvin.py).

It reads the true state and acts through rel_actions alone. record_calvin.py records it, eval_calvin.py judges
it (--policy scripted) as a ceiling for what can be done by these actions.

How a skill is written. A skill is a method of `Expert` that says what to do *now*: it looks where the hand is
and returns one rel_action, from its last stage to its first: "the fingers have it: rise; the hand is at it:
close; the hand is above it: come down; else go above it". Nothing is remembered but the last commands to arm
and gripper, and that it is stuck. So what it does can be learned from what is seen, and wherever a hand is
put, by a drag, a policy or a miss, it goes on from there and not from the beginning (docs/log.md has what
that is worth). Three rules make it learnable:
    a stage begins where the one before it ends, and that one aims beyond: a hand that stops short is not
    between two stages;
    sideways only where nothing is in the way, see `among`;
    what has to be undone is undone by a stage of its own, see `leave`, `fist`, `finish`.
It reads the true state through `self.block`, `self.door`, `self.tip` and the fixtures' places, which come
from the scene's own joints, so that a skill fits all four scenes. Nothing is planned: the simulator's arm
follows straight lines.

In order: what the expert knows and does; which tasks make sense in a state.
"""
from collections import namedtuple

import numpy as np

from nanogr.worlds import calvin

BLOCKS = calvin.BLOCKS
ACROSS = np.pi / 2             # yaw of the gripper at which its fingers open along x
TIP = 0.005                    # the fingertips go this far below a block's centre [m]
SAFE = 0.53                    # z at which nothing is in the arm's way
BEFORE = -0.095                # y beyond which things stand before the cabinet
REACH = 0.355                  # x beyond which the hand can't come down; the fingers take a block further out
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


def unwound(yaw):
    """A yaw as the wrist counts it, which has its ends at about -0.85 and 5."""
    return (yaw + 0.85) % (2 * np.pi) - 0.85


class Expert:
    """Does any of the 34 tasks. `fast`, `slow`: shares of the full action, far from things and near them; a
    push is at least 0.6, what is put on a block 0.25."""

    def __init__(self, world, fast=0.6, slow=0.4):
        self.world, self.fast, self.slow = world, fast, slow
        self.robot, self.fixtures = world.env.robot, fixtures_of(world.env)
        self.grip = int(self.robot.gripper_action)           # what it was told last: 1 open, -1 closed

    # ---- what it sees

    def block(self, name):
        """A block's place (3,) and yaw."""
        seen = self.world.info["scene_info"]["movable_objects"][f"block_{name}"]
        return np.array(seen["current_pos"]), self.world.env.p.getEulerFromQuaternion(seen["current_orn"])[2]

    def contacts(self, name):
        """What touches a block: (the body, its link), as the simulator's numbers."""
        contacts = self.world.info["scene_info"]["movable_objects"][f"block_{name}"]["contacts"]
        return {(contact[2], contact[4]) for contact in contacts}

    def touched(self, name):
        """Whether the robot touches the block."""
        return any(body == self.robot.robot_uid for body, _ in self.contacts(name))

    def gripped(self, name):
        """Whether both fingers hold the block: they touch it, are apart, and were told to close."""
        fingers = sum(body == self.robot.robot_uid for body, _ in self.contacts(name))
        return self.grip == -1 and fingers > 1 and self.width() > 0.015

    def held(self):
        """The block that hangs in the gripper, or None."""
        return next((name for name in BLOCKS
                     if {body for body, _ in self.contacts(name)} == {self.robot.robot_uid}), None)

    def door(self, name):
        return self.world.info["scene_info"]["doors"][f"base__{name}"]["current_state"]

    def tip(self):
        return np.array(self.world.info["robot_info"]["tcp_pos"])

    def width(self):
        """How far the fingers are apart [m]."""
        return self.world.info["robot_info"]["gripper_opening_width"]

    def pose(self):
        """All of the arm that can be seen to move: (7,) tips, turn, width."""
        robot = self.world.info["robot_info"]
        return np.array([*robot["tcp_pos"], *robot["tcp_orn"], self.width()])

    def turn(self):
        """The hand's pitch and yaw."""
        return self.world.info["robot_info"]["tcp_orn"][1:]

    def turned(self, yaw, pitch=0.0, by=0.15):
        """Whether the hand is turned to within `by` of pitch and yaw."""
        now_pitch, now_yaw = self.turn()
        return abs(wrap(yaw - now_yaw)) < by and abs(pitch - now_pitch) < by

    def where(self, name):
        place, _ = self.block(name)
        if place[2] < 0.42:
            return "drawer" if place[2] > 0.3 else "floor"
        if place[1] < 0:
            return "table"
        return min(("left", "right"), key=lambda side: abs(place[0] - self.fixtures.shelf_x[side]))

    def among(self):
        """Whether the hand is where something may be beside it: near the table, in or before the cabinet."""
        _, y, z = self.tip()
        return z < SAFE - 0.01 or y > BEFORE

    # ---- how it moves

    def to(self, place, yaw=None, pitch=0.0, speed=None):
        """Move the tips towards `place` and turn the hand to (pi, pitch, yaw); None: the yaw it has."""
        speed, now = speed or self.fast, self.robot.target_orn
        turn = np.array([wrap(np.pi - now[0]), pitch - now[1],
                         0 if yaw is None else unwound(yaw) - unwound(now[2])])
        way = (np.asarray(place, float) - self.robot.target_pos) / 0.02
        way = way * min(1, speed / max(np.abs(way).max(), 1e-9))
        return np.array([*way, *np.clip(turn / 0.05, -speed, speed), self.grip])

    def stay(self, grip, pitch=None):
        """Tell the gripper, and wait for what it does."""
        self.grip = grip
        pitch = self.robot.target_orn[1] if pitch is None else pitch
        return self.to(self.robot.target_pos, pitch=pitch)

    def leave(self, height=SAFE):
        """Out of what the hand is in or among: back from the cabinet, then up."""
        (x, y, z), pitch = self.tip(), self.robot.target_orn[1]
        if y > BEFORE and z > 0.425:
            return self.to([x, -0.17, max(z, min(z + 0.1, height))], pitch=pitch)
        return self.to([x, y, height + 0.03], pitch=pitch)

    def above(self, place, height=SAFE, yaw=ACROSS, near=0.02):
        """To where it can come down on a place; None if it is there."""
        x, y, *_ = place
        away = np.abs(self.tip()[:2] - [x, y]).max() > near
        if not away and self.turned(yaw):
            return None
        if away and self.among() and self.tip()[2] < height + 0.1:
            return self.leave(max(SAFE, height))
        return self.to([x, y, max(height, SAFE) if away else height], yaw=yaw)

    def down(self, place, height=SAFE, near=0.02, speed=None):
        """Come down on a place, slowly if no speed is given, from above it."""
        if (action := self.above(place, height, near=near)) is not None:
            return action
        return self.to(place, yaw=ACROSS, speed=speed or self.slow)

    def fist(self):
        """Close the hand, but not around a block."""
        near = any(np.linalg.norm(self.block(name)[0] - self.tip()) < 0.06 for name in BLOCKS)
        self.grip = 1 if near and self.width() > 0.02 else -1

    def settle(self):
        """A generator of rel_actions that command the pose that the arm has. Actions add to the last command,
        which no state tells: where it was out of reach, what follows could not be done again from it."""
        robot = self.world.info["robot_info"]
        _, pitch, yaw = robot["tcp_orn"]
        for _ in range(20):
            if np.linalg.norm(robot["tcp_pos"] - self.robot.target_pos) < 2e-3:
                return
            yield self.to(robot["tcp_pos"], yaw=yaw, pitch=pitch)

    # ---- blocks

    def grasp_yaw(self, name):
        """The yaw at which the fingers take a block by two of its sides, away from its neighbours: the
        nearest to ACROSS, and to the hand's, of those that the wrist reaches."""
        place, yaw = self.block(name)
        size, skew, (_, hand) = self.fixtures.sizes[name], 0.6, self.turn()
        yaws = [(yaw + turn + askew, abs(askew)) for turn in (0, np.pi) for askew in (0, skew, -skew)]
        if size < 0.06:                                       # short enough to be taken the long way too
            yaws += [(yaw + turn, 0.15 if size > 0.045 else 0) for turn in (np.pi / 2, -np.pi / 2)]

        def cost(option):                                     # (angle, what is held against it)
            angle, malus = option
            off = abs(wrap(angle - ACROSS))
            spread = 0.05 * np.array([np.sin(angle), -np.cos(angle), 0])
            hits = sum(self.overlap(other, place + finger) for other in BLOCKS if other != name
                       for finger in (spread, -spread))
            return off + malus + 100 * hits + (99 if off > 1.9 else 0) + 0.2 * abs(wrap(angle - hand))

        return min(yaws, key=cost)[0]

    def overlap(self, name, place, margin=0.018):
        """By how many metres a finger that comes down at `place` would meet the block."""
        middle, yaw = self.block(name)
        (x, y, z), (c, s) = place - middle, (np.cos(yaw), np.sin(yaw))
        along, aside = self.fixtures.sizes[name] / 2 - abs(c * x + s * y), 0.02 - abs(c * y - s * x)
        return max(0, margin + min(along, aside)) if abs(z) < 0.03 else 0

    def grasp(self, goal, near):
        """Close the hand at `goal`; None, and an open hand, if it is not there or closed on nothing."""
        missed = self.grip == -1 and self.width() < 0.01
        if missed or np.abs(self.tip() - goal).max() > (near if self.grip == 1 else 0.02):
            self.grip = 1
            return None
        return self.stay(-1)

    def take(self, name):
        """Take a block from above; None once both fingers have it."""
        if self.gripped(name):
            return None
        yaw, (place, _) = self.grasp_yaw(name), self.block(name)
        place[0] = min(place[0], REACH)
        goal = place - [0, 0, TIP]
        if (action := self.grasp(goal, near=0.008)) is not None:
            return action
        if (action := self.above(place, max(place[2] + 0.07, SAFE), yaw, near=0.015)) is not None:
            return action
        if self.width() < 0.07 and self.tip()[2] < place[2] + 0.075:          # it is still opening
            return self.to([*place[:2], place[2] + 0.075], yaw=yaw)
        return self.to(goal, yaw=yaw, speed=self.slow)

    def lift(self, name):
        if (action := self.take(name)) is not None:
            return action
        x, y, _ = self.robot.target_pos
        return self.to([x, y, self.tip()[2] + 0.1], speed=self.slow)

    lift_table = lift_drawer = lift

    def lift_slider(self, name, pitch=-1.0):
        # The arm can't reach into the cabinet from above: the hand leans, and slides in along its axis.
        place, _ = self.block(name)
        if self.gripped(name):
            x, y, _ = self.robot.target_pos
            way = [x, y, self.tip()[2] + 0.05] if place[2] < 0.495 else [x, -0.16, 0.57]
            return self.to(way, yaw=ACROSS, pitch=pitch, speed=self.slow)
        goal = place - 0.004 * self.axis(pitch) + [0, 0, 0.002]
        if (action := self.grasp(goal, near=0.01)) is not None:
            return action
        return self.slide_in(goal, pitch)

    def axis(self, pitch):
        """The direction in which the hand points."""
        return np.array([0, np.sin(-pitch), -np.cos(pitch)])

    def slide_in(self, goal, pitch):
        """Into the cabinet, along the hand's axis."""
        axis, way, (x, _, z) = self.axis(pitch), self.tip() - goal, self.tip()
        along = way @ axis                                                     # negative: still to go
        aside = np.abs(way - along * axis).max()
        if aside < (0.02 if along > -0.12 else 0.012) and along > -0.2 and self.turned(ACROSS, pitch, 0.2):
            return self.to(goal, yaw=ACROSS, pitch=pitch, speed=self.slow)
        if self.turned(ACROSS, pitch, 0.4) and abs(x - goal[0]) < 0.06 and along < -0.12 and z > SAFE:
            return self.to(goal - 0.16 * axis, yaw=ACROSS, pitch=pitch)
        if self.among():
            return self.leave(0.58)
        return self.to([goal[0], -0.12, 0.6], yaw=ACROSS, pitch=pitch)

    def push(self, name, side):
        (x, y, _), half, tip = self.block(name)[0], self.fixtures.sizes[name] / 2, self.tip()
        self.fist()
        if tip[2] < 0.475 and abs(y - tip[1]) < 0.025 and 0 < side * (x - tip[0]) < half + 0.09:
            return self.to([tip[0] + side * 0.08, y, 0.452], yaw=ACROSS, speed=max(self.slow, 0.6))
        return self.down([x - side * (0.067 + half), y, 0.452])

    def rotate(self, name, side):
        if (action := self.take(name)) is not None:
            return action
        slipped_up = self.block(name)[0][2] > 0.466
        action = self.to(self.robot.target_pos - [0, 0, 0.01 * slipped_up], speed=self.slow)
        action[5] = -0.5 * side
        return action

    def push_into_drawer(self):
        table = [name for name in BLOCKS if self.where(name) == "table"]
        name = min(table or BLOCKS, key=lambda name: self.block(name)[0][1])
        (x, y, _), tip = self.block(name)[0], self.tip()
        if abs(x - self.fixtures.drawer_x) > 0.12:                             # it would fall beside it
            return self.carry(name, self.free_x(name))
        if self.gripped(name) or self.held() == name:
            return self.stay(1)
        self.fist()
        if tip[2] < 0.475 and abs(x - tip[0]) < 0.03 and 0 < tip[1] - y < 0.1:
            return self.to([x, max(-0.19, tip[1] - 0.05), 0.455], yaw=ACROSS, speed=self.slow)
        behind = np.array([x, y + 0.075, 0.455])
        away, low = np.abs(tip - behind)[:2].max() > 0.015, tip[2] < SAFE - 0.01 or tip[1] > -0.05
        if away and low:
            return self.leave(0.56)
        if away or not low and not self.turned(ACROSS):
            return self.to([*behind[:2], 0.56], yaw=ACROSS)
        return self.to(behind, yaw=ACROSS, speed=self.slow)

    def free_x(self, name):
        """Where behind the drawer no other block is: in its middle, if that is free."""
        others = [self.block(other)[0] for other in BLOCKS if other != name]
        return max(self.fixtures.drawer_x + np.array([0, -0.08, 0.08]), key=lambda x: min(
            0.12, *(np.linalg.norm(place - [x, -0.12, 0.46]) for place in others)))

    def carry(self, name, x):
        if (action := self.take(name)) is not None:
            return action
        z = 0.465 + self.tip()[2] - self.block(name)[0][2]                     # the block hangs a bit lower
        if abs(self.tip()[0] - x) < 0.015 and self.tip()[2] < z + 0.012:
            return self.stay(1)
        return self.down([x, -0.12, z], 0.56)

    def place_in_drawer(self, name):
        x = np.clip(self.tip()[0], *(self.fixtures.drawer_x + np.array([-0.06, 0.06])))
        y = -0.065 - self.door("drawer")
        if self.tip()[2] < 0.43 and abs(self.tip()[1] - y) < 0.03:
            return self.stay(1, pitch=0)
        return self.down([x, y, 0.41], 0.56, near=0.025)

    def place_in_slider(self, name, pitch=-1.0):
        side = "left" if self.door("slide") < self.fixtures.door_travel / 2 else "right"
        there = [self.block(other)[0][0] for other in BLOCKS if self.where(other) == side and other != name]
        spots = self.fixtures.shelf_x[side] + np.array([0, -0.075, 0.075])
        x = max(spots, key=lambda spot: min([abs(spot - other) for other in there], default=0))
        goal = np.array([x, 0.085, 0.475])
        if np.abs(self.tip() - goal).max() < 0.012:
            return self.stay(1, pitch)
        return self.slide_in(goal, pitch)

    def stack_block(self, name):
        others, (leans, hand) = [other for other in BLOCKS if other != name], self.turn()
        pitch = -1.0 if leans < -0.5 else 0.0                                  # at which it took the block
        below = max([b for b in others if self.where(b) == "table"] or others, key=self.fixtures.sizes.get)
        place, yaw = self.block(below)
        yaw = ACROSS if pitch else yaw if abs(wrap(yaw - hand)) < np.pi / 2 else yaw + np.pi
        goal = place + [0, 0, 0.043] + self.tip() - self.block(name)[0]        # it hangs a bit aside
        way = self.tip() - goal
        aside = np.abs(way[:2]).max()
        if aside < 0.007 and way[2] < 0.005:
            return self.stay(1, pitch)
        if aside < 0.01 and way[2] < 0.06 and self.turned(yaw, pitch):
            return self.to(goal, yaw=yaw, pitch=pitch, speed=0.25)
        if aside > 0.03 and self.tip()[2] < 0.56:
            return self.leave(0.58)
        over = goal + [0, 0, 0.04 if aside < 0.03 else 0.07]
        return self.to(over, yaw=yaw, pitch=pitch, speed=self.slow)

    def unstack_block(self):
        table = [name for name in BLOCKS if self.where(name) == "table"]
        return self.lift(max(table or BLOCKS, key=lambda name: self.block(name)[0][2]))

    # ---- fixtures

    def drawer_x(self):
        """Where the hand takes the drawer: the nearest to where it is."""
        return np.clip(self.tip()[0], *(self.fixtures.drawer_x + np.array([-0.03, 0.03])))

    def hooks(self):
        """Whether the hand has hooked the drawer, from inside."""
        _, y, z = self.tip()
        return z < 0.375 and abs(y + 0.212 + self.door("drawer")) < 0.035

    def open_drawer(self):
        self.fist()
        x = self.drawer_x()
        if self.hooks():
            return self.to([x, -0.44, 0.36], yaw=ACROSS, speed=self.slow)
        return self.down([x, -0.212 - self.door("drawer"), 0.36], near=0.015)

    def before_drawer(self):
        """Whether the hand is where it can push the drawer shut."""
        _, y, z = self.tip()
        return z < 0.385 and -0.03 < y + 0.307 + self.door("drawer") < 0.09

    def close_drawer(self):
        self.fist()
        x = self.drawer_x()
        if self.before_drawer():
            return self.to([x, -0.242, 0.365], yaw=ACROSS, speed=self.slow)
        return self.down([x, -0.307 - self.door("drawer"), 0.365])

    def beside_handle(self, side, deep=-0.04):
        """Whether the hand is, as deep as that, where it can push the door's handle to a side."""
        (x, y, z), handle = self.tip(), self.fixtures.handle_x - self.door("slide")
        return y > deep and abs(z - 0.5) < 0.03 and -0.045 < side * (handle - side * 0.055 - x) < 0.03

    def move_slider(self, side):
        # side: 1 to the right. The handle is pushed from its other side; the door's joint grows to the left.
        self.fist()
        x, tip = self.fixtures.handle_x - self.door("slide") - side * 0.055, self.tip()
        if self.beside_handle(side):
            return self.to([tip[0] + side * 0.08, -0.027, 0.5], yaw=ACROSS, speed=self.slow)
        if abs(tip[2] - 0.5) < 0.03 and abs(x - tip[0]) < 0.02:
            return self.to([x, -0.025, 0.5], yaw=ACROSS, speed=self.slow)
        return self.down([x, -0.11, 0.5], near=0.015, speed=self.fast)

    def press_button(self):
        self.fist()
        x, y, _ = self.fixtures.button
        return self.down([x, y, 0.45], near=0.015)

    turn_on_led = turn_off_led = press_button

    def switch(self):
        """Where the switch's bar is: it slides up and back."""
        share = self.world.info["scene_info"]["switches"]["base__switch"]["joint_state"] / 0.088
        return np.array([self.fixtures.switch_x, 0.02 + 0.044 * share, 0.527 + 0.076 * share])

    def turn_on_lightbulb(self):
        self.fist()
        (x, y, z), tip = self.switch() - [0.012, 0, 0], self.tip()
        before = abs(tip[0] - x) < 0.025
        if before and tip[1] > y - 0.002 and z - 0.07 < tip[2] < z + 0.02:     # under the bar
            return self.to([x, y + 0.04, tip[2] + 0.08], yaw=ACROSS, speed=self.slow)
        if before and abs(tip[2] - z + 0.045) < 0.02:
            return self.to([x, y + 0.025, z - 0.048], yaw=ACROSS, speed=self.slow)
        return self.down([x, -0.11, z - 0.045], near=0.015, speed=self.fast)

    def turn_off_lightbulb(self, pitch=-0.5):
        # From above the arm would end 8 cm short: the hand leans.
        self.fist()
        (x, y, z), tip = self.switch(), self.tip()
        if abs(tip[0] - x) < 0.02 and tip[2] > z - 0.03 and self.turned(ACROSS, pitch, 0.25):
            over, far = tip[2] >= z + 0.035, tip[1] - y
            if not over and -0.036 < far < 0.015:                              # on the bar
                return self.to(tip + [0, -0.03, -0.08], yaw=ACROSS, pitch=pitch, speed=self.slow)
            if over and far > -0.026:
                return self.to([x, y - 0.015, z], yaw=ACROSS, pitch=pitch, speed=self.slow)
            if over:
                return self.to([x, y, z + 0.06], yaw=ACROSS, pitch=pitch)
        if self.among():
            return self.leave(z + 0.06)
        return self.to([x, -0.11, z + 0.06], yaw=ACROSS, pitch=pitch)

    # ---- tasks

    def finish(self):
        """A door that the hand still moves, on to its end: the oracle says yes halfway, and a door ajar would
        be in the next task's way. None if there is nothing to finish."""
        drawer, slide = self.door("drawer"), self.door("slide")
        if abs(self.tip()[0] - self.fixtures.drawer_x) < 0.06:
            if 0.1 < drawer < 0.19 and self.hooks():
                return self.open_drawer()
            if 0.02 < drawer < 0.12 and self.before_drawer():
                return self.close_drawer()
        if 0.035 < slide < self.fixtures.door_travel - 0.035:
            for side in (-1, 1):
                if self.beside_handle(side, deep=-0.05):
                    return self.move_slider(side)
        return None

    def attempt(self, task, held):
        """What to do now: a rel_action."""
        verb, name, *_ = words = task.split("_")
        if verb not in ("open", "close", "move") and (action := self.finish()) is not None:
            return action
        if task in FULL_HANDS:
            if not (self.gripped(held) or self.held() == held):                # dropped, or misplaced
                return self.attempt(f"lift_{held}_block_{WHERE[self.where(held)]}", held)
            return getattr(self, task)(held)
        if hasattr(self, task):
            return getattr(self, task)()
        side = dict(right=1, left=-1).get(words[-1])
        if verb == "move":
            return self.move_slider(side)
        return getattr(self, verb)(name, side) if side else getattr(self, f"{verb}_{words[-1]}")(name)

    def perform(self, task, held=None):
        """A generator of rel_actions float (7,) that do `task`, again and again as long as it is asked. held:
        the block that was in the gripper when the task was given, if it may have been lost since. Where the
        hand is stuck, it leaves for a while: that alone is remembered."""
        if task in FULL_HANDS:
            held = held or self.held() or min(
                BLOCKS, key=lambda name: np.linalg.norm(self.block(name)[0] - self.tip()))
        still, leaving = 0, 0
        while True:
            keeps = task in FULL_HANDS or task.startswith(("lift", "unstack", "push_into"))
            self.grip = self.grip if keeps or not self.held() else 1
            action, before = self.attempt(task, held), self.pose()
            if leaving:
                leaving -= 1
                if task not in FULL_HANDS and any(map(self.gripped, BLOCKS)):
                    self.grip = 1
                action = self.leave(SAFE + 0.04)
            yield action
            still = 0 if np.abs(wrap(self.pose() - before)).max() > 5e-4 else still + 1
            if still > 12:
                still, leaving = 0, 25


# ------------------------------------------------------------------------------ which tasks make sense
def accessible(expert, side):
    """Whether the door leaves this side of the cabinet open."""
    state, travel = expert.door("slide"), expert.fixtures.door_travel
    return state < 0.04 if side == "left" else state > travel - 0.04


def drawer_is_open(expert):
    return expert.door("drawer") > 0.17


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
    drawer, slide, travel = expert.door("drawer"), expert.door("slide"), expert.fixtures.door_travel
    doors = [(drawer < 0.05, "open_drawer"), (drawer > 0.14, "close_drawer"),
             (slide < 0.1, "move_slider_left"), (slide > travel - 0.1, "move_slider_right")]
    return [*(task for can, task in doors if can),
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
    if behind and drawer_is_open(expert) and not expert.touched(name):
        tasks.append("push_into_drawer")
    return tasks


def feasible(expert):
    """The tasks that make sense in the present state."""
    held = expert.held()
    if held:
        return with_full_hands(expert, held)
    stacked = any(expert.where(name) == "table" and expert.block(name)[0][2] > 0.485 for name in BLOCKS)
    blocks = [] if stacked else [task for name in BLOCKS for task in with_block(expert, name)]
    free = all(not expert.touched(name) for name in BLOCKS)
    return with_fixtures(expert) + ["unstack_block"] * (stacked and free) + blocks
