"""Text to image, from a caption to a picture: captioned shapes and their scorer, encoders and their files, training,
sampling."""
import functools
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sample
import train
from conftest import ROOT, command, need, tiny
from iuvit import IUViT
from test_sample import flat

COLOURS, SHAPES = "|".join(data.PALETTE), "|".join(data.SHAPES)


def scenes(n, size=32, held_out=False, first=data.SHAPE_COUNT):
    drawn = [data.draw_scene(first + i, held_out) for i in range(n)]
    return np.stack([data.paint(grey, objects, size) for grey, objects, _ in drawn]), [caption for *_, caption in drawn]


# ---- captioned shapes ----------------------------------------------------------------------------------

def test_scenes_are_the_same_for_ever():
    assert [data.draw_scene(i)[2] for i in range(4)] == [
        "a small green square on the left", "a small yellow square right of a large orange triangle",
        "a small blue square right of a small orange circle", "a large red circle at the top"]
    assert [data.draw_scene(i)[0] for i in range(4)] == [140, 220, 140, 60]
    assert [tuple(o) for i in range(4) for o in data.draw_scene(i)[1]] == [pytest.approx(o, abs=1e-6) for o in [
        (1, 1, 0.298692, 0.548081, 0.348614),
        (3, 1, 0.749418, 0.560236, 0.345988), (5, 2, 0.288642, 0.452415, 0.433556),
        (2, 1, 0.707149, 0.571462, 0.340940), (5, 0, 0.238886, 0.506535, 0.309332),
        (0, 0, 0.515953, 0.283006, 0.488509)]]


def test_scenes_to_ask_for_are_ones_that_no_training_has_seen(monkeypatch):
    numbers, draw = [], data.draw_scene
    monkeypatch.setattr(data, "draw_scene", lambda i, held_out: numbers.append(i) or draw(i, held_out))
    captions, kinds = data.asked_scenes(9)
    assert len(captions) == 9 and kinds == ["one object", "two objects", "held-out"] * 3
    assert min(numbers) >= data.SHAPE_COUNT and len(set(numbers)) == len(numbers)


def test_scenes_to_ask_for_are_of_their_kind():
    for caption, kind in zip(*data.asked_scenes(30)):
        _, colour, shape, place, relation, *second = data.CAPTION_FORM.fullmatch(caption).groups()
        assert bool(place) == (kind == "one object") and bool(relation) == any(second) == (kind != "one object"), caption
        if relation:
            new = data.held_out_colour(data.SHAPES.index(shape), list(data.RELATIONS).index(relation))
            assert (list(data.PALETTE)[new] == colour) == (kind == "held-out"), caption


def test_objects_are_whole_and_never_touch():
    for i in range(2000):
        _, objects, caption = data.draw_scene(i)
        assert all(o.box / 2 <= min(o.x, o.y, 1 - o.x, 1 - o.y) + 1e-9 for o in objects), caption
        if len(objects) == 2:
            a, b = objects
            apart = max(abs(a.x - b.x), abs(a.y - b.y)) - (a.box + b.box) / 2
            assert apart > data.GAP - 1e-9 and a.colour != b.colour, caption


def held_out(objects, relation):
    """Do these two show what training never shows?"""
    return any(o.colour == data.held_out_colour(o.shape, r) for o, r in zip(objects, (relation, relation ^ 1)))


def test_held_out_combinations_are_never_drawn_in_training_and_always_when_asked_for():
    seen = set()
    for i in range(3000):
        _, objects, caption = data.draw_scene(i)
        if len(objects) == 2:
            relation = next(r for r, name in enumerate(data.RELATIONS) if f" {name} a" in caption)
            assert not held_out(objects, relation), caption
            seen.add((objects[0].colour, objects[0].shape, relation))
        _, objects, caption = data.draw_scene(i, held_out=True)
        relation = next(r for r, name in enumerate(data.RELATIONS) if f" {name} a" in caption)
        assert objects[0].colour == data.held_out_colour(objects[0].shape, relation), caption
    assert len(seen) == 6 * 4 * 4 - 4 * 4, "all other combinations of colour, shape and relation do occur"


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("held_out", [False, True])
def test_the_scorer_reads_real_scenes(size, held_out):
    images, captions = scenes(150, size, held_out)
    noisy = (images + np.random.RandomState(0).normal(0, 8, images.shape)).clip(0, 255).astype(np.uint8)
    for pictures in (images, noisy):
        score = data.score_captions(pictures, captions)
        assert min(score.values()) >= 99, score


def test_the_scorer_is_near_chance_on_noise_and_on_captions_of_other_pictures():
    images, captions = scenes(150)
    noise = np.random.RandomState(0).uniform(0, 256, images.shape).astype(np.uint8)
    score = data.score_captions(noise, captions)
    assert score["all"] == score["shape"] == 0 and score["colour"] < 10 and score["place"] < 40, score
    other = data.score_captions(images, captions[1:] + captions[:1])
    assert other["all"] < 3 and other["colour"] < 25 and other["relation"] < 40, other


def test_the_scorer_asks_for_no_more_than_the_caption_says():
    red = data.Object(0, 0, 0.3, 0.5, 0.34)                             # larger than the other, or it would not count
    image = data.paint(60, [red], 32)[None]
    for caption, keys in (("a red circle", {"n", "colour", "shape", "all"}), ("A  small red circle.", {"size"}),
                          ("a red circle on the left", {"place"})):
        score = data.score_captions(image, [caption])
        assert keys <= set(score) and min(list(score.values())[1:]) == 100, score
    two = data.paint(60, [red, data.Object(2, 1, 0.75, 0.5, 0.28)], 32)[None]
    assert data.score_captions(two, ["a red circle"])["all"] == 0, "there is something else"
    assert data.score_captions(two, ["a red circle left of a blue square"])["all"] == 100
    assert data.score_captions(two, ["a red circle right of a blue square"])["relation"] == 0
    assert data.score_captions(two, ["a blue square left of a red circle"])["relation"] == 0
    with pytest.raises(data.UserError, match="'a dog' cannot be scored"):
        data.score_captions(image, ["a dog"])


# ---- encoders ------------------------------------------------------------------------------------------

def test_words_are_the_same_vectors_on_every_machine():
    rows = data.encode(data.Words(), ["A small, red circle", ""])
    assert [row.shape for row in rows] == [(6, 256), (1, 256)] and rows[0].dtype == np.float16
    assert rows[0][0, :3].tolist() == [-0.96435546875, 1.5048828125, -1.20703125]
    assert rows[1][0, :3].tolist() == [-3.375, -1.0712890625, -1.4111328125]
    assert abs(np.stack([data.random_vector(0, i, width=256) for i in range(400)]).var() - 1) < 0.02


def test_words_know_letters_and_places_but_no_capitals():
    a, b, c = data.encode(data.Words(), ["red circle", "Red CIRCLE", "circle red"])
    e, f = data.encode(data.Words(), ["caf\u00e9", "cafe\u0301"])                        # composed, and not
    assert (e == f).all()
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    for odd in ('say "hi"', "😀 🎈", "Привет мир", "日本語", "\ud800"):
        assert len(data.encode(data.Words(), [odd])[0]) > 1, f"nothing is left of {odd!r}"


def test_a_text_of_thousands_of_words_is_cut_and_keeps_its_end():
    row, end = data.encode(data.Words(), ["red " * 5000])[0], data.random_vector(0, width=256)
    assert len(row) == data.MAX_TOKENS
    assert np.array_equal(row[-1], (end + data.random_vector(1, 255, width=256)).astype(np.float16))


# ---- files ---------------------------------------------------------------------------------------------

@pytest.fixture
def captions(tmp_path):
    """captions([["a", "b"], ...]) is a prepared set of two black pixels a picture with these captions."""
    def make(texts):
        folder = tmp_path / "sets" / "mine"
        folder.mkdir(parents=True)
        np.save(folder / "images.npy", np.zeros((len(texts), 3, 8, 8), np.uint8))
        (folder / "captions.jsonl").write_text("".join(json.dumps(lines) + "\n" for lines in texts))
        (folder / "meta.json").write_text(json.dumps(dict(name="mine", size=8, n=len(texts), classes=[], flip=False,
                                                          captions=True)))
        return data.open_set("mine", str(tmp_path / "sets"))

    return make


def test_features_come_back_as_they_were_encoded(captions):
    texts = [["one", "the second one"], [""], ["three"]]
    pictures = captions(texts)
    assert data.encode_set(pictures, data.Words()) and not data.encode_set(pictures, data.Words())
    features = pickle.loads(pickle.dumps(data.Features(data.text_folder(pictures.folder, "words"))))
    wanted = data.encode(data.Words(), [text for lines in texts for text in lines])
    rows = [features.row(i, k) for i, lines in enumerate(texts) for k in range(len(lines))]
    assert all(map(np.array_equal, rows, wanted)) and len(rows) == len(wanted)
    assert np.array_equal(features.null, data.encode(data.Words(), [""])[0])
    drawn = {len(features.rows(np.array([0]), data.mix(0, np.array([k]), data.CAPTION))[0]) for k in range(20)}
    assert drawn == {2, 4}, "one of its captions is never drawn"


def test_a_picture_shows_each_of_its_captions_in_training(captions):
    pictures = captions([["one", "the second one"]])
    data.encode_set(pictures, data.Words())
    batches = data.Batches(pictures, 1, [0], 0, False, data.Features(data.text_folder(pictures.folder, "words")))
    assert {int(batches[step][2].sum()) for step in range(20)} == {2, 4}, "with the end of each"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no files")
@pytest.mark.parametrize("argv, place", [(["prepare", "shapes-text", "--limit", "9"], "shapes-text"),
                                         (["encode", "mine", "--encoder", "words"], "mine/text/words")])
def test_a_second_process_waits_for_the_first_and_then_looks_what_there_is(captions, tmp_path, argv, place):
    """As two trainings that are started at once, on a set that neither has prepared, or encoded, yet."""
    captions([["one"], ["two"]])
    folder = tmp_path / "sets" / place
    code = f"import data\nwith data.alone({str(folder)!r}): print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()                            # it has the lock
    second = subprocess.Popen([sys.executable, ROOT / "data.py", *argv, "--data-dir", tmp_path / "sets"],
                              stderr=subprocess.PIPE, text=True)
    deadline = threading.Timer(100, second.kill)        # or a test that fails would wait for a line for ever
    deadline.start()
    try:
        assert "another process is at work in" in second.stderr.readline()
        assert second.poll() is None and not (folder / "meta.json").exists()
        holder.kill()
        holder.communicate()
        second.communicate()
        assert second.returncode == 0 and (folder / "meta.json").exists()
    finally:
        deadline.cancel()
        holder.kill()
        second.kill()


def test_a_limit_encodes_the_first_pictures_and_training_sees_no_others(captions):
    pictures = captions([[f"number {i}"] for i in range(10)])
    data.encode_set(pictures, data.Words(), limit=4)
    batches = data.Batches(pictures, 8, range(8), 0, False, data.Features(data.text_folder(pictures.folder, "words")))
    assert batches.n == 4
    with pytest.raises(data.UserError, match="already there, of 4 pictures by words.*rm -r"):
        data.encode_set(pictures, data.Words())


def test_batches_are_padded_to_a_multiple_of_eight_and_the_mask_says_where_tokens_are():
    features, mask = data.pad([np.ones((3, 5), np.float16), np.ones((9, 5), np.float16)])
    assert features.shape == (2, 16, 5) and mask.sum(1).tolist() == [3, 9]
    assert torch.equal(features[:, :, 0] != 0, mask)
    features, mask = data.pad([np.ones((3, 5), np.float16)], multiple=24)
    assert features.shape == (1, 24, 5) and mask.sum() == 3


def test_find_encoder_takes_the_only_one_or_lists_them(captions, tmp_path):
    sets = str(tmp_path / "sets")
    pictures = captions([["a"]])
    assert data.find_encoder("shapes-text", sets, "") == ("words", 256) == data.find_encoder("mine", sets, "words")
    with pytest.raises(data.UserError, match="it has none.*data.py encode mine --encoder words"):
        data.find_encoder("mine", sets, "")
    data.encode_set(pictures, data.Words())
    assert data.find_encoder("mine", sets, "") == ("words", 256)
    with pytest.raises(data.UserError, match="no text features by t5; there are words"):
        data.find_encoder("mine", sets, "t5")


# ---- training and sampling -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A --data-dir with 60 captioned shapes."""
    folder = tmp_path_factory.mktemp("sets")
    data.prepare("shapes-text", str(folder), limit=60)
    return folder


def train_in(folder, sets, *flags, model="iuvit", out="run"):
    """Train a tiny text-conditional network for two steps, in a folder, into out/ -> its checkpoint."""
    argv = [*tiny(model), "--cond", "text", "--data-dir", sets, "--out", out, "--steps", 2, "--samples", 4, "--lr",
            0.02, *flags]
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(sys, "argv", ["train.py", *map(str, argv)])
        train.main()
    return data.read_dict(folder / out / "ckpt.pt")


@pytest.fixture
def trained(sets, tmp_path, monkeypatch):
    """trained("--lr", 1) trains so in an empty folder, in which the test goes on."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(train_in, tmp_path, sets)


@pytest.fixture(scope="module")
def guided(sets, tmp_path_factory):
    """The checkpoint of a network trained so with guidance, for all tests that only draw."""
    folder = tmp_path_factory.mktemp("guided")
    train_in(folder, sets, "--cfg", 2)
    return folder / "run/ckpt.pt"


@pytest.fixture
def drawn(guided, tmp_path, monkeypatch):
    """drawn("--prompt", "a red circle") samples from a copy of it, run/ckpt.pt: pictures and captions."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    shutil.copy(guided, "run")

    def run(*flags):
        argv = ["--ckpt", "run/ckpt.pt", "--device", "cpu", "--dtype", "float32", "--npz", "drawn.npz", *flags]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
        sample.main()
        with np.load("drawn.npz") as npz:
            return npz["arr_0"], npz["arr_1"].tolist()

    return run


def equal(a, b):
    return all(torch.equal(a[part][key], b[part][key]) for part in ("model", "ema") for key in a[part])


def test_a_run_on_text_resumes_bit_for_bit_and_at_any_number_of_workers(trained):
    whole = trained("--steps", 4, out="whole")
    trained("--steps", 2, out="halves")
    assert equal(whole, trained("--steps", 4, "--workers", 1, out="halves"))


LONG = " ".join("abcdefgh" * 8)                                                         # 64 words, and the end


@pytest.fixture
def compiled_for(monkeypatch):
    """The lengths of the texts that a compiled network has seen."""
    lengths = set()

    def compiler(net, mode, dynamic):
        assert dynamic is False
        return lambda x, t, y, mask: lengths.add(y.shape[1]) or net(x, t, y, mask)

    monkeypatch.setattr(torch, "compile", compiler)
    return lengths


def test_what_is_compiled_for_training_sees_texts_of_few_lengths(trained, captions, compiled_for):
    pictures = captions([["a red circle"]] * 30 + [[LONG]])
    data.encode_set(pictures, data.Words())
    trained("--data", "mine", "--data-dir", "sets", "--compile", "--steps", 5)          # 40 of 31 pictures
    assert compiled_for == {64, 128}


def test_what_is_compiled_for_sampling_sees_texts_of_few_lengths(drawn, compiled_for):
    drawn("--compile", "--batch", 1, "--n", 3, "--prompt", "red", "nine words are more than eight tokens and end", LONG)
    assert compiled_for == {64, 128}


class OtherWords(data.Words):
    """An encoder of the same width."""
    name = "other"


def test_an_encoder_that_comes_later_changes_no_run_and_weights_are_read_by_their_own(trained, captions):
    pictures, flags = captions([["a red circle"], ["a cat"]] * 4), ["--data", "mine", "--data-dir", "sets"]
    data.encode_set(pictures, data.Words())
    trained(*flags)
    data.encode_set(pictures, OtherWords())
    assert trained(*flags, "--steps", 3)["config"]["encoder"] == "words", "now there are two"
    with pytest.raises(data.UserError, match="reads captions by the encoder words, and not by other"):
        trained(*flags, "--init-from", "run/ckpt.pt", "--encoder", "other", out="tuned")
    assert not Path("tuned").exists()
    trained(*flags, "--init-from", "run/ckpt.pt", "--encoder", "words", out="tuned")
    trained(*flags, "--encoder", "other", out="moved")
    meta = Path("sets/mine/text/other/meta.json")
    meta.write_text(meta.read_text().replace('"other"', '"/elsewhere/other"'))          # encoded anew from there
    assert trained(*flags, "--encoder", "other", "--steps", 3, out="moved")["step"] == 3
    Path("foreign").mkdir()
    Path("foreign/config.json").write_text('{"encoder": {"layers": 2}}')                # not a run of ours
    with pytest.raises(data.UserError, match="foreign/config.json is not of a run: choose another --out"):
        trained(*flags, "--encoder", "other", out="foreign")


def test_a_run_does_not_go_on_with_features_of_other_pictures(trained, sets, tmp_path):
    def encoded(limit):
        shutil.rmtree(copy / "shapes-text" / "text", ignore_errors=True)
        data.encode_set(data.open_set("shapes-text", str(copy)), data.Words(), limit)

    copy = tmp_path / "sets"
    shutil.copytree(sets, copy)
    for first, other, says in [(20, 30, "captioned: 20 there, 30 asked"), (30, None, "captioned: 30 there, None asked")]:
        encoded(first)
        trained("--data-dir", copy, out=f"run{first}")
        encoded(other)
        with pytest.raises(data.UserError, match=says):
            trained("--data-dir", copy, "--steps", 3, out=f"run{first}")


def loss(out):
    return [float(line.split(",")[1]) for line in Path(out, "log.csv").read_text().splitlines()[1:]]


def test_accumulation_and_ranks_slice_the_text_too(trained, sets):
    flags = ["--steps", 3, "--log-every", 1]
    trained(*flags, out="whole")
    trained(*flags, "--accum", 2, out="parts")
    command("train.py", *tiny("iuvit"), "--cond", "text", "--data-dir", sets, "--lr", 0.02, "--samples", 4, *flags,
            "--out", "ranks", cwd=".", processes=2)
    assert loss("parts") == pytest.approx(loss("whole"), rel=1e-4) == loss("ranks")


def test_the_null_caption_takes_the_place_of_the_dropped_ones(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(train.diffusion, "loss", lambda net, *args, cond=(), _loss=train.diffusion.loss: (
        seen.append(args[-1]) or _loss(net, *args)))
    trained("--drop", 0.999, "--steps", 1)
    features, mask = seen[0]
    null = data.encode(data.Words(), [""])[0]
    assert mask.sum(1).tolist() == [1] * 8 and np.allclose(features[:, 0], null) and not features[:, 1:].any()


def test_a_checkpoint_knows_encoder_null_caption_and_grid(trained):
    text = trained()["text"]
    assert (text["encoder"], len(text["captions"])) == ("words", 4)
    for caption, row in zip([*text["captions"], ""], [*text["rows"], text["null"]]):
        assert np.array_equal(row.numpy(), data.encode(data.Words(), [caption])[0]), caption


def test_each_picture_of_a_sheet_is_asked_for_by_its_own_caption(trained, monkeypatch):
    asked, draw = [], sample.draw
    monkeypatch.setattr(sample, "draw", lambda net, config, rows, *more: asked.extend(rows) or draw(
        net, config, rows, *more))
    text = trained("--steps", 1, "--batch", 4, "--accum", 2)["text"]
    assert len(asked) == 4 and all(torch.equal(a, b) for a, b in zip(asked, text["rows"]))


def test_each_picture_shows_its_prompt_and_guidance_leads_away_from_the_empty_caption(drawn, monkeypatch):
    def level(features, mask):
        return (features[:, :, 0] * mask).sum(1) / mask.sum(1) / 20

    def of(captions):
        features, mask = data.pad(data.encode(data.Words(), captions))
        return level(features.float(), mask)

    config = sample.load("run/ckpt.pt")[1]
    monkeypatch.setattr(sample, "load", lambda *args: (flat(level), config))
    prompts = "red", "a blue square", "very " * 9 + "long"
    pictures, captions = drawn("--prompt", *prompts, "--n", 7, "--batch", 2, "--cfg", 3)
    wanted = data.to_uint8(3 * of(captions) - 2 * of([""])).numpy()
    assert abs(pictures.astype(int) - wanted[:, None, None, None]).max() <= 1 and len(set(wanted)) == 3


def test_a_folder_takes_no_command_with_another_prompt_or_another_word_to_attend(drawn):
    flags = ["--n", 2, "--out", "pictures", "--prompt", "a red circle", "--attend"]
    drawn(*flags, "red")
    for other in (["circle"], ["red", "--prompt", "a red square"]):
        with pytest.raises(data.UserError, match="not of this very command"):
            drawn(*flags, *other)


def test_a_caption_is_the_same_picture_whatever_stands_beside_it(drawn):
    alone, _ = drawn("--prompt", "a red circle", "--n", 1)
    beside, _ = drawn("--prompt", "a red circle", "very " * 60 + "long", "--n", 2)        # padded to 64 tokens, not 8
    assert abs(alone[0].astype(int) - beside[0]).max() <= 2
    red, blue = (drawn("--prompt", prompt, "--n", 1, "--cfg", 50)[0] for prompt in ("a red circle", "a blue square"))
    assert abs(red.astype(int) - blue).max() > 0                # strong guidance: the network is tiny, and hardly trained


@pytest.mark.parametrize("prompt", ['say "hi" to it\'s', "😀 🎈", "Привет 日本語 عربى", "", " ", "red " * 5000, "a\nb"])
def test_any_prompt_gives_pictures(drawn, prompt, capsys):
    pictures, captions = drawn("--prompt", prompt, "--n", 2)
    assert len(pictures) == 2 and pictures.std() > 0
    assert ("is cut to 256" in capsys.readouterr().out) == (len(prompt) > 5000)


def test_a_prompt_longer_than_uvit_reads_is_told_to_be_cut(trained, monkeypatch, capsys):
    trained(model="uvit")
    monkeypatch.setattr(sys, "argv", ["sample.py", *"--ckpt run/ckpt.pt --n 1 --device cpu --prompt".split(), "red " * 77])
    sample.main()
    assert "a prompt of 78 tokens is cut to 77" in capsys.readouterr().out


def test_an_encoder_that_has_become_another_is_refused(drawn, monkeypatch):
    vectors = data.Words.vectors
    monkeypatch.setattr(data.Words, "vectors", lambda self, tokens: [-v for v in vectors(self, tokens)])
    with pytest.raises(data.UserError, match="words makes other features of the empty caption than words did"):
        drawn("--prompt", "a red dog")


def test_prompts_come_from_a_file_one_a_line(drawn, tmp_path):
    (tmp_path / "wishes.txt").write_text("\ufeffa red circle\n\n  a blue square \n", encoding="utf-8")
    assert drawn("--prompt", "@wishes.txt", "--n", 3)[1] == ["a red circle", "a blue square", "a red circle"]
    (tmp_path / "empty.txt").touch()
    for prompt, says in (("@empty.txt", "holds no prompts"), ("@nowhere.txt", "cannot read --prompt @nowhere.txt")):
        with pytest.raises(data.UserError, match=says):
            drawn("--prompt", prompt)


def test_without_a_prompt_the_captions_are_those_of_the_training_grid(drawn):
    assert drawn("--n", 5)[1] == [*(c := data.read_dict("run/ckpt.pt")["text"]["captions"]), c[0]]


def test_the_captions_of_the_training_grid_need_no_encoder(drawn, monkeypatch):
    monkeypatch.setattr(data, "load_encoder", lambda name: pytest.fail(f"{name} is loaded"))
    drawn("--n", 4)


def test_a_run_s_own_limit_holds_at_its_own_guidance(trained, drawn):
    trained("--cfg", 3, "--clip", "static", out="run3")
    own, static, dynamic = (drawn("--ckpt", "run3/ckpt.pt", "--n", 2, "--weights", "raw", *flags)[0].astype(int)
                            for flags in ([], ["--clip", "static"], ["--clip", "dynamic"]))
    assert (own == static).all() and (own != dynamic).any()
    stronger, dynamic = (drawn("--ckpt", "run3/ckpt.pt", "--n", 2, "--weights", "raw", "--cfg", 9, *flags)[0]
                         for flags in ([], ["--clip", "dynamic"]))
    assert (stronger == dynamic).all()


@pytest.mark.parametrize("own, scale, clip", [
    (dict(cfg=3, clip="dynamic"), 1, "static"), (dict(cfg=3, clip="dynamic"), 3, "dynamic"),
    (dict(cfg=1, clip="static"), 3, "dynamic"), (dict(cfg=1, clip="dynamic"), 1, "dynamic"),
    (dict(cfg=1, clip="none"), 9, "none"), (dict(cfg=1, clip="static", cond="class"), 9, "static")])
def test_guidance_of_another_scale_is_kept_in_range_as_usual(own, scale, clip):
    assert sample.clip_for(scale, dict(dict(cond="text"), **own)) == clip


def test_several_scales_are_rows_of_one_sheet(drawn, monkeypatch):
    texts, with_caption = [], data.with_caption
    monkeypatch.setattr(data, "with_caption", lambda picture, text, lines: (
        texts.append(text) or with_caption(picture, text, lines)))
    monkeypatch.setattr(sys, "argv", "sample.py --ckpt run/ckpt.pt --cfg 1,2,4 --prompt one two --device cpu".split())
    sample.main()
    assert texts == ["1: one", "1: two", "2: one", "2: two", "4: one", "4: two"]
    sheet = sample.Image.open("samples.png")
    cell = 128 + 3 * 14                                                         # three lines of text
    assert sheet.size == (6 + 2 * (128 + 6), 6 + 3 * (cell + 6))
    sys.argv += ["--n", "342"]
    with pytest.raises(data.UserError, match="a sheet holds 1,024 pictures, and 3 rows of 342 are more"):
        sample.main()


def test_every_scale_draws_all_pictures_block_by_block(drawn, monkeypatch):
    asked, draw = [], sample.draw
    monkeypatch.setattr(sample, "draw", lambda net, config, wanted, ids, device, multiple: (
        asked.append((config["cfg"], config["clip"], list(ids))) or draw(net, config, wanted, ids, device, multiple)))
    monkeypatch.setattr(sys, "argv", "sample.py --ckpt run/ckpt.pt --cfg 1,4 --n 3 --batch 2 --device cpu".split())
    sample.main()
    assert asked == [(1, "static", [0, 1]), (1, "static", [2]), (4, "dynamic", [0, 1]), (4, "dynamic", [2])]


def test_prompts_are_columns_of_a_sheet_also_if_some_are_the_same(drawn, monkeypatch):
    monkeypatch.setattr(sys, "argv", "sample.py --ckpt run/ckpt.pt --n 6 --prompt red red blue --device cpu".split())
    sample.main()
    assert sample.Image.open("samples.png").width == 6 + 3 * (128 + 6)
    for flags, says in ((["--cfg", "1,2"], "there is no --npz"), (["--cfg", "1,x"], "takes a float, or several")):
        with pytest.raises(data.UserError, match=says):
            drawn(*flags)


def test_score_speaks_of_one_two_and_held_out_objects(drawn, capsys):
    drawn("--score", "--n", 6)
    lines = [line for line in capsys.readouterr().out.splitlines() if "show all that was asked" in line]
    assert [line.split(":")[0] for line in lines] == ["one object", "two objects", "held-out"]
    with pytest.raises(data.UserError, match="'a dog' cannot be scored"):
        drawn("--score", "--prompt", "a dog")


def test_each_kind_is_scored_by_its_own_pictures(monkeypatch):
    scored = []
    monkeypatch.setattr(data, "score_captions", lambda pictures, asked: (
        scored.append((pictures.tolist(), asked)) or dict(n=2, all=0)))
    sample.tell_score(np.arange(6), list("abcdef"), ["one object", "two objects", "held-out"] * 2, "")
    assert scored == [([0, 3], ["a", "d"]), ([1, 4], ["b", "e"]), ([2, 5], ["c", "f"])]


def test_the_word_is_watched_where_each_picture_s_own_prompt_has_it(drawn, monkeypatch):
    watched, maps = [], sample.attention_maps
    monkeypatch.setattr(sample, "attention_maps", lambda net, marked, size: (
        watched.append(marked.nonzero().tolist()) or maps(net, marked, size)))
    drawn("--prompt", "a red circle", "a very small red one", "--attend", "red", "--n", 4, "--batch", 1)
    assert watched == [[[0, 1]], [[0, 3]], [[0, 1]], [[0, 3]]]


def test_attention_maps_are_those_of_the_network_and_leave_it_alone(drawn):
    plain, _ = drawn("--prompt", "a red circle", "--n", 2)
    watched, _ = drawn("--prompt", "a red circle", "--n", 2, "--attend", "circle", "--out", "a.png")
    assert np.array_equal(plain, watched)
    assert sample.Image.open("a.png").width > 2 * 64
    net, config = sample.load("run/ckpt.pt")
    features, mask = data.pad(data.encode(data.Words(), ["a red circle"] * 2))
    with sample.attention_maps(net, mask, 32) as maps:
        net(torch.randn(2, 3, 32, 32), torch.rand(2), features.float(), mask)
    layers = sum(type(m).__name__ == "CrossAttention" for m in net.modules())
    assert torch.allclose(maps, torch.full_like(maps, layers), atol=1e-4), "all tokens together get all of it"
    with pytest.raises(data.UserError, match="--attend dog: no prompt has this word"):
        drawn("--prompt", "a red circle", "--attend", "dog")


def test_all_tokens_of_a_word_are_marked_and_no_others():
    marked = sample.mark("blue square", ["a red circle above a blue square"], data.Words())
    assert marked.nonzero().tolist() == [[0, 5], [0, 6]]


def test_a_map_is_what_the_places_of_a_picture_read_of_the_marked_tokens():
    """Written out, for one cross-attention whose grid has the size of the picture, so that nothing is interpolated."""
    torch.manual_seed(0)
    net, seen = IUViT(img_size=4, patch_size=1, dim=32, depth=1, heads=2, text_dim=8), []
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.6)
    cross = net.mid_block.cross
    cross.register_forward_hook(lambda m, inputs, out: seen.append(inputs))
    mask, marked = torch.arange(6) < torch.tensor([6, 4, 1, 1])[:, None], torch.zeros(2, data.MAX_TOKENS) > 0
    marked[0, 2] = marked[1, 1:3] = True                                # of two pictures; the other two are guidance's
    with torch.no_grad(), sample.attention_maps(net, marked, 4) as maps:
        net(torch.randn(4, 3, 4, 4), torch.rand(4), torch.randn(4, 6, 8), mask)
        for i, (x, text, mask) in enumerate(zip(*(part[:2] for part in seen[0]))):
            q, k = cross.q(x).view(17, 2, 16), cross.kv(text)[:, :32].view(6, 2, 16)        # (tokens, heads, channels)
            scores = torch.einsum("nhd,lhd->hnl", q, k) / 4
            read = scores.masked_fill(~mask, -torch.inf).softmax(-1)[:, 1:, marked[i, :6]]  # without the time token
            torch.testing.assert_close(maps[i], read.sum(-1).mean(0).view(4, 4))
    assert min(m.max() - m.min() for m in maps) > 0.1, "these maps are flat"


def test_a_highlight_is_half_grey_where_its_map_is_lowest_and_orange_where_it_is_highest():
    grey, heat = np.full((1, 3, 4, 4), 100, np.uint8), torch.linspace(2, 5, 16).view(1, 4, 4)
    left, right = np.split(sample.highlight(grey, heat)[0], 2, axis=2)
    assert np.array_equal(left, grey[0])
    assert right[:, 0, 0].tolist() == [50, 50, 50] and right[:, -1, -1].tolist() == [255, 140, 0]


def test_attention_needs_cross_attention(trained, monkeypatch):
    trained(model="uvit")
    monkeypatch.setattr(sys, "argv", "sample.py --ckpt run/ckpt.pt --n 1 --attend a --device cpu".split())
    with pytest.raises(data.UserError, match="this network has none"):
        sample.main()


@pytest.mark.parametrize("argv, says", [
    ("--data cifar10 --cond text", "cifar10 has no captions: use --cond class"),
    ("--cond class --encoder words", "--encoder is for --cond text")])
def test_a_mistake_is_answered_by_what_is_allowed(argv, says):
    with pytest.raises(data.UserError, match=says):
        train.parse(argv.split())


def test_another_width_than_that_of_the_features_is_refused(trained):
    with pytest.raises(data.UserError, match="text_dim of 99, and the features by words are 256 wide"):
        trained("--net", json.dumps(dict(patch_size=8, dim=64, depth=3, heads=2, text_dim=99)))


# ---- T5 ------------------------------------------------------------------------------------------------

LINES = ["a small red circle above a large blue square", "a green cross on the left", "yellow triangle in the middle"] * 9


def tiny_t5(folder, form):
    """A T5 encoder of random weights, with its tokenizer as tokenizer.json or, as google's, as spiece.model alone."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    folder.mkdir()
    if form == "spiece.model":
        import sentencepiece
        (folder / "lines").write_text("\n".join(LINES))
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "lines"), model_prefix=str(folder / "spiece"), vocab_size=60, model_type="unigram",
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
        (folder / "tokenizer_config.json").write_text(json.dumps(dict(
            tokenizer_class="T5Tokenizer", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0)))
    else:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.train_from_iterator(LINES, trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
                            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
                            eos_token_id=1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["tokenizer.json", "spiece.model"])
def test_a_t5_folder_goes_through_encode_train_and_sample(form, tmp_path, sets, monkeypatch, trained, capsys):
    here = all(importlib.util.find_spec(name) for name in ("transformers", "sentencepiece"))
    need(here, "T5", data.INSTALL_T5)
    folder = tiny_t5(tmp_path / f"t5-{form[:3]}", form)
    encoder = data.T5(str(folder))
    rows = data.encode(encoder, ["a red circle", "", "red " * 600])
    assert rows[0].dtype == np.float16 and rows[0].shape[1] == 32 and len(rows[1]) == 1 and len(rows[2]) == 256
    alone = data.encode(encoder, ["a red circle"])[0]
    assert np.allclose(rows[0].astype(float), alone, atol=0.05), "it depends on what it was encoded with"
    data.encode_command("shapes", str(sets), str(folder), None)
    ckpt = trained("--encoder", folder)
    assert ckpt["text"]["encoder"] == str(folder) and ckpt["config"]["net"]["text_dim"] == 32
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", "run/ckpt.pt", "--n", "2", "--prompt", "a red dog \ud83d",
                                      "--attend", "red", "--device", "cpu"])
    sample.main()
    assert "2 pictures" in capsys.readouterr().out
    folder.rename(tmp_path / "moved")                                           # another machine, say
    again = ["sample.py", "--ckpt", "run/ckpt.pt", "--n", "2", "--prompt", "a red cat", "--device", "cpu", "--encoder"]
    monkeypatch.setattr(sys, "argv", [*again, str(tmp_path / "moved")])
    sample.main()
    assert "2 pictures" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*again, "words"])
    with pytest.raises(data.UserError, match="makes other features of the empty caption than"):
        sample.main()


def test_an_encoder_that_is_no_t5_is_refused(tmp_path):
    """UMT5 has weights that T5 has not, and CLIP has none of T5's: they would be loaded in part, and the rest random."""
    need(all(importlib.util.find_spec(name) for name in ("transformers", "sentencepiece")), "T5", data.INSTALL_T5)
    from transformers import (CLIPTextConfig, CLIPTextModel, T5Config, T5ForConditionalGeneration, UMT5Config,
                              UMT5EncoderModel)
    small = dict(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    folder = tiny_t5(tmp_path / "t5", "tokenizer.json")
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(folder)               # with a decoder, as google's
    assert data.T5(str(folder)).width == 32
    clip = CLIPTextConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=4)
    for net in (CLIPTextModel(clip), UMT5EncoderModel(UMT5Config(**small))):
        net.save_pretrained(folder)
        with pytest.raises(data.UserError, match="t5 is no T5 encoder: .* weights are missing or unknown, such as"):
            data.T5(str(folder))


def test_without_transformers_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(data.UserError, match="`pip install transformers sentencepiece protobuf`"):
        data.load_encoder("t5-v1_1-base")
