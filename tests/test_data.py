"""data.py: what is drawn, what is read back, what a prepared set holds, and what is said when something is wrong."""
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
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
    """terminal("show", "cats") is `python data.py show cats` in an empty folder: exit code, output, complaints."""
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
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".lock")


# ---- shapes, drawn --------------------------------------------------------------------------------------------------

HELD_OUT = data.SHAPE_COUNT + np.arange(240)                # never prepared, so never trained on


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


def test_shapes_are_the_same_for_ever(monkeypatch):
    images, labels = data.draw_shapes(np.arange(8), 32)
    assert labels.tolist() == [14, 10, 10, 17, 17, 9, 15, 0]
    assert images[:4].mean((1, 2, 3)) == pytest.approx([210.409, 209.326, 136.298, 136.585], abs=0.01)
    painted, paint = [], data.paint
    monkeypatch.setattr(data, "paint", lambda *args: painted.append((args[0], *args[1][0])) or paint(*args))
    data.draw_shapes(np.arange(4), 32)                  # grey; colour, shape, x, y, box
    assert painted == [pytest.approx(o, abs=1e-6) for o in [
        (220, 3, 2, 0.606607, 0.369016, 0.629745), (220, 2, 2, 0.454433, 0.506734, 0.452819),
        (140, 2, 2, 0.301826, 0.639026, 0.562114), (140, 4, 1, 0.397131, 0.640346, 0.715622)]]


def test_the_24_classes_and_the_3_greys_are_balanced():
    images, labels = data.draw_shapes(np.arange(4800), 8)
    counts = np.bincount(labels, minlength=24)
    background = np.median(images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]], axis=1)    # most corners are free
    greys = [int((background == grey).sum()) for grey in data.GREYS]
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


# ---- shapes, read back ----------------------------------------------------------------------------------------------

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
    assert score["n"] == 240 and min(score.values()) >= 99, score


@pytest.mark.parametrize("size", [32, 64])
def test_the_scorer_finds_nothing_in_noise(size):
    rng, labels = np.random.RandomState(0), np.arange(240) % 24
    for noise in (rng.uniform(0, 256, (240, 3, size, size)), rng.normal(128, 30, (240, 3, size, size)).clip(0, 255)):
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
    figures = dict(nothing=x > 9, diamond=abs(x) + abs(y) < 0.35, oval=(x / 7)**2 + (y / 4)**2 < 0.05**2,
                   ell=(abs(x) < 0.3) & (abs(y) < 0.3) & ((x < 0) | (y < 0)), bar=(abs(x) < 0.3) & (abs(y) < 0.2),
                   ring=abs(np.hypot(x, y) - 0.25) < 0.08,
                   half=(np.hypot(x, y) < 0.35) & (x < 0), two=(abs(abs(x) - 0.25) < 0.15) & (abs(y) < 0.15))
    red, grey = data.COLOURS[0][:, None, None], np.full((3, 32, 32), 60)
    for name, figure in figures.items():
        _, shape = data.read_shape(np.where(figure, red, grey).astype(np.uint8))
        assert shape == -1, f"it took {name} for a {data.SHAPES[shape]}"


def test_the_scorer_survives_pictures_of_nothing_and_of_less_than_nothing():
    blue = data.COLOURS[2][:, None, None]
    anti = (128 - 1.35 * (blue - 128)).clip(0, 255)                                 # further from grey, the other way
    speckles = np.where(np.random.RandomState(0).rand(24, 24) < 0.55, blue, anti)
    absurd = np.pad(speckles, [(0, 0), (4, 4), (4, 4)], constant_values=128).astype(np.uint8)
    assert data.read_shape(absurd) == (2, -1) and data.read_shape(np.full_like(absurd, 128)) == (-1, -1)


# ---- emoji ----------------------------------------------------------------------------------------------------------

def need_emoji():
    need(Path(data.NOTO).exists(), "the emoji font", "apt-get install fonts-noto-color-emoji")


def test_emoji_are_about_1100_pictures_of_what_their_captions_say():
    need_emoji()
    source = data.emoji_source(None, 64, None)
    picture = {caption: image for image, _, (caption,) in source.items}
    assert len(picture) == source.count and 1050 < source.count < 1250, f"{source.count} emoji, {len(picture)} captions"
    for channel, caption in enumerate(["large red circle", "green heart", "large blue circle"]):
        darkest = picture[caption].mean((1, 2)).argmax()
        assert darkest == channel, f"the {caption} is mostly {'red green blue'.split()[darkest]}"
    assert {"hot pepper", "steam locomotive", "smiling face with sunglasses"} <= set(picture)
    signs = {"clock face one oclock", "heavy dollar sign", "up-pointing red triangle", "emoji component bald"}
    assert signs.isdisjoint(picture), f"signs, not things: {signs & set(picture)}"


def test_prepared_emoji_have_captions_and_a_white_background(tmp_path):
    need_emoji()
    data.prepare("emoji64", tmp_path, limit=20)
    pictures = data.open_set("emoji64", tmp_path)
    assert pictures.images.shape == (20, 3, 64, 64) and pictures.labels is None
    assert len({name for name, in pictures.captions}) == 20
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


# ---- CIFAR-10 -------------------------------------------------------------------------------------------------------

TRAINING = [f"data_batch_{i}.bin" for i in range(1, 6)]


def write_cifar(path, files):
    """files, name -> bytes, as a .tar.gz like the published one, whose batches are not in order either."""
    with tarfile.open(path, "w:gz") as tar:
        top = tarfile.TarInfo("cifar-10-batches-bin")
        top.type = tarfile.DIRTYPE
        tar.addfile(top)
        for name in sorted(files, reverse=True):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    return path


def cifar_files(records=7):
    """The files of the binary version, name -> bytes, with so many pictures in each batch instead of 10,000."""
    rng, files = np.random.RandomState(0), {"readme.html": b"<html></html>"}
    files["batches.meta.txt"] = "\n".join([*data.CIFAR_CLASSES, "", ""]).encode()
    for name in [*TRAINING, "test_batch.bin"]:
        labels, pixels = rng.randint(0, 10, (records, 1)), rng.randint(0, 256, (records, 3072))
        files[name] = np.hstack([labels, pixels]).astype(np.uint8).tobytes()
    return files


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's format, which passes for the published one."""
    path = write_cifar(tmp_path / "cifar.tar.gz", cifar_files())
    monkeypatch.setattr(data, "CIFAR_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_cifar_pictures_and_labels_come_out_as_they_went_in(archive, tmp_path):
    data.prepare("cifar10", tmp_path, src=str(archive))
    pictures = data.open_set("cifar10", tmp_path)
    records = np.frombuffer(b"".join(cifar_files()[name] for name in TRAINING), np.uint8).reshape(35, 3073)
    assert np.array_equal(pictures.labels, records[:, 0]) and pictures.classes == data.CIFAR_CLASSES
    assert np.array_equal(pictures.images.reshape(35, 3072), records[:, 1:]) and pictures.flip


@pytest.mark.parametrize("harm", [
    lambda blob: b"", lambda blob: blob[:3], lambda blob: blob[:len(blob) // 2], lambda blob: blob[:-1],
    lambda blob: blob[:5000] + b"oops" + blob[5004:], gzip.decompress, lambda blob: b"<html>404</html>",
], ids=["empty", "3 bytes", "half", "all but a byte", "a few bytes wrong", "not compressed", "a web page"])
def test_all_but_the_published_cifar_archive_is_refused(harm, archive, tmp_path):
    archive.write_bytes(harm(archive.read_bytes()))
    with pytest.raises(data.UserError, match="cifar.tar.gz is not the published cifar-10-binary.tar.gz, or not all"):
        data.prepare("cifar10", tmp_path, src=str(archive))
    assert not data.read_meta(tmp_path / "cifar10")


def test_cifar_is_downloaded_once_and_kept_beside_the_set(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_URL", archive.as_uri())
    data.prepare("cifar10", tmp_path / "sets", limit=12)
    assert files_in(tmp_path / "sets") == ["cifar.tar.gz", "cifar10"]
    archive.unlink()                                                                # the server is gone
    shutil.rmtree(tmp_path / "sets/cifar10")
    data.prepare("cifar10", tmp_path / "sets")
    assert len(data.open_set("cifar10", tmp_path / "sets")) == 35


@pytest.mark.parametrize("harm, says", [("another", "its sha256 differs"), ("none", "cannot download")])
def test_a_download_that_fails_says_what_to_do_and_leaves_no_file(harm, says, archive, tmp_path, monkeypatch):
    url = archive.as_uri() if harm == "another" else Path(tmp_path, "nowhere").as_uri()
    monkeypatch.setattr(data, "CIFAR_URL", url)
    if harm == "another":
        archive.write_bytes(archive.read_bytes() + b"more")
    place = re.escape(str(tmp_path / "sets" / os.path.basename(url)))           # where the next prepare looks for it
    with pytest.raises(data.UserError, match=f"{says}.*: get it some other way, put it at {place}, and try again"):
        data.prepare("cifar10", tmp_path / "sets")
    assert files_in(tmp_path / "sets") == ["cifar10"] and files_in(tmp_path / "sets/cifar10") == []


# ---- folders of pictures --------------------------------------------------------------------------------------------

COLOURS = np.array([[(215, 40, 40), (40, 165, 60)], [(50, 80, 210), (240, 210, 60)]], np.uint8)     # (2, 2, 3)
GREYS = np.asarray(Image.fromarray(COLOURS).convert("L"))[:, :, None].repeat(3, 2)
ONE_HOLE = np.where(np.array([[0, 0], [0, 1]])[:, :, None], 255, COLOURS)


def quarters(colours=COLOURS, side=96):
    """A picture of four quarters: red and green above blue and yellow."""
    return Image.fromarray(colours.repeat(side // 2, 0).repeat(side // 2, 1))


def hole(picture, mode="RGBA"):
    """The picture with its last quarter transparent, and black where nobody is meant to look."""
    W, H = picture.size
    picture = picture.convert(mode)
    picture.paste((0,) * len(mode), (W // 2, H // 2, W, H))
    return picture


def colours_of(square):
    """uint8 (3, S, S) -> (2, 2, 3): the mean colour in the middle of each quarter."""
    S = square.shape[-1]
    middle = slice(S // 8, -(S // 8))
    return square.reshape(3, 2, S // 2, 2, S // 2)[:, :, middle, :, middle].mean((2, 4)).transpose(1, 2, 0)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return dict(exif=tags)


ODD = {             # file: what becomes of the quarters before they are saved, how they are saved, what must be seen
    "plain.png":        (lambda q: q, {}, COLOURS),
    "photo.jpg":        (lambda q: q.resize((1600, 1600), Image.Resampling.NEAREST), {}, COLOURS),
    "wide.bmp":         (lambda q: ImageOps.expand(q, (500, 0)), {}, COLOURS),
    "tall.ppm":         (lambda q: ImageOps.expand(q, (0, 501)), {}, COLOURS),
    "grey.png":         (lambda q: q.convert("L"), {}, GREYS),
    "16_bit_grey.png":  (lambda q: Image.fromarray(np.asarray(q.convert("L")).astype(np.uint16) * 257), {}, GREYS),
    "16_bit_grey.tif":  (lambda q: Image.fromarray(np.asarray(q.convert("L")).astype(np.int32) * 257), {}, GREYS),
    "palette.png":      (lambda q: q.quantize(4), {}, COLOURS),
    "print.jpg":        (lambda q: q.convert("CMYK"), {}, COLOURS),
    "one_bit.png":      (lambda q: Image.new("1", q.size, 1), {}, 255),
    "see_through.png":  (hole, {}, ONE_HOLE),
    "see_through.gif":  (hole, {}, ONE_HOLE),
    "see_through.tif":  (lambda q: hole(quarters(GREYS), "LA"), {}, np.where(ONE_HOLE == 255, 255, GREYS)),
    "on_its_side.jpg":  (lambda q: q.transpose(Image.Transpose.ROTATE_90), exif(6), COLOURS),
    "mirrored.jpg":     (lambda q: ImageOps.mirror(q), exif(2), COLOURS),
    "animated.gif":     (lambda q: q, dict(save_all=True, append_images=[Image.new("RGB", (96, 96))]), COLOURS),
    "a_pixel.png":      (lambda q: q.crop((0, 0, 1, 1)), {}, COLOURS[0, 0]),
    "a_line.png":       (lambda q: q.crop((0, 0, 1, 1)).resize((3000, 1)), {}, COLOURS[0, 0]),
}


def save_odd(name, folder):
    change, how, _ = ODD[name]
    change(quarters()).save(Path(folder, name), **how)


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_become_the_right_squares(name, tmp_path):
    save_odd(name, tmp_path)
    square = data.load_square(str(tmp_path / name), 32)
    found, wanted = colours_of(square), ODD[name][2]
    assert square.shape == (3, 32, 32) and square.dtype == np.uint8
    assert abs(found - wanted).max() < 6, f"{name} shows\n{found.round()}\nand not\n{wanted}"


def test_a_photo_decoded_small_is_as_sharp_as_one_decoded_whole(tmp_path):
    x, y = np.meshgrid(*[np.arange(400)] * 2)
    weave = Image.fromarray((127 + 60 * np.sin(x / 4) + 60 * np.sin(y / 5)).astype(np.uint8)).convert("RGB")
    weave.save(tmp_path / "weave.jpg", quality=95)
    weave.save(tmp_path / "weave.png")
    quick, whole = (data.load_square(str(tmp_path / f"weave.{kind}"), 64).astype(int) for kind in ("jpg", "png"))
    assert whole.std() > 30 and abs(quick - whole).mean() < 3, f"{abs(quick - whole).mean():.1f} grey levels apart"


@pytest.fixture
def album(tmp_path):
    """album("cats/1.png", "dogs/2.png") is a folder with these pictures, number i of them in grey level 10 i."""
    def make(*paths, side=40):
        for i, path in enumerate(paths):
            file = tmp_path / "album" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side + 3), (10 * i, 10 * i, 10 * i)).save(file)
        return str(tmp_path / "album")

    return make


def prepared(src, tmp_path, **how):
    data.prepare("mine", tmp_path / "sets", src=src, **how)
    return data.open_set("mine", tmp_path / "sets")


def test_classes_are_the_subfolders_and_order_is_that_of_the_names(album, tmp_path):
    src = album("dogs/b.png", "cats/z.PNG", "dogs/old/a.png", "cats/.hidden.png", "__MACOSX/cats/z.png", "dogs/a.jpeg")
    Path(src, "dogs", "notes.txt").write_text("not a picture")
    pictures = prepared(src, tmp_path)
    assert pictures.classes == ["cats", "dogs"] and pictures.labels.tolist() == [0, 1, 1, 1]
    assert pictures.images[:, 0, 0, 0].tolist() == [10, 50, 0, 20], "not the order z.PNG, a.jpeg, b.png, old/a.png"


def test_linked_folders_count_and_a_link_in_a_circle_ends(album, tmp_path):
    src = album("cats/1.png", "more/2.png", "more/3.png")
    elsewhere = Path(src, "more").rename(tmp_path / "elsewhere")
    Path(src, "dogs").symlink_to(elsewhere, target_is_directory=True)
    Path(src, "cats", "back").symlink_to(src, target_is_directory=True)
    Path(src, "cats", "across").symlink_to(elsewhere, target_is_directory=True)
    Path(elsewhere, "across").symlink_to(Path(src, "cats"), target_is_directory=True)
    os.mkfifo(Path(src, "cats", "pipe.png"))                            # which nobody ever writes to
    Path(src, "cats", "loop").symlink_to("loop")
    pictures = prepared(src, tmp_path)
    assert pictures.classes == ["cats", "dogs"] and pictures.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_sets_of_ours_among_the_pictures_are_no_pictures(album, tmp_path):
    src = album("cats/1.png", "dogs/2.png")
    for name in ("first", "second"):
        data.prepare(name, Path(src, "sets"), src=src)
        data.show(name, Path(src, "sets"), None)
        assert data.open_set(name, Path(src, "sets")).classes == ["cats", "dogs"]


@pytest.mark.parametrize("paths", [["1.png", "2.png"], ["cats/1.png", "2.png"], ["all/1.png", "all/2.png"]])
def test_without_two_subfolders_that_hold_everything_there_are_no_classes(paths, album, tmp_path):
    pictures = prepared(album(*paths), tmp_path)
    assert len(pictures) == 2 and pictures.classes == [] and pictures.labels is pictures.captions is None


def test_what_is_printed_into_a_file_is_there_at_once():
    code = "import data, os; data.run(lambda: (print('begun'), os._exit(0)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent, capture_output=True)
    assert done.stdout.strip() == b"begun"


def test_one_picture_outside_the_subfolders_takes_the_classes_away_but_not_silently(album, tmp_path, capsys):
    assert prepared(album("cats/1.png", "dogs/1.png", "preview.png"), tmp_path).classes == []
    assert "warning: no classes, since some pictures of" in capsys.readouterr().err


def test_numbered_parts_of_a_set_are_no_classes(album, tmp_path, capsys):
    """As img2dataset and FFHQ have them. A shorter number among them may well be the name of a class."""
    assert prepared(album("00000/1.png", "00001/1.png"), tmp_path).classes == []
    assert "warning: no classes, since 00000 and the other subfolders" in capsys.readouterr().err
    assert prepared(album("1999/1.png"), tmp_path / "again").classes == ["00000", "00001", "1999"]


@pytest.mark.parametrize("side, size", [(20, 32), (63, 32), (64, 64), (300, 64)])
def test_the_default_size_suits_the_pictures(side, size, album, tmp_path):
    assert prepared(album("1.png", "2.png", side=side), tmp_path).size == size


def test_a_limit_takes_something_of_every_class(album, tmp_path):
    src = album(*[f"{name}/{i}.png" for name in ("ant", "bee", "cat", "dog") for i in range(5)])
    pictures = prepared(src, tmp_path, limit=8, size=16)
    assert pictures.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and pictures.size == 16


def spoil(folder):
    """Put five files that cannot be read into a folder; their names."""
    quarters().save(folder / "cut.jpg")
    quarters().save(folder / "cut.png")
    for name in ("cut.jpg", "cut.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    Image.new("F", (40, 40), 0.5).save(folder / "range_unknown.tif")
    return ["cut.jpg", "cut.png", "empty.png", "page.jpg", "range_unknown.tif"]


def test_bad_pictures_are_skipped_counted_and_listed(tmp_path, capsys):
    album = tmp_path / "album"
    album.mkdir()
    for name in ODD:
        save_odd(name, album)
    bad = spoil(album)
    pictures = prepared(str(album), tmp_path, size=32)
    shown = {name: image for name, image in zip(sorted(ODD), pictures.images)}
    assert all(abs(colours_of(shown[name]) - ODD[name][2]).max() < 6 for name in ODD), "a picture took another's place"
    assert [line.split("\t")[0] for line in (tmp_path / "sets/mine/skipped.txt").read_text().splitlines()] == bad
    assert "skipped 5 unreadable files" in capsys.readouterr().out and data.read_meta(pictures.folder)["skipped"] == 5


def test_many_bad_pictures_are_refused(album, tmp_path):
    src = album("good.png")
    for i in range(6):
        Path(src, f"bad{i}.png").touch()
    with pytest.raises(data.UserError, match="more than 5, and more than 2%, of the 7 pictures.*'bad5.png'"):
        prepared(src, tmp_path)
    assert files_in(tmp_path / "sets/mine") == []


@pytest.mark.parametrize("files, says", [
    ([], "no pictures in"), (["notes.txt"], "no pictures in"), (["bad.png"], "none of the pictures can be read")])
def test_a_folder_without_a_picture_is_refused(files, says, tmp_path):
    (tmp_path / "album").mkdir()
    for name in files:
        (tmp_path / "album" / name).touch()
    with pytest.raises(data.UserError, match=says):
        prepared(str(tmp_path / "album"), tmp_path)


def test_pictures_inside_the_set_they_would_become_are_refused(album, tmp_path):
    src = album("1.png")
    for data_dir in (tmp_path, tmp_path / "elsewhere" / ".."):
        with pytest.raises(data.UserError, match="move the pictures away"):
            data.prepare("album", data_dir, src=src)


# ---- prepare --------------------------------------------------------------------------------------------------------

def test_prepared_shapes_are_the_drawn_ones_and_memory_mapped(datasets):
    pictures, (images, labels) = data.open_set("shapes", datasets), data.draw_shapes(np.arange(200), 32)
    assert isinstance(pictures.images, np.memmap) and np.array_equal(pictures.images, images)
    assert pictures.labels.dtype == np.int64 and np.array_equal(pictures.labels, labels)
    assert (pictures.name, pictures.size, len(pictures)) == ("shapes", 32, 200) and not pictures.flip


def test_prepare_writes_what_it_announces_and_nothing_else(terminal):
    said = terminal("prepare", "shapes", "--limit", 30)
    assert said == (0, f"writing 30 pictures of 32x32 to datasets/shapes: {30 * (3 * 32 * 32 + 8):,} bytes\n"
                    "30 pictures; 24 classes: red circle, red square, red triangle, red cross, green circle, ..; "
                    "no captions\n", "")
    assert files_in("datasets/shapes") == ["images.npy", "labels.npy", "meta.json"]
    assert json.loads(Path("datasets/shapes/meta.json").read_text()) == dict(
        name="shapes", size=32, n=30, classes=data.SHAPE_CLASSES, flip=False, limit=30, attributes=None, captions=False,
        source="drawn", skipped=0)


def test_prepare_does_nothing_to_a_set_that_is_there(terminal):
    terminal("prepare", "shapes", "--limit", 30)
    written = os.stat("datasets/shapes/images.npy").st_mtime_ns
    says = "datasets/shapes is already prepared, with 30 pictures: nothing to do\n"
    assert terminal("prepare", "shapes") == (0, says, "")
    code, _, complaint = terminal("prepare", "shapes", "--limit", 31)
    assert code == 2 and "is already there, with --limit 30; to prepare it anew: rm -r datasets/shapes" in complaint
    assert os.stat("datasets/shapes/images.npy").st_mtime_ns == written


@pytest.mark.parametrize("other", [dict(crop="adm"), dict(src="elsewhere"), dict(size=32)])
def test_a_set_that_is_there_with_another_source_crop_or_size_is_refused(other, album, tmp_path):
    how = dict(src=album("1.png", "2.png"), size=16)
    prepared(tmp_path=tmp_path, **how)
    with pytest.raises(data.UserError, match=f"mine is already there, with --{[*other][0]} "):
        prepared(tmp_path=tmp_path, **{**how, **other})


@pytest.mark.parametrize("last", ["images.npy", "labels.npy", "meta.json"])
def test_a_prepare_that_is_killed_leaves_no_set_and_can_be_repeated(last, tmp_path, monkeypatch):
    def killed(path, write, write_file=data.write_file):
        if path.endswith(last):
            raise KeyboardInterrupt
        write_file(path, write)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "write_file", killed)
        data.prepare("shapes", tmp_path, limit=30)
    with pytest.raises(data.UserError, match="python data.py prepare shapes"):
        data.open_set("shapes", tmp_path)
    assert data.prepare("shapes", tmp_path, limit=20) and len(data.open_set("shapes", tmp_path)) == 20


def test_leftovers_of_a_killed_prepare_are_replaced(tmp_path):
    (tmp_path / "shapes").mkdir()
    for name in (".lock", "images.npy", "images.npy.part", "labels.npy", "captions.jsonl", "skipped.txt"):
        (tmp_path / "shapes" / name).write_text("of another set")
    data.prepare("shapes", tmp_path, limit=30)
    assert files_in(tmp_path / "shapes") == ["images.npy", "labels.npy", "meta.json"]
    assert data.open_set("shapes", tmp_path).captions is None


def test_features_of_captions_that_are_gone_are_neither_kept_nor_lost(album, tmp_path):
    features = tmp_path / "sets/mine/text/words/tokens.npy"
    features.parent.mkdir(parents=True)
    features.write_text("of other captions")
    (tmp_path / "sets/mine/.lock").touch()
    with pytest.raises(data.UserError, match="features of captions that were there before: rm -r .*mine/text"):
        data.prepare("mine", tmp_path / "sets", album("a.png"))
    assert features.read_text() == "of other captions"


@pytest.mark.parametrize("file", ["labels.npy", "captions.jsonl", "cat.png"])
def test_files_of_somebodys_own_are_not_taken_for_leftovers(file, tmp_path):
    """Where the set would go, or where a link leads that --src names."""
    own = tmp_path / "sets/mine" / file
    own.parent.mkdir(parents=True)
    own.write_text("years of work")
    for _ in range(2):
        with pytest.raises(data.UserError, match="mine holds files, and no set: choose another name"):
            data.prepare("mine", tmp_path / "sets", str(tmp_path))
    (tmp_path / "elsewhere").symlink_to(own.parent)
    with pytest.raises(data.UserError, match="elsewhere lies in .*mine, where the set goes"):
        data.prepare("mine", tmp_path / "sets", str(tmp_path / "elsewhere"))
    assert own.read_text() == "years of work" and files_in(own.parent) == [file]


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=92_399))
    with pytest.raises(data.UserError, match="92,399 bytes free and .* needs 92,400 more: try --data-dir .* or --limit"):
        data.prepare("shapes", tmp_path, limit=30)
    assert files_in(tmp_path / "shapes") == []


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize("keep", [0, 20, -1000])
def test_a_damaged_set_is_refused_in_words(name, keep, tmp_path):
    data.prepare("shapes", tmp_path, limit=200)
    file = tmp_path / "shapes" / name
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(data.UserError, match="damaged.*rm -r .*shapes, and prepare"):
        data.open_set("shapes", tmp_path)


def test_files_of_two_different_sets_are_refused(tmp_path):
    data.prepare("shapes", tmp_path, limit=30)
    np.save(tmp_path / "shapes/labels.npy", np.zeros(29, np.int64))
    with pytest.raises(data.UserError, match="different lengths"):
        data.open_set("shapes", tmp_path)


@pytest.mark.parametrize("look", [data.open_set, data.describe])
def test_a_set_that_is_not_there_comes_with_the_command_that_makes_it(look, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = re.escape(f"`python data.py prepare cats --src FOLDER --data-dir {tmp_path}`")
    with pytest.raises(data.UserError, match=there):
        look("cats", str(tmp_path))
    with pytest.raises(data.UserError, match="in datasets; .*`python data.py prepare cats --src FOLDER` makes one"):
        look("cats", "datasets")


@pytest.mark.parametrize("name, size, classes", [
    ("cifar10", 32, 10), ("celeba64", 64, 0), ("church256", 256, 0), ("bedroom256", 256, 0), ("celebahq256", 256, 0),
    ("cub64", 64, 200), ("cub128", 128, 200), ("imagenet64", 64, 1000), ("cc12m64", 64, 0), ("laion128", 128, 0)])
def test_the_sets_of_the_paper_are_described_before_they_are_prepared(name, size, classes):
    described = data.describe(name, "/nowhere")
    assert described["size"] == size and len(set(described["classes"])) == len(described["classes"]) == classes


def test_what_is_mirrored_shows_no_letters_and_has_no_captions_that_speak_of_left_and_right():
    assert {name for name, row in data.BUILT_IN.items() if row["flip"]} == {
        "cifar10", "celeba64", "celebahq256", "church128", "church256", "bedroom256", "cub64", "cub128", "imagenet64"}


def test_a_built_in_set_is_described_without_the_disk():
    assert data.describe("shapes64", "/nowhere") == dict(size=64, classes=data.SHAPE_CLASSES, flip=False)
    with pytest.raises(data.UserError, match="not in /nowhere yet: `python data.py prepare shapes64 --data-dir /now"):
        data.open_set("shapes64", "/nowhere")


# ---- batches --------------------------------------------------------------------------------------------------------

class Numbered:
    """n pictures of 2 x 2 pixels, 3 channels: number i holds i in its left column and 100 + i in its right one."""
    def __init__(self, n):
        self.images = np.add.outer(np.arange(n), [[[0, 100]] * 2] * 3).astype(np.uint8)
        self.labels = np.arange(n) % 7

    def __len__(self):
        return len(self.images)

    def take(self, index, n):
        return self.images[index], index


def batches(n=10, batch=4, rows=None, seed=0, flip=False):
    return data.Batches(Numbered(n), batch, range(batch) if rows is None else rows, seed, flip)


def numbers(x):
    """Which pictures are in a batch, whether mirrored or not."""
    return x.min(-1).values[:, 0, 0].tolist()


def test_a_batch_is_the_same_whatever_was_asked_before():
    in_order = [batches(flip=True)[step] for step in range(12)]
    asked = batches(flip=True)
    for step in (11, 3, 7, 3, 0, 10):
        assert all(torch.equal(a, b) for a, b in zip(asked[step], in_order[step])), f"batch {step} came out different"


def test_every_picture_comes_once_an_epoch():
    seen = sum((numbers(batches()[step][0]) for step in range(10)), [])             # 4 epochs of 10, in batches of 4
    epochs = [seen[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs), epochs
    assert len(set(map(tuple, epochs))) == 4, f"two epochs have one order: {epochs}"


def test_labels_stay_with_their_pictures():
    x, y = batches(batch=20, flip=True)[3]
    assert y.dtype == torch.int64 and y.tolist() == [i % 7 for i in numbers(x)]


def test_another_seed_is_another_order():
    orders = {tuple(numbers(batches(seed=seed, batch=10)[0][0])) for seed in range(5)}
    assert len(orders) == 5, orders


def test_the_order_is_the_same_for_ever():
    assert numbers(batches(batch=10)[0][0]) == [5, 0, 3, 8, 4, 1, 9, 7, 2, 6]
    assert numbers(batches(batch=10, seed=7)[3][0]) == [2, 0, 1, 3, 9, 7, 5, 8, 4, 6]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_rows_of_the_one_batch(world):
    whole, _ = batches(batch=8, flip=True)[5]
    for rank in range(world):
        share, _ = batches(batch=8, flip=True, rows=range(rank, 8, world))[5]
        assert torch.equal(share, whole[rank::world]), f"rank {rank} of {world} has other pictures"


def test_half_of_the_pictures_are_mirrored_where_asked_and_none_elsewhere():
    plain, asked = batches(n=50, batch=4000)[0][0], batches(n=50, batch=4000, flip=True)[0][0]
    mirrored = asked[:, 0, 0, 0] > asked[:, 0, 0, 1]
    assert (plain[:, 0, 0, 0] < plain[:, 0, 0, 1]).all()
    assert torch.equal(torch.where(mirrored[:, None, None, None], plain.flip(-1), plain), asked)
    assert 0.47 < mirrored.float().mean() < 0.53, f"{mirrored.float().mean():.1%} are mirrored"
    assert len({*zip(numbers(asked), mirrored.tolist())}) == 100, "a picture is always mirrored, or never"


def test_a_set_without_classes_has_label_zero_throughout():
    unlabelled = batches()
    unlabelled.pictures.labels = None
    assert unlabelled[0][1].tolist() == [0, 0, 0, 0]


def test_loader_workers_bring_the_same_batches(datasets):
    shapes = data.Batches(data.open_set("shapes", datasets), 16, range(16), seed=0, flip=True)
    loader = torch.utils.data.DataLoader(shapes, sampler=range(3, 7), batch_size=None, num_workers=2)
    brought = [x for x, _ in loader]
    assert len(brought) == 4 and all(torch.equal(x, shapes[step][0]) for step, x in enumerate(brought, start=3))


def test_a_set_travels_to_a_worker_without_its_pictures(datasets):
    pictures = data.open_set("shapes", datasets)
    parcel = pickle.dumps(pictures)
    assert len(parcel) < 1000 and np.array_equal(pickle.loads(parcel).images, pictures.images), f"{len(parcel)} bytes"


# ---- show and export ------------------------------------------------------------------------------------------------

def test_show_draws_48_pictures_from_all_over_the_set(datasets, terminal, monkeypatch):
    texts, with_caption = [], data.with_caption
    monkeypatch.setattr(data, "with_caption", lambda image, text: texts.append(text) or with_caption(image, text))
    code, said, _ = terminal("show", "shapes", "--data-dir", datasets, "--out", "sheet.png")
    assert code == 0 and said.startswith("sheet.png: 48 of 200 pictures of 32x32, 24 classes: red circle, red square")
    sheet = np.asarray(Image.open("sheet.png"))
    cell_height, cell_width, gap = 128 + 28, 128, 6                                 # 28: two lines of text
    assert sheet.shape == (6 * (cell_height + gap) + gap, 8 * (cell_width + gap) + gap, 3)
    second = sheet[gap:gap + 128:4, 2 * gap + cell_width:2 * (gap + cell_width):4].transpose(2, 0, 1)
    assert np.array_equal(second, data.draw_shapes([200 // 48], 32)[0][0])
    assert texts == [data.SHAPE_CLASSES[label] for label in data.draw_shapes([i * 200 // 48 for i in range(48)], 32)[1]]


def test_show_goes_beside_the_set_and_prepares_a_built_in_one(terminal, monkeypatch):
    monkeypatch.setattr(data, "SHAPE_COUNT", 40)
    assert terminal("show", "shapes64")[0] == 0
    assert files_in("datasets/shapes64") == ["images.npy", "labels.npy", "meta.json", "show.png"]


def test_export_writes_single_pngs_and_an_npz(datasets, terminal):
    code, said, _ = terminal("export", "shapes", "--data-dir", datasets, "--out", "pngs", "--limit", 12)
    assert code == 0 and said == "pngs: 12 PNGs, and images.npz with 2 array(s)\n"
    assert files_in("pngs") == [f"{i:06d}.png" for i in range(12)] + ["images.npz"]
    images, labels = data.draw_shapes(np.arange(12), 32)
    with np.load("pngs/images.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], images.transpose(0, 2, 3, 1)) and np.array_equal(arrays["arr_1"], labels)
    assert np.array_equal(np.asarray(Image.open("pngs/000011.png")), images[11].transpose(1, 2, 0))


def test_export_overwrites_nothing(datasets, terminal, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        code, _, complaint = terminal("export", "shapes", "--data-dir", datasets, "--out", out)
        assert code == 2 and "is not a new or empty folder" in complaint and files_in(tmp_path) == ["thesis.tex"]


def test_an_export_that_was_stopped_does_not_look_like_a_finished_one(datasets, terminal, monkeypatch):
    def stopped(self, index):
        if index == 300:
            raise KeyboardInterrupt
        return take(self, index)

    take = data.Pictures.take
    with monkeypatch.context() as m:
        m.setattr(data.Pictures, "take", stopped)
        assert terminal("export", "shapes64", "--out", "pngs")[0] == 130
    assert "000299.png" in files_in("pngs") and "images.npz" not in files_in("pngs")
    code, _, complaint = terminal("export", "shapes64", "--out", "pngs")
    assert code == 2 and complaint.endswith("an export into it was stopped, or still runs; rm -r pngs\n")


def test_a_place_that_may_not_be_written_to_is_one_line_that_says_what_helps(tmp_path, monkeypatch):
    def forbidden(*args, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "makedirs", forbidden)
    with pytest.raises(data.UserError, match=r"no permission to write into .*shapes: .* use another --data-dir"):
        data.prepare("shapes", tmp_path)


# ---- the command line -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, says", [
    ("", "arguments are required: command"),
    ("paint shapes", "invalid choice: 'paint'"),
    ("prepare", "arguments are required: NAME"),
    ("prepare shapes --colour red", "there is no --colour red"),
    ("prepare shapes --lim 3", "there is no --lim 3"),
    ("prepare shapes --limit many", "invalid int value: 'many'"),
    ("prepare shapes --limit 0", "--limit must be at least 1, not 0"),
    ("prepare shapes --size 48", "shapes is always 32 pixels"),
    ("prepare shapes --src .", "they take no --src"),
    ("prepare .shapes", "'.shapes' cannot name a data set"),
    ("show pets/cats", "'pets/cats' cannot name a data set"),
    ("prepare cats", "Name their folder with --src FOLDER"),
    ("prepare cats --src nowhere", "nowhere is not a folder"),
    ("prepare cats --src . --size 4", "must be at least 8"),
    ("prepare cats --src .", "no pictures in"),
    ("prepare cifar10 --src nowhere.tar.gz", "nowhere.tar.gz is not a file"),
    ("prepare emoji64 --src nowhere.ttf", "no emoji font at"),
    ("show cats", "built-in sets are shapes, shapes64, emoji64, emoji128, cifar10"),
    ("show cifar10", "`python data.py prepare cifar10`"),
    ("show church256", "`python data.py prepare church256 --src PATH`, where PATH is church_outdoor_train_lmdb"),
    ("prepare celeba64", "`python data.py prepare celeba64 --src PATH`, where PATH is the folder with img_align"),
    ("prepare celeba64 --src . --crop face", "--crop face is none of: square"),
    ("prepare celeba64 --src . --crop bbox", "celeba64 has no such boxes"),
    ("prepare shapes --crop adm", "the pictures of shapes are square already"),
    ("prepare cats --src . --classes Smiling", "only celeba64 and celebahq256 have attributes"),
    ("prepare cub64 --src .", "is not CUB-200-2011"),
    ("prepare imagenet64 --src .", "no ImageNet in"),
    ("prepare laion128 --src .", "is no folder of .tar shards, and no lmdb"),
    ("prepare cats --src cut.zip", "cut.zip is not a folder, nor a zip"),
    ("show shapes --out nowhere/sheet.png", "cannot write --out nowhere/sheet.png"),
    ("show shapes --out sheet.txt", "cannot write --out sheet.txt"),
    ("prepare shapes --data-dir a_file", "cannot prepare shapes"),
    ("export shapes", "arguments are required: --out"),
    ("export shapes --out pngs --limit -1", "--limit must be at least 1, not -1"),
    ("prepare shapes --data-dir ''", "error: --data-dir must not be empty"),
    ("prepare ''", "'' cannot name a data set"),
])
def test_a_mistake_is_answered_with_one_line_and_exit_code_2(line, says, terminal, monkeypatch):
    monkeypatch.setattr(data, "SHAPE_COUNT", 8)
    Path("a_file").touch()
    Path("cut.zip").write_bytes(b"PK")
    code, _, complaint = terminal(*shlex.split(line))
    assert code == 2 and says in complaint, f"exit code {code}: {complaint}"
    assert complaint.startswith("error: ") and complaint.count("\n") == 1, complaint


def test_a_folder_whose_name_holds_two_spaces_is_named_as_it_is(terminal):
    Path("my  set").touch()
    _, _, complaint = terminal("prepare", "shapes", "--data-dir", "my  set")
    assert "my  set" in complaint, complaint


def test_a_mistake_in_a_real_terminal_shows_no_traceback(tmp_path):
    complaint = command("data.py", "prepare", "cats", "--src", "no\nwhere", cwd=tmp_path, code=2)
    assert complaint == f"error: --src {tmp_path}/no where is not a folder, nor a zip\n", "not one line"


def test_of_the_processes_of_a_node_the_first_one_complains(terminal, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert terminal("show", "cats") == (2, "", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "no data set 'cats'" in terminal("show", "cats")[2]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", "1")                           # left over from elsewhere
    assert "no data set 'cats'" in terminal("show", "cats")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are valid text")
def test_file_names_need_not_be_valid_text(album, terminal):
    src = album("good.png")
    Path(src, os.fsdecode(b"caf\xe9.png")).touch()
    code, said, _ = terminal("prepare", "mine", "--src", src)
    assert code == 0 and "caf\\udce9.png" in said, said
    assert "caf\\udce9.png" in Path("datasets/mine/skipped.txt").read_text()


def test_a_command_is_parsed_without_being_run():
    asked = vars(data.parse("prepare cats --src pictures --size 64 --limit 9 --crop 140 --classes Male,Smiling".split()))
    assert asked == dict(command="prepare", name="cats", data_dir="datasets", src="pictures", size=64, limit=9,
                         crop="140", classes=["Male", "Smiling"])


# ---- files, seeds and pixels ----------------------------------------------------------------------------------------

def test_a_file_that_cannot_be_written_leaves_the_old_one_as_it_was(tmp_path):
    def fill_the_disk(f):
        f.write(b"half of the new one")
        raise OSError("no space left")

    (tmp_path / "ckpt.pt").write_bytes(b"the old one")
    with pytest.raises(OSError, match="no space left"):
        data.write_file(tmp_path / "ckpt.pt", fill_the_disk)
    assert files_in(tmp_path) == ["ckpt.pt"] and (tmp_path / "ckpt.pt").read_bytes() == b"the old one"


def test_an_error_names_the_file_it_is_about(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*/absent/new: .*No such file"):
        data.write_file(tmp_path / "absent/new", lambda f: f.write(b"x"))
    with pytest.raises(OSError, match=r"^\[Errno 2\] No such file or directory: '.*/source'"):
        data.write_file(tmp_path / "new", lambda f: f.write((tmp_path / "source").read_bytes()))

    def encode(f):
        raise torch.OutOfMemoryError("the GPU is full")

    with pytest.raises(torch.OutOfMemoryError, match="^the GPU is full"):              # it is not about the file at all
        data.write_file(tmp_path / "new", encode)
    assert files_in(tmp_path) == []


def test_what_is_no_ordinary_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")                                                # /dev/null is one, too
    with pytest.raises(OSError, match="not a regular file"):
        data.write_file(tmp_path / "pipe", lambda f: f.write(b"gone"))
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("content, says", [
    (None, "No such file"), (b"", "cannot read"), (b"not a checkpoint", "cannot read"),
    (torch.zeros(3), "holds a Tensor, not a dict of weights"), (dict(config=Malice()), "cannot read")])
def test_what_is_no_checkpoint_is_refused_and_runs_no_code(content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("ckpt.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, "ckpt.pt")
    with pytest.raises(data.UserError, match=says):
        data.read_dict("ckpt.pt")
    assert not Path("pwned").exists()


def test_mix_of_one_number_is_the_published_splitmix64():
    assert [data.mix(i) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_mix_of_several_numbers_never_changes_and_is_the_same_for_arrays():
    assert data.mix(1, 2, 3) == 0x27D1DADE99DDF6A4 != data.mix(3, 2, 1)
    assert data.mix(np.arange(5), 7).tolist() == [data.mix(i, 7) for i in range(5)]
    assert data.mix(7, np.arange(-2, 2)).tolist() == [data.mix(7, i) for i in range(-2, 2)]


def test_no_two_pictures_of_a_run_share_their_noise():
    seeds = data.image_seeds(0, range(50_000))          # consecutive: of hashes to 32 bits, two would often be the same
    assert seeds == [(seeds[0] + i) % 2 ** 32 for i in range(50_000)]
    assert data.image_seeds(0, [7]) == seeds[7:8] != data.image_seeds(1, [7])


def test_to_uint8_undoes_what_training_does_to_pixels():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(levels.float() / 127.5 - 1), levels)
    assert data.to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    assert data.to_uint8(torch.ones(2, 3, dtype=torch.bfloat16)).tolist() == [[255] * 3] * 2


def test_a_grid_goes_row_by_row_with_white_between():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(4, 2).repeat(6, 3)     # (5, 3, 4, 6)
    sheet = np.asarray(data.grid(images, columns=3))
    assert sheet.shape == (2 + 2 * (4 + 2), 2 + 3 * (6 + 2), 3)
    assert sheet[3::6, 3::8, 0].tolist() == [[0, 1, 2], [3, 4, 255]] and (sheet[:2] == 255).all()
    assert data.grid(images[:2], columns=8).width == 2 + 2 * (6 + 2), "columns without a picture"


def test_spread_takes_evenly_from_a_list():
    assert data.spread(range(10), 3) == [0, 3, 6] and data.spread([1, 2], 5) == data.spread([1, 2], None) == [1, 2]
