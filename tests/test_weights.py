"""nanogr/weights.py: files that come back, are refused, run no code; the authors' names."""
import dataclasses
import json
import pathlib
import pickle
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

import model as gr1
from nanogr import weights
from tests.helpers import (Bomb, CAMERAS, ROOT, Recorded, fails_in_one_line, golden_config, golden_file,
                           random_window, refused, run, same, small_model, training)


def test_ego4d_weights_of_the_authors(tmp_path, capsys):
    """Catches a start from Ego4D that drops or misplaces tensors, or does so without a word."""
    path, golden = golden_file(tmp_path / "pretrained.pt", "model.", **{
        "model.embed_goal_image.weight": torch.ones(3), "model.text_encoder.x": torch.ones(2)})
    state = torch.load(path, weights_only=True)["state_dict"]
    robot = ("embed_arm", "embed_gripper", "embed_state", "action_queries", "pred_", "embed_hand", "obs_hand")
    torch.save({"state_dict": {k: v for k, v in state.items() if not k[6:].startswith(robot)}}, path)
    model = gr1.GR1.from_pretrained(path, golden_config(), Recorded(), Recorded())
    said = capsys.readouterr().out
    assert "GR-MG" in said and "goal image" in said
    anew = said.split("random until trained")[1]
    assert all(part in anew for part in weights.finetuning_parts(golden_config().cameras))
    assert same(model.embed_language.weight, torch.tensor(golden["weight/embed_lang.weight"]))
    assert same(model.trunk.blocks[1].kv.weight.T,
                torch.tensor(golden["weight/transformer.h.1.attn.c_attn.weight"])[:, 32:])
    video = golden_config(cameras={"rgb_static": 32}, robot=False)
    gr1.GR1.from_pretrained(path, video, Recorded(), Recorded())
    assert capsys.readouterr().out.endswith("random until trained: trunk.unused_wte\n")


def test_bad_official_files(tmp_path):
    """Catches a file that is loaded by halves, runs code, or fails with a traceback."""
    config = golden_config()
    load = lambda path: gr1.GR1.from_pretrained(path, config, Recorded(), Recorded())
    path, bad = golden_file(tmp_path / "good.pt")[0], tmp_path / "bad.pt"
    bad.write_bytes(b"")
    assert refused("not a readable weights file", load, bad)
    bad.write_bytes(path.read_bytes()[:20_000])
    assert refused("not a readable weights file", load, bad)
    bad.write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
    assert refused("not a plain weights file", load, bad)
    torch.save(Bomb(tmp_path / "bang"), bad)
    assert refused("no weights file.*no tensor", load, bad) and not (tmp_path / "bang").exists()
    torch.save({"state_dict": {"layer1.weight": torch.ones(2)}}, bad)
    assert refused("no GR-1 checkpoint.*layer1.weight", load, bad)
    torch.save([1, 2], bad)
    assert refused("no weights file.*no tensor", load, bad)
    for name, tensor, words in (("embed_img.weight", torch.ones(32, 25), "another shape: embed_img.weight"),
                                ("embed_extra.weight", torch.ones(2), "no place for embed_extra.weight"),
                                ("transformer.h.7.ln_1.bias", torch.ones(32), "no place for transformer.h.7"),
                                ("decoder_pos_embed", torch.ones(1, 4, 32), "decoder_pos_embed")):
        golden_file(bad, **{name: tensor})
        assert refused(words, load, bad)
    state = torch.load(path, weights_only=True)["state_dict"]
    del state["decoder_embed.bias"]
    torch.save({"state_dict": state}, bad)
    assert refused("lacks video_head.embed.bias", load, bad)
    assert refused("no such file", load, tmp_path / "none.pt")
    bad.write_bytes(b"\x80\x02X\x01")
    assert refused("not a readable weights file", load, bad)


def test_the_authors_file_at_full_size(tmp_path):
    """Catches a tensor of the real model that is unknown, misplaced, lost or of another size."""
    lines = (ROOT / "tests/fixtures/official_keys.txt").read_text().splitlines()[2:]
    shapes = {name: tuple(map(int, shape.split("x"))) if shape else () for name, _, shape in
              (line.partition(" ") for line in lines)}
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    config = gr1.GR1Config()
    model = gr1.GR1(config, Recorded(), Recorded())
    state["decoder_pos_embed"] = model.video_head.positions_rgb_static[None].clone()
    torch.save({"state_dict": state}, tmp_path / "snapshot.pt")
    said = weights.load(model, weights.read_checkpoint(tmp_path / "snapshot.pt"), "snapshot.pt")
    left = sum(int(re.match(r"  left out (\d+)", line)[1]) for line in said.splitlines()[1:])
    assert "random" not in said and said.startswith(f"{len(state) - left} of the {len(state)} tensors")
    learned = {name: x for name, x in model.trained_state().items()}
    assert sum(x.numel() for x in learned.values()) == 45_988_039
    seen = {float(value) for x in learned.values() for value in x.flatten()[:1]}           # none came twice
    assert len(seen) == len(state) - left and all((x == x.flatten()[0]).all() for x in learned.values())


def test_checkpoints_come_back_or_are_refused(tmp_path):
    """Catches a checkpoint that lacks a tensor or a setting, strict=False, tracebacks for damaged files."""
    model, load = small_model(seed=1, chunk=3, action_activation=True), gr1.GR1.from_pretrained
    weights.save_checkpoint(tmp_path, model, step=7)
    loaded, inputs = load(tmp_path), random_window(model.config)
    assert loaded.config == model.config and not loaded.training
    assert weights.read_config(tmp_path)["step"] == 7
    answers, again = model(*inputs), loaded(*inputs)
    assert set(answers) == set(again) and all(torch.equal(answers[name], again[name]) for name in answers)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    tensors, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good = tensors.read_bytes(), config.read_text()
    for words, changes in ((r"another shape: .* is \(.*32", dict(width=64)),
                           ("no trunk.blocks.1", dict(layers=1)), ("lacks trunk.blocks.2", dict(layers=3))):
        assert refused(words, load, tmp_path, dataclasses.replace(model.config, **changes))
    for old, new, words in (("width", "widht", "did you mean 'width'"), ("32,", '"32",', "must be int"),
                            ("}", "", "damaged"), ('"model"', '"modle"', "config.json")):
        config.write_text(good[1].replace(old, new))
        assert refused(words, load, tmp_path)
    config.write_text(good[1])
    for part in 0, 4, 100, -1:
        tensors.write_bytes(good[0][:part])
        assert refused("model.safetensors", load, tmp_path)
    tensors.unlink()
    assert refused("no such file", load, tmp_path) and refused("no checkpoint in", load, tmp_path / "nowhere")


def test_malicious_weights_are_not_run(tmp_path):
    """Catches torch.load without weights_only: a checkpoint from a stranger would run any code."""
    bomb, path = tmp_path / "exploded", tmp_path / "weights.pth"
    for legacy in False, True:
        torch.save(dict(model=Bomb(bomb)), path, _use_new_zipfile_serialization=not legacy)
        assert refused("weights.pth", weights.read_weights, path) and not bomb.exists()
    torch.load(path, weights_only=False)
    assert bomb.is_dir()                                                      # it is a working bomb
    torch.save(dict(model=dict(a=torch.ones(2))), path)
    assert weights.read_weights(path)["a"].tolist() == [1, 1]
    for damaged in b"", b"not weights", path.read_bytes()[:-40], path.read_bytes()[:40]:
        path.write_bytes(damaged)
        assert refused("weights.pth", weights.read_weights, path)


def test_extras_and_wrappers_are_passed_over(tmp_path):
    """Catches a file of Lightning's that can't be read for its harmless extras, or whose extras are run;
    names that DistributedDataParallel and torch.compile have lengthened.
    """
    model = small_model()
    state = {"module." + key.replace("trunk.", "trunk._orig_mod."): x
             for key, x in model.trained_state().items()}
    extras = dict(hyper_parameters={"lr": np.float64(1e-3), "table": np.ones(3)}, epoch=3,
                  callbacks={"dir": pathlib.PosixPath("/x"), "bomb": Bomb(tmp_path / "bang")})
    torch.save(dict(state_dict=state, **extras), tmp_path / "last.ckpt")
    read = weights.read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "bang").exists() and set(read) == set(model.trained_state())
    assert all(torch.equal(x, read[key]) for key, x in model.trained_state().items())
    torch.save(dict(state_dict={"trunk.x": Bomb(tmp_path / "bang")}), tmp_path / "bad.ckpt")
    assert refused("no tensor", weights.read_checkpoint, tmp_path / "bad.ckpt")
    assert not (tmp_path / "bang").exists()


def test_one_file_of_a_checkpoint(tmp_path):
    """Catches advice about encoders where what lacks is the config.json beside the weights."""
    weights.save_checkpoint(tmp_path / "run", small_model())
    (tmp_path / "run/resume.pt").write_bytes(b"")
    shutil.copy(tmp_path / "run/model.safetensors", tmp_path / "model.safetensors")
    for name, words in (("model.safetensors", "config.json"), ("run/resume.pt", "--resume"),
                        ("run/config.json", "directory")):
        assert refused(words, gr1.GR1.from_pretrained, tmp_path / name)
    gr1.GR1.from_pretrained(tmp_path / "run/model.safetensors")


def test_scripts_read_the_authors_files(tmp_path, tabletop_data):
    """Catches from_pretrained that works while the commands around it do not; a traceback for a bad file."""
    path = golden_file(tmp_path / "snapshot.pt")[0]
    sizes = dict(cameras=json.dumps(dict.fromkeys(CAMERAS, 32)), copy_gate=False, norm_pixels=True,
                 vision_dim=24, resampler_depth=2, decoder_depth=2, decoder_heads=16)
    data, out = tabletop_data / "demonstrations", tmp_path / "out"
    command = lambda init, *more, **also: training("finetune", data, out, "--init", init, *more,
                                                   **sizes, **also)
    status, text = run(*command(path, "--fresh", "query_act", chunk=2))
    assert status == 0 and "the authors' GR-1" in text, text
    assert "left out 1 (action_queries.weight): to start fresh" in text
    bad = tmp_path / "bad.pt"
    for content, words in ((b"", "not a readable weights file"), (path.read_bytes()[:9000], "not a readable"),
                           (pickle.dumps(Bomb(tmp_path / "bang")), "not a plain weights file")):
        bad.write_bytes(content)
        for script in "eval_calvin.py", "sample.py":
            assert fails_in_one_line(script, "--checkpoint", bad, words=[words])
        assert fails_in_one_line(*command(bad), words=[words])
    assert not (tmp_path / "bang").exists()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """Catches a checkpoint that is overwritten by half of another."""
    model = small_model()
    weights.save_checkpoint(tmp_path, model)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(state, file):
        pathlib.Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="cannot write.*No space left.*whole") as error:
        weights.save_checkpoint(tmp_path, model)
    assert "\n" not in str(error.value)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(weights, "save_file", mock.Mock(side_effect=OSError))      # an error without words
    with pytest.raises(OSError, match="cannot write.*OSError.*whole"):
        weights.save_checkpoint(tmp_path, model)
    with pytest.raises(OSError, match="cannot write.*new/model.safetensors .OSError.$"):     # none was there
        weights.save_checkpoint(tmp_path / "new", model)
