"""README, docs/ and course/ tell the truth about files, flags and lines."""
import re

from tests.helpers import ROOT, run


def problems(text, folder=ROOT):
    """What a page says that is not so: flags that a command lacks, missing files, lines that moved."""
    found, text = [], text.replace("\\\n", " ")
    for command, flags in re.findall(r"(-m nanogr[.\w]+|\b[\w/]+\.py)\b((?: +[^\s`#|&;]+)+)", text):
        module = command.removeprefix("-m ")
        ours = (ROOT / command).exists() and not re.search(r"test_|course/", command)
        if command.startswith("-m") or ours:
            known = re.findall(r"--[a-z][\w-]*", run(command, "--help")[1])
            used = re.findall(r"(?<=\s)--[a-z][\w-]*", flags)
            found += [f"{module} has no {flag}" for flag in used if flag not in known]
    for name, file, line in re.findall(r"\[`([^`]+)`\]\(([\w./-]+)#L(\d+)\)", text):
        lines = [""] + ((folder / file).read_text().splitlines() if (folder / file).exists() else [])
        here = lines[int(line)] if int(line) < len(lines) else ""
        word = re.escape(name.split(".")[-1])
        found += [] if re.search(rf"\b{word}\b", here) else [f"{file}:{line} is not {name}"]
    links = set(re.findall(r"(?<=\]\()(?!https?:|#|mailto:)[^)#\s]+", text))
    found += [f"no file {name}" for name in sorted(links) if not (folder / name).exists()]
    named = set(re.findall(r"(?<![\w/.*<-])(?:[\w-]+/)*\w+\.(?:py|md|gif|txt)\b(?![\w(])", text)) - links
    found += [f"no file {name}" for name in sorted(named)
              if not any((place / name).exists() for place in (ROOT, folder, ROOT / "course"))
              and name.split("/")[0] not in ("out", "data") and name not in WRITTEN]
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    return found + [f"no target {target}" for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M)
                    if target not in targets]


WRITTEN = {"report.md", "report.py", "gr1.py"}           # by our scripts; of others


def test_readme_tells_the_truth():
    """Catches commands, files and line numbers that the code has outgrown; a checker that finds nothing."""
    line = (ROOT / "model.py").read_text().split("def attention_mask")[0].count("\n") + 1
    good = f"`python train.py --stage x \\\n --lr 1` [`attention_mask`](model.py#L{line}) [x](http://a/b)"
    bad = ("torchrun --nproc 8 train.py --stage finetune --lrr 1   # so\nsee `modle.py`, [there](LICENCE-X), "
           f"`make dmeo`, [`attention_mask`](model.py#L{line - 1})")
    assert problems(good) == [] and set(problems(bad)) == {
        "train.py has no --lrr", f"model.py:{line - 1} is not attention_mask", "no file modle.py",
        "no file LICENCE-X", "no target dmeo"}
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("course/*.md")]:
        assert problems(page.read_text(), page.parent) == [], page
