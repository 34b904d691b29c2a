"""
Run the lessons' commands as their texts have them: `python course/run_lessons.py [NUMBER ...]`, all without.

Prints of each lesson the time and the figures that it names, and whether they lie in their bands. In a
lesson's text the block ```sh is its command, and a band is the comment <!-- expect: NAME LOW HIGH -->. NAME
stands in the command's output; the first number after it is the figure. Writes what the lessons write, into
data/course, data/course-videos, out/lesson4, out/lesson5, out/lesson8. All eight: 5 to 15 minutes.
"""
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUMBER = r"([-+]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?)"


def lessons():
    """The lessons' files by number: {1: course/1_clip.md, ...}."""
    return {int(path.name[0]): path for path in sorted((ROOT / "course").glob("[0-9]_*.md"))}


def read(text):
    """A lesson's text -> its command, and its bands [(name, low, high)]; ValueError if they are not there."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    bands = [(name, float(low), float(high))
             for name, low, high in re.findall(r"^<!-- expect: (.+) (\S+) (\S+) -->$", text, re.M)]
    if len(blocks) != 1 or not bands or text.count("<!-- expect") != len(bands):
        raise ValueError(f"{len(blocks)} command blocks, {len(bands)} bands: it takes one block and a band")
    return blocks[0].strip(), bands


def figure(name, output):
    """The first number after `name` in the output, or None."""
    found = re.search(r"(?<![\w/])" + re.escape(name) + r"(?![\w/])[^\w\n]*?" + NUMBER, output)
    return float(found.group(1).replace(",", "")) if found else None


def run(number):
    """Run a lesson: -> seconds, [(name, value, low, high)], what it printed."""
    command, bands = read(lessons()[number].read_text())
    command = command.replace("python ", f'"{sys.executable}" ')          # this python, whatever PATH says
    start = time.monotonic()
    ended = subprocess.run(["bash", "-ec", command], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    values = [(name, figure(name, ended.stdout), low, high) for name, low, high in bands]
    return time.monotonic() - start, values, ended.stdout + f"status {ended.returncode}"


def inside(values):
    return all(value is not None and low <= value <= high for _, value, low, high in values)


def main():
    numbers, good = [int(word) for word in sys.argv[1:]] or list(lessons()), True
    for number in numbers:
        seconds, values, output = run(number)
        said = "; ".join(f"{name} {value} ({low:g} to {high:g})" for name, value, low, high in values)
        print(f"{lessons()[number].name:<18} {seconds:4.0f} s  {'ok ' if inside(values) else 'OUT'}  {said}",
              flush=True)
        if not inside(values):
            good = False
            print(output[-3000:])
    sys.exit(not good)


if __name__ == "__main__":
    main()
