"""Data sets, from where their pictures are to the batches a training step takes.

    python data.py prepare shapes                        a built-in set: drawn here, no download
    python data.py prepare cats --src ~/cats --size 64   a set of your own: any folder of pictures
    python data.py show cats                             look at it
    python data.py export cats --out cats_png            single PNGs, and an .npz for FID tools

A data set is three things: where the pictures are, how they become squares, and their labels. For
each kind of set one function says so, in a Source. `prepare` reads the Source once and writes

    datasets/NAME/images.npy       uint8 (N, 3, S, S), memory-mapped afterwards
                  labels.npy       int64 (N,), if the set has classes
                  captions.jsonl   one JSON string a picture, if it has captions
                  skipped.txt      files that could not be read, and why, if there are any
                  meta.json        written last: if it is there, the set is complete

and nothing after that knows any more what kind of set it was.
Shape letters: N pictures, B pictures of a batch, S pixels a side; 3 is always red, green, blue.
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import shutil
import sys
import tarfile
import textwrap
import unicodedata
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm


# ---- mistakes and files --------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can put right. The message says what is allowed, in one line."""


def run(main):
    """main(), but a UserError, or a disk that refuses, becomes one line and exit code 2 instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")   # file names need not be valid text
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:                           # where nothing is in danger: train.py has its own way
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                             # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as e:
        if os.environ.get("RANK", "0") == "0" or isinstance(e, OSError):        # mistakes are everybody's, told once
            tqdm.write("error: " + " ".join(str(e).split()), file=sys.stderr)           # on a line of its own, below bars
        sys.exit(2)


def write_file(path, write):
    """write(f) fills a new binary file, which appears at path complete or not at all."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as e:                          # also Ctrl-C
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(e, (OSError, RuntimeError)):      # the latter is torch.save's word for a full disk
            raise OSError(f"cannot write {path}: {e}")
        raise


def read_checkpoint(path):
    """A checkpoint of train.py, a plain dict, on the CPU. Loading it runs no code in it."""
    try:
        with zipfile.ZipFile(path) as parts:            # torch.load itself does not look at the checksums
            if broken := parts.testzip():
                raise ValueError(f"the checksum of its part {broken} is wrong")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                              # torch raises half a dozen kinds
        raise UserError(f"cannot read the checkpoint {path}: {(str(e).splitlines() or [e])[0]}")
    if not isinstance(ckpt, dict) or "config" not in ckpt:
        raise UserError(f"{path} is not a checkpoint of train.py: it holds no config")
    return ckpt


# ---- randomness with an address ------------------------------------------------------------------
# Nothing here consumes a stream of random numbers. Each is a hash of where it is used, so that the
# thousandth needs no 999 before it: a resumed run, or one with more workers, draws the same.

SHUFFLE, MIRROR, NOISE = 1, 2, 3                        # purposes, so that no two share an address


def mix(*ints):
    """A 64-bit hash of integers, in order: a Python int, or a uint64 array if any of them is an
    int64 or uint64 array. Pictures and runs depend on it: it never changes.

    One splitmix64 step per integer (Steele, Lea and Flood 2014, constants of Stafford's mix 13)."""
    h = np.zeros(1, np.uint64)                          # an array, because those overflow silently
    for v in ints:
        v = v.astype(np.uint64) if isinstance(v, np.ndarray) else np.uint64(int(v) % 2 ** 64)
        h = h + (v + np.ones(1, np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h if any(isinstance(v, np.ndarray) for v in ints) else int(h[0])


def seed32(*ints):
    """A seed that every generator takes, from any integers."""
    return mix(*ints) % 2 ** 32


def image_seeds(seed, ids):
    """A seed for the starting noise of each picture, whatever batch it is computed in. Consecutive,
    since generators may keep 32 bits only, of which hashes of 50,000 pictures would share some."""
    first = mix(seed, NOISE)
    return [(first + i) % 2 ** 32 for i in ids]


# ---- pictures as arrays --------------------------------------------------------------------------

def to_uint8(x):
    """Float tensor in [-1, 1], of any shape -> uint8 tensor. What lies outside is clamped."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images, columns, gap=2):
    """uint8 (N, 3, H, W) -> one PIL picture, row by row, with white gaps of `gap` pixels."""
    N, _, H, W = images.shape
    columns = min(columns, N)
    rows = math.ceil(N / columns)
    sheet = np.full((gap + rows * (H + gap), gap + columns * (W + gap), 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y:y + H, x:x + W] = image.transpose(1, 2, 0)
    return Image.fromarray(sheet)


def spread(items, n):
    """At most n of the items, evenly spaced (all for n = None): part of a sorted list that still
    has something of every class."""
    if n is None or n >= len(items):
        return items
    return [items[i * len(items) // n] for i in range(n)]


# ---- a source: a data set before it is converted -------------------------------------------------

class Source(NamedTuple):
    count: int            # pictures to expect; unreadable ones drop out on the way
    size: int             # pixels a side
    classes: list         # names; [] is a set without classes
    items: Iterator       # of (square uint8 (3, S, S), class index or None, caption or None)
    origin: str           # a path, or "drawn"
    notes: dict           # what else meta.json should remember
    skipped: list         # (path, reason) of the unreadable; grows while items are taken


# ---- shapes: drawn pictures, so that answers can be checked --------------------------------------
# A picture is a background and a list of objects, painted on it in turn. Everything is relative to
# the side, so that an index is the same picture at any size.

PALETTE = dict(red=(215, 30, 40), green=(30, 160, 60), blue=(40, 90, 220),
               yellow=(250, 225, 40), purple=(160, 50, 190), orange=(250, 130, 20))
COLOURS = np.array(list(PALETTE.values()), np.float32)  # (6, 3)
SHAPES = ("circle", "square", "triangle", "cross")
SHAPE_CLASSES = [f"{colour} {shape}" for colour in PALETTE for shape in SHAPES]
GREYS = (60, 140, 220)
SHAPE_COUNT = 20_000                                    # indexes from here on are held out


class Object(NamedTuple):
    colour: int           # row of COLOURS
    shape: int            # index into SHAPES
    x: float              # centre and side of the bounding box, in units of the picture's side
    y: float
    box: float


def signed_distance(shape, x, y, r):
    """How far (x, y) is outside of a shape that fills the box [-r, r]^2; negative is inside, y
    points down. Beyond a corner the answer is a little small, which does not show."""
    if SHAPES[shape] == "circle":
        return np.hypot(x, y) - r
    if SHAPES[shape] == "square":
        return np.maximum(abs(x), abs(y)) - r
    if SHAPES[shape] == "triangle":                     # apex (0, -r), base y = r
        return np.maximum(y - r, (2 * abs(x) - y - r) / 5 ** 0.5)
    tall, wide = np.maximum(abs(x) - r / 3, abs(y) - r), np.maximum(abs(x) - r, abs(y) - r / 3)
    return np.minimum(tall, wide)                       # cross: its bars are a third as thick as long


def coverage(shape, x, y, box, size):
    """The part of each pixel that a shape covers, float (S, S) in [0, 1]: anti-aliasing."""
    pixels = np.arange(size, dtype=np.float32) + 0.5
    d = signed_distance(shape, pixels - x * size, pixels[:, None] - y * size, box * size / 2)
    return np.clip(0.5 - d, 0, 1)


def paint(background, objects, size):
    """A grey level and Objects, the last one in front -> uint8 (3, S, S)."""
    canvas = np.full((3, size, size), background, np.float32)
    for o in objects:
        colour = COLOURS[o.colour][:, None, None]
        canvas += coverage(o.shape, o.x, o.y, o.box, size) * (colour - canvas)
    return canvas.round().astype(np.uint8)


def draw_shapes(index, size):
    """int array (N,) -> pictures uint8 (N, 3, S, S), classes int64 (N,): one object each. Picture
    number i is the same everywhere and for ever."""
    index = np.asarray(index, np.int64)

    def choice(purpose, n):
        return (mix(index, purpose) % np.uint64(n)).astype(np.int64)

    def uniform(purpose):                               # float64 in [0, 1)
        return (mix(index, purpose) >> np.uint64(11)) * 2.0 ** -53

    colour, shape, grey = choice(0, 6), choice(1, 4), choice(2, 3)
    box = 0.40 + 0.35 * uniform(3)
    x, y = box / 2 + (1 - box) * uniform(4), box / 2 + (1 - box) * uniform(5)   # fully inside
    images = np.empty((len(index), 3, size, size), np.uint8)
    for i, row in enumerate(zip(colour, shape, x, y, box)):
        images[i] = paint(GREYS[grey[i]], [Object(*row)], size)
    return images, colour * 4 + shape


def shapes_source(src, size, limit):
    if src is not None:
        raise UserError("the shapes sets are drawn: they take no --src")
    count = min(SHAPE_COUNT, limit or SHAPE_COUNT)

    def items():
        for start in range(0, count, 500):
            images, labels = draw_shapes(np.arange(start, min(start + 500, count)), size)
            yield from zip(images, labels, [None] * len(labels))

    return Source(count, size, SHAPE_CLASSES, items(), "drawn", {}, [])


# ---- shapes: reading a picture back --------------------------------------------------------------
# The limits were set on 1,500 held-out pictures of 32 pixels: with a blur of 1 / 45 of the side and
# noise of 8 grey levels, the worst overlap is 0.87; a diamond's best is 0.85, a Gaussian spot's 0.78.

FAINT = 40                # grey levels; less contrast is an empty picture
OFF_PALETTE = 70          # grey levels; further from every colour is none of them
POOR_FIT = 0.86           # overlap; where the best shape has less, it is none of them
AREA = (math.pi / 4, 1, 1 / 2, 5 / 9)                   # of each shape, in a box of side 1


def harden(alpha):
    """Pixels that are nearly in or nearly out are taken for in and out: forgives noise and blur."""
    return np.clip(1.5 * (alpha - 0.5) + 0.5, 0, 1)


def fit_shape(alpha):
    """Coverage float (S, S), not quite in [0, 1] -> index into SHAPES, or -1. Each shape is laid
    over the object by area and centre of mass, in which noise averages out; the best overlap wins."""
    S = len(alpha)
    rows, columns = np.nonzero(alpha > 0.5)
    if len(rows) == 0:
        return -1
    mass = np.zeros_like(alpha)                         # the object, with two pixels for soft edges
    near = np.s_[max(0, rows.min() - 2):rows.max() + 3, max(0, columns.min() - 2):columns.max() + 3]
    mass[near] = alpha[near]
    total, pixels = mass.sum(), (np.arange(S) + 0.5) / S
    if total < 1:
        return -1
    x, y = (mass.sum(0) * pixels).sum() / total, (mass.sum(1) * pixels).sum() / total
    mass, overlaps = harden(mass), []
    for shape in range(4):
        box = math.sqrt(total / AREA[shape]) / S
        top = box / 6 if SHAPES[shape] == "triangle" else 0             # its mass sits low
        fit = harden(coverage(shape, x, y - top, box, S))
        overlaps.append(np.minimum(mass, fit).sum() / np.maximum(mass, fit).sum())
    return int(np.argmax(overlaps)) if max(overlaps) > POOR_FIT else -1


def read_shape(image):
    """One picture uint8 (3, S, S) -> (colour, shape), each -1 where it cannot tell."""
    p = image.astype(np.float32)
    border = np.concatenate([p[:, 0], p[:, -1], p[:, :, 0], p[:, :, -1]], axis=1)
    background = np.median(border, axis=1)[:, None, None]
    contrast = np.linalg.norm(p - background, axis=0)                   # (S, S)
    full = np.percentile(contrast, 97)                  # the smallest shape covers 8% of a picture
    if full < FAINT:
        return -1, -1
    found = np.median(p[:, contrast > 0.7 * full], axis=1)              # (3,) the object's middle
    off = np.linalg.norm(COLOURS - found, axis=1)
    if off.min() > OFF_PALETTE:
        return -1, -1
    # from the background's colour to the object's is a line; along it pixels tell their coverage
    line = found[:, None, None] - background
    alpha = ((p - background) * line).sum(0) / max((line ** 2).sum(), 1)
    return int(off.argmin()), fit_shape(alpha)


def read_shapes(images):
    """uint8 (N, 3, S, S) -> colour (N,), shape (N,), as in PALETTE and SHAPES; -1 = cannot tell."""
    answers = np.array([read_shape(image) for image in images], np.int64).reshape(-1, 2)
    return answers[:, 0], answers[:, 1]


def score_shapes(images, labels):
    """Pictures that show the class asked for -> dict(n, shape, colour, both), in percent. Needs no
    network. Of real pictures all are right, of noise none, of other classes 4%."""
    labels = np.asarray(labels)
    colour, shape = read_shapes(images)
    right = dict(shape=shape == labels % 4, colour=colour == labels // 4)
    right["both"] = right["shape"] & right["colour"]
    return dict(n=len(labels), **{key: 100 * float(hit.mean()) for key, hit in right.items()})


# ---- emoji: a thousand real pictures with real captions, out of a font ---------------------------

NOTO = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"              # where Debian puts it
NOT_PICTURES = ("CLOCK FACE", "ARROW", "TRIANGLE", "EMOJI COMPONENT", "INPUT SYMBOL", "KEYCAP")


def emoji_name(code):
    """The Unicode name of a code point that shows a thing rather than a sign, else ''. How many
    there are depends on Python a little: each version knows the emoji of its day."""
    name = unicodedata.name(chr(code), "")
    words = set(name.split())
    if unicodedata.category(chr(code)) != "So" or "SIGN" in words:
        return ""
    if any(part in name for part in NOT_PICTURES):
        return ""
    if code < 0x1F5A4 and words & {"BLACK", "WHITE"}:   # there they mean filled and outlined:
        return ""                                       # a WHITE SUN is yellow
    return name.lower()


def emoji_source(src, size, limit):
    """Noto Color Emoji holds one bitmap of 136 x 128 a glyph, at 109 pixels an em and no other."""
    path = src or NOTO
    if not os.path.isfile(path):
        raise UserError(f"no emoji font at {path}: `apt-get install fonts-noto-color-emoji`, or "
                        "name a NotoColorEmoji.ttf with --src FONT")
    names = {chr(code): emoji_name(code) for code in range(0x1F300, 0x1FB00)}
    try:                                                # the other layout engine fails on some
        font = ImageFont.truetype(path, 109, layout_engine=ImageFont.Layout.BASIC)
        glyphs = [c for c in names if names[c] and font.getbbox(c) == (0, 0, 136, 128)]
    except OSError as e:
        raise UserError(f"{path} is not Noto Color Emoji, a font of 109-pixel bitmaps: {e}")
    if not glyphs:
        raise UserError(f"{path} is not Noto Color Emoji: it has no glyphs of 136 x 128 pixels")
    glyphs = spread(glyphs, limit)

    def items():
        for c in glyphs:
            image = Image.new("RGB", (136, 136), "white")
            ImageDraw.Draw(image).text((0, 4), c, font=font, embedded_color=True)
            image = image.resize((size, size), Image.Resampling.LANCZOS)
            yield np.asarray(image).transpose(2, 0, 1), None, names[c]

    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Source(len(glyphs), size, [], items(), path, dict(sha256=digest), [])


# ---- CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html) --------------------------------------

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def download_cifar(path):
    """Fetch the archive, once. It stays where it is put: the server can take an hour over it."""
    try:
        with urllib.request.urlopen(CIFAR_URL, timeout=60) as reply:
            total, blocks = int(reply.headers.get("Content-Length", 0)), []
            with tqdm(desc=CIFAR_URL, total=total or None, unit="B", unit_scale=True) as bar:
                while block := reply.read(1 << 16):
                    blocks.append(block)
                    bar.update(len(block))
        blob = b"".join(blocks)
        if hashlib.sha256(blob).hexdigest() != CIFAR_SHA256:
            raise OSError("what arrived is not the published file: its sha256 differs")
        write_file(path, lambda f: f.write(blob))
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot download {CIFAR_URL} ({e}): get it some other way, then "
                        "`python data.py prepare cifar10 --src cifar-10-binary.tar.gz`")


def cifar_source(src, size, limit):
    """The 50,000 training pictures, read inside the archive of the binary version. A record is a
    byte for the class and 3 x 32 x 32 for the picture."""
    if not os.path.isfile(src):
        raise UserError(f"--src {src} is not a file; it should be cifar-10-binary.tar.gz")
    names = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
    blob = Path(src).read_bytes()
    digest = hashlib.sha256(blob).hexdigest()
    if digest != CIFAR_SHA256:
        print(f"warning: {src} is not the published archive (its sha256 differs)", file=sys.stderr)
    try:                                                # gzip's checksum is read, tarfile skips it
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(blob)), mode="r:") as tar:
            batches = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        raise UserError(f"{src} is not a complete .tar.gz: {e}")
    for name in names:
        if not batches.get(name) or len(batches[name]) % 3073:
            raise UserError(f"{src} is not CIFAR-10's binary version: {name} is missing, or does "
                            "not consist of records of 3073 bytes")
    records = np.frombuffer(b"".join(batches[name] for name in names), np.uint8).reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise UserError(f"{src} is not CIFAR-10: it holds a class above 9")
    records = records[:limit]
    items = ((record[1:].reshape(3, 32, 32), record[0], None) for record in records)
    return Source(len(records), size, CIFAR_CLASSES, items, src, dict(sha256=digest), [])


# ---- folders of pictures -------------------------------------------------------------------------

EXTENSIONS = tuple(".jpg .jpeg .png .gif .webp .bmp .ppm .pgm .tif .tiff".split())


def find_pictures(src):
    """All pictures below a folder, linked folders too: relative paths, sorted, since disks have orders of their own."""
    def refuse(e):
        raise UserError(f"cannot read the folder {e.filename}: {e.strerror}")

    found = []
    for folder, subfolders, files in os.walk(src, onerror=refuse, followlinks=True):
        here = Path(folder).resolve()
        subfolders[:] = [d for d in subfolders if not d.startswith((".", "__MACOSX"))
                         and not here.is_relative_to(Path(folder, d).resolve())]        # a link to above: a circle
        found += [Path(folder, f).relative_to(src).as_posix() for f in files
                  if not f.startswith(".") and f.lower().endswith(EXTENSIONS)
                  and not Path(folder, f).is_fifo()]    # opening a pipe would wait for a writer
    return sorted(found)


def folder_classes(paths):
    """The top-level subfolders, if there are at least two and every picture is in one; else []."""
    tops = {path.split("/")[0] if "/" in path else "" for path in paths}
    return sorted(tops) if len(tops) > 1 and "" not in tops else []


def natural_size(files):
    """32 or 64 pixels, whichever suits the median short side of (at most 200 of) the pictures."""
    sides = []
    for file in spread(files, 200):
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
        except Exception:                               # load_square will say what is wrong
            continue
    return 32 if sides and np.median(sides) < 64 else 64


def upright(image):
    """Turned as the camera was held."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:                                   # damaged EXIF says nothing about up
        return image


def to_rgb(image):
    """Any PIL picture -> RGB. convert() alone would clip 16 bits, and bare what alpha hides."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, of unknown range")
    if image.mode.startswith("I"):                      # I, I;16 and relatives: 16 bits of grey
        levels = np.asarray(image).astype(np.int64)
        wide = image.mode != "I" or levels.max() > 255
        image = Image.fromarray((levels >> 8 if wide else levels).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_square(file, size):
    """The centre square of a picture, uint8 (3, S, S); of an animation, the first frame."""
    with Image.open(file) as image:
        image.draft("RGB", (3 * size, 3 * size))        # JPEG can decode smaller, and much faster
        image.load()
        image = to_rgb(upright(image))
    W, H = image.size
    side = min(W, H)
    box = ((W - side) / 2, (H - side) / 2, (W + side) / 2, (H + side) / 2)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(image).transpose(2, 0, 1)


def load_or_reason(file, size):
    """load_square, or why not, as a string: never some other picture in its place."""
    try:
        return load_square(file, size)
    except Exception as e:                              # a broken file can raise anything
        return " ".join(f"{type(e).__name__}: {e}".replace(file, "the file").split())


def folder_source(src, size, limit):
    if src is None or not os.path.isdir(src):
        raise UserError("which pictures? Name their folder with --src FOLDER" if src is None else
                        f"--src {src} is not a folder")
    found = find_pictures(src)
    if not found:
        raise UserError(f"no pictures in {src} or below; looked for {' '.join(EXTENSIONS)}")
    warnings.filterwarnings("ignore", module="PIL")     # remarks on files that it reads all the same
    classes, paths, skipped = folder_classes(found), spread(found, limit), []
    files = [os.path.join(src, path) for path in paths]
    size = size or natural_size(files)

    def squares():
        with ThreadPoolExecutor(os.cpu_count()) as pool:                # decoders release the GIL
            for i in range(0, len(files), 256):         # few at a time, or pictures pile up here
                yield from pool.map(lambda file: load_or_reason(file, size), files[i:i + 256])

    def items():
        for path, square in zip(paths, squares()):
            if not isinstance(square, str):
                yield square, classes.index(path.split("/")[0]) if classes else None, None
                continue
            skipped.append((path, square))
            if len(skipped) > max(5, 0.02 * len(paths)):
                raise UserError(f"more than 5, and more than 2%, of the {len(paths):,} pictures in "
                                f"{src} cannot be read; one is {path!r} ({square})")

    return Source(len(paths), size, classes, items(), src, dict(crop="square"), skipped)


# ---- prepare: a source is converted, once --------------------------------------------------------

def numbered(n):
    """Names of classes that have none until their set is prepared."""
    return [f"class {i}" for i in range(1, n + 1)]


def not_yet(src, size, limit):
    raise UserError("this set can be described, but not prepared yet")


BUILT_IN = {              # flip: may training mirror pictures? Not emoji, with their letters and hands, and not what
                          # long captions tell the left and right of
    "shapes":      dict(size=32, classes=SHAPE_CLASSES, captions=False, flip=False, source=shapes_source),
    "shapes64":    dict(size=64, classes=SHAPE_CLASSES, captions=False, flip=False, source=shapes_source),
    "emoji64":     dict(size=64, classes=[], captions=True, flip=False, source=emoji_source),
    "emoji128":    dict(size=128, classes=[], captions=True, flip=False, source=emoji_source),
    "cifar10":     dict(size=32, classes=CIFAR_CLASSES, captions=False, flip=True, source=cifar_source),
    "celeba64":    dict(size=64, classes=[], captions=False, flip=True, source=not_yet),
    "celebahq256": dict(size=256, classes=[], captions=False, flip=True, source=not_yet),
    "church128":   dict(size=128, classes=[], captions=False, flip=True, source=not_yet),
    "church256":   dict(size=256, classes=[], captions=False, flip=True, source=not_yet),
    "bedroom256":  dict(size=256, classes=[], captions=False, flip=True, source=not_yet),
    "cub64":       dict(size=64, classes=numbered(200), captions=True, flip=True, source=not_yet),
    "cub128":      dict(size=128, classes=numbered(200), captions=True, flip=True, source=not_yet),
    "imagenet64":  dict(size=64, classes=numbered(1000), captions=False, flip=True, source=not_yet),
    "cc12m64":     dict(size=64, classes=[], captions=True, flip=False, source=not_yet),
    "laion128":    dict(size=128, classes=[], captions=True, flip=False, source=not_yet),
}
OWN = dict(size=None, flip=True, source=folder_source)  # the row of any other name


def set_folder(name, data_dir):
    if not name or name.startswith((".", "-")) or "/" in name or "\\" in name:
        raise UserError(f"{name!r} cannot name a data set; a plain folder name, like cats, can")
    return os.path.join(data_dir, name)


def read_meta(folder):
    """meta.json of a complete set, None if there is none."""
    try:
        return json.loads(Path(folder, "meta.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}/meta.json is damaged ({e}): rm -r {folder}, and prepare again")


def prepare(name, data_dir, src=None, size=None, limit=None):
    """Convert a set into DATA_DIR/NAME. True if that was done now, False if it had been before.

    src: the folder (emoji: the font; cifar10: the archive); size: pixels a side, for sets of your
    own; limit: at most so many pictures. UserError if the source is no good, the disk too small,
    or the set there with another src, size or limit than asked for."""
    folder, row = set_folder(name, data_dir), BUILT_IN.get(name, OWN)
    if size is not None and (size < 8 or row["size"] not in (None, size)):
        raise UserError(f"--size {size}: " + (f"{name} is always {row['size']} pixels"
                                              if row["size"] else "must be at least 8"))
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    src = src and os.path.abspath(os.path.expanduser(src))
    if src and Path(os.path.abspath(folder)) in (Path(src), *Path(src).parents):
        raise UserError(f"--src {src} lies in {folder}, where the set goes: move the pictures away")
    meta = read_meta(folder)
    if meta:
        asked = dict(source=src, size=size, limit=limit)
        other = [f"{k} {meta[k]}" for k, v in asked.items() if v is not None and v != meta[k]]
        if other:
            raise UserError(f"{folder} is already there, with {', '.join(other)}; "
                            f"to prepare it anew: rm -r {folder}")
        return False
    try:
        os.makedirs(folder, exist_ok=True)
        if name == "cifar10" and src is None:           # beside the set: it outlives `rm -r`
            src = os.path.abspath(os.path.join(data_dir, os.path.basename(CIFAR_URL)))
            if not os.path.exists(src):
                download_cifar(src)
        convert(row["source"](src, size or row["size"], limit), folder,
                dict(name=name, flip=row["flip"], limit=limit))
    except OSError as e:
        raise UserError(f"cannot prepare {name}: {e}")
    return True


def convert(source, folder, about):
    """Write the files of a set, meta.json last. What a killed prepare left behind is replaced."""
    for old in ("images.npy.part", "images.npy", "labels.npy", "captions.jsonl", "skipped.txt"):
        Path(folder, old).unlink(missing_ok=True)
    S, skipped = source.size, source.skipped
    need, free = source.count * (3 * S * S + 8), shutil.disk_usage(folder).free
    print(f"writing {source.count:,} pictures of {S}x{S} to {folder}: {need:,} bytes")
    if need > free:
        raise UserError(f"the disk has {free:,} bytes free and {folder} needs {need:,}: try "
                        "--data-dir on another disk, or --limit")
    labels, captions = [], []

    def write_images(f):
        # row after row, not through a writable memory map: a full disk kills those by a bus error
        header = dict(descr="|u1", fortran_order=False, shape=(source.count, 3, S, S))
        np.lib.format.write_array_header_1_0(f, header)
        for square, label, caption in tqdm(source.items, total=source.count, disable=None):
            f.write(square.tobytes())
            labels.append(label)
            captions.append(caption)
        if not labels:
            raise UserError("none of the pictures can be read; the first is {!r} ({})".format(*skipped[0]))
        f.seek(0)                                       # numpy pads headers, so that N may change
        np.lib.format.write_array_header_1_0(f, dict(header, shape=(len(labels), 3, S, S)))

    def write_lines(name, lines):
        text = "".join(line + "\n" for line in lines).encode(errors="backslashreplace")
        write_file(os.path.join(folder, name), lambda f: f.write(text))

    write_file(os.path.join(folder, "images.npy"), write_images)
    if source.classes:
        write_file(os.path.join(folder, "labels.npy"), lambda f: np.save(f, np.array(labels, np.int64)))
    if captions[0] is not None:
        write_lines("captions.jsonl", map(json.dumps, captions))
    if skipped:
        write_lines("skipped.txt", (f"{path}\t{reason}" for path, reason in skipped))
        print(f"skipped {len(skipped)} unreadable files, listed in {folder}/skipped.txt; the first: "
              "{!r} ({})".format(*skipped[0]))
    meta = dict(about, size=S, n=len(labels), classes=source.classes, source=source.origin,
                skipped=len(skipped), **source.notes)
    write_lines("meta.json", [json.dumps(meta, indent=1)])


# ---- a prepared set ------------------------------------------------------------------------------

class Pictures:
    """A prepared set: name, size, classes (names), flip; images uint8 (N, 3, S, S), memory-mapped;
    labels int64 (N,) and captions (a list), or None. UserError if its files are damaged."""

    def __init__(self, folder):
        meta, captions = read_meta(folder), Path(folder, "captions.jsonl")
        self.folder = folder
        try:
            self.name, self.size = meta["name"], meta["size"]
            self.classes, self.flip = meta["classes"], meta["flip"]
            self.images = np.load(os.path.join(folder, "images.npy"), mmap_mode="r")
            self.labels = np.load(os.path.join(folder, "labels.npy")) if self.classes else None
            lines = captions.read_text().splitlines() if captions.exists() else []
            self.captions = [json.loads(line) for line in lines] or None
            parts = (self.images, self.labels, self.captions)
            if any(len(part) != meta["n"] for part in parts if part is not None):
                raise ValueError("its files are of different lengths")
        except Exception as e:                          # numpy raises half a dozen kinds
            raise UserError(f"{folder} is damaged ({e}): rm -r {folder}, and prepare it again")

    def __len__(self):
        return len(self.images)

    def __reduce__(self):                               # a pickled memory map takes its data along
        return Pictures, (self.folder,)


def not_there(name, data_dir):
    where = "" if data_dir == "datasets" else f" --data-dir {data_dir}"
    if name in BUILT_IN:
        return UserError(f"{name} is not in {data_dir} yet: `python data.py prepare {name}{where}`")
    return UserError(f"no data set {name!r} in {data_dir}; built-in sets are {', '.join(BUILT_IN)}; "
                     f"`python data.py prepare {name} --src FOLDER{where}` makes one")


def describe(name, data_dir):
    """dict(size=, classes=, flip=) of a set. Of a built-in one also before it is prepared."""
    meta = read_meta(set_folder(name, data_dir)) or BUILT_IN.get(name)
    if not meta:
        raise not_there(name, data_dir)
    return {key: meta[key] for key in ("size", "classes", "flip")}


def open_set(name, data_dir):
    """The Pictures of a prepared set. UserError, naming the command, if it is not prepared."""
    folder = set_folder(name, data_dir)
    if not read_meta(folder):
        raise not_there(name, data_dir)
    return Pictures(folder)


# ---- batches -------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=2)                         # a batch can lie across the end of an epoch
def permutation(seed, epoch, n):
    """The order of the pictures in an epoch, int64 (n,)."""
    h = mix(seed, epoch, SHUFFLE)
    return np.random.RandomState([h % 2 ** 32, h >> 32]).permutation(n)     # frozen, says NEP 19


class Batches(torch.utils.data.Dataset):
    """Batches[step] -> x uint8 (B, 3, S, S), y int64 (B,), all 0 in a set without classes.

    batch: size of the global batch; rows: those of its rows that this process takes; flip: mirror
    half the pictures. Sample number k = step * batch + row, and all about it follows from (seed, k):
    it is the same at any number of workers and processes, and after any resume."""

    def __init__(self, pictures, batch, rows, seed, flip):
        self.pictures, self.batch, self.seed, self.flip = pictures, batch, seed, flip
        self.rows = np.array(rows, np.int64)

    def __getitem__(self, step):
        k = step * self.batch + self.rows
        epoch, place = np.divmod(k, len(self.pictures))
        index = np.empty_like(k)
        for e in np.unique(epoch):
            here = epoch == e
            index[here] = permutation(self.seed, int(e), len(self.pictures))[place[here]]

        order = np.argsort(index)                       # the disk is read in one direction
        x = np.empty((len(k), *self.pictures.images.shape[1:]), np.uint8)
        x[order] = self.pictures.images[index[order]]
        if self.flip:
            mirrored = mix(self.seed, k, MIRROR) % np.uint64(2) == 1
            x[mirrored] = x[mirrored, ..., ::-1]
        y = np.zeros_like(k) if self.pictures.labels is None else self.pictures.labels[index]
        return torch.from_numpy(x), torch.from_numpy(y)


# ---- commands ------------------------------------------------------------------------------------

def open_or_prepare(name, data_dir):
    """open_set, after making a built-in set that needs neither source nor download."""
    if BUILT_IN.get(name, OWN)["source"] in (shapes_source, emoji_source):
        prepare(name, data_dir)
    return open_set(name, data_dir)


def captioned(image, text):
    """uint8 (3, S, S) -> (3, H, W), 128 pixels or more wide, with two lines of text below."""
    scale = max(1, 128 // image.shape[-1])
    image = image.repeat(scale, axis=1).repeat(scale, axis=2)
    W, H = max(128, image.shape[2]), image.shape[1]
    cell = Image.new("RGB", (W, H + 28), "white")
    cell.paste(Image.fromarray(image.transpose(1, 2, 0)))
    lines = textwrap.wrap(text.encode("ascii", "replace").decode(), W // 6)[:2]
    ImageDraw.Draw(cell).text((1, H + 1), "\n".join(lines), "black", ImageFont.load_default())
    return np.asarray(cell).transpose(2, 0, 1)


def show(name, data_dir, out):
    """A sheet of up to 48 pictures, evenly spaced over the set, with their captions or classes."""
    pictures = open_or_prepare(name, data_dir)
    out = out or os.path.join(pictures.folder, "show.png")
    texts, classes = pictures.captions, pictures.classes
    if not texts:
        texts = [classes[y] for y in pictures.labels] if classes else [""] * len(pictures)
    chosen = spread(range(len(pictures)), 48)
    sheet = grid(np.stack([captioned(pictures.images[i], texts[i]) for i in chosen]), 8, gap=6)
    try:
        sheet.save(out)
    except (OSError, ValueError) as e:                  # ValueError: not a picture's extension
        raise UserError(f"cannot write --out {out}: {e}")
    print(f"{out}: {len(chosen)} of {len(pictures):,} pictures of {pictures.size}x{pictures.size}, "
          + (f"{len(classes)} classes: {', '.join(classes[:30])}" if classes else "no classes"))


def export(name, data_dir, out, limit):
    """000000.png .. and images.npz: arr_0 uint8 (N, S, S, 3), arr_1 classes, for FID tools."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    if os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise UserError(f"--out {out} is not a new or empty folder")
    pictures = open_or_prepare(name, data_dir)
    images = pictures.images[:limit].transpose(0, 2, 3, 1)
    arrays = [images] if pictures.labels is None else [images, pictures.labels[:limit]]
    try:
        os.makedirs(out, exist_ok=True)
        for i, image in enumerate(tqdm(images, disable=None)):
            Image.fromarray(image).save(os.path.join(out, f"{i:06d}.png"))
        np.savez(os.path.join(out, "images.npz"), *arrays)
    except OSError as e:
        raise UserError(f"cannot write --out {out}: {e}")
    print(f"{out}: {len(images):,} PNGs, and images.npz with {len(arrays)} array(s)")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ({' '.join(self.format_usage().split())})")


def parse(argv):
    """argv -> the command, the set's name and the command's flags. Every mistake is a UserError."""
    parser = Parser(prog="data.py", description=__doc__.split("\n")[0],
                    epilog=f"built-in sets: {', '.join(BUILT_IN)}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        p = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        p.add_argument("name", metavar="NAME", help="a built-in set, or the name of your own")
        p.add_argument("--data-dir", default="datasets", metavar="DIR", help="where sets are kept")
        return p

    p = command("prepare", "convert a set, once")
    p.add_argument("--src", metavar="PATH", help="folder of pictures; emoji: font; cifar10: archive")
    p.add_argument("--size", metavar="S", type=int, help="pixels a side; default: 32 or 64, as fits")
    p.add_argument("--limit", metavar="N", type=int, help="at most so many pictures")
    p = command("show", "draw a sheet of its pictures")
    p.add_argument("--out", metavar="FILE.png", help="default: show.png beside the set")
    p = command("export", "write single PNGs and an .npz")
    p.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder")
    p.add_argument("--limit", metavar="N", type=int, help="only the first N")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"there is no {' '.join(unknown)}")
    return args


def main():
    args = parse(sys.argv[1:])
    if args.command == "show":
        show(args.name, args.data_dir, args.out)
    elif args.command == "export":
        export(args.name, args.data_dir, args.out, args.limit)
    elif not prepare(args.name, args.data_dir, args.src, args.size, args.limit):
        print(f"{os.path.join(args.data_dir, args.name)} is already prepared: nothing to do")


if __name__ == "__main__":
    run(main)
