"""The embedded world: a CALVIN-shaped tabletop in numpy + Pillow, its scripted demonstrator, its clips.

An arm, three blocks, a drawer, a sliding door, a button with an LED and a switch with a bulb, in four scenes
A-D that differ in looks and in the places of their fixtures. No physics engine and no GL: boxes are grasped,
pushed and dropped by a few rules, so that a step with both pictures takes a quarter of a millisecond.
Observations, actions, task names and oracles follow CALVIN, so eval_calvin.py can use this or calvin_env.

    python -m nanogr.worlds.tabletop                      # measure the demonstrator, draw out/tabletop.png
    python -m nanogr.worlds.tabletop --make demonstrations --out DIR   # two cameras, states, actions
    python -m nanogr.worlds.tabletop --make videos --out DIR           # a person's hand: one camera

Reads nothing; writes packed clips (see clips.py). In order: the world, its pictures, the tasks and their
oracle, the demonstrator, data sets. Lengths are metres: x to the right, y away from the viewer, z up.
"""
import functools
import pathlib
from collections import Counter, namedtuple

import numpy as np
from PIL import Image, ImageDraw

from nanogr import clips
from nanogr.common import Parser, cores, nearest, run_script
from nanogr.pictures import enlarge, write_sheet

# Actions are CALVIN's rel_actions. CALVIN runs at 30 Hz; here one step holds the action for two of its ticks.
METRES_PER_TICK, RADIANS_PER_TICK = 1 / 50, 1 / 20    # moved by an action of 1
TICKS_PER_STEP, FPS = 2, 15.0
STEP, TURN = METRES_PER_TICK * TICKS_PER_STEP, RADIANS_PER_TICK * TICKS_PER_STEP
NOISE = 0.12                                          # a sloppy arm: standard deviation as a fraction of STEP
NUDGES = 0.5                                          # how readily something drags it off, see perform

BLOCKS = ("red", "blue", "pink")                      # CALVIN's order in scene_obs
HALF = 0.03                                           # half a block
REACH = np.array([[-0.31, -0.40, -0.03], [0.31, 0.195, 0.20]])        # where the gripper can be: low, high
FREE = np.array([[-0.28, -0.28, 0.09], [0.28, 0.12, 0.18]])           # where nothing is in its way
EDGE, WALL = -0.20, 0.20                              # y of the table's front edge and of the wall
GRASP, CONTACT, PRESS = 0.045, HALF + 0.012, 0.022    # how near it grasps, pushes, presses
IN_DRAWER = -0.03                                     # z of a block that lies in the drawer
TRAVEL = dict(door=0.14, drawer=0.14, switch=0.08)
AXIS = dict(door=np.array([1, 0, 0]), drawer=np.array([0, -1, 0]), switch=np.array([0, 0, 1]))

# Places of the fixtures, colours of table, wall, drawer and door, period of the table's grain.
Scene = namedtuple("Scene", "drawer door button switch table wall wood panel grain")
SCENES = dict(
    A=Scene(-.12, -.05, (.22, -.12), -.22,
            (201, 168, 122), (148, 156, 168), (139, 90, 50), (224, 206, 160), 5),
    B=Scene(.12, -.20, (-.22, -.10), .22,
            (150, 132, 116), (108, 142, 150), (98, 70, 52), (198, 178, 140), 9),
    C=Scene(.0, .0, (-.25, -.14), -.13,
            (190, 192, 184), (160, 134, 112), (120, 126, 120), (236, 232, 214), 14),
    D=Scene(-.06, -.16, (.25, -.08), .14,
            (122, 104, 88), (116, 132, 112), (176, 132, 80), (214, 190, 130), 7))


class Tabletop:
    """One scene, "A".."D"; `observe` says what is seen, `step` what can be done.

    hand: a Person, whose hand is drawn for the gripper; pace: scales a step's motion; size: a picture's side.
    """

    def __init__(self, scene="D", seed=0, hand=None, pace=1.0, size=64):
        self.scene, self.fixtures = scene, SCENES[scene]
        self.rng = np.random.default_rng(seed)
        self.hand, self.pace, self.size = hand, pace, size
        self.look = True                               # False: nothing is drawn, for nobody looks
        self.seconds = Counter()                       # what eval_calvin.py measures, by part
        self.reset(render=False)

    def reset(self, robot_obs=None, scene_obs=None, render=True):
        """Restores the state robot_obs (15,), scene_obs (24,), without them draws one; then observes."""
        if (robot_obs is None) != (scene_obs is None):
            raise ValueError("reset needs both robot_obs and scene_obs, or neither")
        if robot_obs is None:
            self._draw_state()
            robot_obs, scene_obs = self.state()
        self._load(robot_obs, scene_obs)
        return self.observe(render)

    def _load(self, robot_obs, scene_obs):
        """Takes the state out of float32, after every step too, so that a stored state is this very state."""
        robot, scene = (np.array(o, np.float32).astype(float) for o in (robot_obs, scene_obs))
        self.position, self.yaw, self.closed = robot[:3], robot[5], bool(robot[14] < 0)
        self.joints = dict(door=scene[0], drawer=scene[1], switch=scene[3])
        self.pressed, self.led = bool(scene[2]), int(scene[5])
        blocks = scene[6:].reshape(3, 6)
        self.blocks, self.block_yaw = blocks[:, :3].copy(), blocks[:, 5].copy()
        self.held = self._nearest(.005) if self.closed and robot[6] > 0 else None

    def _draw_state(self):
        rng, wide = self.rng, 1.15 if self.hand else 1.0    # people reach further than the robot's play
        self.joints = {name: float(rng.choice([0.0, end])) for name, end in TRAVEL.items()}
        self.led, self.pressed, self.closed, self.held = int(rng.integers(2)), False, False, None
        self.position = rng.uniform([-.15 * wide, -.15 * wide, .08], [.15 * wide, .12, .16])
        self.yaw, self.block_yaw, self.blocks = 0.0, np.zeros(3), np.full((3, 3), HALF)
        taken = [np.array(self.fixtures.button)]
        while len(taken) < 4:
            spot = rng.uniform([-.25 * wide, -.15], [.25 * wide, .09])
            if all(np.abs(spot - other).max() > .095 for other in taken):
                self.blocks[len(taken) - 1, :2] = spot
                taken.append(spot)
        if self.joints["drawer"] > 0 and rng.random() < .3:
            spot = self.fixtures.drawer + rng.uniform(-.05, .05)
            self.blocks[rng.integers(3)] = spot, EDGE - .07, IN_DRAWER

    # ---- state

    @property
    def bulb(self):
        return int(self.joints["switch"] > TRAVEL["switch"] / 2)

    @property
    def held_block(self):
        """Index of the block in the gripper, or None."""
        return BLOCKS.index(self.held) if self.held in BLOCKS else None

    def handle(self, name):
        """Where the door's, the drawer's or the switch's handle is now: float (3,)."""
        y, z = dict(door=(WALL - .015, .06), drawer=(EDGE - .02, -.015), switch=(WALL - .015, .03))[name]
        return np.array([getattr(self.fixtures, name), y, z]) + self.joints[name] * AXIS[name]

    def state(self):
        """robot_obs float32 (15,) and scene_obs float32 (24,), which together are the whole state."""
        width = .08 if not self.closed else (.04 if self.held else 0.0)
        robot = [*self.position, np.pi, 0, self.yaw, width, *np.zeros(7), -1 if self.closed else 1]
        door, drawer, switch = (self.joints[name] for name in ("door", "drawer", "switch"))
        scene = [door, drawer, self.pressed, switch, self.bulb, self.led]
        for place, yaw in zip(self.blocks, self.block_yaw):
            scene += [*place, 0, 0, yaw]
        return np.array(robot, np.float32), np.array(scene, np.float32)

    def observe(self, render=True):
        """dict: robot_obs (15,), scene_obs (24,), uint8 rgb_static (64,64,3), rgb_gripper (32,32,3)."""
        robot, scene = self.state()
        pictures = dict(zip(("rgb_static", "rgb_gripper"), draw(self))) if render and self.look else {}
        return dict(pictures, robot_obs=robot, scene_obs=scene)

    def get_info(self):
        """A copy of what the oracle reads: fixtures, blocks (3,3), what is in the drawer or on a block."""
        resting = self._rests_on()
        return dict(door=self.joints["door"], drawer=self.joints["drawer"], bulb=self.bulb, led=self.led,
                    held=self.held, blocks=self.blocks.copy(),
                    on_block=resting.any(1), below_block=resting.any(0),
                    in_drawer=np.array([self._over_drawer(p) and p[2] < .01 for p in self.blocks]))

    def _over_drawer(self, p):
        out, aside = self.joints["drawer"], abs(p[0] - self.fixtures.drawer)
        return out > .09 and aside < .085 and EDGE - out - .005 < p[1] < EDGE - .005

    def _rests_on(self):
        gap = self.blocks[:, None] - self.blocks[None]                          # (3, 3, xyz): i above k
        rests = (np.abs(gap[..., :2]).max(-1) < .04) & (np.abs(gap[..., 2] - 2 * HALF) < .01)
        if self.held_block is not None:
            rests[self.held_block] = rests[:, self.held_block] = False
        return rests

    # ---- rules of motion

    def step(self, action, render=True):
        """Executes rel_actions (7,): xyz, Euler, gripper -1 close, +1 open, clipped to -1..1."""
        action = np.clip(np.asarray(action, float), -1, 1)
        old, move = self.position, action[:3] * STEP * self.pace
        if np.abs(action[:3]).max() > .05:
            move = move + NOISE * STEP * self.pace * self.rng.normal(size=3)
        new = np.clip(old + move, *REACH)
        if new[1] > EDGE - .005:
            new[2] = max(new[2], .012)                                # the table's top
        self.yaw = float(np.clip(self.yaw + action[5] * TURN, -1.6, 1.6))
        self.position = self._slide(new - old) if self.held in TRAVEL else new
        if self.held_block is not None:
            self.blocks[self.held_block] = self.position
            self.block_yaw[self.held_block] += action[5] * TURN
        elif self.closed and self.held is None:
            self._push(old)
        self._press()
        self._set_gripper(closed=bool(action[6] < 0))
        self._load(*self.state())
        return self.observe(render)

    def _slide(self, move):
        """Moves the held fixture along its axis and returns where its handle holds the gripper."""
        name, before = self.held, self.joints[self.held]
        self.joints[name] = float(np.clip(before + move @ AXIS[name], 0, TRAVEL[name]))
        if name == "drawer":
            self.blocks[self.blocks[:, 2] < 0, 1] -= self.joints[name] - before  # what lies in it rides along
            self._settle()
        return self.handle(name)

    def _push(self, old):
        """The closed gripper shoves what it runs into, along the axis on which it came nearer."""
        for block in self.blocks:
            dx, dy, dz = np.abs(block - self.position)
            if max(dx, dy) < CONTACT and dz < .04 and block[2] > 0:
                before = block[:2] - old[:2]
                axis = int(np.argmax(np.abs(before)))
                block[axis] = self.position[axis] + CONTACT * (1 if before[axis] >= 0 else -1)
                self._settle()

    def _press(self):
        down = np.abs(self.position[:2] - self.fixtures.button).max() < .04 and self.position[2] < PRESS
        if down and not self.pressed:
            self.led = 1 - self.led
        self.pressed = bool(down)

    def _set_gripper(self, closed):
        if closed and not self.closed:
            self.held = self._nearest(GRASP)
            if self.held in TRAVEL:
                self.position = self.handle(self.held)
            elif self.held:
                self.blocks[self.held_block] = self.position          # the fingers centre what they grasp
            self._settle()
        elif not closed and self.closed:
            self.held = None
            self._settle()
        self.closed = closed

    def _nearest(self, limit):
        """Name of the block or handle nearest to the gripper, in the maximum norm; None beyond limit."""
        places = dict(zip(BLOCKS, self.blocks), **{name: self.handle(name) for name in TRAVEL})
        gaps = {name: np.abs(place - self.position).max() for name, place in places.items()}
        name = min(gaps, key=gaps.get)
        return name if gaps[name] < limit else None

    def _settle(self):
        """Lets every free block fall, the lowest first: into the open drawer, on a block, or on the table."""
        settled = []
        for i in np.argsort(self.blocks[:, 2]):
            if i == self.held_block:
                continue
            block = self.blocks[i]
            below = [k for k in settled if np.abs(self.blocks[k] - block)[:2].max() < .04]
            tops = [self.blocks[k, 2] + 2 * HALF for k in below]
            lies_inside = block[2] < 0 and block[1] > EDGE - self.joints["drawer"] - .005
            floor = IN_DRAWER if lies_inside or self._over_drawer(block) else HALF
            block[2] = max([top for top in tops if top < block[2] + HALF], default=floor)
            if block[2] >= HALF:                                      # nothing ever leaves the table
                block[:2] = np.clip(block[:2], [-.29, EDGE + .02], [.29, .15])
            settled.append(i)


#  pictures: an oblique view from the front, drawn at twice the size; the gripper's is a crop of the large one
VIEW = 0.70                                                           # metres across the picture
COLOURS = dict(red=(214, 36, 36), blue=(40, 76, 220), pink=(246, 136, 200))
GREY, DARK, AMBER = (226, 228, 232), (38, 36, 36), (240, 168, 32)
# A person as a camera sees one: colours of hand and sleeve, how thick the arm is, where from it comes, to the
# right and towards the viewer. Videos are of many people: what one looks like is of no use for a robot.
Person = namedtuple("Person", "skin sleeve girth x y")
SOMEBODY = Person((232, 178, 142), (64, 92, 84), .056, .17, 1)
SKINS = ((232, 178, 142), (198, 134, 96), (141, 85, 54), (88, 56, 40), (244, 208, 180),
         (236, 236, 236), (168, 172, 180), (104, 108, 116), (60, 62, 66), (222, 200, 90))    # five are gloves


class Canvas:
    """Draws in metres on an image; colours with a fourth component are blended."""

    def __init__(self, image):
        self.scale, self.side = image.width / VIEW, image.width
        self.pen, self.blend = ImageDraw.Draw(image), ImageDraw.Draw(image, "RGBA")

    def at(self, x, y, z):
        return self.side / 2 + x * self.scale, self.side / 4 - ((y - WALL) * .8 + z * .7) * self.scale

    def flat(self, x0, x1, y0, y1, z, colour):
        self.pen.rectangle((*self.at(x0, y1, z), *self.at(x1, y0, z)), fill=colour)

    def upright(self, x0, x1, y, z0, z1, colour):
        self.pen.rectangle((*self.at(x0, y, z1), *self.at(x1, y, z0)), fill=colour)

    def polygon(self, points, colour):
        self.pen.polygon([self.at(*p) for p in points], fill=colour)

    def disc(self, x, y, z, radius, colour, squash=1.0):
        (u, v), r = self.at(x, y, z), radius * self.scale
        pen = self.blend if len(colour) == 4 else self.pen
        pen.ellipse((u - r, v - r * squash, u + r, v + r * squash), fill=colour)

    def block(self, place, yaw, colour):
        (x, y, z), c, s = place, HALF * np.cos(yaw), HALF * np.sin(yaw)
        corners = [(x + a * c - b * s, y + a * s + b * c) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        for k in range(4):
            (x0, y0), (x1, y1) = corners[k], corners[(k + 1) % 4]
            if x1 - x0 > 1e-6:                                        # this side faces the viewer
                shade = .52 + .12 * (x1 - x0) / (2 * HALF)
                side = [(x0, y0, z - HALF), (x1, y1, z - HALF), (x1, y1, z + HALF), (x0, y0, z + HALF)]
                self.polygon(side, tuple(int(v * shade) for v in colour))
        self.polygon([(u, v, z + HALF) for u, v in corners], colour)


def draw(world):
    """The static picture uint8 (size, size, 3) and the gripper's (size/2, size/2, 3), None for a hand."""
    image = _background(world.scene, 2 * world.size).copy()
    canvas = Canvas(image)
    _draw_fixtures(canvas, world)
    _draw_drawer(canvas, world)
    _draw_blocks(canvas, world)
    if world.hand:
        _draw_hand(canvas, world)
        return np.asarray(image.reduce(2)), None
    _draw_fingers(canvas, world)
    left, top = (int(round(c - world.size / 4)) for c in canvas.at(*world.position))
    gripper = np.asarray(image.crop((left, top, left + world.size // 2, top + world.size // 2)))
    _draw_arm(canvas, world)
    return np.asarray(image.reduce(2)), gripper


@functools.lru_cache(maxsize=None)
def _background(scene, side):
    """What never moves: wall, table, its front, floor; frame of the door, plates of switch and button."""
    s, image = SCENES[scene], Image.new("RGB", (side, side))
    canvas = Canvas(image)
    v, u = np.mgrid[:side, :side][..., None] * (128 / side)
    grain = 6 * np.sin(np.pi * u / s.grain) + 3 * np.sin(.25 * v + .12 * u)
    wall, edge, floor = (canvas.at(0, *yz)[1] * 128 / side for yz in ((WALL, 0), (EDGE, 0), (EDGE, -.07)))
    front = np.multiply(s.table, .62) + .4 * grain
    pixels = np.select([v < wall, v < edge, v < floor],
                       [s.wall + .5 * grain + .35 * (v - wall), s.table + grain, front],
                       default=np.array((52.0, 54, 62)))
    image.paste(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    canvas.upright(s.door - .085, s.door + TRAVEL["door"] + .085, WALL, 0, .115, DARK)
    canvas.upright(s.switch - .014, s.switch + .014, WALL, .01, .13, (238, 238, 238))
    x, y = s.button
    canvas.flat(x - .036, x + .036, y - .036, y + .036, 0, DARK)
    return image


def _draw_fixtures(canvas, world):
    f, (bx, by) = world.fixtures, world.fixtures.button
    bulb, led = f.switch + .058 * np.sign(f.switch), bx + .06 * np.sign(bx)    # the arm doesn't hide them
    x, _, _ = world.handle("door")
    canvas.upright(x - .08, x + .08, WALL, 0, .11, f.panel)
    canvas.upright(x - .011, x + .011, WALL, .03, .09, (84, 56, 30))
    x, _, z = world.handle("switch")
    canvas.upright(x - .023, x + .023, WALL, z - .012, z + .012, DARK)
    if world.bulb:
        canvas.disc(bulb, WALL, .165, .044, (255, 236, 120, 120))
    canvas.disc(bulb, WALL, .165, .027, (255, 250, 130) if world.bulb else (78, 72, 60))
    if world.led:
        canvas.disc(led, WALL, .165, .040, (90, 255, 120, 90))
    canvas.upright(led - .026, led + .026, WALL, .145, .185, DARK)
    canvas.upright(led - .020, led + .020, WALL, .150, .180, (70, 255, 100) if world.led else (36, 66, 42))
    top = .002 if world.pressed else .012
    canvas.flat(bx - .022, bx + .022, by - .022, by + .022, top, (150, 100, 20) if world.pressed else AMBER)


def _draw_drawer(canvas, world):
    x, front = world.fixtures.drawer, EDGE - world.joints["drawer"]
    canvas.flat(x - .10, x + .10, front, EDGE, -.05, (70, 54, 42))
    for i in range(3):
        if world.blocks[i, 2] < 0 and i != world.held_block and world.blocks[i, 1] < EDGE - .03:
            canvas.block(world.blocks[i], world.block_yaw[i], COLOURS[BLOCKS[i]])
    canvas.upright(x - .11, x + .11, front, -.07, -.004, world.fixtures.wood)
    canvas.upright(x - .028, x + .028, front - .01, -.032, -.006, DARK)


def _draw_blocks(canvas, world):
    """Blocks from back to front and low to high, and the gripper's shadow, which tells its height."""
    (x, y, z), held = world.position, world.held_block
    radius = .026 if held is None else .036
    tops = [p[2] + HALF for i, p in enumerate(world.blocks)
            if i != held and p[2] < z and max(abs(p[0] - x), abs(p[1] - y)) < HALF]

    def shadow(floor):
        canvas.disc(x, y, floor, radius, (0, 0, 0, 130), squash=.7)

    if not tops:
        shadow(0 if y > EDGE else -.05)
    visible = [i for i in range(3) if world.blocks[i, 2] >= 0 or i == held]
    for i in sorted(visible, key=lambda i: (i == held, world.blocks[i, 2] > .04, -world.blocks[i, 1])):
        if tops and i == held:
            shadow(max(tops))
        canvas.block(world.blocks[i], world.block_yaw[i], COLOURS[BLOCKS[i]])
    if tops and held is None:
        shadow(max(tops))


def _draw_fingers(canvas, world):
    (u, v), k = canvas.at(*world.position), canvas.scale
    spread = .046 if not world.closed else (HALF + .005 if world.held_block is not None else .010)
    for side in (-1, 1):
        du, dv = side * spread * k * np.cos(world.yaw), side * spread * k * np.sin(world.yaw) * .8
        box = (u + du - .009 * k, v + dv - .05 * k, u + du + .009 * k, v + dv + .012 * k)
        canvas.pen.rectangle(box, fill=(250, 250, 250), outline=DARK)


def _draw_arm(canvas, world):
    (u, v), k = canvas.at(*world.position), canvas.scale
    top, bottom = v - .085 * k, v - .048 * k
    arm, palm = (u - .020 * k, min(-1, top), u + .020 * k, top), (u - .056 * k, top, u + .056 * k, bottom)
    canvas.pen.rectangle(arm, fill=(150, 154, 166), outline=(84, 86, 96))
    canvas.pen.rectangle(palm, fill=GREY, outline=DARK)


def draw_person(rng):
    """Somebody: bare or gloved, in any sleeve, reaching in from any side, from behind the table too."""
    angle = rng.uniform(0, 2 * np.pi)
    return Person(SKINS[rng.integers(len(SKINS))], tuple(map(int, rng.integers(40, 200, 3))),
                  rng.uniform(.035, .065), .3 * np.cos(angle), np.sin(angle))


def _draw_hand(canvas, world):
    """From where the person stands, so that the fingers enclose what they hold without hiding it."""
    (u, v), k, person = canvas.at(*world.position), canvas.scale, world.hand
    way = np.array([person.x, person.y])
    way = way / np.linalg.norm(way)
    across, tip = np.array([-way[1], way[0]]), np.array([u, v])
    palm, elbow = tip + .053 * k * way, tip + 2 * canvas.side * way
    wrist = palm + .06 * k * way
    line = lambda a, b, fill, width: canvas.pen.line((*a, *b), fill=fill, width=max(1, int(width * k)))
    line(wrist, elbow, person.sleeve, person.girth)
    line(palm, wrist, person.skin, .7 * person.girth)
    canvas.pen.ellipse((*(palm - .030 * k), *(palm + .030 * k)), fill=person.skin)
    gap = .008 if world.closed and not world.held else (.030 if world.closed else .046)
    shade = tuple(int(.9 * c) for c in person.skin)
    for side in (-1, 1):
        line(palm - .012 * k * way + side * .024 * k * across, tip - .012 * k * way + side * gap * k * across,
             shade, .020)


# -------------- tasks: one row a task; `skill` is how it's done, `what` it's done to, `sign` which way
Task = namedtuple("Task", "skill what sign instructions narrations")


def _table():
    """{name: Task} of tabletop_sentences.txt: CALVIN's names; instructions are for the robot, narrations for
    the videos, as Ego4D's.
    """
    text, rows = pathlib.Path(__file__).with_name("tabletop_sentences.txt").read_text(), {}
    for section in text.split("\n[")[1:]:
        head, *sentences = section.strip().splitlines()
        name, skill, what, sign = head.replace("]", "").split()
        rows[name] = Task(skill, what, int(sign), [x for x in sentences if not x.startswith("- ")],
                          [x.removeprefix("- ") for x in sentences if x.startswith("- ")])
    return rows


SPECS = _table()
TASKS = {name: task.instructions for name, task in SPECS.items()}
NARRATIONS = {name: task.narrations for name, task in SPECS.items()}
RANGE = dict(drawer=TRAVEL["drawer"], door=TRAVEL["door"], bulb=1, led=1)
CHANGE = dict(drawer=.10, door=.10, bulb=1, led=1)                    # what counts as having changed


def _on_table(info, i):
    return abs(info["blocks"][i, 2] - HALF) < .005 and info["held"] != BLOCKS[i]


def _clear_of(place, obstacles, size=.095):
    return all(np.abs(np.subtract(place[:2], other[:2])).max() > size for other in obstacles)


def _obstacles(world, i):
    """What block i must not come to lie on: the other blocks and the button."""
    return [world.blocks[k] for k in range(3) if k != i] + [np.array(world.fixtures.button)]


def _lane_is_free(world, i, sign):
    x, y, _ = world.blocks[i]
    in_lane = [o for o in _obstacles(world, i) if abs(o[1] - y) < .075 and -.14 < (o[0] - x) * sign < .19]
    return not in_lane and abs(x + sign * .11) < .28 and abs(x - sign * .07) < .30


def _drawer_slot(world):
    """A free place in the drawer for the held block, the middle by preference; None if there is none."""
    y = EDGE - world.joints["drawer"] / 2
    inside = [p for i, p in enumerate(world.blocks) if p[2] < .05 and p[1] < EDGE and i != world.held_block]
    for dx in (0, -.06, .06):
        place = np.array([world.fixtures.drawer + dx, y, IN_DRAWER])
        if all(abs(p[0] - place[0]) > .045 for p in inside):
            return place
    return None


def _stack_target(world, info):
    """Index of the nearest free block on the table, None if there is none."""
    free = [k for k in range(3) if _on_table(info, k) and not info["below_block"][k]]
    return min(free, key=lambda k: np.abs(world.blocks[k, :2] - world.position[:2]).sum(), default=None)


def _unstack_spot(world, i):
    """A free place on the table beside the tower whose top is block i, towards the middle by preference."""
    x, y, _ = world.blocks[i]
    inward = -1 if x > 0 else 1
    for dx, dy in ((inward, 0), (-inward, 0), (0, -1), (0, 1)):
        place = np.array([x + .12 * dx, y + .12 * dy, HALF])
        on_table = abs(place[0]) < .28 and EDGE + .03 < place[1] < .12
        if on_table and _clear_of(place, _obstacles(world, i), .075):
            return place
    return None


STEPS = 60                                            # an instruction may take; the demonstrator takes 12


def instruction(task, seed):
    """One of the task's phrasings; the seed decides which."""
    return str(np.random.default_rng([seed, 7]).choice(TASKS[task]))


def feasible(world, task):
    """Whether the task makes sense in the present state; with a block in hand only place and stack do."""
    spec, info = SPECS[task], world.get_info()
    if (spec.what == "held") != (world.held_block is not None):
        return False
    if spec.skill == "place":
        return bool(info["drawer"] > .11 and _drawer_slot(world) is not None)
    if spec.skill == "stack":
        return _stack_target(world, info) is not None
    if spec.skill == "unstack":
        return any(info["on_block"][i] and _unstack_spot(world, i) is not None for i in range(3))
    if spec.what in RANGE:                              # is there enough way left for the oracle to say yes?
        covered = spec.what == "led" and not _clear_of(world.fixtures.button, world.blocks, .07)
        end = RANGE[spec.what] if spec.sign > 0 else 0
        return bool((end - info[spec.what]) * spec.sign >= CHANGE[spec.what] and not covered)
    i = BLOCKS.index(spec.what)
    there = info["in_drawer"][i] if spec.skill == "lift" and spec.sign < 0 else _on_table(info, i)
    free = not info["below_block"][i] and (spec.skill != "push" or _lane_is_free(world, i, spec.sign))
    return bool(there and free)


def success(task, start, now):
    """The oracle: whether the task was done between two `get_info` dicts, as a change of state: bool."""
    spec = SPECS[task]
    if spec.what in RANGE:
        return bool((now[spec.what] - start[spec.what]) * spec.sign >= CHANGE[spec.what])
    if spec.skill == "unstack":
        return bool((start["on_block"] & ~now["on_block"]).any() and now["held"] not in BLOCKS)
    name = start["held"] if spec.what == "held" else spec.what
    if name not in BLOCKS:
        return False
    i, held = BLOCKS.index(name), now["held"] == name
    moved = now["blocks"][i] - start["blocks"][i]
    if spec.skill == "lift":
        there = start["in_drawer"][i] if spec.sign < 0 else _on_table(start, i)
        return bool(there and held and moved[2] > .05)
    if spec.skill == "push":
        return bool(_on_table(start, i) and _on_table(now, i) and moved[0] * spec.sign > .07)
    return bool(not held and now["in_drawer" if spec.skill == "place" else "on_block"][i])


# ------------------------------------------------------------------------------------ the demonstrator
OPEN, CLOSE = 1.0, -1.0


class Demonstrator:
    """Scripted motions from the true state; each method is a generator of rel_actions float32 (7,)."""

    def __init__(self, world, rng):
        self.world = world
        self.speed, self.hover = rng.uniform(.85, 1.0), rng.uniform(.06, .085)

    def act(self, target, grip):
        # Each axis saturates by itself: fast, and simpler to learn than a straight line, whose direction
        # depends on how far off the target is along every axis at once.
        d = (np.asarray(target) - self.world.position) / (STEP * self.world.pace)
        return np.array([*np.clip(d, -self.speed, self.speed), 0, 0, 0, grip], np.float32)

    def go(self, target, grip, tolerance=.014, limit=30):
        for _ in range(limit):
            if np.abs(target - self.world.position).max() < tolerance:
                return
            yield self.act(target, grip)

    def grip(self, grip):
        yield self.act(self.world.position, grip)

    def over(self, place, grip, height):
        """To a point above `place`, rising first if that is far and the gripper low."""
        x, y, z = self.world.position
        if z < .07 and max(abs(x - place[0]), abs(y - place[1])) > .03:
            yield from self.rise(grip, .085)
        yield from self.go(np.array([place[0], place[1], height]), grip, .02)

    def rise(self, grip, z):
        yield from self.go(np.array([*self.world.position[:2], z]), grip, .02)

    def grasp(self, place):
        yield from self.over(place, OPEN, place[2] + self.hover)
        yield from self.go(place, OPEN)
        yield from self.grip(CLOSE)

    def leave(self):
        """Away from where the last task ended: off a handle, the wall, or the drawer's inside."""
        world, grip = self.world, CLOSE if self.world.held_block is not None else OPEN
        if world.held in TRAVEL:
            yield from self.grip(OPEN)
        x, y, z = world.position
        if y > .14:
            yield from self.go(np.array([x, .12, max(z, .09)]), grip, .02)
        elif y < EDGE and z < .03:
            yield from self.rise(grip, .06)

    def slide(self, spec):
        world, name = self.world, "switch" if spec.what == "bulb" else spec.what
        handle, end = world.handle(name), TRAVEL[name] if spec.sign > 0 else 0
        before = handle + [0, 0, .065] if name == "drawer" else np.array([handle[0], .11, .09])
        yield from self.go(before, OPEN, .02)
        yield from self.go(handle, OPEN)
        yield from self.grip(CLOSE)
        for _ in range(8):
            if abs(end - world.joints[name]) < .005:
                break
            yield self.act(world.position + .2 * spec.sign * AXIS[name], CLOSE)
        yield from self.grip(OPEN)
        x, y, _ = world.position
        yield from self.go(np.array([x, y, .07] if name == "drawer" else [x, .11, .09]), OPEN, .02)

    def press(self, spec):
        button = np.array([*self.world.fixtures.button, .008])
        # Here and in push it closes on the way down: earlier, it could grasp again what it just let go.
        yield from self.over(button, OPEN, self.hover + .02)
        yield from self.go(button, CLOSE, limit=6)
        yield from self.rise(CLOSE, .09)

    def lift(self, spec):
        place = self.world.blocks[BLOCKS.index(spec.what)].copy()
        yield from self.grasp(place)
        yield from self.rise(CLOSE, place[2] + .10)

    def push(self, spec):
        x, y, _ = self.world.blocks[BLOCKS.index(spec.what)]
        behind = np.array([x - spec.sign * .064, y, .034])    # higher than PRESS: leaves the button alone
        yield from self.over(behind, OPEN, .034 + self.hover)
        yield from self.go(behind, CLOSE)
        yield from self.go(np.array([x + spec.sign * .073, y, .034]), CLOSE, limit=8)
        yield from self.rise(CLOSE, .09)

    def lower(self, place, height):
        """Carries the held block above `place`, lets it down and opens the gripper."""
        yield from self.go(np.array([place[0], place[1], height]), CLOSE, .02)
        yield from self.go(place, CLOSE)
        yield from self.grip(OPEN)
        yield from self.rise(OPEN, place[2] + .07)

    def place(self, spec):
        yield from self.lower(_drawer_slot(self.world) + [0, 0, .05], .08)

    def stack(self, spec):
        target = self.world.blocks[_stack_target(self.world, self.world.get_info())]
        yield from self.lower(target + [0, 0, 2 * HALF + .012], .15)

    def unstack(self, spec):
        world, on_block = self.world, self.world.get_info()["on_block"]
        i = next(i for i in range(3) if on_block[i] and _unstack_spot(world, i) is not None)
        place, spot = world.blocks[i].copy(), _unstack_spot(world, i)
        yield from self.grasp(place)
        yield from self.rise(CLOSE, place[2] + .05)
        yield from self.lower(spot + [0, 0, .01], place[2] + .03)


def demonstrate(world, task, rng):
    """A generator of rel_actions float32 (7,) that do the feasible `task`, from the world's true state."""
    demonstrator, spec = Demonstrator(world, rng), SPECS[task]
    yield from demonstrator.leave()
    yield from getattr(demonstrator, spec.skill)(spec)


# How much oftener than the others the tasks come that must tell three blocks on the table apart.
SHARES = dict(push=4, lift=2)


def perform(world, task, rng, render=True, limit=40, nudges=0.0):
    """Lets the demonstrator do `task`; returns observations (n + 1), actions (n), the oracle's word (bool).

    It stops one to three actions after the success: near where, in a chain, the next task starts.

    nudges: chance, at each of the first four steps, if in free space, that something drags the arm, once,
    to a random place for three to seven steps. The demonstrator's actions are recorded, not the drag, so they
    say where to go from anywhere (after the idea of DART, Laskey et al. 2017, arXiv 1703.09327). Without them
    a policy with a memory goes on where it sees the arm going, and does not learn which block a word means.
    """
    start, left, done = world.get_info(), int(rng.integers(1, 4)), False
    observations, actions, drag, nudged = [world.observe(render)], [], 0, False
    for action in demonstrate(world, task, rng):
        if len(actions) == limit or (done and left == 0):
            break
        left -= done
        actions.append(action)
        free = world.position[2] > .07 and world.position[1] < .12 and world.held not in TRAVEL
        # (without nudges no random number is drawn: evaluation's starting states depend on none of this)
        if nudges and not nudged and len(actions) < 5 and free and rng.random() < nudges:
            nudged, drag, away = True, int(rng.integers(3, 8)), rng.uniform(*FREE)
        if drag:
            drag -= 1
            way = (away - world.position) / (STEP * world.pace)
            action = np.array([*way, 0, 0, 0, action[6]], np.float32)
        observations.append(world.step(action, render))
        done = done or success(task, start, world.get_info())
    return observations, actions, done


def play(world, rng, counts, n_tasks, render=True, nudges=0.0, tasks=TASKS):
    """A session without resets: yields up to n_tasks (task, observations, actions, success), adds to counts.

    Tasks are drawn with the inverse square of count / share as weight, so that none is rare; a failure ends
    the session.
    """
    world.reset(render=False)
    for _ in range(n_tasks):
        options = [task for task in tasks if feasible(world, task)]
        if not options:
            return
        shares = [SHARES.get(task.split("_")[0], 1) if "drawer" not in task else 1 for task in options]
        weights = np.array([1 / (1 + counts[task] / share) ** 2 for task, share in zip(options, shares)])
        task = options[rng.choice(len(options), p=weights / weights.sum())]
        segment = perform(world, task, rng, render, nudges=nudges)
        counts[task] += 1
        yield task, *segment
        if not segment[-1]:
            return


def draw_chain(scene, seed, length=5):
    """robot_obs (15,), scene_obs (24,), and `length` different tasks the demonstrator did in turn."""
    rng = np.random.default_rng([seed, length])
    world = Tabletop(scene, seed)
    while True:
        world.reset(render=False)
        state, tasks = world.state(), []
        while len(tasks) < length:
            options = [task for task in TASKS if task not in tasks and feasible(world, task)]
            if not options:
                break
            tasks.append(options[rng.integers(len(options))])
            if not perform(world, tasks[-1], rng, render=False)[-1]:
                break
        else:
            return *state, tasks


def draw_first(task, seed):
    """What must be done in draw_start's state before `task` can be: nothing."""
    return ()


def draw_start(scene, task, seed):
    """robot_obs (15,), scene_obs (24,) where `task` is feasible; if need be the demonstrator prepares it."""
    before = dict(place=["lift"], stack=["lift"], unstack=["lift", "stack"]).get(SPECS[task].skill, [])
    rng, world = np.random.default_rng([seed, 1]), Tabletop(scene, seed)
    while True:
        world.reset(render=False)
        for skill in before:
            options = [name for name, spec in SPECS.items() if spec.skill == skill and feasible(world, name)]
            if not options:
                break
            perform(world, options[rng.integers(len(options))], rng, render=False)
        state = world.state()
        if feasible(world, task):
            return state


# ------------------------------------------------------------------------------------ making data sets
SHARD, SESSION = 250, 12                                     # clips a shard, tasks a session


def make(kind, directory, n_clips=8000, scenes="ABCD", workers=None, seed=0, command="", tasks=()):
    """Writes n_clips "demonstrations" or "videos", evenly over the scenes, of all tasks or of those named;
    skips shards that are there.
    """
    tasks = [task for task in TASKS if task in tasks or not tasks]
    shards = len(scenes) * max(1, round(n_clips / SHARD / len(scenes)))
    sizes = [n_clips // shards + (i < n_clips % shards) for i in range(shards)]
    jobs = [(kind, directory, i, scenes[i % len(scenes)], size, seed, tasks) for i, size in enumerate(sizes)]
    some = dict(tasks=tasks) if len(tasks) < len(TASKS) else {}
    clips.claim(directory, kind=kind, clips=n_clips, scenes=scenes, seed=seed, shares=SHARES,
                nudges=0 if kind == "videos" else NUDGES, **some)
    clips.make_shards(make_shard, [(job[2], job[4], job) for job in jobs], directory, workers or cores(),
                      unit="clip", desc=f"tabletop {kind}")
    clips.write_meta(directory, source=f"tabletop {kind}", fps=FPS, command=command)


def make_shard(job):
    """One unit of work, a shard, with its own random numbers; job: as `make` puts it together."""
    kind, directory, index, scene, n_clips, seed, tasks = job
    video = kind == "videos"
    rng = np.random.default_rng([seed, index, int(video)])
    cameras = ["rgb_static"] if video else ["rgb_static", "rgb_gripper"]
    counts, written, session = Counter(), 0, 0
    with clips.ShardWriter(directory, index, cameras=cameras) as shard:
        while written < n_clips:
            pace = rng.uniform(1.5, 2.0) if video else 1.0
            world = Tabletop(scene, rng.integers(2**31), draw_person(rng) if video else None, pace)
            for task, observations, actions, done in play(world, rng, counts, SESSION,
                                                          nudges=0 if video else NUDGES, tasks=tasks):
                if done and written < n_clips:
                    add_clip(shard, cameras, task, observations, actions, index * 10000 + session, video, rng)
                    written += 1
            session += 1
    return written


def add_clip(shard, cameras, task, observations, actions, episode, video, rng):
    """Stores one segment; its last frame has no action (NaN), and a video has neither states nor actions."""
    sentences = (NARRATIONS if video else TASKS)[task]
    frames = {camera: np.stack([o[camera] for o in observations]) for camera in cameras}
    states = np.stack([o["robot_obs"] for o in observations])
    rows = np.stack([*actions, np.full(7, np.nan)]).astype(np.float32)
    shard.add(frames=frames, sentence=sentences[rng.integers(len(sentences))], task=task, episode=episode,
              robot_obs=None if video else states, rel_actions=None if video else rows)


# ------------------------------------------------------------------------------- measuring and looking
def measure(scenes, episodes, seed):
    """Prints the demonstrator's success and mean length in play, every task at least `episodes` times."""
    rng, tried, done, steps, session = np.random.default_rng(seed), Counter(), Counter(), Counter(), 0
    while min(tried[task] for task in TASKS) < episodes:
        world = Tabletop(scenes[session % len(scenes)], seed=[seed, session])
        for task, _, actions, ok in play(world, rng, tried, SESSION, render=False):
            done[task] += ok
            steps[task] += len(actions)
        session += 1
    for task in TASKS:
        print(f"{task:24} {done[task]:4}/{tried[task]:<4} {done[task] / tried[task]:6.1%}"
              f"  mean length {steps[task] / tried[task]:4.1f}")
    total = sum(tried.values())
    print(f"{'all':24} {sum(done.values()):4}/{total:<4} {sum(done.values()) / total:6.1%}"
          f"  mean length {sum(steps.values()) / total:4.1f}")


def contact_sheet(path, scenes, seed):
    """Write a PNG: a column a scene; static camera, gripper camera, a frame of a video."""
    rows = [("static camera", []), ("gripper camera", []), ("a video", [])]
    for column, scene in enumerate(scenes):
        robot, person = Tabletop(scene, [seed, column]), Tabletop(scene, [seed, column], SOMEBODY, pace=1.7)
        rng = np.random.default_rng([seed, column])
        for world, places in (robot, rows[:2]), (person, rows[2:]):
            segment = list(play(world, rng, Counter(), 3))[-1][1]
            shown = segment[2 * len(segment) // 3]
            for (_, images), camera in zip(places, ("rgb_static", "rgb_gripper")):
                images.append(np.asarray(enlarge(shown[camera], 256)))
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_sheet(path, rows, side=256)
    print(f"wrote {path}")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--make", choices=["demonstrations", "videos"], help="without it, measure")
    parser.add_argument("--out", help="directory of the data set")
    parser.add_argument("--clips", type=int, default=8000)
    parser.add_argument("--scenes", default="ABCD")
    parser.add_argument("--tasks", default="", metavar="A,B,...", help="make clips of these alone")
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=20, help="times each task is measured")
    args = parser.parse_args()
    if not args.scenes or not set(args.scenes) <= set(SCENES):
        parser.error(f"--scenes takes letters of {''.join(SCENES)}, for instance ABC")
    tasks = args.tasks.split(",") if args.tasks else []
    for task in tasks:
        if task not in TASKS:
            parser.error(f"--tasks: there is no {task!r}; did you mean {nearest(task, TASKS)}?")
    if args.make is None:
        measure(args.scenes, args.episodes, args.seed)
        contact_sheet("out/tabletop.png", args.scenes, args.seed)
        return
    if args.out is None:
        parser.error("--make needs --out DIR")
    command = (f"python -m nanogr.worlds.tabletop --make {args.make} --out {args.out} --clips {args.clips}"
               f" --scenes {args.scenes} --seed {args.seed}" + f" --tasks {args.tasks}" * bool(tasks))
    make(args.make, args.out, args.clips, args.scenes, args.workers, args.seed, command, tasks)


if __name__ == "__main__":
    run_script(main)
