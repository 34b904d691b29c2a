"""gr2.py, and what train.py, sample.py and nanogr/policy.py do otherwise for it: what changes from GR-1."""
import math

import numpy as np
import pytest
import torch

import gr2
import model as gr1
import train
from nanogr import clips, policy, tokenizer, weights
from nanogr.encoders import HashText
from tests.helpers import (CAMERAS, fails_in_one_line, golden_file, read_log, refused, run, same, small_model,
                           small_tokenizer, training)

CODES = dict(rgb_static=16, rgb_gripper=4)               # of a picture of 32 and 16 px
SIZES = dict(window=3, stride=2, width=32, layers=2, heads=4, dropout=0.0, text_dim=16, head_width=32,
             decoder_depth=1, decoder_heads=4, act_width=16, act_depth=1, act_heads=2, latent=3, chunk=4)


def small_config(**changes):
    cameras = dict(rgb_static=32, rgb_gripper=16)
    return gr2.preset_config("gr2-tiny", **dict(cameras=cameras) | SIZES | changes)


def small_gr2(**changes):
    return gr2.GR2(small_config(**changes), small_tokenizer(), HashText(16)).eval()


def random_codes(config, batch=2, steps=None):
    rng, steps = torch.Generator().manual_seed(0), steps or config.window
    codes = {camera: torch.randint(1000, (batch, steps, CODES[camera]), generator=rng)
             for camera in config.cameras}
    return codes, [f"do {i}" for i in range(batch)], torch.randn(batch, steps, 15, generator=rng)


def random_actions(config, batch=2):
    actions = torch.rand(batch, config.window, config.chunk, 7) - 0.5
    noise = torch.randn(batch, config.window, config.latent)
    return actions, torch.ones(actions.shape[:3], dtype=torch.bool), noise


def test_sizes_are_the_papers():
    """Catches a matrix too many: the four sizes would not be those of the paper any more."""
    table = {}
    with torch.device("meta"):
        vqgan = tokenizer.VQGAN()
        for name in ("gr2-s", "gr2-b", "gr2-l", "gr2-xl"):
            for stage in ("pretrain", "finetune"):
                model = gr2.GR2(gr2.preset_config(name, stage), vqgan, torch.nn.Identity())
                table[name, stage] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [round(table[name, "pretrain"] / 1e6) for name in ("gr2-s", "gr2-b", "gr2-l", "gr2-xl")] == [
        30, 95, 312, 719]
    assert [round(table[name, "finetune"] / 1e5) for name in ("gr2-s", "gr2-b")] == [323, 976]
    count = lambda stage: [row[:2] for row in gr2.token_table(gr2.preset_config("gr2-tiny", stage))]
    assert count("pretrain") == [("language", 1), ("rgb_static codes", 16), ("[OBS] rgb_static", 16)]
    assert count("finetune") == [
        ("language", 1), ("state", 1), ("rgb_static codes", 16), ("rgb_gripper codes", 4), ("[ACT]", 1),
        ("[OBS] rgb_static", 16), ("[OBS] rgb_gripper", 4)]
    pretrain, finetune = (gr2.preset_config("gr2-tiny", stage) for stage in ("pretrain", "finetune"))
    assert (pretrain.stride, finetune.stride, list(pretrain.cameras)) == (1, 3, ["rgb_static"])
    status, text = run("gr2.py", "--preset", "gr2-tiny")
    assert status == 0 and "[OBS] rgb_gripper" in text and "action_head" in text
    assert refused("did you mean 'merge'", gr2.preset_config, "gr2-tiny", marge=1)
    assert refused("does not divide", gr2.preset_config, "gr2-tiny", merge=3)
    assert refused("--model codes=1000", gr2.GR2, small_config(codes=1024), tokenizer.TinyTokenizer(), None)


def test_cells_are_merged_as_neighbours():
    """Catches cells that are merged along a row alone, or transposed on the way back."""
    x = torch.arange(16)[None, :, None]                  # 4 x 4 cells
    assert gr2.merge_cells(x, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    x = torch.randn(3, 36, 5)
    assert torch.equal(gr2.unmerge_cells(gr2.merge_cells(x, 3), 3), x)
    assert torch.equal(gr2.merge_cells(x, 1), x)
    model = small_gr2()
    codes, *_ = random_codes(model.config)
    flat = {camera: x[:, 0] for camera, x in codes.items()}
    before = model.encode_images(flat)
    flat["rgb_static"][:, 6] += 1                        # row 1, column 2: the second of four tokens
    changed = (model.encode_images(flat) != before).any(-1)
    assert changed.tolist() == [[False, True, False, False, False]] * 2


@pytest.mark.parametrize("gate", [True, False])
def test_gr2_future_does_not_leak(gate):
    """Catches a later frame or state that changes an earlier answer; an action that changes a picture, or any
    chunk but its own.
    """
    model = small_gr2(copy_gate=gate)
    for key in [*CAMERAS, "robot_obs"]:
        codes, sentences, robot_obs = random_codes(model.config)
        before = model(codes, sentences, robot_obs)
        changed = robot_obs if key == "robot_obs" else codes[key]
        changed[:, 1] = (changed[:, 1] + 7) % 1000
        after = model(codes, sentences, robot_obs)
        for name in before:
            assert same(before[name][:, :1], after[name][:, :1]), (key, name)
            assert all(not same(before[name][:, t], after[name][:, t]) for t in (1, 2)), (key, name)
    model.train()
    codes, sentences, robot_obs = random_codes(model.config)
    actions, is_known, noise = random_actions(model.config)
    before = model(codes, sentences, robot_obs, actions=actions, is_known=is_known, noise=noise)
    actions[0, 1, 2] += 1
    after = model(codes, sentences, robot_obs, actions=actions, is_known=is_known, noise=noise)
    for name in ("arm", "gripper", "kl"):
        differs = (before[name] - after[name]).abs().flatten(2).amax(2) if before[name].dim() > 2 else (
            before[name] - after[name]).abs()
        assert (differs > 1e-6).tolist() == [[False, True, False], [False] * 3], name
    assert all(torch.equal(before[name], after[name]) for name in (*CAMERAS, "arm_mean"))


def test_judged_and_acting_without_the_answers():
    """Catches a posterior that is used when the model is judged: great losses, no policy."""
    model = small_gr2()
    inputs, given = random_codes(model.config), random_actions(model.config)
    plain = model(*inputs)
    informed = model(*inputs, actions=given[0], is_known=given[1], noise=given[2])
    assert plain.keys() == informed.keys() and all(torch.equal(plain[name], informed[name]) for name in plain)
    model.train()
    learning = model(*inputs, actions=given[0], is_known=given[1], noise=given[2])
    assert same(learning["arm_mean"], plain["arm"]) and not same(learning["arm"], plain["arm"])
    del model.action_head.encoder, model.action_head.embed_actions, model.action_head.posterior
    assert same(model.eval()(*inputs)["arm"], plain["arm"])
    assert {"kl", "arm_mean"} & small_gr2(latent=0).train()(*inputs).keys() == set()


def test_the_latents_cost_by_hand():
    """Catches another KL; actions that nobody knows, as zeros: they would count as standing still."""
    model = small_gr2().train()
    config, head = model.config, model.action_head
    actions, is_known, noise = random_actions(config)
    is_known[0, 2, 2:] = False
    is_known[1, 2] = False
    mean, log_variance = head.encode(actions, is_known)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    codes, sentences, robot_obs = random_codes(config, steps=4)
    seen = {camera: x[:, :3] for camera, x in codes.items()}
    batch = dict(rel_actions=actions, action_mask=is_known, future_mask=torch.ones(2, 3, dtype=torch.bool),
                 video_at=torch.tensor([2]))

    def named():
        out = model(seen, sentences, robot_obs[:, :3], video_at=batch["video_at"], actions=actions,
                    is_known=is_known, noise=noise)
        assert same(out["kl"], wanted, 1e-5)
        return gr2.losses(out, batch, codes, config), out
    before, out = named()
    assert same(before["kl"], (wanted * is_known.sum(-1)).sum() / is_known.sum(), 1e-5)
    target = codes["rgb_static"][:, 3]
    logp = out["rgb_static"][:, 0].log_softmax(-1).gather(-1, target[..., None])
    assert same(before["rgb_static"], -logp.mean(), 1e-5)
    actions[~is_known] = 99.0
    after, _ = named()
    assert all(same(before[name], after[name]) for name in before) and before.keys() == after.keys()
    total = gr1.total_loss(before, 100, 1, 0.3, kl=2, arm_mean=0)
    parts = 100 * before["arm"] + before["gripper"] + 2 * before["kl"] + 0.3 * sum(before[c] for c in CAMERAS)
    assert same(total, parts, 1e-5)


def test_copy_gate_and_unknown_states():
    """Catches a gate that favours another place's code; a hidden state that still tells something."""
    model = small_gr2()
    codes, sentences, robot_obs = random_codes(model.config)
    before = model(codes, sentences, robot_obs)
    model.video_head.stays.bias.data += 50.0
    after = model(codes, sentences, robot_obs)
    assert all(torch.equal(after[camera].argmax(-1), codes[camera]) for camera in CAMERAS)
    assert not torch.equal(before["rgb_static"].argmax(-1), codes["rgb_static"])
    hidden = robot_obs.clone()
    hidden[0] = math.nan
    first = model(codes, sentences, hidden)
    hidden[0, :, 1:] = 5.0
    second = model(codes, sentences, hidden)
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
    assert not same(first["arm"][0], after["arm"][0]) and same(first["arm"][1], after["arm"][1])


def watch(model, steps, **options):
    """A policy's observations, sentences, actions and raw chunks, across a reset and a new sentence."""
    acting, rng, rows = policy.Policy(model, **options), np.random.default_rng(0), []
    for step in range(steps):
        if step == 11:
            acting.reset()
        seen = dict(rgb_static=rng.integers(0, 256, (32, 32, 3), np.uint8),
                    rgb_gripper=rng.integers(0, 256, (16, 16, 3), np.uint8), robot_obs=rng.normal(size=15))
        sentence = "open the drawer" if step < 17 else "lift the block"
        rows.append((seen, sentence, acting.step(seen, sentence), acting.predicted_frames()))
    return rows


def chunks(model, rows):
    """What a full forward over the window says at each step: arm (k, 6), gripper (k,), drawn frames."""
    found, stride, T = [], model.config.stride, model.config.window
    for t in range(len(rows)):
        begin = 11 if t >= 11 else 0
        at = list(range(t, begin - 1, -stride))[:T][::-1]
        frames = {c: torch.tensor(np.stack([rows[i][0][c] for i in at])).permute(0, 3, 1, 2) for c in CAMERAS}
        pixels = {c: gr1.to_pixels(x, model.config.cameras[c])[None] for c, x in frames.items()}
        states = torch.tensor(np.stack([rows[i][0]["robot_obs"] for i in at]), dtype=torch.float32)[None]
        with torch.no_grad():
            out = model(pixels, [rows[t][1]], states)
        drawn = {c: policy.to_images(model.draw(out[c])[0, -1]).numpy() for c in CAMERAS}
        found.append((out["arm"][0, -1].numpy(), out["gripper"][0, -1].numpy(), drawn))
    return found


@pytest.mark.parametrize("execute", [1, 2, 4])
def test_gr2_policy_equals_the_full_forward(execute):
    """Catches frames of the wrong stride, and a plan that outlives a reset or a new sentence."""
    model = small_gr2()
    rows = watch(model, 24, execute=execute)
    full, since = chunks(model, rows), 0
    for t, (_, _, action, drawn) in enumerate(rows):
        since = 0 if t in (11, 17) or since == execute else since
        arm, gripper, frames = full[t - since]
        assert np.abs(action[:6] - arm[since]).max() < 1e-5 and action[6] == np.sign(gripper[since]), t
        looked = t - since if execute == model.config.stride else t      # then not at what lies between
        for camera in CAMERAS:
            assert (drawn[camera] == full[looked][2][camera]).mean() > 0.99, t
        since += 1
    assert refused("from 1 to the 4", policy.Policy, model, execute=5)
    assert refused("leave execute at 1", policy.Policy, model, execute=2, ensemble=0.1)
    for model in small_gr2(latent=0), small_model():
        assert refused("no latent", policy.Policy, model, sample_z=True)


def test_ensemble_is_the_plain_mean():
    """Catches newest and oldest swapped in the weights, and chunks of before a reset or another sentence."""
    model = small_gr2()
    rows = watch(model, 24, ensemble=0.5)
    full = chunks(model, rows)
    for t, (_, _, action, _) in enumerate(rows):
        begin = max(0 if t < 11 else 11 if t < 17 else 17, t - model.config.chunk + 1)
        arm, gripper, total = np.zeros(6), 0, 0
        for i, s in enumerate(range(begin, t + 1)):      # from the oldest chunk that has an action for t
            weight = math.exp(-0.5 * i)
            arm, gripper = arm + weight * full[s][0][t - s], gripper + weight * full[s][1][t - s]
            total += weight
        assert np.abs(action[:6] - arm / total).max() < 1e-5 and action[6] == np.sign(gripper), t


def test_a_drawn_latent_acts_otherwise():
    """Catches --sample-z that draws nothing."""
    model = small_gr2()
    a, b, mean = (np.stack([row[2] for row in watch(model, 3, sample_z=z)]) for z in (True, True, False))
    assert not np.allclose(a, b) and not np.allclose(a, mean)


def test_stride_is_the_same_everywhere(tmp_path):
    """Catches an off-by-one between Windows, the policy and roll_out: the target of a window's last step must
    be the frame that acting, or imagining, feeds in next.
    """
    with clips.ShardWriter(tmp_path, 0, ["rgb_static"]) as shard:
        gray = np.arange(30, dtype=np.uint8)[:, None, None, None]
        shard.add(dict(rgb_static=np.broadcast_to(gray, (30, 16, 16, 3))), "count")
    clips.write_meta(tmp_path, "test", 3, "pytest")
    data, seen = clips.Clips(tmp_path), set()
    for W in 1, 3:
        windows = clips.Windows(data, [0], 6, 3, 1, ["rgb_static"], per_clip=W, stride=4)
        for step in range(20):
            batch = windows[step]
            frames = batch["frames"]["rgb_static"][:, :, 0, 0, 0].int()
            at = batch["frame_at"] if W > 1 else torch.arange(18).view(6, 3)
            now = (frames[:, :-1].flatten()[at] if W > 1 else frames[:, :3])
            future = (frames[:, 1:].flatten()[at] if W > 1 else frames[:, 1:])
            assert (now[:, 1:] - now[:, :-1] == 4).all() and batch["mask"].all()
            true = batch["future_mask"]
            assert (future - now == 4)[true].all() and torch.equal(true, now + 4 < 30)
            seen |= set(now[:, 0].tolist())
    assert {0, 21} <= seen and max(seen) == 21           # 21 + 2 * 4 is the clip's last frame


def test_rolled_out_is_fed_in_again():
    """Catches teacher forcing in the sheet: true frames where imagined ones should be; a state that tells."""
    model = small_gr2(window=2)
    codes, *_ = random_codes(model.config, batch=1, steps=3)
    seen = {camera: x[0] for camera, x in codes.items()}
    found = gr2.roll_out(model, seen, "do it", 2)
    nan = torch.full((1, 2, 15), math.nan)
    with torch.no_grad():
        first = model({c: x[None, 1:] for c, x in seen.items()}, ["do it"], nan)
        one = {c: first[c][0, -1].argmax(-1) for c in seen}
        again = {c: torch.stack([seen[c][2], one[c]])[None] for c in seen}
        two = {c: model(again, ["do it"], nan)[c][0, -1].argmax(-1) for c in seen}
    for camera in CAMERAS:
        assert torch.equal(found[camera], torch.stack([one[camera], two[camera]]))
        drawn = policy.pictures(model, {c: first[c][:, -1:] for c in seen}, {})[camera]
        assert same(model.vision.decode(found[camera][:1]), drawn[0], 1e-5)
    logits = torch.tensor([[0.0, 9.0, 8.0], [5.0, 0.0, 0.0]])
    assert gr2.choose(logits, 0, 100).tolist() == [1, 0]
    drawn = torch.stack([gr2.choose(logits, 1.0, 2) for _ in range(50)])
    assert set(drawn[:, 0].tolist()) == {1, 2} and drawn[:, 1].unique().tolist()[0] == 0


def gr2_run(stage, data, out, *more):
    sizes = {key: value for key, value in SIZES.items() if stage == "finetune" or key != "stride"}
    return ["train.py", "--stage", stage, "--preset", "gr2-tiny", "--data", data, "--out", out, "--steps", 4,
            "--batch", 4, "--eval-every", 2, "--eval-batches", 1, "--log-every", 1, *more, "--model",
            *(f"{key}={value}" for key, value in sizes.items())]


@pytest.fixture(scope="module")
def trained(tabletop_data, tmp_path_factory):
    """A folder with a tokenizer, tok/, and a run of each stage: pre/ and one/, which started from it."""
    folder = tmp_path_factory.mktemp("gr2")
    tokenizer.save_tokenizer(small_tokenizer(), folder / "tok")
    tok = "--tokenizer", folder / "tok"
    for command in (gr2_run("pretrain", tabletop_data / "videos", folder / "pre", *tok),
                    gr2_run("finetune", tabletop_data / "demonstrations", folder / "one", *tok, "--init",
                            folder / "pre")):
        status, text = run(*command)
        assert status == 0, text
    anew = text.split("until trained")[1].split("\n")[0]
    assert "trunk" not in anew and "video_head" not in anew and all(part in anew for part in (
        "no_state", "action_head", "camera.rgb_gripper", "query_obs.rgb_gripper")), text
    return folder


def test_noise_is_the_steps_own(trained, tabletop_data, tmp_path, monkeypatch):
    """Catches noise that depends on the pass or process that uses it; a resumed run with other noise."""
    command = lambda name, *more: gr2_run("finetune", tabletop_data / "demonstrations", tmp_path / name,
                                          "--tokenizer", trained / "tok", "--init", trained / "pre", *more)
    assert run(*command("two", "--accumulate", 2))[0] == 0
    for key in "arm", "kl", "rgb_static", "val/arm", "grad_norm":
        one, two = (read_log(out, key) for out in (trained / "one", tmp_path / "two"))
        assert one and all(abs(two[step] - one[step]) < 1e-4 * abs(one[step]) + 1e-5 for step in one), key
    read = clips.Windows.__getitem__
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(clips.Windows, "__getitem__", lambda *at: read(*at) if at[1][0] < 3 else 1 / 0)
        run(*command("cut"))
    status, text = run(*command("cut", "--resume"))
    assert status == 0 and "at step 2" in text, text
    straight, resumed = (weights.read_weights(folder / "model.safetensors")
                         for folder in (trained / "one", tmp_path / "cut"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight | resumed)


def test_codes_on_the_disk_are_the_frames(trained, tabletop_data):
    """Catches a run on stale codes, or of other frames: its losses must be those of codes made as it goes."""
    model, data = gr2.load(trained / "one"), clips.Clips(tabletop_data / "demonstrations")
    fly, disk = (clips.Windows(data, [0, 1, 2], 4, 3, 1, CAMERAS, 4, stride=2, fingerprint=mark)[0]
                 for mark in ("", model.vision.fingerprint))
    seen = [train.take_in(batch, model) for batch in (fly, disk)]
    assert all(torch.equal(seen[0][camera], seen[1][camera].long()) for camera in CAMERAS)
    assert len(seen[0]["rgb_static"].unique()) > 4
    before, after = (gr2.losses(train.predict(model, model.config, fly, x), fly, x, model.config)
                     for x in seen)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_scripts_know_gr2(trained, tabletop_data, tmp_path, monkeypatch):
    """Catches a script that takes a GR-2 for a GR-1, or a checkpoint whose tokenizer stayed behind."""
    monkeypatch.chdir(tmp_path)
    demos = tabletop_data / "demonstrations"
    status, text = run("sample.py", "--checkpoint", trained / "one", "--roll-out", 2, "--data", demos,
                       "--episodes", 2, "--out", tmp_path / "rolled")
    assert status == 0 and "after 2" in text and len(list((tmp_path / "rolled").glob("*.png"))) == 2, text
    status, text = run("sample.py", "--checkpoint", trained / "one", "--show-predictions", "--episodes", 1,
                       "--out", tmp_path / "shown")
    assert status == 0 and "all cameras" in text, text
    flags = ["--episodes", 1, "--chains", 1, "--steps", 3, "--tasks", "open_drawer", "--workers", 1]
    status, text = run("eval_calvin.py", "--checkpoint", trained / "one", *flags, "--execute", 2,
                       "--sample-z", "--tokenizer", trained / "tok", "--out", tmp_path / "eval")
    report = (tmp_path / "eval/report.md").read_text()
    assert status == 0 and "actions executed of a chunk" in report and "latent" in report, text
    assert run("eval_calvin.py", "--policy", "untrained", "--preset", "gr2-tiny", *flags, "--out",
               tmp_path / "untrained")[0] == 0
    tokenizer.save_tokenizer(small_tokenizer(1), tmp_path / "other")
    other = gr2_run("finetune", demos, tmp_path / "x", "--tokenizer", tmp_path / "other", "--init",
                    trained / "pre")
    assert fails_in_one_line(*other, words=["was trained on codes of the tokenizer"])
    # without --tokenizer: the one of --init
    assert run(*gr2_run("finetune", demos, tmp_path / "y", "--init", trained / "pre"))[0] == 0
    before = clips.codes_path(demos, 0).read_bytes()
    other = gr2_run("finetune", demos, tmp_path / "y", "--tokenizer", tmp_path / "other", "--resume")
    assert fails_in_one_line(*other, words=["was trained on codes of the tokenizer"])
    assert clips.codes_path(demos, 0).read_bytes() == before                 # and not overwritten
    official, _ = golden_file(tmp_path / "official.pt")
    theirs = gr2_run("finetune", demos, tmp_path / "z", "--tokenizer", trained / "tok", "--init", official)
    assert fails_in_one_line(*theirs, words=["the authors' GR-1", "GR-2 cannot start"])
    assert fails_in_one_line(*gr2_run("finetune", demos, tmp_path / "z"), words=["no tokenizer in out"])
    gr1_run = training("finetune", demos, tmp_path / "x")
    gr1_run[gr1_run.index("none")] = trained / "pre"
    assert fails_in_one_line(*gr1_run, words=["is a checkpoint of another model"])
    assert fails_in_one_line("train.py", "--preset", "gr2-b", "--data", demos, words=["needs --tokenizer"])
    assert fails_in_one_line("train.py", "--preset", "gr2", words=["did you mean 'gr2-"])
    finetuned = ["sample.py", "--roll-out", 2, "--data", demos, "--checkpoint"]
    assert fails_in_one_line(*finetuned, tmp_path / "nothing", words=["no checkpoint"])
