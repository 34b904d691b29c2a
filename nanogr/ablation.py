"""
The paper's first question in miniature: what do video prediction and video pre-training give the robot?

    python -m nanogr.ablation --init CHECKPOINT                    # all trainings and judgements, one by one
    python -m nanogr.ablation --init CHECKPOINT --shard 1/2        # half of them; on any number of machines
    python -m nanogr.ablation --init CHECKPOINT --report           # the table and the chart of what is there

Rows: neither (no [OBS], no pre-training), video (with [OBS]), video + pre-training (starts from CHECKPOINT,
which `train.py --stage pretrain` made). Columns: how many demonstrations, see COLUMNS. Each cell is several
trainings (--seeds) of the same steps, which differ in weights, windows and which demonstrations they get.
Each is judged by single instructions in scene D, from the same states. All of CHECKPOINT is carried over,
whatever the preset's --fresh is. Nothing else differs between rows.

It runs train.py and eval_calvin.py; flags after `--` go to train.py. Into --out (default out/ablation) it
writes a folder for each training, report.md, report.json and chart.png. A killed run goes on where it was;
elsewhere it goes on with report.json alone, whose cells are not trained again.
"""
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image, ImageDraw

import gr2
from nanogr.common import Parser, UserError, check_same, parse_part, read_json, run_script, write_whole
from nanogr.pictures import GRAY, INK, SMALL, write_png
from nanogr.tokenizer import tokenizer_of
from nanogr.weights import fingerprint

HERE = pathlib.Path(__file__).resolve().parents[1]
ROWS = {"neither": ["--no-video", "--init", "none"], "video": ["--init", "none"],
        "video + pre-training": None}
# Flags of train.py, the scenes trained on, the paper's average lengths of the three rows (its Tables 1 to 3).
# Of 8000 clips 348 are of each of the 23 tasks.
COLUMNS = {
    "10 a task": (["--data-fraction", "0.0288"], "ABCD", None),
    "10%": (["--data-fraction", "0.1"], "ABCD", (1.04, 1.52, 2.00)),
    "all": ([], "ABCD", (3.33, 3.82, 4.21)),
    "ABC to D": ([], "ABC", (2.40, 2.65, 3.06)),
    "future 1": (["--future-step", "1"], "ABCD", (None, 3.61, None)),
    "future 5": (["--future-step", "5"], "ABCD", (None, 3.67, None)),
}
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}    # 95%


def parse():
    parser = Parser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--init", required=True, metavar="CHECKPOINT",
                        help="the pre-trained model of the third row")
    parser.add_argument("--preset", default="tiny", help="default: tiny")
    parser.add_argument("--columns", default="10 a task,10%,all", metavar="A,B,...",
                        help=f"of {', '.join(COLUMNS)} (default: the first three)".replace("%", "%%"))
    parser.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="trainings a cell (default: 5)")
    parser.add_argument("--steps", type=int, default=2000, help="of every training (default: 2000)")
    parser.add_argument("--episodes", type=int, default=20, help="a task and training (default: 20)")
    parser.add_argument("--tasks", default="", help="judge these alone, A,B,... (default: all)")
    parser.add_argument("--data", metavar="DIR", help="other demonstrations than the tabletop's")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="do the I-th of N parts, I = 1 .. N")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is there")
    parser.add_argument("--out", default="out/ablation", help="default: out/ablation")
    parser.add_argument("flags", nargs="*", help="behind --: more flags for every training")
    args = parser.parse_args()
    args.columns, args.rows = args.columns.split(","), args.rows.split(",")
    for name, known in [(x, COLUMNS) for x in args.columns] + [(x, ROWS) for x in args.rows]:
        if name not in known:
            parser.error(f"there is no {name!r}: choose from {', '.join(known)}")
        if args.preset in gr2.PRESETS and name.startswith("future"):
            parser.error(f"column {name!r} is for GR-1: GR-2 foresees its next timestep")
    if not 1 <= args.seeds <= max(STUDENT) or min(args.steps, args.episodes) < 1:
        parser.error(f"--seeds must be 1 to {max(STUDENT)}, --steps and --episodes 1 or more")
    args.part, args.parts = parse_part(parser, args.shard)
    return args


def jobs(args):
    """(column, row, seed) of every training, seeds outermost: what is there early is a whole table."""
    return [(column, row, seed) for seed in range(args.seeds) for column in args.columns for row in args.rows]


def folder(args, column, row, seed):
    name = "".join(c if c.isalnum() else "-" for c in f"{column} {row}")
    return pathlib.Path(args.out, f"{name}-{seed}")


def demonstrations(args, scenes):
    """Where the demonstrations of these scenes are; made if need be."""
    if args.data:
        return args.data
    path = "data/tabletop-demonstrations" + ("" if scenes == "ABCD" else f"-{scenes}")
    if not pathlib.Path(path, "meta.json").exists():
        run("-m", "nanogr.worlds.tabletop", "--make", "demonstrations", "--scenes", scenes, "--out", path)
    return path


def run(*command):
    if subprocess.run([sys.executable, *map(str, command)]).returncode:
        raise UserError(f"{' '.join(map(str, command))} failed, see above; the same command goes on there")


def do(args, column, row, seed):
    """Train and judge one model, or what is left of that."""
    out, (flags, scenes, _) = folder(args, column, row, seed), COLUMNS[column]
    if seed in cell(args, column, row):
        return
    own = ROWS[row] or ["--init", args.init, "--fresh", "none"]
    if args.preset in gr2.PRESETS:                       # all rows read the same codes
        own = [*own, "--tokenizer", tokenizer_of(args.init)]
    data = demonstrations(args, scenes)
    run(HERE / "train.py", "--preset", args.preset, "--data", data, "--seed", seed, "--steps", args.steps,
        "--eval-every", args.steps, "--out", out, "--resume", *flags, *own, *args.flags)
    run(HERE / "eval_calvin.py", "--checkpoint", out, "--episodes", args.episodes, "--chains", 0, "--resume",
        "--out", out / "eval", *(["--tasks", args.tasks] if args.tasks else []))


# ------------------------------------------------------------------------------------------------ report
def cell(args, column, row):
    """{seed: success [share, mean over tasks]} of the trainings that are there, or in an earlier report."""
    done = {int(seed): share for seed, share in args.earlier.get(column, {}).get(row, {}).items()}
    for seed in range(args.seeds):
        path = folder(args, column, row, seed) / "eval/report.json"
        if path.exists():
            tasks = read_json(path, "delete it, and judge again")["tasks"].values()
            done[seed] = float(np.mean([task["rate"] for task in tasks]))
    return dict(sorted(done.items()))


def interval(values):
    """Mean, and the half of its 95% interval over trainings (Student's t); NaN for fewer than two."""
    n = len(values)
    half = STUDENT[n] * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return (float(np.mean(values)) if n else math.nan), float(half)


def said_as(values):
    """Shares of trainings as words: mean ± half of the interval, in percent, and how many."""
    mean, half = interval(values)
    spread = "" if math.isnan(half) else f" ± {100 * half:.1f}"
    return f"{100 * mean:.1f}{spread} (n {len(values)})" if values else "-"


def as_json(said, table):
    """What report.json holds: the settings of all parts, and {column: {row: {seed: success}}}."""
    return json.dumps(dict(settings=said, table=table), indent=1).encode()


def report(args, said):
    columns = [column for column in COLUMNS if column in {*args.columns, *args.earlier}]
    rows = [row for row in ROWS if row in {*args.rows, *sum(map(list, args.earlier.values()), [])}]
    table = {column: {row: cell(args, column, row) for row in rows} for column in columns}
    lines = ["# What video gives the robot, in the tabletop", "",
             "Single instructions, % done: mean of the trainings, 95% interval over them. In brackets the "
             "paper's average length in CALVIN.", "",
             "| | " + " | ".join(columns) + " |", "|---" * (len(table) + 1) + "|"]
    for row in rows:
        words = []
        for column, cells in table.items():
            paper = (COLUMNS[column][2] or (None,) * 3)[list(ROWS).index(row)]
            words.append(said_as(list(cells[row].values())) + (f" [{paper:.2f}]" if paper else ""))
        lines.append(f"| {row} | " + " | ".join(words) + " |")
    *others, last = rows
    for row in others:                                   # seed by seed: both had the same demonstrations
        gains = ([cells[last][seed] - cells[row][seed] for seed in cells[last] if seed in cells[row]]
                 for cells in table.values())
        lines.append(f"| gain of *{last}* over *{row}* | " + " | ".join(map(said_as, gains)) + " |")
    lines += ["", *(f"- {name}: {value}" for name, value in said.items())]
    write_whole(pathlib.Path(args.out, "report.md"), ("\n".join(lines) + "\n").encode())
    write_whole(pathlib.Path(args.out, "report.json"), as_json(said, table))
    chart(table, pathlib.Path(args.out, "chart.png"))
    print("\n".join(lines))


def chart(table, path, width=150, height=220):
    """A group of bars for each column, a dot for each training."""
    colours = dict(zip(ROWS, ((170, 174, 182), (86, 156, 214), (213, 94, 0))))
    sheet = Image.new("RGB", (60 + (width + 20) * len(table), height + 90), "white")
    pen = ImageDraw.Draw(sheet)
    for share in range(0, 101, 20):
        y = 20 + height * (1 - share / 100)
        pen.line((40, y, sheet.width - 10, y), (232, 234, 238))
        pen.text((34, y), str(share), GRAY, SMALL, anchor="rm")
    for i, (column, cells) in enumerate(table.items()):
        left, bar = 50 + i * (width + 20), width // len(cells)
        pen.text((left + width / 2, height + 28), column, INK, SMALL, anchor="mt")
        for j, (row, by_seed) in enumerate(cells.items()):
            values = list(by_seed.values())
            x, (mean, half) = left + j * bar, interval(values)
            if not values:
                continue
            top = lambda share: 20 + height * (1 - share)
            pen.rectangle((x + 4, top(mean), x + bar - 4, top(0)), colours[row])
            if not math.isnan(half):
                low, high = max(0, mean - half), min(1, mean + half)
                pen.line((x + bar / 2, top(high), x + bar / 2, top(low)), INK, 2)
            for value in values:
                pen.ellipse((x + bar / 2 - 3, top(value) - 3, x + bar / 2 + 3, top(value) + 3), "white", INK)
    x = 50
    for row, colour in colours.items():
        pen.rectangle((x, height + 62, x + 12, height + 74), colour)
        pen.text((x + 18, height + 68), row, INK, SMALL, anchor="lm")
        x += 34 + SMALL.getlength(row)
    write_png(path, sheet)


def settings(args):
    """What all parts must have in common."""
    return {"checkpoint": args.init, "which is": fingerprint(args.init), "preset": args.preset,
            "steps": args.steps, "episodes a task": args.episodes, "tasks": args.tasks or "all",
            "data": args.data or "the tabletop's", "more": " ".join(args.flags)}


def main():
    args = parse()
    said, begun = settings(args), pathlib.Path(args.out, "report.json")
    if not begun.exists():                               # for the other parts, and for a later start
        begun.parent.mkdir(parents=True, exist_ok=True)
        write_whole(begun, as_json(said, {}))
    before = read_json(begun, "delete it, or choose another --out")
    check_same(before["settings"], said, args.out, ": give the same, or another --out")
    args.earlier = before["table"]
    for job in () if args.report else jobs(args)[args.part - 1::args.parts]:
        print(f"ablation: {', '.join(map(str, job))}", flush=True)
        do(args, *job)
    report(args, said)


if __name__ == "__main__":
    run_script(main)
