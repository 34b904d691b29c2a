"""
Draw the course's figures from the code: `python course/figures.py [NAME ...]`, all without a name.

    model, mask, clip, resampler, target, losses, pretraining, confusion, window, judging, codes

Writes course/figures/NAME.png. `clip` reads data/course (lesson 1), `resampler` and `losses` the run
out/lesson4, `pretraining` out/lesson5, `judging` out/lesson8*, `codes` out/tokenizer or out/lesson9; the
others need nothing but the code.
"""
import json
import math
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "course")]

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import lab
from eval_calvin import wilson
from model import GR1, attention_mask, preset_config, to_pixels, token_table, video_target
from nanogr import clips, tokenizer
from nanogr.policy import to_images, unpatchify
from nanogr.worlds import tabletop

OUT = ROOT / "course/figures"
INK, GREY, PALE = (40, 44, 52), (140, 145, 155), (232, 234, 238)
COLOURS = {"language": (230, 159, 0), "state": (120, 94, 160), "rgb_static": (86, 156, 214),
           "rgb_gripper": (0, 158, 115), "[ACT]": (213, 94, 0), "[OBS]": (204, 121, 167)}


# ------------------------------------------------------------------------------------------- drawing
class Sheet:
    """A picture drawn at twice its size and then made smaller, so that lines are smooth."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * width, 2 * height), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, words, size=13, fill=INK, anchor="lt"):
        font = ImageFont.load_default(2 * size)
        if "\n" in words:
            self.pen.multiline_text((2 * x, 2 * y), words, fill, font, spacing=size // 2)
        else:
            self.pen.text((2 * x, 2 * y), words, fill, font, anchor)

    def box(self, x, y, width, height, fill=PALE, outline=None, words="", size=13, ink=INK):
        self.pen.rectangle([2 * x, 2 * y, 2 * (x + width) - 1, 2 * (y + height) - 1], fill, outline, 2)
        if words:
            lines = words.split("\n")
            for i, line in enumerate(lines):
                middle = y + height / 2 + (i - (len(lines) - 1) / 2) * size * 1.3
                self.text(x + width / 2, middle, line, size, ink, "mm")

    def line(self, *points, fill=GREY, width=1.5):
        self.pen.line([2 * v for point in points for v in point], fill, round(2 * width), "curve")

    def arrow(self, x, y, x2, y2, fill=GREY):
        self.line((x, y), (x2, y2), fill=fill)
        angle = math.atan2(y2 - y, x2 - x)
        wings = [(2 * (x2 - 7 * math.cos(angle + a)), 2 * (y2 - 7 * math.sin(angle + a))) for a in (.4, -.4)]
        self.pen.polygon([(2 * x2, 2 * y2), *wings], fill)

    def picture(self, x, y, pixels, side):
        """uint8 (S, S, 3), enlarged without smoothing."""
        image = Image.fromarray(pixels).resize((2 * side, 2 * side), Image.NEAREST)
        self.image.paste(image, (round(2 * x), round(2 * y)))

    def save(self, name, photo=False):
        """photo: with all colours, not the 256 that serve a drawing."""
        OUT.mkdir(exist_ok=True)
        small = self.image.resize((self.image.width // 2, self.image.height // 2), Image.LANCZOS)
        if not photo:
            small = small.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(OUT / f"{name}.png", optimize=True)
        print(f"wrote course/figures/{name}.png, {(OUT / f'{name}.png').stat().st_size // 1024} KB")


def colour(token):
    """Of a token's kind: queries by the query, the rest by the sentence, the state or the camera."""
    return next(COLOURS[name] for name in reversed(COLOURS) if name in token)


def curve(sheet, box, values, low, high, fill, width=2):
    x, y, w, h = box
    points = [(x + w * i / max(1, len(values) - 1), y + h - h * (min(max(v, low), high) - low) / (high - low))
              for i, v in enumerate(values)]
    sheet.line(*points, fill=fill, width=width)


def glimpse(scene="A", seed=3, steps=9):
    """What both cameras see amid a demonstration: uint8 (64, 64, 3), (32, 32, 3)."""
    world, rng = tabletop.Tabletop(scene, seed), np.random.default_rng(seed)
    world.reset(render=False)
    task = next(task for task in tabletop.TASKS if "lift" in task and tabletop.feasible(world, task))
    observations = tabletop.perform(world, task, rng)[0]
    seen = observations[min(steps, len(observations) - 1)]
    return seen["rgb_static"], seen["rgb_gripper"]


# ------------------------------------------------------------------------------------------- figures
def tokens_row(sheet, x, y, table, cell=15, height=24):
    """A timestep's tokens, a box each, its query tokens hatched by a white middle; returns the right end."""
    for name, count, is_query in table:
        for _ in range(count):
            sheet.box(x, y, cell - 2, height, colour(name))
            if is_query:
                sheet.box(x + 3, y + 3, cell - 8, height - 6, "white")
            x += cell
        x += 4
    return x


def model():
    """The whole model: pictures to answers; every count is read off the code."""
    config = preset_config("gr1")
    table, pretraining = token_table(config), token_table(preset_config("gr1", "pretrain"))
    total = lambda table: sum(count for _, count, _ in table)
    patches = (224 // config.patch) ** 2
    sheet = Sheet(860, 640)
    for row, (camera, picture) in enumerate(zip(config.cameras, glimpse())):
        y, fill = 8 + 96 * row, COLOURS[camera]
        cls, rest = (y + 22, y + 54) if row == 0 else (y + 54, y + 22)
        sheet.picture(12, y, picture, 76)
        sheet.text(12, y + 78, camera, 10, GREY)
        sheet.arrow(94, y + 38, 122, y + 38)
        sheet.box(126, y + 12, 120, 52, words="image encoder\n(frozen MAE)", size=12)
        for at, words, out in ((cls, f"CLS, 1 x {config.vision_dim}", f"1 x {config.width}"),
                               (rest, f"patches, {patches} x {config.vision_dim}",
                                f"{config.latents} x {config.width}")):
            sheet.arrow(250, at, 300, at)
            sheet.text(306, at, words, 12, fill, "lm")
            sheet.arrow(430, at, 466 if at == rest else 724, at)
            sheet.text(728, at, out, 12, fill, "lm")
        sheet.arrow(596, rest, 724, rest)
    said = f"resampler\n{config.latents} latents,\none for both\ncameras"
    sheet.box(470, 44, 122, 100, words=said, size=12)
    for y, name, words, part, out in (
            (208, "language", '"lift the red block"', "text encoder (frozen CLIP)", f"1 x {config.text_dim}"),
            (240, "state", "pose: 6, gripper: 2", "linear maps", "")):
        sheet.text(12, y, words, 12, COLOURS[name], "lm")
        sheet.arrow(138, y, 166, y)
        sheet.box(170, y - 12, 190, 24, words=part, size=12)
        sheet.text(370, y, out, 12, COLOURS[name], "lm")
        sheet.arrow(430, y, 724, y)
        sheet.text(728, y, f"1 x {config.width}", 12, COLOURS[name], "lm")
    y = 292
    sheet.text(12, y - 20, f"the {total(table)} tokens of a timestep (filled: context, hollow: queries)", 12)
    end = tokens_row(sheet, 12, y, table)
    short = {"language": "lang", "rgb_static latents": "static, 9", "rgb_static CLS": "CLS",
             "rgb_gripper latents": "gripper, 9", "rgb_gripper CLS": "CLS"}
    x = 12
    for i, (name, count, _) in enumerate(table):
        words = short.get(name, name.replace("rgb_", "") + f", {count}" * (count > 1))
        sheet.text(x, y + 28 + 13 * (i in (1, 3, 6)), words, 10, colour(name))
        x += 15 * count + 4
    y = 368
    sheet.text(12, y - 18, f"{total(pretraining)} in pre-training: no robot, one camera", 12)
    tokens_row(sheet, 12, y, pretraining)
    x = 372
    sheet.text(x, y - 18, f"{config.window} timesteps, each with a learned embedding for its context", 12)
    for t in range(config.window):
        sheet.box(x + 47 * t, y, 43, 24, words=f"t{t}", size=11)
    sheet.arrow(430, y + 34, 430, y + 56)
    y = 430
    sheet.box(12, y, 836, 44, (214, 222, 236), size=14,
              words=f"trunk: a GPT of {config.layers} blocks, {config.heads} heads, width {config.width}; "
              "keys and values from context tokens alone")
    sheet.arrow(200, y + 48, 200, y + 74, COLOURS["[ACT]"])
    sheet.text(210, y + 60, "answers to [ACT]", 11, COLOURS["[ACT]"], "lm")
    sheet.arrow(600, y + 48, 600, y + 74, COLOURS["[OBS]"])
    sheet.text(610, y + 60, "answers to [OBS]", 11, COLOURS["[OBS]"], "lm")
    sheet.box(70, y + 78, 260, 34, words="action head: linear layers", size=13)
    said = f"video head: {config.decoder_depth} blocks, {patches} mask tokens"
    sheet.box(430, y + 78, 340, 34, words=said, size=13)
    sheet.arrow(200, y + 114, 200, y + 138)
    sheet.arrow(600, y + 114, 600, y + 138)
    sheet.text(200, y + 142, "what should the arm do?", 13, INK, "mt")
    sheet.text(200, y + 162, "6 numbers of rel_actions, gripper open or closed", 12, GREY, "mt")
    sheet.text(600, y + 142, "what will the cameras see?", 13, INK, "mt")
    said = f"each camera's frame {config.future} steps on, {patches} x {3 * config.patch ** 2} numbers"
    sheet.text(600, y + 162, said, 12, GREY, "mt")
    assert end < 860
    sheet.save("model")


def mask():
    """attention_mask of two timesteps at the paper's size, a square each pair of tokens."""
    table, steps, cell = token_table(preset_config("gr1")), 2, 7
    context = [name for name, count, query in table if not query for _ in range(count)]
    queries = [name for name, count, query in table if query for _ in range(count)]
    may = attention_mask(steps, len(context), [t for t in range(steps) for _ in queries])
    rows = [*context * steps, *queries * steps]
    sheet = Sheet(150 + cell * may.shape[1] + 180, 60 + cell * len(rows) + 12)
    sheet.text(150, 18, "columns: what it may look at, the context of t0, then of t1", 12)
    sheet.text(10, 18, "rows: a token", 12)
    for i, name in enumerate(context * steps):
        sheet.box(150 + cell * i, 44, cell - 1, 9, colour(name))
    for i, name in enumerate(rows):
        sheet.box(136, 58 + cell * i, 9, cell - 1, colour(name))
        for k in range(may.shape[1]):
            fill = colour(name) if may[i, k] else (244, 245, 247)
            sheet.box(150 + cell * k, 58 + cell * i, cell - 1, cell - 1, fill)
    n, q = len(context), len(queries)
    for start, count, words in ((0, n, "context, t0"), (n, n, "context, t1"), (2 * n, q, "queries, t0"),
                                (2 * n + q, q, "queries, t1")):
        sheet.text(126, 58 + cell * (start + count / 2), words, 12, INK, "rm")
    x = 160 + cell * may.shape[1]
    for i, (name, fill) in enumerate(COLOURS.items()):
        sheet.box(x, 60 + 22 * i, 14, 14, fill)
        sheet.text(x + 20, 60 + 22 * i, name, 12)
    sheet.text(x, 210, "No column for queries:\nno token may look at\na query, not even\n"
               "the query itself.", 12)
    sheet.save("mask")


def clip():
    """A real training window of the tabletop: frames of both cameras, poses, actions and the target."""
    data, config = clips.Clips(ROOT / "data/course"), preset_config("tiny")
    windows = clips.Windows(data, np.arange(len(data)), 4, config.window, config.future, list(config.cameras))
    batch, side, b = windows[3], 92, 1
    sheet = Sheet(60 + 8 * (side + 4), 330)
    sheet.text(8, 8, f'"{batch["sentences"][b]}"', 15)
    names = [f"t{t}" for t in range(config.window)] + [f"t{config.window + f}" for f in range(config.future)]
    for t, name in enumerate(names):
        x = 52 + t * (side + 4)
        sheet.text(x + side / 2, 34, name, 12, INK if t < config.window else COLOURS["[OBS]"], "mt")
        for row, camera in enumerate(config.cameras):
            frame = batch["frames"][camera][b, t].permute(1, 2, 0).numpy()
            sheet.picture(x, 52 + row * (side + 4), frame, side)
        if t < config.window:
            place, action = batch["robot_obs"][b, t], batch["rel_actions"][b, t, 0]
            sheet.text(x, 250, "x %.2f\ny %.2f\nz %.2f m" % tuple(place[:3]), 11)
            sheet.text(x + 46, 250, "dx %.1f\ndy %.1f\ndz %.1f" % tuple(action[:3]), 11, COLOURS["[ACT]"])
            said = "open" if action[6] > 0 else "close"
            sheet.text(x, 302, f"gripper {said}", 11, COLOURS["[ACT]"])
    for y, words in ((90, "static"), (186, "gripper"), (260, "pose,\naction")):
        sheet.text(4, y, words, 11, GREY)
    x = 52 + config.window * (side + 4)
    sheet.text(x, 252, f"only targets of [OBS]:\nwhat t sees is to be foretold\nat t - {config.future}", 11,
               COLOURS["[OBS]"])
    sheet.save("clip", photo=True)


@torch.no_grad()
def resampler():
    """What a trained tiny resampler's latents look at: keypoints by place, their size the weight."""
    net, frame = GR1.from_pretrained(str(ROOT / "out/lesson4")), glimpse()[0]
    side, config = 190, net.config
    pixels = to_pixels(torch.tensor(frame).permute(2, 0, 1)[None], config.cameras["rgb_static"])
    vision, layer = net.vision, net.resampler.layers[0]
    heat = vision.look(pixels)[2][0]
    cells = math.isqrt(heat.shape[1])
    grid = torch.stack([torch.arange(cells).repeat(cells), torch.arange(cells).repeat_interleave(cells)], 1)
    where = ((heat @ grid.float()) + 0.5) / cells                                     # (points, 2), 0..1
    patches = vision(pixels)[1] + net.resampler.media_position
    h = layer.norm_latents(net.resampler.latents[None])
    seen = torch.cat([layer.norm_patches(patches), h], 1)
    q, k = layer.q(h), layer.kv(seen).chunk(2, -1)[0]
    q, k = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (q, k))
    weight = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)[0].mean(0)       # (L, points + L)
    sheet = Sheet(10 + (side + 8) * config.latents, side + 44)
    for i in range(config.latents):
        x, points = 8 + i * (side + 8), weight[i, :len(where)]
        sheet.picture(x, 24, frame, side)
        for (u, v), w in zip(where.tolist(), points.tolist()):
            r = 2 + 14 * (w / float(points.max())) ** 0.5
            sheet.pen.ellipse([2 * (x + side * u - r), 2 * (24 + side * v - r), 2 * (x + side * u + r),
                               2 * (24 + side * v + r)], None, (255, 255, 0), 3)
        sheet.text(x, 4, f"latent {i}", 13)
        sheet.text(x, side + 27, f"{float(points.sum()):.0%} on keypoints, the rest on latents", 10, GREY)
    sheet.save("resampler", photo=True)


def target():
    """A frame, and what [OBS] should say of it with and without normalising each patch."""
    frame, side = glimpse()[0], 200
    pixels = to_pixels(torch.tensor(frame).permute(2, 0, 1)[None], 64)[0]
    config = preset_config("tiny", norm_pixels=True, copy_gate=False)
    normal = unpatchify(video_target(pixels, config), config.patch)
    shown = ((normal / 6 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    sheet = Sheet(3 * (side + 12) + 8, side + 40)
    for i, (words, picture) in enumerate((("the frame", frame), ("cut into patches of 16 px", frame),
                                          ("each patch: mean 0, spread 1", shown))):
        sheet.text(10 + i * (side + 12), 8, words, 13)
        sheet.picture(10 + i * (side + 12), 28, picture, side)
        for k in range(1, 4) if i else ():
            a, x = k * side / 4, 10 + i * (side + 12)
            sheet.line((x + a, 28), (x + a, 28 + side), fill="white", width=1)
            sheet.line((x, 28 + a), (x + side, 28 + a), fill="white", width=1)
    sheet.save("target", photo=True)


def read_log(run):
    return [json.loads(line) for line in (ROOT / run / "log.jsonl").read_text().splitlines()]


def losses():
    """The four losses of the run out/lesson4, as they are and as they weigh in the total."""
    lines = [line for line in read_log("out/lesson4") if "arm" in line]
    sheet, named = Sheet(760, 270), dict(arm=100, gripper=1, rgb_static=1, rgb_gripper=1)
    fills = dict(arm=COLOURS["[ACT]"], gripper=COLOURS["state"], rgb_static=COLOURS["rgb_static"],
                 rgb_gripper=COLOURS["rgb_gripper"])
    for panel, (title, top) in enumerate((("each loss", 1.2), ("as it weighs in the total", 16))):
        x, y, w, h = box = 50 + 370 * panel, 30, 300, 200
        sheet.text(x, 8, title, 14)
        for k in range(5):
            sheet.line((x, y + h * k / 4), (x + w, y + h * k / 4), fill=PALE, width=1)
            sheet.text(x - 6, y + h * k / 4, f"{top * (1 - k / 4):.3g}", 11, GREY, "rm")
        for name, weight in named.items():
            values = [line[name] * (weight if panel else 1) for line in lines]
            curve(sheet, box, values, 0, top, fills[name])
            if panel:
                row = 34 + 18 * list(named).index(name)
                sheet.text(x + w - 90, row, f"{weight} x {name}", 12, fills[name])
        sheet.text(x, y + h + 8, f"step {lines[0]['step']}", 11, GREY)
        sheet.text(x + w, y + h + 8, f"{lines[-1]['step']}", 11, GREY, "rt")
    sheet.save("losses")


def pretraining():
    """Held-out frames of out/lesson5: now, foretold, true; below, the loss."""
    last = sorted((ROOT / "out/lesson5").glob("[0-9]*.png"))[-1]
    tiles, count, side = np.array(Image.open(last)), 5, 96
    size = tiles.shape[0] // 3
    columns = [i for i in range(tiles.shape[1] // size) if tiles[2 * size:, i * size:(i + 1) * size].any()]
    count = min(count, len(columns))                     # those whose clip goes on for another step
    sheet = Sheet(80 + 6 * (side + 4), 3 * (side + 4) + 150)
    for row, words in enumerate(("now", "foretold", "true, one\nstep on")):
        sheet.text(6, row * (side + 4) + side / 2, words, 13)
        for i, k in enumerate(columns[:count]):
            tile = tiles[row * size:(row + 1) * size, k * size:(k + 1) * size]
            sheet.picture(76 + i * (side + 4), 4 + row * (side + 4), tile, side)
    lines = [line for line in read_log("out/lesson5") if "rgb_static" in line]
    x, y, w, h = box = 76, 3 * (side + 4) + 24, 480, 96
    sheet.text(6, y + 30, "loss", 13)
    for k in range(3):
        sheet.line((x, y + h * k / 2), (x + w, y + h * k / 2), fill=PALE, width=1)
        sheet.text(x + w + 6, y + h * k / 2, f"{0.2 * (1 - k / 2):.1f}", 11, GREY, "lm")
    curve(sheet, box, [line["rgb_static"] for line in lines], 0, 0.2, COLOURS["rgb_static"])
    sheet.text(x, y + h + 8, f"step {lines[0]['step']} to {lines[-1]['step']}: it soon has learned to copy",
               12, GREY)
    sheet.save("pretraining", photo=True)


def confusion():
    """A clean and a dragged demonstration from above, and what the last moves foretell."""
    sheet, scale = Sheet(760, 290), 560
    for panel, (words, nudges) in enumerate((("clean", 0.0), ("dragged", 1.0))):
        left = 8 + 270 * panel
        sheet.box(left, 30, 256, 236, (248, 248, 246))
        sheet.text(left, 8, f"a {words} demonstration, from above", 13)
        world, rng = tabletop.Tabletop("A", 5), np.random.default_rng(5)
        world.reset(render=False)
        at = lambda p: (left + 128 + scale * p[0] * 0.7, 150 - scale * p[1] * 0.6)
        for i, fill in enumerate(((200, 50, 40), (60, 90, 200), (230, 130, 170))):
            u, v = at(world.blocks[i])
            sheet.box(u - 10, v - 10, 20, 20, fill)
        seen, actions, _ = tabletop.perform(world, "lift_blue_block_table", rng, render=False, nudges=nudges)
        places = [o["robot_obs"][:3] for o in seen]
        for p, after, action in zip(places, places[1:], actions):
            sheet.line(at(p), at(after), fill=GREY, width=2)
            if np.abs(action[:2]).max() > 0.1:
                wanted = p + 0.8 * tabletop.STEP * np.array([*action[:2], 0])
                sheet.arrow(*at(p), *at(wanted), COLOURS["[ACT]"])
    sheet.text(8, 270, "grey: where the arm went    orange: the action that is recorded", 12)
    x = 570
    sheet.text(x, 8, "what the last two moves\nforetell of the next action", 13)
    for i, (name, nudges) in enumerate((("clean", 0.0), ("dragged", tabletop.NUDGES))):
        share = lab.foretold(nudges)
        sheet.box(x + 20 + 80 * i, 250 - 180 * share, 50, 180 * share, COLOURS["[ACT]"])
        sheet.text(x + 45 + 80 * i, 244 - 180 * share, f"{share:.0%}", 13, INK, "mb")
        sheet.text(x + 45 + 80 * i, 256, name, 13, INK, "mt")
    sheet.save("confusion")


def window():
    """Which frame stands at which timestep of a window of five, as the robot acts."""
    config = preset_config("tiny")
    sheet, cell = Sheet(760, 292), 52
    sheet.text(8, 6, f"a window of {config.window}: which frame stands at which timestep's embedding", 14)
    shades = [(86 + 14 * i, 156 - 8 * i, 214 - 12 * i) for i in range(9)]
    for row, step in enumerate((0, 1, 4, 5, 6)):
        y = 34 + row * 46
        sheet.text(8, y + 10, f"after step {step}", 13)
        frames = range(max(0, step + 1 - config.window), step + 1)
        for t in range(config.window):
            x = 110 + t * (cell + 6)
            sheet.box(x, y, cell, 34, (246, 246, 248))
            if t < len(frames):
                sheet.box(x, y, cell, 34, shades[frames[t]], words=f"frame {frames[t]}", size=11, ink="white")
            if row == 4:
                sheet.text(x + cell / 2, y + 40, f"t{t}", 12, GREY, "mt")
        last = 110 + (len(frames) - 1) * (cell + 6)
        sheet.arrow(last + cell + 4, y + 17, 424, y + 17, COLOURS["[ACT]"])
        sheet.text(430, y + 17, f"[ACT] is asked at t{len(frames) - 1}", 13, COLOURS["[ACT]"], "lm")
        if step >= config.window:
            sheet.text(580, y + 17, "every frame at another t", 12, GREY, "lm")
    sheet.save("window")


def judging():
    """Success of lesson 8's tasks with Wilson's intervals, for retrainings and the control, from reports."""
    runs = [(words, ROOT / f"out/{name}/report.json") for words, name in
            (("seed 0", "lesson8"), ("seed 1", "lesson8-seed1"), ("seed 2", "lesson8-seed2"),
             ("seed 0, another\ntask's sentence", "lesson8-control"))]
    runs = [(words, json.loads(path.read_text())["tasks"]) for words, path in runs if path.exists()]
    tasks = list(runs[0][1])
    sheet = Sheet(760, 60 + 38 * len(runs))
    for i, task in enumerate(tasks + ["all together"]):
        sheet.text(130 + i * 125, 8, task, 12)
        for share in (0, .5, 1):
            x = 130 + i * 125 + share * 90
            sheet.line((x, 28), (x, 34 + 38 * len(runs)), fill=PALE, width=1)
            sheet.text(x, 38 + 38 * len(runs), f"{100 * share:.0f}" + "%" * (share == 1), 10, GREY, "mt")
    for row, (words, table) in enumerate(runs):
        y = 46 + 38 * row
        sheet.text(6, y - 8, words, 12)
        pairs = [(table[task]["successes"], table[task]["episodes"]) for task in tasks]
        for i, (done, n) in enumerate(pairs + [tuple(map(sum, zip(*pairs)))]):
            low, high = wilson(done, n)
            x, fill = 130 + i * 125, GREY if "sentence" in words else COLOURS["rgb_static"]
            sheet.line((x + 90 * low, y), (x + 90 * high, y), fill=fill, width=2)
            middle = x + 90 * done / n
            sheet.pen.ellipse([2 * middle - 9, 2 * y - 9, 2 * middle + 9, 2 * y + 9], fill)
    sheet.save("judging")


def codes():
    """A frame, its codes, the frame painted from them, by the tokenizer of make demo-gr2 or of lesson 9."""
    folder = next(path for name in ("tokenizer", "lesson9") if (path := ROOT / "out" / name).is_dir())
    made, frame, side = tokenizer.open_tokenizer(folder), glimpse()[0], 240
    found = made.encode(to_pixels(torch.tensor(frame).permute(2, 0, 1)[None], len(frame)))
    grid, painted = found[0].unflatten(0, (math.isqrt(found.shape[1]), -1)).tolist(), made.decode(found)
    sheet, cell = Sheet(3 * (side + 12) + 8, side + 40), side / len(grid)
    for i, (words, picture) in enumerate((("a frame of 64 x 64 px", frame), ("its 8 x 8 codes", None),
                                          ("painted from the codes", to_images(painted)[0].numpy()))):
        x = 10 + i * (side + 12)
        sheet.text(x, 8, words, 13)
        if picture is not None:
            sheet.picture(x, 28, picture, side)
        for row, numbers in enumerate(grid if picture is None else ()):
            for column, number in enumerate(numbers):    # coloured by three of the four values behind a code
                levels = number // 8 % 5, number // 40 % 5, number // 200
                fill = tuple(135 + 115 * level // 4 for level in levels)
                sheet.box(x + column * cell, 28 + row * cell, cell, cell, fill, "white", str(number), 10)
    sheet.save("codes", photo=True)


FIGURES = dict(model=model, mask=mask, clip=clip, resampler=resampler, target=target, losses=losses,
               pretraining=pretraining, confusion=confusion, window=window, judging=judging, codes=codes)

if __name__ == "__main__":
    for figure in sys.argv[1:] or FIGURES:
        FIGURES[figure]()
