"""nanogr/tokenizer.py: codes and what they stand for, public files by their names, codes on the disk."""
import collections
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model import imagenet, to_pixels
from nanogr import clips, tokenizer
from nanogr.tokenizer import VQGAN, TinyTokenizer, open_tokenizer, save_tokenizer
from tests.helpers import Bomb, refused, run, same, small_tokenizer

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def small_vqgan(**changes):
    torch.manual_seed(0)
    made = VQGAN(**dict(codes=40, dim=8, width=32, z=16) | changes).eval()
    for p in made.parameters():                          # norms and biases too
        p.data += 0.02 * torch.randn(p.shape)
    return made


def test_every_code_has_a_vector():
    """Catches indices in another order than the vectors, and FSQ's half step where levels are even."""
    made, codes = TinyTokenizer(), torch.arange(1000)
    vectors = made.vectors(codes)
    assert torch.equal(made.to_codes(vectors), codes) and len(vectors.unique(dim=0)) == 1000
    assert made.vectors(torch.tensor([0, 1, 8, 999])).tolist() == [
        [-1, -1, -1, -1], [-0.75, -1, -1, -1], [-1, -0.5, -1, -1], [0.75, 1, 1, 1]]
    middle = made.quantize(torch.zeros(4))
    assert middle.tolist() == [0, 0, 0, 0]
    far = made.quantize(torch.tensor([[99.0] * 4, [-99.0] * 4]))
    assert far.tolist() == [[0.75, 1, 1, 1], [-1, -1, -1, -1]]
    # as many of each value as there are levels, and nothing between them
    line = torch.linspace(-9, 9, 4001)[:, None].expand(-1, 4)
    assert [len(made.quantize(line)[:, i].unique()) for i in range(4)] == [8, 5, 5, 5]
    assert torch.equal(made.quantize(line), made.vectors(made.to_codes(made.quantize(line))))


def test_the_tiny_one_learns_through_rounding():
    """Catches rounding that stops the gradient; a decoder that sees what encode's codes do not hold."""
    torch.manual_seed(0)
    made = TinyTokenizer(16)
    x = torch.rand(4, 3, 16, 16).round() - 0.5
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    for step in range(150):
        loss = (made(x) - x).abs().mean()
        loss.backward()
        if not step:
            first = loss.item()
            assert made.encoder[0].weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.7 * first
    codes = made.encode(x)
    assert codes.shape == (4, 4) and codes.dtype == torch.int64 and same(made.decode(codes), made(x), 1e-5)
    other = x.clone()
    other[:, :, :, 8:] = torch.rand(4, 3, 16, 8)         # the right half: codes are row by row
    assert (made.encode(other) != codes).any() and made.encode(x[:, :, :8]).shape == (4, 2)


@pytest.mark.parametrize("unit_length", [False, True])
def test_the_nearest_code(unit_length):
    """Catches a distance without the book's own length, or without scaling both sides (LlamaGen's)."""
    made = small_vqgan(unit_length=unit_length)
    made.quantize["embedding"].weight.data *= torch.linspace(0.5, 3, 40)[:, None]
    images = torch.randn(2, 3, 32, 48 - 16)
    std, mean = (imagenet(which, images.device) for which in ("std", "mean"))
    x = made.quant_conv(made.encoder(2 * (images * std + mean) - 1))
    scale = (lambda y: y / y.norm(dim=-1, keepdim=True)) if unit_length else (lambda y: y)
    book, codes = scale(made.quantize["embedding"].weight), made.encode(images)
    for n in range(2):
        for place, row in enumerate(x[n].flatten(1).T):
            assert codes[n, place] == (scale(row) - book).norm(dim=-1).argmin()
    assert same(made.vectors(codes), book[codes]) and made.decode(codes).shape == images.shape


def test_public_names():
    """Catches a tensor that public files have by another name or shape; a decoder read upside down."""
    listed = {name: eval(shape) for name, _, shape in (
        line.partition(" ") for line in (FIXTURES / "vqgan_keys.txt").read_text().splitlines())}
    with torch.device("meta"):
        made, wider = VQGAN(), VQGAN(16384, 8, True)
    assert {name: tuple(x.shape) for name, x in made.state_dict().items()} == listed
    assert len(listed) == 343 and sum(p.numel() for p in made.parameters()) == 72_141_699
    theirs = (FIXTURES / "llamagen_keys.txt").read_text().split()
    ours = [tokenizer.our_name(name) for name in theirs]
    assert ours.count(None) == 1 and theirs[ours.index(None)] == "quantize.codebook_used"
    assert sorted(name for name in ours if name) == sorted(wider.state_dict())
    assert tokenizer.our_name("decoder.conv_blocks.0.res.2.conv1.bias") == "decoder.up.4.block.2.conv1.bias"
    assert tokenizer.our_name("encoder.conv_blocks.0.res.1.conv1.bias") == "encoder.down.0.block.1.conv1.bias"
    assert tokenizer.our_name("loss.discriminator.main.0.weight") is None


def to_llamagen(name):
    """LlamaGen's name of taming's tensor, written down a second time."""
    for i in range(5):
        name = name.replace(f"encoder.down.{i}.", f"encoder.conv_blocks.{i}.")
        name = name.replace(f"decoder.up.{i}.", f"decoder.conv_blocks.{4 - i}.")
    for ours, theirs in ("mid.block_1", "mid.0"), ("mid.attn_1", "mid.1"), ("mid.block_2", "mid.2"):
        name = name.replace(ours, theirs)
    return name.replace(".block.", ".res.") if "conv_blocks" in name else name


def test_files(tmp_path):
    """Catches a public file of either naming that loads as another network, and what is no tokenizer's."""
    made, images = small_vqgan(unit_length=True), torch.randn(1, 3, 32, 32)
    codes = made.encode(images)
    theirs = {to_llamagen(name): x for name, x in made.state_dict().items()}
    torch.save({"model": theirs | {"quantize.codebook_used": torch.zeros(9)}}, tmp_path / "vq_ds16.pt")
    read = open_tokenizer(tmp_path / "vq_ds16.pt")
    assert read.unit_length and read.fingerprint == made.fingerprint
    assert torch.equal(read.encode(images), codes) and same(read.decode(codes), made.decode(codes))
    assert not any(p.requires_grad for p in read.parameters())
    plain = small_vqgan()
    save_file(plain.state_dict() | {"loss.logvar": torch.zeros(1)}, tmp_path / "taming.safetensors")
    read = open_tokenizer(tmp_path / "taming.safetensors")
    assert not read.unit_length and torch.equal(read.encode(images), plain.encode(images))
    state = plain.state_dict()
    for name, words in (("encoder.mid.block_1.conv1.weight", "lacks encoder.mid.block_1.conv1.weight"),
                        ("quantize.embedding.weight", "is no VQGAN's file")):
        save_file({key: x for key, x in state.items() if key != name}, tmp_path / "x.safetensors")
        assert refused(words, open_tokenizer, tmp_path / "x.safetensors")
    save_file(state | {"ema.decay": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert refused("has ema.decay", open_tokenizer, tmp_path / "x.safetensors")
    save_file(state | {"quant_conv.bias": torch.zeros(3)}, tmp_path / "x.safetensors")
    assert refused("quant_conv.bias of shape", open_tokenizer, tmp_path / "x.safetensors")
    assert refused("no tokenizer in", open_tokenizer, tmp_path)
    tiny = TinyTokenizer()
    save_tokenizer(tiny, tmp_path / "tiny", steps=3)
    read = open_tokenizer(tmp_path / "tiny")
    assert read.fingerprint == tiny.fingerprint != TinyTokenizer().fingerprint
    assert torch.equal(read.encode(images), tiny.encode(images))


def test_lightning_file(tmp_path, monkeypatch):
    """Catches taming's own files, whose callbacks name a class of Lightning's, refused, or run."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for end in range(1, 4):
        module = types.ModuleType(".".join(name.split(".")[:end]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.ModelCheckpoint = ModelCheckpoint = type("ModelCheckpoint", (), dict(__module__=name))
    made = small_vqgan()
    file = {"state_dict": collections.OrderedDict(made.state_dict()), "callbacks": {ModelCheckpoint: {}}}
    torch.save(file, tmp_path / "last.ckpt")
    torch.save(file | {"callbacks": Bomb(tmp_path / "boom")}, tmp_path / "bad.ckpt")
    monkeypatch.delitem(sys.modules, name)               # as for who has no Lightning
    for name in "last.ckpt", "bad.ckpt":
        assert open_tokenizer(tmp_path / name).fingerprint == made.fingerprint
    assert not (tmp_path / "boom").exists()


def pack(directory, sizes=dict(rgb_static=32, rgb_gripper=16)):
    rng = np.random.default_rng(0)
    for number in range(2):
        with clips.ShardWriter(directory, number, list(sizes)) as shard:
            for i in range(3):
                frames = {camera: rng.integers(0, 256, (4 + i, side, side, 3), np.uint8)
                          for camera, side in sizes.items()}
                shard.add(frames, f"clip {i}", episode=3 * number + i)
    clips.write_meta(directory, "noise", 3, "pytest")
    return clips.Clips(directory)


def test_codes_on_the_disk(tmp_path):
    """Catches codes of other frames, of another tokenizer or size, and half a file that counts as done."""
    data, made, sides = pack(tmp_path / "data"), small_tokenizer(), dict(rgb_static=32, rgb_gripper=16)
    assert refused("has no codes for shard 0", clips.read_codes, data, 0, made.fingerprint)
    tokenizer.encode_clips(data.directory, made, sides)
    plainly, coded = (clips.Windows(data, np.arange(6), 4, 2, 1, list(sides), stride=2, fingerprint=mark)
                      for mark in ("", made.fingerprint))
    for step in range(3):
        plain, codes = plainly[step], coded[step]["codes"]
        for camera, side in sides.items():
            fly = made.encode(to_pixels(plain["frames"][camera], side).flatten(0, 1)).unflatten(0, (4, 3))
            real = torch.cat([plain["mask"], plain["future_mask"][:, -1:]], 1)
            assert torch.equal(codes[camera][real].long(), fly[real]) and real.sum() > 6
            assert len(fly[real].unique()) > 4
    path = clips.codes_path(data.directory, 1)
    first, age = path.read_bytes(), clips.codes_path(data.directory, 0).stat().st_mtime_ns
    path.write_bytes(first[:-100])
    assert refused("can't be read", clips.read_codes, data, 1, made.fingerprint)
    tokenizer.encode_clips(data.directory, made, sides)
    assert path.read_bytes() == first and clips.codes_path(data.directory, 0).stat().st_mtime_ns == age
    assert refused("not 00000000: .*anew", clips.read_codes, data, 0, "00000000")
    data.shards[0]["crc32"][0] += 1                      # as if packed anew, with other pictures
    assert refused("other pictures", clips.read_codes, data, 0, made.fingerprint)
    data.shards[0]["crc32"][0] -= 1
    assert refused("do not divide", tokenizer.encode_clips, data.directory, made, dict(rgb_static=-8))
    tokenizer.encode_clips(data.directory, made, dict(rgb_static=64))        # another size: written anew
    assert clips.read_codes(data, 0, made.fingerprint)["rgb_static"].shape[1] == 64


def test_tokenizer_commands(tmp_path):
    """Catches a command that needs what it does not say, or a training that its seed does not decide."""
    pack(tmp_path / "data")
    for name in "a", "b":
        status, said = run("-m nanogr.tokenizer", "--make", tmp_path / name, "--data", tmp_path / "data",
                           "--steps", 2)
        assert status == 0 and "floor" in said and "codes in use" in said
    assert open_tokenizer(tmp_path / "a").fingerprint == open_tokenizer(tmp_path / "b").fingerprint in said
    status, said = run("-m nanogr.tokenizer", "--encode", tmp_path / "data", "--tokenizer", tmp_path / "a")
    assert status == 0 and clips.has_codes(clips.Clips(tmp_path / "data"), 1,
                                           open_tokenizer(tmp_path / "a").fingerprint,
                                           dict(rgb_static=64, rgb_gripper=16))
    assert run("-m nanogr.tokenizer", "--make", tmp_path)[0] == 2
