"""What pytest needs for the course: the project's files to import, and whose answers are graded.

`pytest course/` grades yours, course/exercises.py. With --solutions, with CI set in the environment, or run
together with the project's other tests, the same graders grade course/solutions.py.
"""
import os
import pathlib
import sys

COURSE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(COURSE.parent), str(COURSE)]
os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # before torch reads it

import pytest


def pytest_addoption(parser):
    parser.addoption("--solutions", action="store_true", help="grade course/solutions.py, not exercises.py")
    parser.addoption("--lessons", action="store_true", help="run every lesson's command: 5 to 15 minutes")


@pytest.fixture(scope="session")
def grades_solutions(request):
    alone = all(COURSE in item.path.parents for item in request.session.items)
    return request.config.getoption("--solutions") or bool(os.environ.get("CI")) or not alone
