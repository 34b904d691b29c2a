"""
Do the lessons say what is so? Their form, links and cheap commands; with --lessons all their commands.
"""
import json
import re
import subprocess
import sys

import figures
import numpy as np
import pytest
import your_robot
from PIL import Image
from run_lessons import ROOT, figure, inside, lessons, read, run

from nanogr import clips

CHEAP = [2, 3, 6, 7]
COURSE = ROOT / "course"


def test_figures_are_read():
    """Catches a reader that takes another number for a lesson's figure."""
    text = ("step 3  val/a_ratio 0.5  a_ratio 1.5\n  total   43\n  sum 45,988,039\n"
            "| **mean** | **40.1%** | x 1e-07")
    wanted = {"val/a_ratio": 0.5, "a_ratio": 1.5, "total": 43, "sum": 45_988_039, "mean": 40.1, "x": 1e-7,
              "ratio": None}
    assert {name: figure(name, text) for name in wanted} == wanted
    assert not inside([("a", None, 0, 1)]) and not inside([("a", 2.0, 0, 1)]) and inside([("a", 1.0, 0, 1)])
    for wrong in "no block", "```sh\na\n```\n", "```sh\na\n```\n```sh\na\n```\n<!-- expect: a 0 1 -->\n":
        with pytest.raises(ValueError, match="one block and a band"):
            read(wrong)


def test_form():
    """Catches a lesson without command, band, figure, exercise or answer, or longer than a screen."""
    assert list(lessons()) == list(range(1, 10))
    answers, index = ((COURSE / name).read_text() for name in ("answers.md", "README.md"))
    for number, path in lessons().items():
        text = path.read_text()
        assert read(text)[0] and "## Exercise" in text and f"]({path.name})" in index, path
        anchors = re.findall(r"\]\(answers\.md#([\w-]+)\)", text)
        assert anchors == [f"lesson-{number}"] and f"## Lesson {number}\n" in answers, path
        assert re.search(r"!\[.+\]\(figures/\w+\.png\)", text) and len(text) < 5500, (path, len(text))


def test_links():
    """Catches links and paths that lead nowhere, and figures that are missing, unused or too big."""
    for path in COURSE.glob("*.md"):
        text = path.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (path.parent / target).exists(), (path, target)
        for name in re.findall(r"(?<![\w/.-])((?:nanogr|course|tests|docs)/[\w/]+\.\w+)", text):
            assert (ROOT / name).exists(), (path, name)
    pictures = list((COURSE / "figures").glob("*.png"))
    texts = "".join(path.read_text() for path in COURSE.glob("*.md"))
    assert pictures and sum(path.stat().st_size for path in pictures) < 600_000
    assert all(f"figures/{path.name}" in texts for path in pictures)


def test_figures_are_drawn(tmp_path, monkeypatch):
    """Catches a drawing that the code has outgrown: another number of tokens makes another size."""
    monkeypatch.setattr(figures, "OUT", tmp_path)
    for name in "model", "mask", "window":
        figures.FIGURES[name]()
        drawn, shown = (Image.open(folder / f"{name}.png") for folder in (tmp_path, COURSE / "figures"))
        assert drawn.size == shown.size


@pytest.mark.parametrize("number", range(1, 10))
def test_lesson(number, request):
    """Catches a command that no longer runs, or whose figure has left its band."""
    if number not in CHEAP and not request.config.getoption("--lessons"):
        pytest.skip("takes minutes: pytest course/ --lessons, or python course/run_lessons.py")
    _, values, output = run(number)
    assert inside(values), (values, output[-3000:])


def test_your_robot(tmp_path):
    """Catches an example that packs what training refuses, or with another unit or sign than it says."""
    ends = [subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True, text=True)
            for words in ((COURSE / "your_robot.py", "packed"),
                          (ROOT / "train.py", "--data", "packed", "--init", "none", "--steps", 1,
                           "--batch", 4, "--eval-batches", 1, "--out", "out"))]
    assert [end.returncode for end in ends] == [0, 0], ends
    assert (tmp_path / "out/model.safetensors").exists()
    meta = json.loads((tmp_path / "packed/meta.json").read_text())
    assert meta["has_actions"] and meta["counts"]["clips"] == 6 and list(meta["cameras"]) == [
        "rgb_static", "rgb_gripper"]


def test_packed_actions_lead_to_the_next_pose(tmp_path):
    """Catches an action a step late, a scale turned upside down, a turn the long way round."""
    your_robot.pack(tmp_path)
    states, actions = clips.Clips(tmp_path).rows(2)
    reached = states[:-1, :3] + actions[:-1, :3] * your_robot.METRES
    assert np.allclose(reached, states[1:, :3], atol=1e-5) and np.isnan(actions[-1]).all()
    assert (actions[:-1, 6] == states[1:, 14]).all() and set(states[:, 14]) == {-1, 1}


def test_commands_name_real_files():
    """Catches a lesson whose command needs what no earlier lesson has written."""
    written = set()
    for number in lessons():
        command = read(lessons()[number].read_text())[0]
        reads = r"(?:--data|--checkpoint|clip|losses|sentence|codes) ((?:data|out)/[\w-]+)"
        needed = set(re.findall(reads, command))
        own = set(re.findall(r"--(?:out|make) ((?:data|out)/[\w-]+)", command))
        assert needed <= written | own, (number, needed - written - own)
        written |= own
