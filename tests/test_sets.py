"""Every set of data.py, from small files in the format it is published in to pictures that a network trained on."""
import csv
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import data
import train
from conftest import command, need
from test_data import COLOURS, colours_of, files_in, quarters, terminal         # noqa: F401 (terminal is a fixture)

RED, BLUE = (250, 10, 20), (20, 30, 240)


def target(size, box, inside=RED, outside=BLUE):
    """A picture that shows where it was cut: one colour inside of the box, another around it."""
    image = Image.new("RGB", size, outside)
    image.paste(inside, box)
    return image


def save(image, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **{**dict(quality=100, subsampling=0), **how} if path.suffix == ".jpg" else how)


def encoded(image, kind):
    f = io.BytesIO()
    image.save(f, kind)
    return f.getvalue()


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def all_red(images):
    return abs(images.astype(int) - np.array(RED)[:, None, None]).max() < 12


# ---- the sets, as they are published --------------------------------------------------------------------------------
# Each function makes a small one in a folder and returns what --src must be.

FACE, MIDDLE_140 = (25, 57, 153, 185), (19, 39, 159, 179)


def celeba(folder, box=FACE):
    for i in range(1, 7):
        save(target((178, 218), box), folder / f"img_align_celeba/{i:06d}.jpg")
    smiles = [" 1", "-1", " 1", "-1", " 1", "-1"]
    write(folder / "list_attr_celeba.txt", "6", "5_o_Clock_Shadow Smiling Young ",
          *[f"{i:06d}.jpg -1 {smile}  1" for i, smile in enumerate(smiles, 1)])
    write(folder / "list_eval_partition.txt", *[f"{i:06d}.jpg {0 if i < 5 else i - 4}" for i in range(1, 7)])
    write(folder / "list_bbox_celeba.txt", "6", "image_id x_1 y_1 width height", "000001.jpg    95  71 226 313")
    return folder


def celebahq(folder):
    for i in range(12):
        save(Image.new("L", (320, 320), 20 * i), folder / f"CelebA-HQ-img/{i}.jpg")
        save(Image.new("L", (64, 64), 255), folder / f"CelebAMask-HQ-mask-anno/0/{i:05d}_hair.png")
    write(folder / "CelebAMask-HQ-attribute-anno.txt", "12", "Male Smiling",
          *[f"{i}.jpg  {1 if i % 2 else -1} {1 if i > 5 else -1}" for i in range(12)])
    return folder


def lsun(folder, spoil=(), key=lambda i: hashlib.sha1(bytes([i])).hexdigest().encode()):
    need_lmdb()
    import lmdb
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as view:
        for i, k in enumerate(sorted(map(key, range(6)))):
            blob = encoded(target((341, 256), (42, 0, 298, 256)), "webp" if i % 2 else "jpeg")
            view.put(k, b"not a picture" if i in spoil else blob)
    return folder


def need_lmdb():
    try:
        import lmdb                                                                     # noqa: F401
    except ImportError:
        need(False, "lmdb", "pip install lmdb")


def cub(folder):
    top, texts = folder / "CUB_200_2011", folder / "cvpr2016_cub/text_c10"
    kinds = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    birds = [f"{kinds[i // 3]}/{kinds[i // 3][4:]}_{i:04d}_{i}" for i in range(6)]
    for i, bird in enumerate(birds):                            # the first window leaves the picture on two sides
        window = (0, 0, 150, 120) if i == 0 else (50, 20, 200, 170)
        save(target((300, 240), window), top / f"images/{bird}.jpg")
        write(texts / f"{bird}.txt", *[f"this bird is number {i} in way {j}." for j in range(9 if i == 1 else 10)])
    (texts / f"{birds[3]}.txt").write_bytes(b"a bird\xff\xfe with a red\xff\xff beak\n\n  \nsecond\n")
    (texts / f"{kinds[0]}.t7").write_bytes(b"torch")
    write(top / "images.txt", *[f"{i + 1} {bird}.jpg" for i, bird in enumerate(birds)])
    write(top / "bounding_boxes.txt", "1 25.0 5.0 100.0 80.0",              # 1.5 x 100 around (75, 45)
          *[f"{i} 75.0 65.0 100.0 60.0" for i in range(2, 7)])              # 1.5 x 100 around (125, 95)
    write(top / "image_class_labels.txt", *[f"{i + 1} {i // 3 + 1}" for i in range(6)])
    write(top / "train_test_split.txt", *[f"{i + 1} {0 if i == 4 else 1}" for i in range(6)])
    write(top / "classes.txt", *[f"{i + 1} {kind}" for i, kind in enumerate(kinds)])
    return folder


def imagenet_pixels(batch):
    return np.random.RandomState(batch).randint(0, 256, (4, 3 * 64 * 64)).astype(np.uint8)


def imagenet(folder):
    for batch in (1, 2, 10):
        np.savez(folder / f"train_data_batch_{batch}.npz", data=imagenet_pixels(batch),
                 labels=np.array([1, 1000, 7, batch]), mean=np.zeros(12288))
    np.savez(folder / "val_data.npz", data=imagenet_pixels(0), labels=np.ones(4, int))
    return folder


CAPTIONS = ["a red thing", "", "<PERSON> at the sea", "caf\u00e9", "a cut picture", "last"]


def shards(folder, spoil=True):
    """Two shards as img2dataset leaves them: members by completion, with gaps, here a broken picture (the third of
    shard 0), a caption that is empty and one that is missing, and an end that was cut off."""
    for shard, keys in enumerate([[3, 0, 2], [5, 1, 4]]):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, key in enumerate(keys):
                number = 3 * shard + place
                blob = encoded(Image.new("RGB", (160, 128), (40 * number, 0, 0)), "jpeg")
                files = dict(jpg=blob[:300] if spoil and number == 2 else blob,
                             json=json.dumps(dict(caption=CAPTIONS[number], key=f"{shard:05d}{key:04d}")).encode(),
                             txt=CAPTIONS[number].encode())
                if number == 3:
                    del files["txt"]
                for kind, content in files.items():
                    member = tarfile.TarInfo(f"{shard:05d}{key:04d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    end = tar.offset
        write(folder / f"{shard:05d}_stats.json", "{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    if spoil:                                                   # the last caption is gone, and half of its picture
        os.truncate(folder / "00001.tar", end - 4 * 512 - len(blob) // 2)
    return folder


def edm(folder, labels=True):
    with zipfile.ZipFile(folder / "set.zip", "w") as z:
        names = [f"{i // 1000:05d}/img{i:08d}.png" for i in (0, 1, 1000, 2)]
        for i, name in enumerate(names):
            z.writestr(name, encoded(Image.new("RGB", (64, 64), (60 * i, 0, 0)), "png"))
        z.writestr("dataset.json", json.dumps(dict(labels=[[n, i % 3] for i, n in enumerate(names)] if labels else None)))
    return folder / "set.zip"


def captioned_folder(folder):
    for name, grey in {"a.png": 10, "sub/b.PNG": 20, "c.png": 30}.items():
        save(Image.new("L", (64, 64), grey), folder / name)
    write(folder / "a.txt", "\ufeffthe first", "", "also the first")          # the mark of Windows' editors
    write(folder / "sub/b.txt", "the second")
    write(folder / "c.txt", "the third")
    return folder


SETS = {            # name: what makes it, pictures in it, classes, first caption
    "celeba64": (celeba, 4, 0, None), "celebahq256": (celebahq, 12, 0, None), "church256": (lsun, 6, 0, None),
    "bedroom256": (lsun, 6, 0, None), "cub64": (cub, 5, 2, "this bird is number 0 in way 0."),
    "cub128": (cub, 5, 2, "this bird is number 0 in way 0."), "imagenet64": (imagenet, 12, 1000, None),
    "cc12m64": (shards, 5, 0, "a red thing"), "laion128": (shards, 5, 0, "a red thing"),
    "edm": (edm, 4, 3, None), "mine": (captioned_folder, 3, 0, "the first"),
}


@pytest.fixture
def published(tmp_path):
    """published(make, ...) is a set in its published form: what --src must be."""
    def make(build, *args, **how):
        folder = tmp_path / "published"
        folder.mkdir()
        return build(folder, *args, **how)

    return make


def opened(name, src, data_dir, **how):
    data.prepare(name, data_dir, src=str(src), **how)
    return data.open_set(name, data_dir)


@pytest.fixture
def trained(monkeypatch):
    """trained(name, out, "--lr", ...) trains a tiny network for three steps, in this process."""
    def run(name, out, *flags):
        size = data.describe(name, "datasets")["size"]
        net = json.dumps(dict(patch_size=size // 4, dim=32, depth=3, heads=2))
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", "uvit", "--data", name, "--out", out, "--net", net,
                                          *"--steps 3 --batch 4 --samples 2 --sample-steps 1 --device cpu "
                                           "--dtype float32 --workers 0".split(), *flags])
        train.main()

    return run


@pytest.mark.parametrize("name", SETS)
def test_a_set_goes_from_its_published_form_to_a_trained_network(name, published, terminal, trained):    # noqa: F811
    build, n, classes, caption = SETS[name]
    src = published(build)
    code, said, complaint = terminal("prepare", name, "--src", src)
    assert code == 0 and f" pictures of {data.describe(name, 'datasets')['size']}x" in said, complaint
    pictures = data.open_set(name, "datasets")
    assert len(pictures) == n and len(pictures.classes) == classes and (pictures.labels is None) == (classes == 0)
    assert (pictures.captions and pictures.captions[0][0]) == caption
    assert terminal("prepare", name)[1].endswith(f"already prepared, with {n} pictures: nothing to do\n")

    code, said, complaint = terminal("show", name)
    assert code == 0 and f"show.png: {n} of {n} pictures" in said, complaint
    code, said, complaint = terminal("export", name, "--out", "pngs")
    assert code == 0, complaint
    with np.load("pngs/images.npz") as arrays:
        assert arrays["arr_0"].shape == (n, pictures.size, pictures.size, 3) and ("arr_1" in arrays) == (classes > 0)
        assert np.array_equal(arrays["arr_0"].transpose(0, 3, 1, 2), pictures.take(np.arange(n))[0])
        assert np.array_equal(np.asarray(Image.open(f"pngs/{n - 1:06d}.png")), arrays["arr_0"][-1])

    trained(name, "run")
    assert [line.split(",")[0] for line in Path("run/log.csv").read_text().splitlines()] == ["step", "3"]


def test_training_on_a_published_set_that_is_not_there_says_how_to_prepare_it(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError, match="cub64 is not in datasets yet: `python data.py prepare cub64 --src PATH`"):
        trained("cub64", "run")
    with pytest.raises(data.UserError, match="cub64 is not in datasets yet: `python data.py prepare cub64 --src PATH`"):
        trained("cub64", "run", "--cond", "text")
    assert files_in(tmp_path) == []


# ---- crops and labels -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("box, crop", [(FACE, None), (MIDDLE_140, "140"), ((0, 0, 178, 178), "0,0,178,178")])
def test_faces_are_cut_at_exactly_the_published_box(box, crop, published, tmp_path):
    pictures = opened("celeba64", published(celeba, box), tmp_path, crop=crop)
    assert all_red(pictures.images), f"blue shows at the edges: {pictures.images[0, :, [0, 32, -1], 32]}"
    assert data.read_meta(pictures.folder)["crop"] == (crop or "25,57,153,185")


@pytest.mark.parametrize("table", ["as published", "by Kaggle", "with faces as .png"])
def test_attributes_of_faces_become_classes_when_asked(table, published, tmp_path):
    src = published(celeba)
    if table == "with faces as .png":
        for face in (src / "img_align_celeba").iterdir():
            save(Image.open(face), face.with_suffix(".png"))
            face.unlink()
    if table == "by Kaggle":
        for name in ("list_attr_celeba", "list_eval_partition"):
            rows = [line.split() for line in (src / f"{name}.txt").read_text().splitlines()]
            rows = [["image_id", *rows[1]], *rows[2:]] if "attr" in name else [["image_id", "partition"], *rows]
            write(src / f"{name}.csv", *map(",".join, rows))
            (src / f"{name}.txt").unlink()
        (src / "img_align_celeba").rename(src / "inner")
        (src / "img_align_celeba").mkdir()
        (src / "inner").rename(src / "img_align_celeba/img_align_celeba")
    pictures = opened("celeba64", src, tmp_path, classes=["Smiling"])
    assert pictures.classes == ["not Smiling", "Smiling"] and pictures.labels.tolist() == [1, 0, 1, 0]
    assert data.describe("celeba64", tmp_path)["classes"] == pictures.classes
    shutil.rmtree(tmp_path / "celeba64")
    both = opened("celeba64", src, tmp_path, classes=["Smiling", "Young"])
    assert both.classes[both.labels[1]] == "not Smiling, Young" and len(both.classes) == 4
    shutil.rmtree(tmp_path / "celeba64")
    with pytest.raises(data.UserError, match="no Happy in list_attr_celeba.*there are .*Smiling"):
        opened("celeba64", src, tmp_path, classes=["Happy"])
    with pytest.raises(data.UserError, match="11 attributes make 2.11 classes"):
        opened("celeba64", src, tmp_path, classes=["Smiling"] * 11)


def test_celeba_without_its_split_says_that_it_takes_all(published, tmp_path, capsys):
    src = published(celeba)
    (src / "list_eval_partition.txt").unlink()
    assert len(opened("celeba64", src, tmp_path)) == 6 and "taking all pictures" in capsys.readouterr().err


def test_celebahq_is_in_the_order_of_its_numbers_and_knows_its_attributes(published, tmp_path):
    pictures = opened("celebahq256", published(celebahq), tmp_path, classes=["Smiling"])
    assert abs(pictures.images[:, 0, 0, 0].astype(int) - 20 * np.arange(12)).max() < 3, "10.jpg came before 2.jpg"
    assert pictures.labels.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize("name", ["church256", "bedroom256"])
def test_lsun_keeps_the_order_of_its_keys_and_the_middle_of_its_pictures(name, published, tmp_path):
    src = published(lsun)
    pictures = opened(name, src, tmp_path)
    assert abs(pictures.take(np.arange(6))[0].astype(int) - np.array(RED)[:, None, None]).mean() < 6
    assert (pictures.images is None) == (name == "bedroom256"), "only bedroom stays in place"
    assert len(opened("few", src, tmp_path, limit=2)) == 2


def test_birds_are_cut_around_their_boxes_and_come_with_species_and_captions(published, tmp_path):
    pictures = opened("cub64", published(cub), tmp_path)
    assert all_red(pictures.images), "blue shows at the edges"
    assert pictures.classes == ["Black footed Albatross", "Laysan Albatross"]
    assert pictures.labels.tolist() == [0, 0, 0, 1, 1], "not the training pictures"
    assert list(map(len, pictures.captions)) == [10, 9, 10, 2, 10]
    assert pictures.captions[3] == ["a bird with a red beak", "second"]


def test_birds_without_captions_are_still_a_set(published, tmp_path, capsys):
    src = published(cub)
    shutil.rmtree(src / "cvpr2016_cub")
    assert opened("cub64", src, tmp_path).captions is None and "without captions" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [None, 6])
def test_imagenet_batches_follow_their_numbers_and_labels_start_at_zero(limit, published, tmp_path, capsys):
    pictures = opened("imagenet64", published(imagenet), tmp_path, limit=limit)
    pixels = np.concatenate([imagenet_pixels(batch) for batch in (1, 2, 10)])
    assert np.array_equal(pictures.images.reshape(-1, 12288), pixels[:limit])
    assert pictures.labels.tolist() == [0, 999, 6, 0, 0, 999, 6, 1, 0, 999, 6, 9][:limit]
    assert "has 3 of the 10 batches: taking those" in capsys.readouterr().err, "one of two archives, perhaps"


def test_imagenet_classes_have_names_and_the_usual_order_where_the_list_is_there(published, tmp_path):
    src = published(imagenet)
    theirs = ["n02119789 1 kit_fox", "n02100735 2 English_setter",
              *(f"n{9_000_000 - i:08} {i} thing_{i}" for i in range(3, 1001))]
    write(src / "map_clsloc.txt", *theirs)
    pictures = opened("imagenet64", src, tmp_path)
    assert pictures.classes == [f"{name.replace('_', ' ')} {wnid}" for wnid, _, name in sorted(map(str.split, theirs))]
    assert pictures.classes[:2] == ["English setter n02100735", "kit fox n02119789"]
    assert pictures.labels.tolist() == [1, 2, 995, 1, 1, 2, 995, 0, 1, 2, 995, 992]        # theirs: 1, 1000, 7, 1, ..
    write(src / "map_clsloc.txt", *theirs[:-1])
    with pytest.raises(data.UserError, match="map_clsloc.txt in .* is not the published list"):
        opened("imagenet64", src, tmp_path / "cut")


def test_imagenet_without_the_list_has_an_order_of_its_own(published, tmp_path, capsys):
    assert opened("imagenet64", published(imagenet), tmp_path).classes[999] == "class 1000"
    assert "no map_clsloc.txt: classes without names, in another order" in capsys.readouterr().err


@pytest.mark.parametrize("harm, says", [
    (dict(labels=np.array([0, 1, 2, 3])), "with labels 1 .. 1000"),
    (dict(data=np.zeros((4, 3072), np.uint8)), "not 4 pictures of 64 pixels"), (None, "cannot prepare imagenet64: ")])
def test_what_is_not_imagenet_is_refused(harm, says, published, tmp_path):
    src = published(imagenet)
    np.savez(src / "train_data_batch_2.npz", **{**dict(data=imagenet_pixels(2), labels=np.ones(4, int)), **(harm or {})})
    if harm is None:
        os.truncate(src / "train_data_batch_2.npz", 1000)
    with pytest.raises(data.UserError, match=says):
        opened("imagenet64", src, tmp_path)
    assert data.read_meta(tmp_path / "imagenet64") is None


def test_adm_cuts_where_adm_cuts(tmp_path):
    """1600 x 1200 to 64: halved to 100 x 75, scaled to 85 x 64, cut at (85 - 64) // 2 = 10 pixels, 188 of the original;
    the middle starts at 200. And so if it stands upright."""
    for left, seen_by_adm in ((186, False), (195, True)):
        wide = target((1600, 1200), (left, 0, 1600, 1200))
        for image, axes in ((wide, (0, 1, 2)), (wide.transpose(Image.Transpose.TRANSPOSE), (0, 2, 1))):
            save(image, tmp_path / "picture.png")
            adm, square = (data.load_square(str(tmp_path / "picture.png"), 64, crop).astype(int).transpose(axes)
                           for crop in ("adm", "square"))
            assert adm.shape == (3, 64, 64) and (adm[0, 32, 0] < RED[0] - 30) == seen_by_adm, f"red starts at {left}"
            assert abs(square[0] - RED[0]).max() < 12 and abs(adm[0, :, 2:] - RED[0]).max() < 12


def test_adm_halves_a_picture_of_just_twice_the_size(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (128, 128, 3), np.uint8)
    save(Image.fromarray(pixels), tmp_path / "picture.png")
    halved = pixels.transpose(2, 0, 1).reshape(3, 64, 2, 64, 2).mean((2, 4))
    assert abs(data.load_square(str(tmp_path / "picture.png"), 64, "adm") - halved).max() <= 1


@pytest.mark.parametrize("width, crop, left", [
    (341, "square", 42), (342, "square", 43), (341, "adm", 42), (400, "59,0,400,256", 59 + 42)])
def test_a_picture_of_the_right_height_is_cut_and_not_resampled(width, crop, left, tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (256, width, 3), np.uint8)        # LSUN's are often 341 x 256
    save(Image.fromarray(pixels), tmp_path / "picture.png")
    square = data.load_square(str(tmp_path / "picture.png"), 256, crop)
    assert (square == pixels[:, left:left + 256].transpose(2, 0, 1)).all()


# ---- odd and broken pictures that Pillow does not write -------------------------------------------------------------

def png(width, height, depth, colour, pixels=b""):
    """A PNG chunk by chunk; colour 2 is RGB."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def reason(content, tmp_path):
    (tmp_path / "picture").write_bytes(content)
    return data.load_or_reason(lambda: open(tmp_path / "picture", "rb"), 32)


def test_sixteen_bits_of_colour_and_exif_that_is_none_are_no_obstacle(tmp_path):
    wide = (np.asarray(quarters()).astype(">u2") * 257).reshape(96, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    jpeg = io.BytesIO()
    quarters().save(jpeg, "jpeg", exif=b"Exif\0\0MM nothing that makes sense")
    for content in (png(96, 96, 16, 2, rows), jpeg.getvalue()):
        square = reason(content, tmp_path)
        assert not isinstance(square, str) and abs(colours_of(square) - COLOURS).max() < 6, square


@pytest.mark.parametrize("content, says", [
    (b"", "UnidentifiedImageError"), (b"<html>404</html>", "cannot identify image file the file"),
    (encoded(quarters(), "webp")[:-20], "Error"), (encoded(quarters(), "jpeg")[:200], "Error"),
    (encoded(quarters(), "png")[:100], "Error"),
    (png(40, 40, 8, 2).replace(b"IHDR\0", b"IHDR\1"), "UnidentifiedImageError"),
    (png(20_000, 20_000, 8, 2), "DecompressionBombError"), (png(40, 40, 8, 2), "Error"),
], ids=["empty", "a page", "cut webp", "cut jpeg", "cut png", "wrong checksum", "400 megapixels", "no pixels"])
def test_what_is_wrong_with_a_picture_is_said_the_same_every_time(content, says, tmp_path):
    first, again = reason(content, tmp_path), reason(content, tmp_path)
    assert isinstance(first, str) and says in first and first == again, first


# ---- folders and zips -----------------------------------------------------------------------------------------------

def test_an_edm_zip_has_the_labels_of_its_list_and_no_classes_without(published, tmp_path):
    src = published(edm)
    pictures = opened("zipped", src, tmp_path)
    assert pictures.images[:, 0, 0, 0].tolist() == [0, 60, 180, 120] and pictures.labels.tolist() == [0, 1, 0, 2]
    edm(src.parent, labels=False)
    pictures = opened("unlabelled", src, tmp_path)
    assert pictures.classes == [] and pictures.images.shape == (4, 3, 64, 64), "00000 and 00001 are no classes"


def test_a_folder_around_everything_in_a_zip_is_no_class(tmp_path):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as z:
        for name in ("pets/cat/1.png", "pets\\dog\\1.png"):                  # the latter by Windows of old
            z.writestr(name, encoded(Image.new("RGB", (64, 64)), "png"))
    pictures = opened("pets", tmp_path / "pets.zip", tmp_path)
    assert pictures.classes == ["cat", "dog"] and pictures.labels.tolist() == [0, 1]


def test_a_list_of_labels_that_does_not_fit_is_refused(published, tmp_path):
    src = published(captioned_folder)
    write(src / "dataset.json", '{"labels": [["a.png", 0]]}')
    with pytest.raises(data.UserError, match="no label for 2 of its pictures, such as 'c.png'"):
        opened("mine", src, tmp_path)
    for labels in ("[1, 2]", '{"labels": [["a.png", Infinity]]}'):
        write(src / "dataset.json", labels)
        with pytest.raises(data.UserError, match="dataset.json in .* is no"):
            opened("mine", src, tmp_path)
    write(src / "dataset.json", '{"labels": [["a.png", 0], ["c.png", 1], ["sub/b.PNG", 2119789]]}')
    with pytest.raises(data.UserError, match="a label 2119789 for 3 pictures"):
        opened("mine", src, tmp_path)


def test_captions_come_from_the_text_beside_a_picture(published, tmp_path):
    pictures = opened("mine", src := published(captioned_folder), tmp_path)
    assert list(pictures.captions) == [["the first", "also the first"], ["the third"], ["the second"]]
    (src / "c.txt").write_text("das dritte, größer", encoding="utf-16")                     # as Windows' PowerShell
    (src / "a.txt").write_bytes("a line\u2028separator\rnext\r\n\x0clast\n".encode())
    captions = opened("again", src, tmp_path).captions
    assert captions[1] == ["das dritte, größer"] and captions[0] == ["a line separator", "next", "last"]


def test_of_your_own_pictures_only_those_without_captions_are_mirrored(published, tmp_path):
    src = published(captioned_folder)
    assert not opened("mine", src, tmp_path).flip, "a caption may tell left from right"
    for file in src.rglob("*.txt"):
        file.unlink()
    assert opened("bare", src, tmp_path).flip
    with pytest.raises(data.UserError, match="bare has no captions"):
        data.find_encoder("bare", tmp_path, "words")


def test_a_metadata_table_goes_before_the_text_beside(published, tmp_path, capsys):
    src = published(captioned_folder)
    with open(src / "metadata.csv", "w", newline="") as f:
        csv.writer(f).writerows([["file_name", "prompt"], ["a.png", 'one, with "commas"'], ["sub/b.PNG", "two"]])
    pictures = opened("by_csv", src, tmp_path)
    assert list(pictures.captions) == [['one, with "commas"'], [""], ["two"]]
    assert "1 of 3 pictures have no caption" in capsys.readouterr().err
    write(src / "metadata.csv", "file_name,prompt", "a.png,one", "c.png,three")
    write(src / "sub/metadata.csv", "file_name,prompt", "b.PNG,two")
    assert list(opened("by_two", src, tmp_path).captions) == [["one"], ["three"], ["two"]]
    (src / "metadata.csv").write_text("file_name,prompt,\r\na.png,größer, , \r\n", encoding="utf-16")   # as PowerShell
    assert opened("by_windows", src, tmp_path).captions[0] == ["größer"]
    (src / "metadata.csv").write_text("file_name,prompt\na.png,größer\n", encoding="latin-1")
    with pytest.raises(data.UserError, match="metadata.csv in .*should hold file_name and text .*UnicodeDecodeError"):
        opened("by_another", src, tmp_path)
    (src / "metadata.csv").unlink()
    write(src / "metadata.jsonl", '{"file_name": "a.png", "text": ["x", null, "y"], "id": 3}', "",
          '{"file_name": "c.png", "text": "z"}')
    write(src / "sub/metadata.jsonl", '{"file_name": "b.PNG", "text": "w"}')
    assert list(opened("by_jsonl", src, tmp_path).captions) == [["x", "y"], ["z"], ["w"]]


def test_a_metadata_table_may_have_several_rows_for_a_picture(published, tmp_path):
    src = published(captioned_folder)
    write(src / "metadata.csv", "file_name,text", "a.png,one", "c.png,three", "a.png,two")
    assert list(opened("mine", src, tmp_path).captions) == [["one", "two"], ["three"], [""]]


def test_a_metadata_table_without_captions_is_told_of(published, tmp_path, capsys):
    src = published(captioned_folder)
    write(src / "metadata.csv", "file_name;text", "a.png;one")                  # a semicolon is no comma
    assert len(opened("mine", src, tmp_path).captions) == 3
    assert "metadata.csv in" in (told := capsys.readouterr().err) and "gives no captions" in told
    write(src / "metadata.csv", "file_name,text", "a.png,one")
    write(src / "metadata.jsonl", '{"file_name": "a.png", "label": 3}')
    assert opened("other", src, tmp_path).captions[0] == ["one"], "a table without captions hides none that has some"


@pytest.mark.parametrize("table, says", [
    ('{"file_name": "a.png", "text": "x"}\n{"file_name": "d.png", "text": "y"}', "1 files that are not in .*: d.png"),
    ('{"text": "x"}', "should hold file_name and text in every row"), ("not json", "should hold file_name and text"),
    ('["a.png", "x"]', "should hold file_name and text"),
    ('file_name,text\na.png,"no end\nc.png,x', "should hold file_name and text"),
    ("file_name,text\na.png,x\nc.png,a cat, sitting", "more cells than columns .texts that hold commas need quotes")])
def test_a_metadata_table_that_does_not_fit_is_refused(table, says, published, tmp_path):
    src = published(captioned_folder)
    write(src / f"metadata.{'csv' if table.startswith('file') else 'jsonl'}", table)
    with pytest.raises(data.UserError, match=says):
        opened("mine", src, tmp_path)


def test_captions_stay_on_the_disk(published, tmp_path):
    pictures = opened("mine", published(captioned_folder), tmp_path)
    with pytest.raises(IndexError):
        pictures.captions[3]
    Path(pictures.folder, "captions.jsonl").write_text('["a"]\n["b"]\n')
    with pytest.raises(data.UserError, match="different lengths"):
        data.open_set("mine", tmp_path)
    Path(pictures.folder, "captions.jsonl").unlink()
    with pytest.raises(data.UserError, match="mine is damaged .*captions.jsonl.*and prepare it again"):
        data.open_set("mine", tmp_path)


# ---- sets that stay in place ----------------------------------------------------------------------------------------

def test_shards_are_indexed_and_their_captions_read_in_place(published, tmp_path, capsys):
    src = published(shards)
    pictures = opened("cc12m64", src, tmp_path)
    assert files_in(pictures.folder) == ["index.npy", "meta.json"]
    assert pictures.place.names[:, :2].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]], "shard and number in it"
    assert list(pictures.captions) == [["a red thing"], [""], ["<PERSON> at the sea"], [""], ["a cut picture"]]
    warning = capsys.readouterr().err
    assert "00001.tar: " in warning and "it gave 2 pictures" in warning, "not a word of the end that is missing"
    meta = data.read_meta(pictures.folder)
    assert meta["shards"] == ["00000.tar", "00001.tar"] and meta["n"] == 5 and meta["crop"] == "square"


@pytest.mark.parametrize("harm", ["noise", "zeros", "another tar behind it"])
def test_a_shard_that_ends_before_its_file_does_is_told(harm, published, tmp_path, capsys):
    """tarfile ends without a word where the next header should be and is not."""
    src = published(shards, spoil=False)
    file = src / "00000.tar"
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        at = tar.getmembers()[3].offset
    spoilt = {"noise": b"\xa5" * 512, "zeros": bytes(512)}.get(harm)
    file.write_bytes(whole[:at] + spoilt + whole[at + 512:] if spoilt else whole + whole)
    assert len(opened("cc12m64", src, tmp_path)) == (4 if spoilt else 6)
    end = at if spoilt else max(i for i in range(0, len(whole), 512) if any(whole[i - 512:i]))
    assert f"00000.tar: damaged at byte {end:,}" in capsys.readouterr().err


def test_a_shard_with_a_header_of_absurd_size_is_told_and_keeps_what_comes_before(published, tmp_path, capsys):
    src = published(shards, spoil=False)
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2 ** 62
    with tarfile.open(src / "00000.tar") as tar:
        end = tar.getmembers() and tar.offset                                   # where the zeros begin
    os.truncate(src / "00000.tar", end)
    with open(src / "00000.tar", "ab") as f:
        f.write(header.tobuf(tarfile.GNU_FORMAT))
    assert len(opened("cc12m64", src, tmp_path)) == 6 and "00000.tar: " in capsys.readouterr().err


def test_a_tar_of_all_pictures_and_then_all_texts_has_its_captions(published, tmp_path):
    src = published(captioned_folder)
    with tarfile.open(src / "0.tar", "w") as tar:
        for kind in ("png", "txt"):
            for name in ("a", "c"):
                tar.add(src / f"{name}.{kind}", f"{name}.{kind}")
    assert list(opened("beside", src, tmp_path).captions)[1:] == [["the third"], ["the second"]], "of the pictures there"
    only = tmp_path / "only"
    only.mkdir()
    (src / "0.tar").rename(only / "0.tar")
    captions = opened("shards", only, tmp_path).captions
    assert [captions[0], captions[1]] == [["the first", "also the first"], ["the third"]]


def test_shards_without_any_text_are_a_set_without_captions(published, tmp_path):
    src = published(captioned_folder)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        tar.add(src / "a.png", "a.png")
    pictures = opened("bare", tmp_path / "tars", tmp_path)
    assert pictures.captions is None and pictures.flip
    with pytest.raises(data.UserError, match="bare has no captions"):
        data.find_encoder("bare", tmp_path, "words")


def test_pictures_with_two_dots_in_a_tar_are_told_of(published, tmp_path, capsys):
    src = published(captioned_folder)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        for name in ("a.png", "b.0.png", "b.1.png"):
            tar.add(src / "a.png", name)
    assert len(opened("dotted", tmp_path / "tars", tmp_path)) == 1
    assert "2 pictures have a second dot in their names" in capsys.readouterr().err


def test_shards_that_are_others_by_now_are_refused(published, tmp_path):
    src = published(shards)
    pictures = opened("set", src, tmp_path)
    with open(src / "00000.tar", "ab") as f:
        f.write(bytes(512))
    says = f"have changed since .*: rm -r {re.escape(pictures.folder)}, and prepare it again"
    with pytest.raises(data.UserError, match=says):
        data.open_set("set", tmp_path)
    assert len(opened("first", src, tmp_path, limit=2)) == 2
    (src / "00001.tar").unlink()                                                # none of its pictures
    assert len(data.open_set("first", tmp_path)) == 2


def test_the_next_picture_stands_in_for_a_broken_one_with_its_caption_and_is_listed_once(published, tmp_path):
    pictures = opened("cc12m64", published(shards), tmp_path)
    for _ in range(2):
        images, numbers = pictures.take(np.array([4, 2, 0]))
        assert numbers.tolist() == [4, 3, 0]
        assert abs(images[:, 0, 0, 0].astype(int) - 40 * numbers).max() < 3
    skipped = Path(pictures.folder, "skipped.txt").read_text().splitlines()
    assert len(skipped) == 1 and skipped[0].startswith("00000.tar/000000002.jpg\tOSError: "), skipped
    x, _ = data.Batches(pictures, 5, range(5), seed=0, flip=False)[0]
    assert sorted(round(int(level) / 40) for level in x[:, 0, 0, 0]) == [0, 1, 3, 3, 4]


def test_workers_bring_the_same_batches_from_shards_and_lmdb(published, tmp_path):
    for name, build in (("cc12m64", shards), ("bedroom256", lsun)):
        (tmp_path / name).mkdir()
        pictures = opened(name, build(tmp_path / name), tmp_path / "sets")
        batches = data.Batches(pictures, 4, range(4), seed=0, flip=True)
        parcel = pickle.dumps(batches)                          # how workers get them where there is no fork
        assert len(parcel) < 1000 and torch.equal(pickle.loads(parcel)[0][0], batches[0][0])
        loader = torch.utils.data.DataLoader(batches, sampler=range(3), batch_size=None, num_workers=1)
        assert all(torch.equal(x, batches[step][0]) for step, (x, _) in enumerate(loader))


def test_a_limit_indexes_the_first_and_a_lost_shard_is_an_error(published, tmp_path):
    src = published(shards, spoil=False)
    few = opened("few", src, tmp_path, limit=4, size=32)
    assert len(few) == 4 and few.size == 32 and few.take(np.array([3]))[0].shape == (1, 3, 32, 32)
    (src / "00001.tar").unlink()
    with pytest.raises(FileNotFoundError):
        few.take(np.array([3]))


def test_a_picture_beside_shards_that_are_asked_for_is_none_of_theirs(published, tmp_path):
    src = published(shards, spoil=False)
    (src / "logo.png").write_bytes(encoded(target((64, 64), (0, 0, 64, 64)), "png"))
    assert len(opened("cc12m64", src, tmp_path)) > 1
    assert len(opened("mine", src, tmp_path)) == 1, "of a set of one's own pictures come first"


def test_shards_without_a_picture_are_refused(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/0.tar").write_bytes(b"nothing" * 1000)
    with pytest.raises(data.UserError, match="no pictures that can be read"):
        opened("cc12m64", tmp_path / "src", tmp_path)


def test_an_lmdb_stays_in_place_without_its_broken_pictures(published, tmp_path):
    pictures = opened("bedroom256", published(lsun, spoil=[5]), tmp_path)
    assert pictures.take(np.array([5, 4]))[1].tolist() == [0, 4], "the first stands in for the last"


def test_keys_of_an_lmdb_may_be_binary_numbers(published, tmp_path):
    src = published(lsun, key=lambda i: bytes([0, 255, i, 0]), spoil=[5])
    assert len(opened("mine", src, tmp_path)) == 5
    assert opened("bedroom256", src, tmp_path).take(np.arange(6))[1].tolist() == [0, 1, 2, 3, 4, 0]
    assert "\\udcff" in (tmp_path / "bedroom256/skipped.txt").read_text()


def test_without_lmdb_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "data.mdb").touch()
    with pytest.raises(data.UserError, match="pip install lmdb"):
        opened("church256", tmp_path, tmp_path / "sets")


def test_a_set_whose_source_is_away_is_not_called_damaged(published, tmp_path):
    src = published(lsun)
    opened("bedroom256", src, tmp_path)
    src.rename(tmp_path / "unplugged")
    data.open_lmdb.cache_clear()
    with pytest.raises(data.UserError, match="is not a readable lmdb") as e:
        data.open_set("bedroom256", tmp_path)
    assert "rm -r" not in str(e.value)


def test_an_lmdb_that_is_cut_short_is_one_line_and_no_bus_error(published, tmp_path):
    src = published(lsun)
    os.truncate(src / "data.mdb", os.path.getsize(src / "data.mdb") // 2)
    with pytest.raises(data.UserError, match="is cut short: data.mdb has"):
        opened("bedroom256", src, tmp_path)


def test_an_error_in_a_loader_s_worker_is_one_line_too(published, tmp_path, capsys):
    src = published(shards, spoil=False)
    pictures = opened("cc12m64", src, tmp_path)
    batches = iter(torch.utils.data.DataLoader(data.Batches(pictures, 6, range(6), 0, False), sampler=range(1000),
                                               batch_size=None, num_workers=1))
    next(batches)                                           # it has opened the set, and reads ahead
    (src / "00001.tar").unlink()
    with pytest.raises(SystemExit):
        data.run(lambda: list(batches))
    assert capsys.readouterr().err.startswith("error: FileNotFoundError: [Errno 2] No such file")


# ---- text features of shards ----------------------------------------------------------------------------------------

@pytest.fixture
def captioned(tmp_path, monkeypatch):
    """captioned("set") is the set "set" of two good shards of three, encoded in parts of three and chunks of two."""
    monkeypatch.setattr(data, "PART", 3)
    monkeypatch.setattr(data, "CHUNK", 2)
    (tmp_path / "published").mkdir()
    src = shards(tmp_path / "published", spoil=False)
    return lambda name: opened(name, src, tmp_path / "datasets", size=32)


def encoded_files(pictures):
    folder = Path(pictures.folder, "text/words")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def own_captions(pictures, features, chosen):
    rows = features.rows(np.array(chosen), data.mix(0, np.arange(len(chosen))))
    return all(map(np.array_equal, rows, data.encode(data.Words(), [pictures.captions[i][0] for i in chosen])))


def test_features_of_parts_lie_apart_and_are_read_as_one(captioned):
    pictures = captioned("whole")
    assert data.encode_set(pictures, data.Words()) and not data.encode_set(pictures, data.Words())
    parts = [f"{part}/{file}" for part in ("000000", "000001")
             for file in ("caption_of.npy", "meta.json", "offsets.npy", "tokens.npy")]
    assert sorted(encoded_files(pictures)) == [*parts, "meta.json"]
    features = pickle.loads(pickle.dumps(data.Features(data.text_folder(pictures.folder, "words"))))
    assert (features.encoder, features.width, features.n) == ("words", 256, 6)
    assert own_captions(pictures, features, [5, 0, 1, 4, 2, 3, 0])
    assert np.array_equal(features.null, data.encode(data.Words(), [""])[0])


def test_of_a_damaged_part_a_line_says_how_to_encode_it_alone_again(captioned):
    pictures = captioned("set")
    data.encode_set(pictures, data.Words())
    folder, whole = data.text_folder(pictures.folder, "words"), encoded_files(pictures)
    Path(folder, "000001/offsets.npy").write_bytes(whole["000000/caption_of.npy"])
    with pytest.raises(data.UserError, match="000001 is damaged .*: rm -r .*, and encode again") as damage:
        data.Features(folder).row(5)
    for path in str(damage.value).split("rm -r ")[1].split(",")[0].split():
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    assert sorted(encoded_files(pictures)) == [name for name in sorted(whole) if name.startswith("000000")]
    data.encode_set(pictures, data.Words())
    assert encoded_files(pictures) == whole
    shutil.rmtree(folder)
    with pytest.raises(data.UserError, match="holds no complete text features"):
        data.Features(folder)


class Dying(data.Words):
    """Words that die when they have served so often."""

    def __init__(self, breaths):
        self.breaths = breaths

    def vectors(self, tokens):
        self.breaths -= 1
        if self.breaths < 0:
            raise KeyboardInterrupt
        return super().vectors(tokens)


def test_an_encode_killed_inside_of_a_part_or_between_two_goes_on_to_the_same_bytes(captioned):
    whole, pictures = captioned("whole"), captioned("killed")
    data.encode_set(whole, data.Words())
    for breaths in (1, 2, 3, 1):                # a part asks three times: for two pictures, one picture, and ""
        with pytest.raises(KeyboardInterrupt):
            data.encode_set(pictures, Dying(breaths))
    with pytest.raises(data.UserError, match="killed has no text features by t5; it has none"):
        data.find_encoder("killed", os.path.dirname(pictures.folder), "t5")
    assert {name.split("/")[0] for name in encoded_files(pictures)} == {"000000"}, "half a part is left"
    assert data.encode_set(pictures, Dying(3)), "more is done again than was lost"
    assert encoded_files(pictures) == encoded_files(whole)


@pytest.mark.parametrize("last", ["tokens.npy", "offsets.npy", "caption_of.npy", "meta.json"])
def test_an_encode_killed_before_any_of_its_files_is_written_goes_on(last, captioned, monkeypatch):
    def killed(path, write, write_file=data.write_file):
        if path.name == last:
            raise KeyboardInterrupt
        write_file(path, write)

    whole, pictures = captioned("whole"), captioned("killed")
    data.encode_set(whole, data.Words())
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(data, "write_file", killed)
        data.encode_set(pictures, data.Words())
    with pytest.raises(data.UserError, match="holds no complete text features"):
        data.Features(data.text_folder(pictures.folder, "words"))
    assert data.encode_set(pictures, data.Words()) and encoded_files(pictures) == encoded_files(whole)


def test_processes_share_the_parts_and_the_last_one_declares_them_complete(captioned, tmp_path):
    whole, shared, started = captioned("whole"), captioned("shared"), captioned("started")
    data.encode_set(whole, data.Words())
    data.encode_set(shared, data.Words(), rank=1, world=2)
    assert {name.split("/")[0] for name in encoded_files(shared)} == {"000001"}
    data.encode_set(shared, data.Words(), rank=0, world=2)
    assert encoded_files(shared) == encoded_files(whole)
    said = command("data.py", "encode", "started", "--encoder", "words", cwd=tmp_path, processes=2)
    features = data.Features(data.text_folder(started.folder, "words"))                 # in one part of 5,000
    assert "6 captions of 6 pictures" in said and own_captions(started, features, range(6))


def test_a_limit_encodes_the_first_pictures(captioned):
    pictures = captioned("few")
    data.encode_set(pictures, data.Words(), limit=4)
    features = data.Features(data.text_folder(pictures.folder, "words"))
    assert features.n == 4 and json.loads(encoded_files(pictures)["000001/meta.json"])["n"] == 1
    assert own_captions(pictures, features, [3, 2, 1, 0])
    with pytest.raises(data.UserError, match="already there, of 4 pictures by words.*rm -r"):
        data.encode_set(pictures, data.Words())
    captioned("one")
    data.encode_command("one", os.path.dirname(pictures.folder), "words", 2)
    assert data.Features(data.text_folder(data.set_folder("one", os.path.dirname(pictures.folder)), "words")).n == 2


def test_an_encode_that_the_disk_cannot_hold_ends_after_its_first_pictures(captioned, monkeypatch):
    pictures = captioned("large")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(data.UserError, match=r"has 1 bytes free and .* needs 5,120 more: try --limit"):
        data.encode_set(pictures, data.Words())         # the first two have 5 tokens of 512 bytes, four are to come


@pytest.mark.parametrize("world, says", [(1, "5,120 bytes and about 4.0 hours"),
                                         (2, "2,560 bytes and about 1.0 hours")])
def test_hours_and_bytes_are_told_after_the_first_pictures(world, says, captioned, monkeypatch, capsys):
    clock = iter([0, 2 * 3600])                         # for two of six pictures; or of three here, three elsewhere
    monkeypatch.setattr(data, "time", SimpleNamespace(time=lambda: next(clock)))
    data.encode_set(captioned("large"), data.Words(), world=world)
    assert f"{says} to go" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux lists what a process has mapped")
def test_few_of_many_parts_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PART", 1)
    monkeypatch.setattr(data, "OPEN_PARTS", 4)
    n, texts = 12, [[f"number {i}"] for i in range(12)]
    for i in range(n):
        (tmp_path / data.part_name(i)).mkdir()
        data.encode_part(tmp_path / data.part_name(i), texts, range(i, i + 1), data.Words(), lambda *done: None)
    write(tmp_path / "meta.json", json.dumps(dict(encoder="words", width=256, n=n, part=1)))
    features = data.Features(str(tmp_path))
    rows = features.rows(np.arange(n), np.zeros(n, np.uint64))
    assert all(map(np.array_equal, rows, data.encode(data.Words(), [text for text, in texts])))
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(maps) == 3 * data.OPEN_PARTS


def test_what_stands_in_for_a_broken_picture_has_features_too(published, tmp_path):
    pictures = opened("cc12m64", published(shards), tmp_path)
    data.encode_set(pictures, data.Words(), limit=3)            # the third is broken, and the fourth has no features
    batches = data.Batches(pictures, 3, range(3), 0, False, data.Features(data.text_folder(pictures.folder, "words")))
    x, features, mask = batches[0]
    assert sorted(round(int(level) / 40) for level in x[:, 0, 0, 0]) == [0, 0, 1]
    assert sorted(mask.sum(1).tolist()) == [1, 4, 4], "a red thing, twice, and nothing"


def test_two_ranks_with_two_workers_see_each_sample_once_an_epoch_with_its_own_caption(captioned):
    pictures = captioned("set")
    data.encode_set(pictures, data.Words())
    text = data.Features(data.text_folder(pictures.folder, "words"))
    own = data.encode(data.Words(), [pictures.captions[i][0] for i in range(6)])
    seen = {0: [], 1: []}
    for rank in range(2):
        batches = data.Batches(pictures, 2, range(rank, 2, 2), 0, False, text)
        for step, (x, features, mask) in enumerate(torch.utils.data.DataLoader(
                batches, sampler=range(6), batch_size=None, num_workers=2)):            # two epochs
            number = round(int(x[0, 0, 0, 0]) / 40)
            assert np.array_equal(features[0][mask[0]], own[number])
            seen[step // 3].append(number)
    assert sorted(seen[0]) == sorted(seen[1]) == [0, 1, 2, 3, 4, 5]


def test_a_network_trains_on_the_captions_of_shards(captioned, tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    pictures = captioned("set")
    data.encode_set(pictures, data.Words(), limit=5)
    trained("set", "run", "--cond", "text")
    text = data.read_dict("run/ckpt.pt")["text"]
    assert text["captions"] == ["a red thing", "<PERSON> at the sea"] and len(text["rows"][0]) == 4


# ---- killed, full and changed ---------------------------------------------------------------------------------------

def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def prepare_and_die(owner, name, count, *args):
    """In a process that kills itself in call number `count` of a function."""
    def deadly(*args):
        return os.kill(os.getpid(), signal.SIGKILL) if next(calls) == count else function(*args)

    tqdm.set_lock(threading.RLock())            # it must not die with the lock of bars that it shares with its parents
    calls, function = itertools.count(1), getattr(owner, name)
    setattr(owner, name, deadly)
    data.prepare(*args)


def test_a_prepare_killed_at_ten_moments_leaves_no_set_and_repeats_to_the_byte(tmp_path):
    src = tmp_path / "src"
    for i in range(600):
        save(Image.new("L", (64, 64), i % 256), src / f"{i % 3}/{i}.png")
        write(src / f"{i % 3}/{i}.txt", f"number {i}")
    (src / "1/broken.png").touch()
    opened("whole", src, tmp_path)
    reading = [(data, "load_or_reason", i) for i in (1, 2, 256, 257, 600)]      # they are read in blocks of 256
    naming = [(os, "replace", i) for i in range(1, 6)]                          # each of five files, once it is whole
    for moment in reading + naming:
        child = multiprocessing.get_context("fork").Process(
            target=prepare_and_die, args=(*moment, "set", tmp_path, str(src)), daemon=True)
        child.start()
        child.join(100)
        assert child.exitcode == -signal.SIGKILL, f"it lived through {moment}"
        with pytest.raises(data.UserError, match="no data set 'set'"):
            data.open_set("set", tmp_path)
    opened("set", src, tmp_path)
    again = contents(tmp_path / "set")
    again["meta.json"] = again["meta.json"].replace(b'"set"', b'"whole"')
    assert again == contents(tmp_path / "whole")


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(published, terminal):                  # noqa: F811
    src, limits = published(celebahq), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        code, _, complaint = terminal("prepare", "celebahq256", "--src", src)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and complaint.startswith("error: cannot prepare celebahq256: ") and complaint.count("\n") == 1
    assert files_in("datasets/celebahq256") == []


def test_a_set_made_anew_of_other_pictures_has_another_fingerprint(published, tmp_path):
    src, prints = published(captioned_folder), set()
    for how in (dict(), dict(crop="adm"), dict(size=32), dict(limit=2)):
        prints.add(opened("mine", src, tmp_path, **how).fingerprint)
        again = data.open_set("mine", tmp_path).fingerprint
        shutil.rmtree(tmp_path / "mine")
        assert opened("mine", src, tmp_path, **how).fingerprint == again in prints
        shutil.rmtree(tmp_path / "mine")
    save(Image.new("L", (64, 64), 200), src / "d.png")
    assert len(prints | {opened("mine", src, tmp_path).fingerprint}) == 5


def test_a_file_that_cannot_be_read_just_now_is_not_called_damaged(captioned, monkeypatch):
    pictures = captioned("set")
    data.encode_set(pictures, data.Words())
    text = data.Features(data.text_folder(pictures.folder, "words"))

    def refused(path, *args, **how):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(np, "load", refused)
    with pytest.raises(PermissionError, match="index.npy"):             # which data.run prints, in one line
        data.open_set("set", os.path.dirname(pictures.folder))
    with pytest.raises(PermissionError, match="tokens.npy"):
        text.open(0)


@pytest.mark.parametrize("file, content, says", [
    ("meta.json", b"[]", "name, size, n, classes, flip, captions missing"), ("meta.json", b'{"name": "edm"}', "size, n, .* missing"),
    ("labels.npy", np.zeros(4), "labels are not int64"), ("labels.npy", np.full(4, 3), "classes below 3"),
    ("images.npy", np.zeros((4, 3, 64, 64)), "images are float64"),
    ("images.npy", np.zeros((4, 64, 64, 3), np.uint8), r"images are uint8 \(4, 64, 64, 3\)")])
def test_files_of_another_kind_are_one_line(file, content, says, published, tmp_path):
    folder = opened("edm", published(edm), tmp_path).folder
    if isinstance(content, bytes):
        Path(folder, file).write_bytes(content)
    else:
        np.save(Path(folder, file), content)
    if file == "meta.json":                     # of somebody's own, perhaps: no word of removing the folder
        for look in (data.open_set, data.describe):
            with pytest.raises(data.UserError, match=f"of something else.*{says}.*choose another name"):
                look("edm", tmp_path)
    else:
        with pytest.raises(data.UserError, match=f"damaged.*{says}.*rm -r"):
            data.open_set("edm", tmp_path)
