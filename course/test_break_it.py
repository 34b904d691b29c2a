"""
The "break it" exercises, done: change a line in a copy of the project, and the test that should notice fails.

A copy is needed because the line is really changed. It is made once; each change is undone after its test.
"""
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ANSWERS = (ROOT / "course/answers.md").read_text()

# lesson, file, a line's text as it is, as it becomes, the test that notices
BREAKS = [
    (1, "nanogr/clips.py", "future_mask=steps + self.F * every < lengths[:, None]",
     "future_mask=steps + self.F * every <= lengths[:, None]", "test_window_masks"),
    (2, "model.py", "column[None, :] // context <= query_steps[:, None]",
     "column[None, :] // context < query_steps[:, None]", "test_mask_is_the_drawn_one"),
    (4, "model.py", "opened = (target[..., -1] > 0).float()", "opened = (target[..., -1] < 0).float()",
     "test_losses_by_hand"),
    (5, "model.py", 'changes.get("future", 1)', 'changes.get("future", 3)', "test_token_table"),
    (6, "nanogr/worlds/tabletop.py", "observations.append(world.step(action, render))",
     "actions[-1] = action; observations.append(world.step(action, render))",
     "test_nudged_demonstrations_say_where_to_go"),
    (7, "nanogr/policy.py", "if sentence != self.sentence:", "if self.sentence is None:",
     "test_policy_equals_the_full_forward"),
    (8, "eval_calvin.py", "        if steps[-1] is None:\n            break\n    length",
     "        if steps[-1] is None:\n            continue\n    length",
     "test_chain_stops_at_the_first_failure"),
    (9, "gr2.py", "self.training and noise is not None", "noise is not None",
     "test_judged_and_acting_without_the_answers"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for path in [*ROOT.glob("*.py"), ROOT / "tests", ROOT / "nanogr", ROOT / "Makefile", ROOT / "README.md"]:
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, folder / path.name, ignore=skip) if path.is_dir() else shutil.copy(path, folder)
    return folder


def where(folder, test):
    """The test file that holds a test."""
    found = [path for path in (folder / "test_model.py", *sorted((folder / "tests").glob("test_*.py")))
             if re.search(rf"^def {test}\(", path.read_text(), re.M)]
    assert len(found) == 1, f"{test} is in {found}"
    return f"{found[0].relative_to(folder)}::{test}"


def passes(folder, *tests):
    """Run tests in the copy: -> whether all passed, what pytest printed."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr               # 1: a test failed
    return ended.returncode == 0, ended.stdout


def test_unbroken(copy):
    """Catches a named test that fails anyway."""
    good, text = passes(copy, *(where(copy, test) for *_, test in BREAKS))
    assert good, text


@pytest.mark.parametrize("lesson, file, before, after, test", BREAKS, ids=[f"lesson{b[0]}" for b in BREAKS])
def test_break(copy, lesson, file, before, after, test):
    """Catches an answer that is no longer true: the line has changed, or the test does not notice."""
    said, text = (ROOT / lesson_file(lesson)).read_text(), (copy / file).read_text()
    assert text.count(before) == 1, f"lesson {lesson}: {file} has this {text.count(before)} times: {before}"
    assert file in said and before.strip().splitlines()[0] in said, f"{lesson_file(lesson)} says otherwise"
    assert test in ANSWERS and test not in said, "the test's name belongs into the answer, not the lesson"
    (copy / file).write_text(text.replace(before, after))
    try:
        good, output = passes(copy, where(copy, test))
    finally:
        (copy / file).write_text(text)
    assert not good and f"{test}" in output, output


def lesson_file(number):
    return next((ROOT / "course").glob(f"{number}_*.md")).relative_to(ROOT)
