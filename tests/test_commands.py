"""What the commands say when something is wrong; how the files hang together."""
import ast
import shutil

from nanogr.worlds import tabletop
from tests.helpers import ROOT, fails_in_one_line, make_calvin, training


def test_commands_say_what_is_wrong(tabletop_data, checkpoints, tmp_path):
    """Catches tracebacks, misspelt flags that are ignored, runs that start although something is wrong."""
    robot, video, out = tabletop_data / "demonstrations", tabletop_data / "videos", tmp_path / "out"
    broken, damaged = tmp_path / "broken", tmp_path / "damaged"
    tabletop.make("demonstrations", broken, 12, "AD", workers=1)
    for shard in broken.glob("*.bin"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    shutil.copytree(checkpoints / "finetune", damaged)
    for half, data in ("training", robot), ("validation", video):
        shutil.copytree(data, tmp_path / "halves" / half)
    raw = make_calvin(tmp_path / "raw/training", []).parent
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-8])
    for command, *needed in (["train.py"], ["eval_calvin.py"], ["sample.py"], ["-m nanogr.worlds.tabletop"],
                             ["-m nanogr.clips", "A"], ["-m nanogr.worlds.calvin"], ["-m nanogr.bench"],
                             ["record_calvin.py"], ["prepare_calvin.py", "A", "B"],
                             ["-m nanogr.painter", "--data", "A", "--out", "B"]):
        assert fails_in_one_line(command, *needed, "--hepl", words=["--hepl", "did you mean --help?"])
    start = training("finetune", robot, out)
    judge = ["eval_calvin.py", "--episodes", 1, "--chains", 0, "--workers", 1, "--out", out]
    look = ["sample.py", "--checkpoint", checkpoints / "finetune", "--episodes", 1, "--out", out]
    for command, words in (
            (training("finetune", tmp_path / "nowhere", out), ["nowhere", "no such directory"]),
            (training("finetune", video, out), ["videos", "no actions", "--stage pretrain"]),
            (training("finetune", tmp_path / "halves", out), ["halves/validation", "no actions"]),
            (training("finetune", broken, out), ["JPEG is broken", "nanogr.clips"]),
            (training("finetune", broken, out, "--workers", 1), ["JPEG is broken", "nanogr.clips"]),
            (training("pretrain", video, out, "--no-video"), ["--no-video", "[OBS]"]),
            (training("pretrain", video, out, "--video-every", 5), ["--video-every", "learns nothing"]),
            ([*start, "--preset", "gr1", "--eye-noise", 0.1], ["--eye-noise", "--preset calvin"]),
            ([*start, "--preset", "tinny"], ["tinny", "did you mean 'tiny'?"]),
            ([*start, "--stage", "fintune"], ["fintune", "finetune"]),
            ([*start, "widht=3"], ["widht", "did you mean 'width'?"]),
            ([*start, "width"], ["KEY=VALUE", "width"]),
            ([*start, 'width="32"'], ["width", "int"]),
            ([*start, "window=0"], ["window", "0"]),
            ([*start, "width=33"], ["width 33", "multiple"]),
            ([*start, 'cameras={"rgb_static":33}'], ["rgb_static", "33"]),
            ([*start, 'cameras={"rgb_tactile":32}'], ["rgb_tactile", "rgb_static"]),
            ([*start, "--batch", 5, "--accumulate", 2], ["--batch 5", "multiple of 2"]),
            ([*start, "--log-every", 0], ["--log-every", "0"]),
            ([*start, "--epochs", -1], ["--epochs", "at least 0"]),
            ([*start, "--lr", -1], ["--lr", "at least 0", "-1"]),
            ([*start, "--beta2", 1], ["--beta2", "below 1"]),
            ([*start, "--weight-decay", -0.5], ["--weight-decay", "at least 0", "-0.5"]),
            ([*start, "--seed", -1], ["--seed", "at least 0", "-1"]),
            ([*start, "--eye-noise", -0.1], ["--eye-noise", "at least 0", "-0.1"]),
            ([*start, "--reword", 1.5], ["--reword", "at most 1", "1.5"]),
            ([*start, "--shift", -0.5], ["--shift", "at least 0", "-0.5"]),
            ([*start, "--clip-grad", 0], ["--clip-grad", "above 0"]),
            ([*start, "stage=1"], ["stage"]),
            ([*start, "name=1"], ["name"]),
            ([*start, "--bench", "--estimate"], ["--bench", "--estimate"]),
            ([*start, "--data-fraction", 1.5], ["--data-fraction", "1.5"]),
            ([*start, "--precision", "fp17"], ["fp17", "bf16"]),
            ([*start, "width=64", "--init", checkpoints / "pretrain"], ["another shape", "pretrain"]),
            ([*start, "--init", video], ["videos", "no such file"]),
            (["sample.py", "--checkpoint", raw], ["raw CALVIN", "prepare_calvin.py"]),
            (["eval_calvin.py", "--checkpoint", robot], ["packed already", "--data"]),
            (["model.py", "--preset", "grl"], ["grl", "gr1", "tiny"]),
            (["-m nanogr.worlds.tabletop", "--make", "videos"], ["--out"]),
            (["-m nanogr.worlds.tabletop", "--scenes", "AX"], ["--scenes", "ABCD"]),
            ([*judge, "--policy", "noop", "--episodes", 0], ["nothing to play"]),
            ([*judge, "--workers", 0], ["--workers", "1 or more"]),
            ([*judge, "--language", "unseen"], ["--language", "calvin"]),
            ([*judge, "--env", "calvin", "--scene", "A"], ["scene D"]),
            (["eval_calvin.py", "--merge", out], ["episodes.jsonl", "not there"]),
            (["record_calvin.py"], ["--out"]),
            (["record_calvin.py", "--out", out, "--tasks", "open_draw"], ["open_draw", "open_drawer"]),
            (["record_calvin.py", "--out", out, "--scenes", "E"], ["--scenes", "ABCD"]),
            (["record_calvin.py", "--out", out, "--sessions", 401], ["--sessions", "400"]),
            (["record_calvin.py", "--out", out, "--play", 1], ["--play 1", "another task ends"]),
            (["record_calvin.py", "--out", out, "--drags", 2], ["--drags", "below 1"]),
            (["record_calvin.py", "--out", out, "--drags", 0.1, "--format", "calvin"], ["--actions meant"]),
            (["record_calvin.py", "--out", out, "--policy", out, "--actions", "executed"],
             ["--actions meant"]),
            (["record_calvin.py", "--out", out, "--policy", checkpoints / "pretrain"], ["finetune"]),
            (["record_calvin.py", "--out", out, "--policy", checkpoints / "finetune", "--stride", 3],
             ["--stride 3", "looks every 1"]),
            (["record_calvin.py", "--measure", "--policy", out], ["recording alone"]),
            ([*judge, "--seed", -1], ["--seed", "0 or more"]),
            ([*look, "--instruction", " "], ["instruction", "empty"]),
            ([*judge, "--checkpoint", tmp_path / "nowhere"], ["nowhere", "train.py"]),
            ([*judge, "--checkpoint", checkpoints / "pretrain"], ["finetune"]),
            ([*judge, "--checkpoint", damaged], ["model.safetensors"]),
            ([*look, "--checkpoint", tmp_path / "nowhere"], ["nowhere", "train.py"]),
            ([*look, "--checkpoint", checkpoints / "pretrain"], ["finetune"])):
        assert fails_in_one_line(*command, words=words)
    assert not (out / "model.safetensors").exists()


def our_imports(path, top=False):
    """Names of modules and of what is taken from them that a file imports; top: not inside functions."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top else ast.walk(tree)
    return {name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
            for name in ([f"{node.module}.{alias.name}", node.module] if isinstance(node, ast.ImportFrom)
                         else [alias.name])}


def our_files():
    """{module name: path} of all but tests and the course."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("nanogr/**/*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in files}
    return {name: path for name, path in names.items() if name not in ("test_model", "conftest")}


def test_no_file_imports_a_script_or_in_a_circle():
    """Catches parts that others need but that live in a script; imports in a circle, in functions too."""
    files, scripts = our_files(), {"train", "sample", "eval_calvin", "record_calvin", "prepare_calvin",
                                   "prepare_ego4d"}
    uses = {name: our_imports(path) & set(files) for name, path in files.items()}
    uses["train"].discard("nanogr.bench")                # which times train.py's very step
    for name, used in uses.items():
        assert used & scripts <= ({"train"} if name == "nanogr.bench" else set()), name
    while leaves := {name for name, used in uses.items() if not used}:
        uses = {name: used - leaves for name, used in uses.items() if used}
    assert not uses, f"a circle among {sorted(uses)}"


def test_the_house():
    """Catches model.py growing beyond one sitting, or reaching for other files; lines too long to read."""
    model = ROOT / "model.py"
    assert len(model.read_text().splitlines()) <= 650
    forward = next(node for node in ast.walk(ast.parse(model.read_text()))
                   if isinstance(node, ast.ClassDef) and node.name == "GR1")
    forward = next(node for node in forward.body if getattr(node, "name", "") == "forward")
    assert forward.end_lineno - forward.lineno + 1 <= 25
    assert not {name for name in our_imports(model, top=True) if name in our_files()}
    assert {name for name in our_imports(model) if name in our_files()} == {
        "nanogr", "nanogr.encoders", "nanogr.weights"}
    assert {node.name for node in ast.walk(ast.parse(model.read_text())) if isinstance(node, ast.FunctionDef)
            and any(isinstance(x, (ast.Import, ast.ImportFrom)) for x in ast.walk(node))} == {
        "from_pretrained", "main"}                       # to read files, and to count parameters
    for path in [*ROOT.glob("*.py"), *ROOT.glob("nanogr/**/*.py"), *ROOT.glob("tests/*.py"),
                 *ROOT.glob("course/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path}:{number}"
