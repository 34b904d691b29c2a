"""nanogr/encoders.py: keypoints, sentences."""
import functools
from unittest import mock

import torch

import train
from model import GR1, preset_config
from nanogr import clips, encoders, weights
from nanogr.worlds import calvin
from tests.helpers import make_data_set, refused, same


def test_keypoints_say_where_and_what():
    """Catches a keypoint with row and column swapped, upside down, at another scale, or of another cell."""
    vision, images = encoders.TinyVision(8, points=2), torch.zeros(3, 3, 32, 32)
    for i, (row, column) in enumerate(((1, 6), (1, 7), (2, 6))):             # one bright cell of 8 x 8
        images[i, 0, 4 * row:4 * row + 4, 4 * column:4 * column + 4] = 1
    with torch.no_grad():
        for parameter in vision.parameters():
            parameter.zero_()
        vision.stem.weight[0, 0] = vision.maps.weight[0, 0] = 1.0            # cell feature 0, map 0: red
        vision.cls.weight[[0, 1, 2], [0, 1, 4]] = 1.0                        # map 0's column, row and peak
        cls, points = vision(images)
    assert points.shape == (3, 2, 8)
    column, row = cls[:, 0], cls[:, 1]
    assert column[0] > 0 > row[0] and column[1] - column[0] > 0.3 and same(row[1], row[0], 1e-3)
    assert row[2] - row[0] > 0.3 and same(column[2], column[0], 1e-3)
    assert same(cls[0, 2], torch.nn.functional.gelu(torch.tensor(16.0)), 1e-3)


def test_noise_is_for_training_alone():
    """Catches a policy that acts on noise, noise that comes but once, or where none was asked for."""
    torch.manual_seed(0)
    vision, images = encoders.TinyVision(8, points=2), torch.rand(2, 3, 32, 32)
    quiet, _ = vision.train()(images)
    vision.noise = 0.1
    (first, _), (second, _), (acting, _) = vision(images), vision(images), vision.eval()(images)
    assert same(acting, quiet, 0) and not same(first, quiet, 1e-3) and not same(first, second, 1e-3)


def test_a_sentence_is_encoded_the_same_in_any_company():
    """Catches a resumed run that differs in the last bits: the encoder's depend on how many come at once."""
    text = encoders.CLIPText.__new__(encoders.CLIPText)
    torch.nn.Module.__init__(text)
    text.group, text.cache, text.tokenize = 4, {}, lambda group: torch.tensor([[ord(x)] for x in group])
    text.clip = mock.Mock(text_projection=torch.zeros(1), encode_text=lambda tokens: torch.cat(
        [tokens, torch.full_like(tokens, len(tokens))], 1))
    wanted = [[ord(x), 4] for x in "abcdefg"]
    assert text(["a"]).tolist() == wanted[:1] and text(list("abcdefg")).tolist() == wanted
    text.cache = {}
    assert text(list("abcdefg")).tolist() == wanted and text(list("ga")).tolist() == [wanted[6], wanted[0]]


def test_what_is_remembered_takes_no_more_than_it_says():
    """Catches rows that are views: each keeps the whole group it was computed in, and memory runs out after
    an hour."""
    memory = {}
    found = encoders.recall(memory, ["a", "b"], lambda keys: torch.ones(len(keys), 5), 16, 10)
    assert found.shape == (2, 5) and {row.untyped_storage().nbytes() for row in memory.values()} == {5 * 4}


def test_a_strange_sentence_is_taken_for_the_nearest_known():
    """Catches a known sentence taken for another, a strange one read as it is, or taken for another task's:
    each of the 34 by which CALVIN judges, none of which demonstrations have."""
    lessons = {sentence: task for task in calvin.NAMES for sentence in calvin.SENTENCES[task]["training"]}
    plain, knows = (encoders.build_text(preset_config("calvin"), known=known) for known in ((), [*lessons]))
    assert torch.equal(plain([*lessons]), knows([*lessons]))
    for task in calvin.NAMES:
        judged = calvin.instruction(task, 0)
        nearest = knows.nearest(judged)
        assert judged not in lessons and lessons[nearest] == task
        assert torch.equal(knows([judged]), plain([nearest]))
        assert not same(knows([judged]), plain([judged]), 0.1)


def test_a_sentence_without_a_known_word_is_refused():
    """Catches any noise taken for an instruction."""
    text = encoders.build_text(preset_config("calvin"), known=["lift the block", "push it"])
    assert text.nearest("Please lift one!") == "lift the block"
    for strange in "dance", "!!!":
        assert refused("lift the block", text, [strange])


def test_a_checkpoint_knows_its_sentences(tmp_path):
    """Catches a policy that forgets which sentences it learned by, or takes those that were held out or left
    out for them; one that forgets what --init had learned; a resumed run that does."""
    data = clips.Clips(make_data_set(tmp_path / "data", lengths=[(3,) * 10]))
    ids = range(3, 8)
    init = str(encoders.EYE.parent / "calvin-policy")
    before = set(weights.read_config(init)["encoders"]["known"])
    learned = {data.sentences[i] for i in ids}
    for start, fresh, wanted in (("none", "", learned), (init, "none", learned | before),
                                 (init, "embed_language", learned)):
        config = train.TrainConfig(preset="calvin", init=start, fresh=fresh, out=str(tmp_path),
                                   text_weights="hub")
        model = train.build(config, dict(upright=False), train.Processes())
        assert train.learned_by(model, data, ids, config) == sorted(wanted)
        model.text.known = sorted(wanted)
        train.save_model(config.out, config, model, 7)
        assert set(GR1.from_pretrained(config.out).text.known) == wanted
        config.resume, model = True, train.build(config, dict(upright=False), train.Processes())
        assert train.learned_by(model, data, ids, config) == sorted(wanted)
    config = train.TrainConfig(stage="pretrain", preset="calvin", init="none", text_weights="hub")
    assert not train.learned_by(train.build(config, {}, train.Processes()), data, ids, config)


def test_angles_are_read_as_they_were_learned(tmp_path):
    """Catches weights that read the hand's angles one way in a model that gives them another: ours, ours
    without what says so, the authors'; a refusal where no angles are read, or where they are learned anew."""
    released, settings = str(encoders.EYE.parent / "calvin-policy"), train.TrainConfig(fresh="none")
    state, saved = weights.read_checkpoint(released), weights.read_config(released)
    theirs = {"embed_lang.weight": torch.zeros(1), "embed_arm_state.weight": torch.zeros(1)}
    small = lambda **changes: GR1(made := preset_config("calvin", **changes), *encoders.build_encoders(made))
    upright, plain = small(), small(upright=False)
    for some, known in (state, saved), (theirs, {}):
        assert refused("--model upright=false", train.same_angles, upright, some, known, released, [])
        train.same_angles(plain, some, known, released, [])
    assert refused("config.json", train.same_angles, upright, state, {}, released, [])
    train.same_angles(upright, state, saved, released, ["embed_arm"])
    train.same_angles(GR1(made := preset_config("calvin", "pretrain"), *encoders.build_encoders(made)), state,
                      saved, released, [])
    start = functools.partial(train.start_from, state, released)
    assert refused("--model upright=false", start, upright, settings, train.Processes())
    start(plain, settings, train.Processes())


def test_words_alone_are_read_in_any_order():
    """Catches a comma that makes another word, pairs where a preset should hear none, or none elsewhere."""
    sentences = ["Take the red block, then push it", "push then take it the red block", "take the blue block"]
    words, pairs = (encoders.HashText(64, pairs)(sentences) for pairs in (False, True))
    assert same(words[0], words[1], 1e-5) and not same(words[0], words[2], 0.1)
    assert not same(pairs[0], pairs[1], 0.1)
    ours, tiny = (encoders.build_text(preset_config(name)) for name in ("calvin", "tiny"))
    assert tiny.pairs and not ours.pairs
