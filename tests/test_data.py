"""data.py: what is drawn, what is read back, what a prepared set holds, and what is said when something is wrong."""
import gzip
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

import data
from conftest import command, need


@pytest.fixture
def terminal(tmp_path, monkeypatch, capsys):
    """terminal("show", "cats") is `python data.py show cats` in an empty folder: its exit code, output and complaints."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        code = 0
        try:
            data.run(data.main)
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


def files_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ---- shapes, drawn -----------------------------------------------------------------------------------------------

HELD_OUT = data.SHAPE_COUNT + np.arange(480)


def test_a_shape_depends_on_its_number_and_the_size_alone():
    many, labels = data.draw_shapes(np.arange(50), 32)
    for i in (0, 7, 49):
        one, label = data.draw_shapes([i], 32)
        assert label[0] == labels[i] and np.array_equal(one[0], many[i]), f"picture {i} differs when drawn alone"


def test_a_shape_is_the_same_picture_at_any_size():
    small, large = (data.draw_shapes(np.arange(50), size) for size in (32, 64))
    halved = large[0].reshape(50, 3, 32, 2, 32, 2).mean((3, 5))
    error = abs(halved - small[0]).mean()
    assert np.array_equal(small[1], large[1]) and error < 1, f"they differ by {error:.2f} grey levels"


def test_shapes_are_the_same_for_ever():
    images, labels = data.draw_shapes(np.arange(8), 32)
    assert labels.tolist() == [14, 10, 10, 17, 17, 9, 15, 0]
    assert images[:4].mean((1, 2, 3)) == pytest.approx([210.409, 209.326, 136.298, 136.585], abs=0.01)


def test_the_24_classes_and_the_3_greys_are_balanced():
    images, labels = data.draw_shapes(np.arange(4800), 8)
    background = images[:, 0].reshape(4800, -1)[:, [0, 7, -8, -1]]                  # a corner is free, whatever the object
    counts = np.bincount(labels, minlength=24)
    greys = [int((np.median(background, axis=1) == grey).sum()) for grey in data.GREYS]
    assert len(data.SHAPE_CLASSES) == len(counts) == 24 and abs(counts - 200).max() < 70, f"pictures a class: {counts}"
    assert sum(greys) > 4700 and abs(np.array(greys) - 1600).max() < 170, f"pictures a grey: {greys}"


def test_the_object_is_whole_and_fills_40_to_75_percent_of_the_side():
    images, _ = data.draw_shapes(HELD_OUT, 64)
    background = np.median(images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]], axis=2)[:, :, None, None]
    there = abs(images.astype(int) - background).max(1) > 12                        # (N, S, S)
    width, height = there.any(1).sum(1) / 64, there.any(2).sum(1) / 64
    assert abs(width - height).max() < 0.05, "something is cut off: every shape is as wide as high"
    assert width.min() > 0.38 and width.max() < 0.78, f"diameters {width.min():.2f} to {width.max():.2f}"
    assert width.min() < 0.43 and width.max() > 0.72, f"not the whole range: {width.min():.2f} to {width.max():.2f}"


# ---- shapes, read back ---------------------------------------------------------------------------------------------

def noisy(images):
    return (images + np.random.RandomState(0).normal(0, 8, images.shape)).clip(0, 255).round().astype(np.uint8)


def blurred(images):
    blur = ImageFilter.GaussianBlur(images.shape[-1] / 45)
    return np.stack([np.asarray(Image.fromarray(p.transpose(1, 2, 0)).filter(blur)).transpose(2, 0, 1) for p in images])


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("harm", [np.array, noisy, blurred], ids=["clean", "noisy", "blurred"])
def test_the_scorer_reads_real_pictures(harm, size):
    images, labels = data.draw_shapes(HELD_OUT, size)
    score = data.score_shapes(harm(images), labels)
    assert score["n"] == 480 and min(score.values()) >= 99, score


@pytest.mark.parametrize("size", [32, 64])
def test_the_scorer_finds_nothing_in_noise(size):
    rng, labels = np.random.RandomState(0), np.arange(480) % 24
    for noise in (rng.uniform(0, 256, (480, 3, size, size)), rng.normal(128, 30, (480, 3, size, size)).clip(0, 255)):
        score = data.score_shapes(noise.astype(np.uint8), labels)
        assert score["both"] == score["shape"] == 0 and score["colour"] < 10, score


def test_the_scorer_is_at_chance_on_the_labels_of_other_pictures():
    images, labels = data.draw_shapes(HELD_OUT, 32)
    score = data.score_shapes(images, np.random.RandomState(0).permutation(labels))
    chance = dict(shape=100 / 4, colour=100 / 6, both=100 / 24)
    assert all(abs(score[k] - chance[k]) < 5 for k in chance), score
    assert data.score_shapes(images, (labels + 5) % 24)["both"] == 0


@pytest.mark.parametrize("name", data.SHAPE_CLASSES)
def test_the_scorer_names_what_it_sees(name):
    colour, shape = name.split()
    seen = data.Object(list(data.PALETTE).index(colour), data.SHAPES.index(shape), x=0.4, y=0.6, box=0.5)
    found = data.read_shape(data.paint(140, [seen], 32))
    assert found == (seen.colour, seen.shape), f"it took a {name} for {found}"


def test_the_scorer_takes_no_other_figure_for_a_shape():
    x, y = np.meshgrid(*[np.arange(32) / 32 - 0.48] * 2)
    figures = dict(nothing=x > 9, diamond=abs(x) + abs(y) < 0.35, ring=abs(np.hypot(x, y) - 0.25) < 0.08,
                   half=(np.hypot(x, y) < 0.35) & (x < 0), two=(abs(abs(x) - 0.25) < 0.15) & (abs(y) < 0.15))
    red, grey = data.COLOURS[0][:, None, None], np.full((3, 32, 32), 60)
    for name, figure in figures.items():
        _, shape = data.read_shape(np.where(figure, red, grey).astype(np.uint8))
        assert shape == -1, f"it took {name} for a {data.SHAPES[shape]}"


# ---- emoji -----------------------------------------------------------------------------------------------------------

def need_emoji():
    need(Path(data.NOTO).exists(), "the emoji font", "apt-get install fonts-noto-color-emoji")


def test_emoji_are_about_1100_pictures_of_what_their_captions_say():
    need_emoji()
    source = data.emoji_source(None, 64, None)
    picture = {caption: image for image, _, caption in source.items}
    assert len(picture) == source.count and 1050 < source.count < 1250, f"{source.count} emoji, {len(picture)} captions"
    for channel, caption in enumerate(["large red circle", "green heart", "large blue circle"]):
        darkest = picture[caption].mean((1, 2)).argmax()
        assert darkest == channel, f"the {caption} is mostly {'red green blue'.split()[darkest]}"
    assert {"hot pepper", "steam locomotive", "smiling face with sunglasses"} <= set(picture)


def test_prepared_emoji_have_captions_and_a_white_background(tmp_path):
    need_emoji()
    data.prepare("emoji64", tmp_path, limit=20)
    pictures = data.open_set("emoji64", tmp_path)
    assert pictures.images.shape == (20, 3, 64, 64) and len(set(pictures.captions)) == 20 and pictures.labels is None
    assert pictures.images[:, :, 0, [0, -1]].min() > 250, "the upper corners are not white"
    assert pictures.images.min((1, 2, 3)).max() < 200, "one picture is empty"
    assert not pictures.flip, "mirrored letters and hands are other letters and hands"


@pytest.mark.parametrize("content", [None, b"a font, they said"])
def test_without_the_emoji_font_one_line_says_how_to_get_it(content, tmp_path):
    font = tmp_path / "some.ttf"
    if content:
        font.write_bytes(content)
    with pytest.raises(data.UserError, match="is not Noto Color Emoji" if content else "apt-get install fonts-noto"):
        data.prepare("emoji64", tmp_path, src=str(font))


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------

TRAINING = [f"data_batch_{i}.bin" for i in range(1, 6)]


def write_cifar(path, files):
    """files, name -> bytes, as a .tar.gz like the published one, whose batches are not in order either."""
    with tarfile.open(path, "w:gz") as tar:
        for name in sorted(files, reverse=True):
            member = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    return path


def cifar_files(records=7):
    """The files of the binary version with so many pictures a batch, as name -> bytes."""
    def batch(seed):
        rng = np.random.RandomState(seed)
        return np.hstack([rng.randint(0, 10, (records, 1)), rng.randint(0, 256, (records, 3072))]).astype(np.uint8).tobytes()

    files = {name: batch(seed) for seed, name in enumerate([*TRAINING, "test_batch.bin"])}
    return {**files, "batches.meta.txt": "\n".join([*data.CIFAR_CLASSES, "", ""]).encode()}


@pytest.fixture
def archive(tmp_path):
    return write_cifar(tmp_path / "cifar.tar.gz", cifar_files())


def test_cifar_pictures_and_labels_come_out_as_they_went_in(archive, tmp_path):
    data.prepare("cifar10", tmp_path, src=str(archive))
    pictures = data.open_set("cifar10", tmp_path)
    records = np.frombuffer(b"".join(cifar_files()[name] for name in TRAINING), np.uint8).reshape(35, 3073)
    assert np.array_equal(pictures.labels, records[:, 0]) and pictures.classes == data.CIFAR_CLASSES
    assert np.array_equal(pictures.images.reshape(35, 3072), records[:, 1:]) and pictures.flip


@pytest.mark.parametrize("published", [True, False])
def test_a_cifar_archive_other_than_the_published_one_gives_a_warning(published, archive, tmp_path, monkeypatch, capsys):
    if published:
        monkeypatch.setattr(data, "CIFAR_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    data.prepare("cifar10", tmp_path, src=str(archive))
    assert ("not the published archive" in capsys.readouterr().err) == (not published)


@pytest.mark.parametrize("harm, says", [
    (lambda files: files.pop("data_batch_3.bin"), "data_batch_3.bin is missing"),
    (lambda files: files.update({"data_batch_2.bin": files["data_batch_2.bin"][:-1]}), "records of 3073 bytes"),
    (lambda files: files.update({"data_batch_5.bin": bytes([10] * 3073)}), "a class above 9"),
], ids=["a batch missing", "a batch cut short", "a class too many"])
def test_an_archive_that_is_not_cifar_is_refused(harm, says, tmp_path):
    files = cifar_files()
    harm(files)
    with pytest.raises(data.UserError, match=says):
        data.prepare("cifar10", tmp_path, src=str(write_cifar(tmp_path / "other.tar.gz", files)))


@pytest.mark.parametrize("harm", [
    lambda blob: b"", lambda blob: blob[:3], lambda blob: blob[:len(blob) // 2], lambda blob: blob[:-1],
    lambda blob: blob[:5000] + b"oops" + blob[5004:], gzip.decompress, lambda blob: b"<html>404</html>",
], ids=["empty", "3 bytes", "half", "all but a byte", "a few bytes wrong", "not compressed", "a web page"])
def test_a_damaged_cifar_archive_is_refused(harm, archive, tmp_path):
    archive.write_bytes(harm(archive.read_bytes()))
    with pytest.raises(data.UserError, match="is not a complete .tar.gz"):
        data.prepare("cifar10", tmp_path, src=str(archive))
    assert not data.read_meta(tmp_path / "cifar10")


def test_cifar_is_downloaded_once_and_kept_beside_the_set(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_URL", archive.as_uri())
    monkeypatch.setattr(data, "CIFAR_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    data.prepare("cifar10", tmp_path / "sets", limit=12)
    assert len(data.open_set("cifar10", tmp_path / "sets")) == 12
    assert files_in(tmp_path / "sets") == ["cifar.tar.gz", "cifar10"]


@pytest.mark.parametrize("harm, says", [("another", "its sha256 differs"), ("none", "cannot download")])
def test_a_download_that_fails_says_what_to_do_and_leaves_no_file(harm, says, archive, tmp_path, monkeypatch):
    url = archive.as_uri() if harm == "another" else Path(tmp_path, "nowhere").as_uri()
    monkeypatch.setattr(data, "CIFAR_URL", url)
    with pytest.raises(data.UserError, match=f"{says}.*prepare cifar10 --src"):
        data.prepare("cifar10", tmp_path / "sets")
    assert not [path for path in (tmp_path / "sets").rglob("*") if path.is_file()]
