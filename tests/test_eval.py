"""eval_calvin.py: chains, baselines, one model for many worlds, runs that are killed or parted."""
import json
import os
import signal
from unittest import mock

import numpy as np
import pytest

import eval_calvin
from nanogr import common, policy
from nanogr.worlds import tabletop
from tests.helpers import CAMERAS, eval_settings, fails_in_one_line, refused, run, small_model


def test_chain_stops_at_the_first_failure(monkeypatch):
    """Catches a chain that goes on after a failure or counts what came later; 0 +- 0 for 0 of 20."""
    for answers, length in (([5, 3, None, 4, 4], 2), ([None] * 5, 0), ([1] * 5, 5)):
        asked = iter(answers)
        monkeypatch.setattr(eval_calvin, "follow", lambda *_: next(asked))
        result = eval_calvin.play_chain(tabletop.Tabletop("D", 0), None, eval_settings(), 7)
        assert result["length"] == length and result["steps"] == answers[:length + 1]
        assert len(list(asked)) == 5 - len(result["steps"])
    chains = [dict(kind="chain", length=length, tasks=["a", "b"], steps=[4, None]) for length in (0, 2, 5, 5)]
    figures = eval_calvin.summarise(chains)
    assert figures["chains"]["average_length"] == 3
    assert figures["chains"]["in_a_row"] == [0.75, 0.75, 0.5, 0.5, 0.5]
    assert figures["tasks"]["a"]["successes"] == figures["tasks"]["b"]["episodes"] == 4
    assert figures["tasks"]["a"]["steps"] == 4 and figures["tasks"]["b"]["rate"] == 0
    for successes, n, low, high in (8, 10, 0.4902, 0.9433), (0, 20, 0, 0.1611), (20, 20, 0.8389, 1):
        assert np.allclose(eval_calvin.wilson(successes, n), (low, high), atol=1e-4)


def test_the_scripted_expert_passes():
    """Catches an evaluation that nobody can pass: wrong starts, resets amid a chain, a late oracle."""
    args, expert = eval_settings(), eval_calvin.load_policy(mock.Mock(policy="scripted", seed=0, serve=False))
    worlds = [tabletop.Tabletop("D", seed) for seed in range(4)]
    chains = [eval_calvin.play_chain(world, expert, args, seed) for seed, world in enumerate(worlds)]
    assert sum(chain["length"] for chain in chains) >= 18
    singles = [eval_calvin.play_single(worlds[0], expert, args, task, 3) for task in tabletop.TASKS]
    assert sum(episode["steps"] is not None for episode in singles) >= len(singles) - 1


def test_doing_nothing_scores_nothing(tmp_path):
    """Catches an oracle that is satisfied with the state it started from, and episodes that go missing."""
    status, text = run("eval_calvin.py", "--policy", "noop", "--episodes", 1, "--chains", 2, "--workers", 1,
                       "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0 and (tmp_path / "report.md").read_text() in text and "PARTIAL" not in text
    assert len(report["episodes"]) == len(tabletop.TASKS) + 2 and report["chains"]["n"] == 2
    assert report["single"]["mean"] == report["chains"]["average_length"] == 0
    assert all(result["successes"] == 0 and result["episodes"] == 1 for result in report["tasks"].values())


@pytest.mark.parametrize("served", [False, True])
def test_what_nobody_looks_at_is_not_drawn(served):
    """Catches pictures drawn between a policy's timesteps, and a policy that gets none when it looks."""
    model, drawn, seen = small_model(stride=3, chunk=4), [], []
    acting = policy.Policy(model, execute=3)
    if served:
        server, asked = eval_calvin.Server(acting), []
        pipe = mock.Mock(send=lambda question: asked.append(("me", *question)),
                         recv=lambda: server.answers([asked.pop()])[0][1])
        acting = eval_calvin.Remote(pipe)

    class World(tabletop.Tabletop):
        def observe(self, render=True):
            found = super().observe(render)
            drawn.append("rgb_static" in found)
            return found

    step = acting.step
    acting.step = lambda observation, sentence: (seen.append("rgb_static" in observation),
                                                 step(observation, sentence))[1]
    world, looked = World("D", 0), [1, 0, 0, 1, 0, 0, 1, 0]
    for film in None, []:
        world.reset()
        drawn.clear(), seen.clear()
        assert eval_calvin.follow(world, acting, "open_drawer", "do nothing", 8, film) is None
        assert seen == looked and drawn == looked + [0] and world.look
    assert [caption for caption, _ in film] == ["do nothing, step 1", "do nothing, step 5"]


def test_an_episode_depends_on_its_seed_alone():
    """Catches a report that depends on the number of workers, or a control that gives the right sentence."""
    def play(name, *jobs):
        args = eval_settings(policy=name, seed=5)
        policy = eval_calvin.load_policy(args)
        results = [eval_calvin.play(job, tabletop.Tabletop("D", job[2]), policy, args) for job in jobs]
        return results[-1] | dict(seconds=None), policy.rng.bit_generator.state

    first, second = ("single", "open_drawer", 5), ("chain", None, 9)
    for name in "random", "scripted":
        assert play(name, second) == play(name, first, second), name
    for task, seed in ((task, seed) for task in tabletop.TASKS for seed in range(20)):
        right, wrong, again = (eval_calvin.instruction(task, seed, eval_settings(shuffle_language=shuffle))
                               for shuffle in (False, True, True))
        assert right in tabletop.TASKS[task] and wrong not in tabletop.TASKS[task] and wrong == again


def test_one_model_serves_many_worlds():
    """Catches histories that get mixed up, or a batch that acts otherwise than each policy alone."""
    model, rng = small_model(), np.random.default_rng(0)
    alone, together = ([policy.Policy(model) for _ in range(3)] for _ in range(2))
    for t in range(7):
        who = [i for i in range(3) if t >= i and rng.random() < 0.8]                  # of different ages
        seen = [dict({c: rng.integers(256, size=(32, 32, 3), dtype=np.uint8) for c in CAMERAS},
                     robot_obs=rng.normal(size=15)) for _ in who]
        sentences = [f"do {i} {t // 4}" for i in who]
        apart = [alone[i].step(o, text) for i, o, text in zip(who, seen, sentences)]
        if who:
            chunks = policy.act_together([together[i] for i in who], seen, sentences)
            actions = [policy.to_action(arm[0], gripper[0]) for arm, gripper in zip(*chunks)]
            assert np.allclose(actions, apart, atol=1e-5)
            images = [list(policies[who[0]].predicted_frames().values()) for policies in (alone, together)]
            assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(*images))


def test_killed_and_sharded_runs_give_the_straight_report(tmp_path, monkeypatch):
    """Catches episodes lost or played twice by --resume and --merge, a part that passes for the whole."""
    def judge(out, *more):
        status, text = run("eval_calvin.py", *more, "--out", tmp_path / out)
        assert status == 0, text
        return json.loads((tmp_path / out / "report.json").read_text())

    def figures(report):
        timed = ("timing", "seconds, by part", "steps a second of a process")
        episodes = [episode | dict(seconds=None) for episode in report["episodes"]]
        return {key: value for key, value in report.items() if key not in timed} | dict(episodes=episodes)

    play = ["--policy", "random", "--episodes", 0, "--chains", 5, "--workers", 1]
    straight = judge("straight", *play)
    path = tmp_path / "straight/episodes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])                  # killed while it wrote a line
    assert figures(judge("straight", *play, "--resume")) == figures(straight)
    assert len(path.read_bytes().splitlines()) == 6
    parts = [judge(f"part{i}", *play, "--shard", f"{i}/2") for i in (1, 2)]
    assert all(part["title"].startswith("PARTIAL") for part in parts)
    directories = [tmp_path / "part1", tmp_path / "part2"]
    assert figures(judge("all", "--merge", *directories)) == figures(straight)
    assert judge("one", "--merge", directories[0])["title"].startswith("PARTIAL (3 of 5")
    assert figures(judge("again", "--merge", tmp_path / "all")) == figures(straight)       # a merge is a run
    assert fails_in_one_line("eval_calvin.py", "--merge", directories[0], "--out", directories[1],
                             words=["part2", "episodes that these don't"])
    judge("other", *play, "--seed", 3)
    assert fails_in_one_line("eval_calvin.py", "--merge", *directories, "--out", tmp_path / "other",
                             words=["other was begun with", "seed 3"])
    (tmp_path / "other/episodes.jsonl").write_bytes(lines[0])              # killed in its first minute
    assert fails_in_one_line("eval_calvin.py", "--merge", tmp_path / "other", words=["no episode was"])
    out = ["--out", tmp_path / "no"]
    assert fails_in_one_line("eval_calvin.py", "--merge", *directories, directories[0], *out, words=["twice"])
    assert fails_in_one_line("eval_calvin.py", *play, "--seed", 3, "--resume", "--out", tmp_path / "all2",
                             "--shard", "3/2", words=["--shard", "3/2"])
    assert fails_in_one_line("eval_calvin.py", *play, "--seed", 3, "--resume", "--out", directories[0],
                             words=["part1", "seed 1000000, now 3"])
    assert not (tmp_path / "no").exists()


def says_one_thing_and_dies(connection, args):
    connection.send(("result", None))
    connection.recv()
    connection.send(("result", "the first chain's"))
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_played_is_lost(tmp_path, monkeypatch, capsys):
    """Catches a run that overwrites an earlier one, two that write one file, a result thrown away because the
    worker who sent it died next."""
    args, path = mock.Mock(out=tmp_path / "a", resume=False), tmp_path / "a/episodes.jsonl"
    said = dict(chains=2)
    _, file = eval_calvin.begin(args, said)
    file.write(eval_calvin.to_line(dict(kind="chain", seed=0)))
    file.close()
    first = path.read_bytes()
    (tmp_path / "a/model.safetensors").write_bytes(b"not evaluation's")
    results, file = eval_calvin.begin(args, said)                                      # --resume forgotten
    assert (tmp_path / "a/model.safetensors").exists()
    assert results == [] and (tmp_path / "a.1/episodes.jsonl").read_bytes() == first
    assert "--resume would have gone on" in capsys.readouterr().err
    for args.resume in False, True:
        assert refused("another run is writing", eval_calvin.begin, args, said)
    file.close()
    path.write_bytes(first + b'{"kind": "cha')                                         # killed amid a line
    results, file = eval_calvin.begin(args, said)
    file.close()
    assert results == [dict(kind="chain", seed=0)] and path.read_bytes() == first

    monkeypatch.setattr(eval_calvin, "work", says_one_thing_and_dies)
    results = []
    with pytest.raises(common.UserError, match="a worker died .exit status -9"):
        for result in eval_calvin.play_all(eval_settings(workers=1), [("chain", None, i) for i in (1, 2)]):
            results.append(result)
    assert results == ["the first chain's"]
