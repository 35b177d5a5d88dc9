"""Data sets: from pictures, wherever they are, to the batches of a training step.

    python data.py prepare shapes                        a built-in set: drawn here, no download
    python data.py prepare cats --src ~/cats --size 64   a set of your own: any folder of pictures
    python data.py prepare celeba64 --src ~/celeba       a published one
    python data.py show cats                             look at it
    python data.py export cats --out cats_png            single PNGs, and an .npz for FID tools
    python data.py encode cats --encoder words           captions become what a text-conditional network reads

A data set is three things: where the pictures are, how they become squares, and their labels or captions. For each kind
of set one function returns these as a Source. `prepare` reads the Source once and writes

    datasets/NAME/images.npy       uint8 (N, 3, S, S), memory-mapped afterwards
                  labels.npy       int64 (N,), if the set has classes
                  captions.jsonl   one JSON list of strings per picture, if the set has captions
                  skipped.txt      files that could not be read, and why, if there are any
                  meta.json        written last: if it is there, the set is complete

and nothing after that needs to know what kind of set it was. Sets of millions, in tar shards or an lmdb, stay where
they are: instead of images.npy, index.npy says where each picture lies. Shape letters: N pictures, B pictures of a
batch, S pixels a side; 3 is always red, green, blue.
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import sys
import tarfile
import textwrap
import time
import unicodedata
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm


# ---- mistakes and files --------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can put right. The message says what is allowed, in one line."""


class LocalError(UserError):
    """A mistake that one process may meet alone (a damaged shard, a full GPU). Every process reports its own; any other
    UserError is reported only by the first process of each machine."""


class Console:
    """stdout or stderr. If nobody reads it any more (a closed pipe, a full disk), words are lost, and no work."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, act, *args):
        try:
            return act(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run(main):
    """main(), but a UserError or OSError ends in one line and exit code 2 instead of a traceback."""
    out, err = (Console(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))    # None: closed
    # file names need not be valid text; and in a log file, lines are to be seen at once
    out.reconfigure(errors="backslashreplace", line_buffering=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if sys.flags.optimize:
                raise UserError("python -O leaves out checks this code needs: run it without -O and PYTHONOPTIMIZE")
            main()
            out.flush()
        except KeyboardInterrupt:                       # nothing is lost here; train.py handles signals itself
            print("stopped", file=err)
            sys.exit(130)
        except (UserError, OSError) as e:
            first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0"
            if first or isinstance(e, (OSError, LocalError)):
                lines = str(e).strip().splitlines()
                if "Traceback" in str(e):               # a loader worker's: its last line says what is wrong
                    lines = lines[-1:]
                for bar in list(getattr(tqdm, "_instances", ())):       # open bars would be drawn once more, below
                    bar.close()
                print("error:", *map(str.strip, lines), file=err)
            sys.exit(2)


def first_line(e):
    """Of an error's message, to which torch adds pages; its type if it has no message."""
    return (str(e).strip().splitlines() or [repr(e)])[0]


def processes():
    """(rank, world): the number of this process and how many there are, as torchrun sets them; (0, 1) without it."""
    world = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0" if world == "1" else "")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise LocalError(f"the environment's RANK {rank!r} of WORLD_SIZE {world!r} makes no sense; torchrun sets them")
    port = os.environ.get("MASTER_PORT", "")
    if int(world) > 1 and not ("MASTER_ADDR" in os.environ and port.isdecimal() and int(port) < 2 ** 16):
        raise LocalError(f"the environment has a WORLD_SIZE of {world} without a MASTER_ADDR and a valid MASTER_PORT "
                         f"(it is {port!r}); torchrun sets them")
    return int(rank), int(world)


def write_file(path, write, sync=True):
    """Write a binary file with write(f). It appears at path complete or not at all; without sync, unless the machine
    goes down just then."""
    part = f"{path}.part"
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"cannot write {path}: it is not a regular file")     # /dev/null, say, must not be replaced
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as e:                          # also Ctrl-C
        with contextlib.suppress(OSError):
            os.unlink(part)
        if type(e) is RuntimeError:                     # torch.save's, whose cause is in its context; a subclass is not
            e = e.__context__ or e
        if (isinstance(e, OSError) or type(e) is RuntimeError) and getattr(e, "filename", None) in (None, part):
            raise OSError(f"cannot write {path}: {e}")  # but not: cannot read some other file
        raise


def npy_header(f, kind, *shape):
    """Write the header of a .npy file whose rows follow one by one. numpy pads it, so a second one can overwrite it
    when the number of rows is known."""
    np.lib.format.write_array_header_1_0(f, dict(descr=kind, fortran_order=False, shape=shape))


def check_room(folder, need, advice):
    """UserError if the disk of a folder has fewer than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"the disk has {free:,} bytes free and {folder} needs {need:,} more: try {advice}")


@contextlib.contextmanager
def or_damaged(folder, remedy, kind=UserError):
    """An error in reading a folder of ours calls for making it anew, unless the disk or permissions are at fault."""
    try:
        yield
    except Exception as e:                              # numpy raises half a dozen kinds
        if isinstance(e, (UserError, OSError)) and not isinstance(e, FileNotFoundError):
            raise
        raise kind(f"{folder} is damaged ({e}): {remedy}")


def removal(folder):
    """The command that removes a folder, for messages."""
    return f"rm -r {shlex.quote(str(folder))}"


def lock(f, wait=False):
    """Lock an open file until this process closes it or ends. False if another process holds the lock and this one does
    not wait. Where files cannot be locked (Windows, some network disks), every process gets True."""
    try:
        import fcntl                                    # lockf, since loader workers would inherit flock's lock
        fcntl.lockf(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        pass
    return True


@contextlib.contextmanager
def alone(folder):
    """Make a folder and lock it: a second process waits here for the first. The lock file is never removed, because
    others may be waiting for it."""
    try:
        os.makedirs(folder, exist_ok=True)
        f = open(os.path.join(folder, ".lock"), "a")
    except PermissionError:
        raise UserError(f"no permission to write into {folder}: its owner can, or use another --data-dir")
    with f:
        if not lock(f):
            tqdm.write(f"another process is at work in {folder}: waiting for it", file=sys.stderr)
            lock(f, wait=True)
        yield


def read_dict(path):
    """The dict in a file of torch.save, its tensors on the CPU. Loading runs no code from the file."""
    try:
        if zipfile.is_zipfile(path):                    # torch.load itself does not verify checksums
            with zipfile.ZipFile(path) as parts:
                if broken := parts.testzip():
                    raise ValueError(f"the checksum of its part {broken} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # about pickles that it refuses anyway
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                              # torch raises half a dozen kinds
        code, reason = re.search(r"GLOBAL ([\w.]+)", str(e)), first_line(e)
        if code:
            reason = f"it holds {code[1]}, and more than tensors and plain values could run code here"
        elif isinstance(e, pickle.UnpicklingError):     # torch's own message advises running the code
            reason = "torch.save did not write it, or it is damaged"
        kind = LocalError if isinstance(e, (OSError, MemoryError)) else UserError       # perhaps this process alone
        raise kind(f"cannot read the checkpoint {path}: {reason}")
    if not isinstance(whole, dict):
        raise UserError(f"{path} holds a {type(whole).__name__}, not a dict of weights")
    return whole


# ---- randomness with an address ------------------------------------------------------------------
# There is no stream of random numbers. Each number is a hash of where it is used, so the thousandth
# needs no 999 before it: a resumed run, or one with more workers, draws the same numbers. (Two uses may have one
# address: a sample's noise and that of a training step, say. This does no harm.)

SHUFFLE, MIRROR, NOISE, CAPTION, SCENE, WORD = 1, 2, 3, 4, 5, 6         # purposes


def mix(*ints):
    """A 64-bit hash of integers, in order: a Python int, or a uint64 array if any of them is an
    int64 or uint64 array. Pictures and runs depend on it: it never changes.

    One splitmix64 step per integer (Steele, Lea and Flood 2014, constants of Stafford's mix 13)."""
    h = np.zeros(1, np.uint64)                          # an array, because those overflow silently
    for v in ints:
        v = v.astype(np.uint64) if isinstance(v, np.ndarray) else np.array([int(v) % 2 ** 64], np.uint64)
        h = h + (v + 1) * 0x9E3779B97F4A7C15
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB
        h = h ^ (h >> 31)
    return h if any(isinstance(v, np.ndarray) for v in ints) else int(h[0])


def uniform(*ints):
    """As mix, but float64 in [0, 1): integer steps and single roundings, so it is the same on any machine."""
    return (mix(*ints) >> 11) * 2.0 ** -53


def seed32(*ints):
    """From any integers, a seed that every generator accepts."""
    return mix(*ints) % 2 ** 32


def image_seeds(seed, ids):
    """A seed for the starting noise of each picture, whatever its batch. They are consecutive, since
    generators may keep only 32 bits, and 32-bit hashes of 50,000 pictures may collide."""
    first = mix(seed, NOISE)
    return [(first + i) % 2 ** 32 for i in ids]


# ---- pictures as arrays --------------------------------------------------------------------------

def to_uint8(x):
    """Float tensor in [-1, 1], of any shape -> uint8 tensor. Values outside are clamped."""
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
    """At most n of the items, evenly spaced (all if n is None), so that a part of a sorted list
    still has some of every class."""
    if n is None or n >= len(items):
        return items
    return [items[i * len(items) // n] for i in range(n)]


# ---- a source: a data set before it is converted -------------------------------------------------

class Source(NamedTuple):
    count: int            # pictures to expect; unreadable ones drop out on the way
    size: int             # pixels a side
    classes: list         # names; [] is a set without classes
    items: Iterator       # of (square uint8 (3, S, S), class index or None, list of captions or None)
    origin: str           # a path, or "drawn"
    notes: dict           # whatever else meta.json should hold; sha256: of the source, or of its list of files
    skipped: list         # (path, reason) of unreadable pictures; grows while items are taken
    index: np.ndarray = None            # instead of items: the names of pictures that stay in place


# ---- shapes: drawn pictures, so that answers can be checked --------------------------------------
# A picture is a background and a list of objects, painted on it in turn. Everything is relative to
# the side, so an index gives the same picture at any size.

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
    """The fraction of each pixel that a shape covers, float (S, S) in [0, 1]: anti-aliasing."""
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
    # purposes of its own: 0 colour, 1 shape, 2 grey, 3 side, 4 and 5 place
    colour, shape, grey = ((mix(index, purpose) % n).astype(np.int64) for purpose, n in enumerate((6, 4, 3)))
    box = 0.40 + 0.35 * uniform(index, 3)
    x, y = (box / 2 + (1 - box) * uniform(index, purpose) for purpose in (4, 5))        # fully inside
    images = np.empty((len(index), 3, size, size), np.uint8)
    for i, row in enumerate(zip(colour, shape, x, y, box)):
        images[i] = paint(GREYS[grey[i]], [Object(*row)], size)
    return images, colour * 4 + shape


def drawn_source(src, size, limit, classes, items):
    if src is not None:
        raise UserError("the shapes sets are drawn: they take no --src")
    count = min(SHAPE_COUNT, limit or SHAPE_COUNT)
    return Source(count, size, classes, items(count, size), "drawn", {}, [])


def shape_items(count, size):
    for start in range(0, count, 500):
        images, labels = draw_shapes(np.arange(start, min(start + 500, count)), size)
        yield from zip(images, labels, [None] * len(labels))


shapes_source = functools.partial(drawn_source, classes=SHAPE_CLASSES, items=shape_items)


# ---- shapes with captions: one or two objects, what they are and where ---------------------------
# `python train.py --data shapes --cond text` learns from shapes-text, drawn on first use. Captions: "a small red circle
# on the left", or "a small red circle above a large blue square". Two objects differ in colour and never touch.

SIDES = dict(small=(0.30, 0.35), large=(0.41, 0.46))    # of the bounding box, in units of the picture's side
ALONE = 0.62                                            # the largest side of an object that is alone in its picture
PLACES = {"in the middle": (0, 0), "on the left": (-0.2, 0), "on the right": (0.2, 0), "at the top": (0, -0.2),
          "at the bottom": (0, 0.2)}                    # of one object: its centre minus the picture's, +- 0.06
# from the second object to the first; number r is the opposite of number r ^ 1
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
GAP = 0.07                                              # the least distance between the boxes of two objects


def held_out_colour(shape, relation):
    """The colour that a shape never has in a relation, in any picture of the set. Relation 0 (above): no red circle is
    above anything (nor anything below one), but red circles elsewhere, and others above, are common."""
    return (shape + relation) % 6


def draw_scene(index, held_out=False):
    """Picture number `index` of the caption task -> (grey level, Objects, caption), for `paint`. The same everywhere
    and for ever. held_out: two objects, the first in its held_out_colour."""
    def choice(purpose, n):
        return mix(index, SCENE, purpose) % n

    def part(purpose):
        return uniform(index, SCENE, purpose)

    def phrase(size, colour, shape):
        return f"a {list(SIDES)[size]} {list(PALETTE)[colour]} {SHAPES[shape]}"

    sizes, shapes = (choice(0, 2), choice(1, 2)), (choice(2, 4), choice(3, 4))
    sides = [list(SIDES.values())[size] for size in sizes]
    boxes = [low + (high - low) * part(4 + i) for i, (low, high) in enumerate(sides)]
    grey = GREYS[choice(6, 3)]
    if not held_out and choice(7, 2) == 0:
        colour, place = choice(8, 6), list(PLACES)[choice(9, 5)]
        box = SIDES["large"][0] + (ALONE - SIDES["large"][0]) * part(4) if sizes[0] else boxes[0]
        x, y = (np.clip(0.5 + d + 0.12 * (part(10 + i) - 0.5), box / 2, 1 - box / 2)
                for i, d in enumerate(PLACES[place]))
        return grey, [Object(colour, shapes[0], x, y, box)], f"{phrase(sizes[0], colour, shapes[0])} {place}"

    relation = choice(8, 4)
    missing = [held_out_colour(shapes[0], relation), held_out_colour(shapes[1], relation ^ 1)]
    colour = missing[0] if held_out else (missing[0] + 1 + choice(9, 5)) % 6
    left = [c for c in range(6) if c != colour and (held_out or c != missing[1])]
    colours = colour, left[choice(10, len(left))]

    # along the relation's axis each object has its own part of the side; across it, each is near the middle
    slack = 1 - boxes[0] - boxes[1] - GAP
    before, after = slack * part(11), slack * (1 - part(11)) * part(12)
    name, (dx, dy) = list(RELATIONS.items())[relation]
    first, centres = 0 if dx + dy < 0 else 1, []        # which object comes first from the left, or from the top
    for i in range(2):
        along = before + boxes[i] / 2 if i == first else 1 - after - boxes[i] / 2
        across = 0.5 + 0.16 * (part(13 + i) - 0.5)
        centres.append((along, across) if dx else (across, along))
    objects = [Object(colours[i], shapes[i], *centres[i], boxes[i]) for i in range(2)]
    return grey, objects, f"{phrase(sizes[0], colours[0], shapes[0])} {name} {phrase(sizes[1], colours[1], shapes[1])}"


def scene_items(count, size):
    for grey, objects, caption in map(draw_scene, range(count)):
        yield paint(grey, objects, size), None, [caption]


captions_source = functools.partial(drawn_source, classes=[], items=scene_items)


# ---- emoji: a thousand real pictures with real captions, out of a font ---------------------------

NOTO = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"              # where Debian puts it
NOT_PICTURES = ("CLOCK FACE", "ARROW", "TRIANGLE", "EMOJI COMPONENT", "INPUT SYMBOL", "KEYCAP")


def emoji_name(code):
    """The Unicode name of a code point that shows a thing rather than a sign, else ''. How many
    there are depends a little on Python: each version knows the emoji of its day."""
    name = unicodedata.name(chr(code), "")
    words = set(name.split())
    sign = unicodedata.category(chr(code)) != "So" or "SIGN" in words or any(part in name for part in NOT_PICTURES)
    outlined = code < 0x1F5A4 and words & {"BLACK", "WHITE"}            # not a colour: a WHITE SUN is yellow
    return "" if sign or outlined else name.lower()


def emoji_source(src, size, limit):
    """Noto Color Emoji holds one bitmap of 136 x 128 per glyph, at 109 pixels per em and no other size."""
    path = src or NOTO
    if not os.path.isfile(path):
        raise UserError(f"no emoji font at {path}: `apt-get install fonts-noto-color-emoji`, or "
                        "name a NotoColorEmoji.ttf with --src FONT")
    names = {chr(code): emoji_name(code) for code in range(0x1F300, 0x1FB00)}
    try:                                                # the other layout engine fails on some
        font = ImageFont.truetype(path, 109, layout_engine=ImageFont.Layout.BASIC)
        glyphs = spread([c for c in names if names[c] and font.getbbox(c) == (0, 0, 136, 128)], limit)
    except OSError as e:
        raise UserError(f"{path} is not Noto Color Emoji, a font of 109-pixel bitmaps: {e}")
    if not glyphs:
        raise UserError(f"{path} is not Noto Color Emoji: it has no glyphs of 136 x 128 pixels")

    def items():
        for c in glyphs:
            image = Image.new("RGB", (136, 136), "white")
            ImageDraw.Draw(image).text((0, 4), c, font=font, embedded_color=True)
            image = image.resize((size, size), Image.Resampling.LANCZOS)
            yield np.asarray(image).transpose(2, 0, 1), None, [names[c]]

    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Source(len(glyphs), size, [], items(), path, dict(sha256=sha256), [])


# ---- where pictures are: a folder, a zip, an lmdb, tar shards ------------------------------------
# A place has `names`, always in the same order; open(name) -> a binary file; title(name), what messages call it; and
# sha256, over the list of its files and their sizes: that of a copy elsewhere, and another once files come, go or
# change their size.

EXTENSIONS = tuple(".jpg .jpeg .jfif .png .gif .webp .avif .bmp .ppm .pgm .tif .tiff".split())
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX)")              # files and folders of such names are passed over


def digest(lines):
    """sha256 of lines of text. They may hold file names, which need not be valid text."""
    h = hashlib.sha256()
    for line in lines:
        h.update(os.fsencode(line + "\n"))
    return h.hexdigest()


def encoding_of(raw):
    """Of a text file's first bytes. Windows editors begin it with a byte-order mark, PowerShell with UTF-16's."""
    return "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def to_text(raw):
    """The bytes of a text file -> str."""
    return raw.decode(encoding_of(raw), "replace")


def lines_of(text):
    """Text -> its lines. str.splitlines would also split at characters that may be inside of a line, such as U+2028."""
    return re.split(r"\r\n?|\n", text)


class Files:
    """A place whose names are paths, str."""

    def title(self, name):
        return name

    def text(self, name):
        with self.open(name) as f:
            return to_text(f.read())

    def find(self, pattern):
        """Names whose last part matches."""
        return [name for name in self.names if re.fullmatch(pattern, name.split("/")[-1])]

    def pictures(self):
        return [name for name in self.names if name.lower().endswith(EXTENSIONS)]


class Folder(Files):
    """All files below a folder, also in linked folders. Sorted, because disks have orders of their own."""

    def __init__(self, src):
        self.src, sizes = src, {}

        def walk(folder, prefix, above):
            real = os.path.realpath(folder)
            if real in above:                           # a circular link
                return
            for entry in os.scandir(folder):
                if HIDDEN.match(entry.name):
                    continue
                if os.path.isdir(entry.path):
                    if not os.path.exists(os.path.join(entry.path, ".lock")):   # a set or a run of ours
                        walk(entry.path, f"{prefix}{entry.name}/", {*above, real})
                # a pipe is passed over: opening it would wait for a writer
                elif (file := os.path.isfile(entry.path)) or entry.is_symlink():
                    sizes[prefix + entry.name] = os.path.getsize(entry.path) if file else -1

        try:
            walk(src, "", {str(folder) for folder in Path(src).resolve().parents})
        except PermissionError as e:
            raise UserError(f"cannot read the folder {e.filename}: {e.strerror}")
        self.names = sorted(sizes)
        self.sha256 = digest(f"{name}\t{sizes[name]}" for name in self.names)

    def open(self, name):
        return open(os.path.join(self.src, name), "rb")


class Zip(Files):
    """The files in a zip, as if in a folder: EDM's data sets, for example."""

    def __init__(self, src):
        self.src, self.zip = src, zipfile.ZipFile(src)
        found = {entry.filename.replace("\\", "/"): entry for entry in self.zip.infolist()}      # as old .NET writes
        found = {name: entry for name, entry in found.items() if not name.endswith("/") and not HIDDEN.search(name)}
        self.sha256 = digest(f"{name}\t{found[name].file_size}\t{found[name].CRC}" for name in sorted(found))
        tops = {name[:name.find("/") + 1] for name in found}
        top = tops.pop() if len(tops) == 1 else ""                      # a folder around everything does not count
        self.entries = {name.removeprefix(top): entry for name, entry in found.items()}
        self.names = sorted(self.entries)

    def open(self, name):
        return io.BytesIO(self.zip.read(self.entries[name]))


@functools.lru_cache(maxsize=4)
def open_lmdb(src):
    try:
        import lmdb
    except ImportError:
        raise UserError("LSUN is kept in lmdb files: `pip install lmdb`")
    try:
        env = lmdb.open(src, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as e:
        raise LocalError(f"{src} is not a readable lmdb: {e}")
    size, whole = os.path.getsize(os.path.join(src, "data.mdb")), (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if size < whole:                                    # reading on would kill this process with a bus error
        raise LocalError(f"{src} is cut short: data.mdb has {size:,} bytes of {whole:,}")
    return env


if hasattr(os, "register_at_fork"):                     # an lmdb must not be carried through a fork
    os.register_at_fork(before=open_lmdb.cache_clear)


class Lmdb:
    """The values of an lmdb, the form of LSUN; names: bytes (N,), the keys (hashes) in order, each with a full stop
    added, because numpy drops zeros at the end."""

    def __init__(self, src, names=None):
        self.src, self.names = src, names
        open_lmdb(src)                                  # now, since several threads must not do it at once
        if names is None:
            with open_lmdb(src).begin() as view:
                keys = tqdm(view.cursor().iternext(values=False), desc="keys", disable=None)
                self.names = np.array([key + b"." for key in keys], bytes)
            size = os.path.getsize(os.path.join(src, "data.mdb"))
            self.sha256 = hashlib.sha256(self.names.tobytes() + b"%d" % size).hexdigest()

    def open(self, name):
        with open_lmdb(self.src).begin() as view:
            value = view.get(bytes(name)[:-1])
        if value is None:
            raise LocalError(f"{self.src} lacks entries that it had when it was prepared")
        return io.BytesIO(value)

    def title(self, name):
        return os.fsdecode(bytes(name)[:-1])


def tar_pictures(path):
    """The pictures in a tar, int64 (N, 5), and what is wrong with it, or "". A row: number, offset and length
    of the picture, the same of its caption (0 0 without one). Files of one name up to the first dot belong together."""
    samples, trouble, end = {}, "", os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, file = os.path.split(member.name)
                stem, _, kind = file.partition(".")
                if member.isfile() and stem and member.offset_data + member.size <= end:
                    sample = samples.setdefault((folder, stem), {})
                    sample["." + kind.lower()] = member.offset_data, member.size
            with open(path, "rb") as f:
                f.seek(tar.offset)                      # where tarfile stopped: at a broken header, too, silently
                if any(f.read(2 ** 16)):                # a proper end is all zeros
                    trouble = f"damaged at byte {tar.offset:,}, beyond which nothing is read"
    except Exception as e:                              # a damaged header can raise anything; what was read is good
        trouble = str(e) or type(e).__name__
    rows, dotted = [], 0
    for sample in samples.values():
        picture = next((sample[kind] for kind in EXTENSIONS if kind in sample), None)
        if picture:
            rows.append((len(rows), *picture, *sample.get(".txt", (0, 0))))
        else:
            dotted += sum(kind.endswith(EXTENSIONS) for kind in sample)
    if dotted:
        trouble = f"{trouble} {dotted:,} pictures have a second dot in their names, as parts of samples have".strip()
    return np.array(rows, np.int64).reshape(-1, 5), trouble


def index_tars(src, shards, limit):
    """The Tars of these shards, or of the first that hold `limit` pictures."""
    paths, found = [os.path.join(src, shard) for shard in shards], []
    with ProcessPoolExecutor(min(len(paths), os.cpu_count())) as pool:
        tables = tqdm(pool.map(tar_pictures, paths), desc="shards", total=len(paths), disable=None)
        for (rows, trouble), path in zip(tables, paths):
            if trouble:
                print(f"warning: {path}: {trouble}; it gave {len(rows):,} pictures", file=sys.stderr)
            found.append(np.insert(rows, 0, len(found), axis=1))
            if limit and sum(map(len, found)) >= limit:
                pool.shutdown(cancel_futures=True)
                break
    return Tars(src, np.concatenate(found)[:limit], shards[:len(found)])


class Tars:
    """Tar shards in a folder, as img2dataset writes them; names: int64 (N, 6), number of the shard, number of
    the picture in it, offset and length of the picture, offset and length of the caption."""

    def __init__(self, src, names, shards):
        self.src, self.names, self.shards = src, names, shards
        self.sha256 = digest(f"{shard}\t{os.path.getsize(os.path.join(src, shard))}" for shard in shards)

    def read(self, shard, offset, length):
        with open(os.path.join(self.src, self.shards[shard]), "rb") as f:
            f.seek(offset)
            return f.read(length)

    def open(self, name):
        return io.BytesIO(self.read(name[0], name[2], name[3]))

    def captions(self, name):
        return caption_lines(to_text(self.read(name[0], name[4], name[5])))

    def title(self, name):                              # a member's header is the block before it
        member = self.read(name[0], name[2] - 512, 100).split(b"\0")[0].decode(errors="replace")
        return f"{self.shards[name[0]]}/{member}"


def open_files(src):
    """A folder or a zip."""
    if os.path.isfile(src) and zipfile.is_zipfile(src):
        return Zip(src)
    if not os.path.isdir(src):
        raise UserError(f"--src {src} is not a folder, nor a zip")
    return Folder(src)


# ---- how a picture becomes a square --------------------------------------------------------------

CROP = r"square|adm|bbox|[1-9]\d*|\d+,\d+,\d+,\d+"      # bbox: of a set whose every picture has its own box
CROPS = ("square (the largest in the middle), adm (the same as ADM cuts it), N (the middle N pixels) or "
         "LEFT,TOP,RIGHT,BOTTOM (a box)")

warnings.filterwarnings("ignore", module="PIL")         # about pictures that it reads anyway


def to_rgb(image):
    """Any PIL picture -> RGB. convert() alone would clip 16 bits and reveal what alpha hides."""
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


def adm_square(image, size):
    """The centre square as ADM, DiT and others cut it: halve with a box filter while that leaves enough pixels, resize
    bicubically to whole pixels, then cut. Rounding puts it up to a pixel off the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return cut(image, str(size))


def cut(image, crop):
    """The part of a picture that "N" or "LEFT,TOP,RIGHT,BOTTOM" names, as far as the picture goes."""
    (W, H), box = image.size, [int(number) for number in crop.split(",")]
    if len(box) == 1:
        left, top = (W - box[0]) // 2, (H - box[0]) // 2
        box = left, top, left + box[0], top + box[0]
    left, top, right, bottom = max(0, box[0]), max(0, box[1]), min(W, box[2]), min(H, box[3])
    if left >= right or top >= bottom:
        raise ValueError(f"nothing of its {W} x {H} pixels is in the box")
    return image.crop((left, top, right, bottom))


def load_square(file, size, crop="square"):
    """A picture, or the first of an animation -> uint8 (3, S, S). The middle square of what a crop leaves is resized;
    if the crop is given by numbers, bilinearly, as by those who published the boxes."""
    with Image.open(file) as image:
        if crop == "square":
            image.draft("RGB", (3 * size, 3 * size))    # JPEG can decode smaller, and much faster
        image.load()
        with contextlib.suppress(Exception):            # damaged EXIF does not say which way is up
            image = ImageOps.exif_transpose(image)
        image = to_rgb(image)
    how = dict(resample=Image.Resampling.BICUBIC, reducing_gap=3.0)
    if crop == "adm":
        image = adm_square(image, size)
    elif crop != "square":
        image, how = cut(image, crop), dict(resample=Image.Resampling.BILINEAR)
    (W, H), side = image.size, min(image.size)
    left, top = (W - side) // 2, (H - side) // 2        # whole pixels: half of one would blur what keeps its size
    box = left, top, left + side, top + side
    return np.asarray(image.resize((size, size), box=box, **how)).transpose(2, 0, 1)


# ---- from the pictures in a place to a source -----------------------------------------------------

def load_or_reason(open_file, size, crop="square"):
    """load_square, or the reason it failed, as a string: never some other picture instead."""
    file = None
    try:
        with open_file() as file:
            return load_square(file, size, crop)
    except Exception as e:                              # a broken file can raise anything
        return " ".join(f"{type(e).__name__}: {e}".replace(repr(file), "the file").split())


def natural_size(place, names):
    """32 or 64 pixels, whichever suits the median short side of (at most 200 of) the pictures."""
    sides = []
    for name in spread(names, 200):
        with contextlib.suppress(Exception), place.open(name) as file, Image.open(file) as image:
            sides.append(min(image.size))               # load_square will say what is wrong with the others
    return 32 if sides and np.median(sides) < 64 else 64


def in_threads(work, items):
    """map(work, items), in order, on all cores: decoders release the GIL. Few at a time, or results pile up."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(items), 256):
            yield from pool.map(work, items[i:i + 256])


def pictures_source(place, names, size, limit, crop, classes=(), label=None, captions=None, boxes=None):
    """A Source of the pictures of these names in a place. label(name) -> int and captions(name) -> list of str, if
    there are any; boxes: name -> its crop, for crop "bbox"."""
    if len(names) == 0:
        raise UserError(f"no pictures in {place.src} or below; looked for {' '.join(EXTENSIONS)}")
    names, skipped = spread(names, limit), []
    size = size or natural_size(place, names)

    def square(name):
        return load_or_reason(functools.partial(place.open, name), size, boxes[name] if crop == "bbox" else crop)

    def items():
        for name, found in zip(names, in_threads(square, names)):
            if not isinstance(found, str):
                yield found, label(name) if label else None, captions(name) if captions else None
                continue
            skipped.append((place.title(name), found))
            if len(skipped) > max(5, 0.02 * len(names)):
                raise UserError(f"more than 5, and more than 2%, of the {len(names):,} pictures in "
                                f"{place.src} cannot be read; one is {skipped[-1][0]!r} ({found})")

    notes = dict(crop=crop, sha256=place.sha256)
    return Source(len(names), size, list(classes), items(), place.src, notes, skipped)


def in_place_source(place, size, limit, crop):
    """A Source that only indexes tars or an lmdb: decoded, their pictures would take many times the space."""
    names = place.names[:limit]
    reasons = [load_or_reason(functools.partial(place.open, name), size or 64, crop) for name in spread(names, 20)]
    if all(isinstance(reason, str) for reason in reasons):
        raise UserError(f"{place.src} holds no pictures that can be read: {(reasons or ['no pictures at all'])[0]}")
    notes = dict(crop=crop, sha256=place.sha256, place=type(place).__name__, shards=getattr(place, "shards", None))
    return Source(len(names), size or natural_size(place, names), [], None, place.src, notes, [], index=names)


# ---- a folder, zip, lmdb or shards of your own ---------------------------------------------------

def numbered(n, first=1):
    """Names for classes that have none."""
    return [f"class {i}" for i in range(first, first + n)]


def folder_labels(place, names):
    """Class names and label(name). They come from dataset.json, as EDM writes it, if there is one. Else the classes are
    the top-level subfolders, if there are at least two, every picture is in one, and they are not all called by five
    digits or more, as parts of a set are; else there are none: [], None."""
    if "dataset.json" in place.names:
        try:
            labels = {name: int(label) for name, label in json.loads(place.text("dataset.json"))["labels"] or []}
        except (ValueError, TypeError, KeyError, OverflowError) as e:
            raise UserError(f"dataset.json in {place.src} is no {{'labels': [['a.png', 0], ..]}}: "
                            f"{type(e).__name__} {e}")
        if not labels:
            return [], None
        if missing := [name for name in names if labels.get(name, -1) < 0]:
            raise UserError(f"dataset.json in {place.src} has no label for {len(missing):,} of its pictures, "
                            f"such as {missing[0]!r}")
        if (last := max(labels.values())) >= max(1000, len(names)):
            raise UserError(f"dataset.json in {place.src} has a label {last} for {len(names):,} pictures: "
                            "labels are the numbers of classes, from 0")
        return numbered(last + 1, 0), labels.get
    tops = sorted({name.split("/")[0] if "/" in name else "" for name in names})        # "" comes first
    if len(tops) > 1 and all(re.fullmatch(r"\d{5,}", top) for top in tops):
        print(f"warning: no classes, since {tops[0]} and the other subfolders of {place.src} look like parts of a set; "
              "if they are classes, give them names that are not numbers", file=sys.stderr)
    elif len(tops) > 1 and tops[0]:
        number = {top: i for i, top in enumerate(tops)}
        return tops, lambda name: number[name.split("/")[0]]
    elif len(tops) > 2:
        print(f"warning: no classes, since some pictures of {place.src} are in no subfolder", file=sys.stderr)
    return [], None


def caption_lines(text):
    """Text, one caption per line -> list of str, at least one. Invalid text counts as a space."""
    lines = [" ".join(line.replace("\ufffd", " ").split()) for line in lines_of(text)]
    return [line for line in lines if line] or [""]


def read_metadata(place, table):
    """A metadata.jsonl or .csv with columns file_name and text, caption or prompt -> {file: list of str}."""
    found, folder = {}, os.path.dirname(table)
    try:
        with place.open(table) as raw:
            encoding = encoding_of(raw.read(2))
        with place.open(table) as raw, io.TextIOWrapper(raw, encoding, newline="") as f:
            by_line = table.endswith(".jsonl")
            rows = map(json.loads, filter(str.strip, f)) if by_line else csv.DictReader(f, strict=True)
            for row in rows:
                if any(map(str.strip, row.get(None, []))):      # cells beyond the columns
                    raise ValueError("a row of more cells than columns (texts that hold commas need quotes)")
                text = next((row[name] for name in ("text", "caption", "prompt") if row.get(name) is not None), None)
                if text is not None:
                    name = os.path.normpath(os.path.join(folder, row["file_name"])).replace(os.sep, "/")
                    texts = text if isinstance(text, list) else [text]
                    found.setdefault(name, []).extend([str(t) for t in texts if t is not None] or [""])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as e:
        raise UserError(f"{table} in {place.src} should hold file_name and text in every row: {type(e).__name__} {e}")
    if not found:
        print(f"warning: {table} in {place.src} gives no captions in a column text, caption or prompt", file=sys.stderr)
    return found


def folder_captions(place, names):
    """captions(name), or None. From metadata.jsonl files, else metadata.csv files, else a .txt beside each picture."""
    files, found = set(place.names), {}                 # found: of a picture its captions, or the file that holds them
    for kind in ("jsonl", "csv"):
        if found:
            break
        for table in place.find(rf"metadata\.{kind}"):
            rows = read_metadata(place, table)
            if absent := sorted(rows.keys() - files):
                raise UserError(f"{table} names {len(absent):,} files that are not in {place.src}: "
                                f"{', '.join(absent[:5])}")
            found.update(rows)
    if not found:
        found = {name: text for name in names if (text := os.path.splitext(name)[0] + ".txt") in files}

    def captions(name):
        there = found.get(name, [""])
        return there if isinstance(there, list) else caption_lines(place.text(there))

    without = sum(name not in found for name in names)
    if 0 < without < len(names):
        print(f"warning: {without:,} of {len(names):,} pictures have no caption", file=sys.stderr)
    return captions if without < len(names) else None


def folder_source(src, size, limit, crop, in_place=False):
    """A Source: tar shards stay in place, all else is converted. in_place: take only shards or an lmdb, unconverted."""
    if os.path.exists(os.path.join(src, "data.mdb")):
        place = Lmdb(src)
        return (in_place_source(place, size, limit, crop) if in_place else
                pictures_source(place, place.names, size, limit, crop))
    place = open_files(src)
    names = place.pictures()
    tars = [name for name in place.names if re.fullmatch(r"[^/]+\.tar", name)] if isinstance(place, Folder) else []
    if tars and (in_place or not names):
        return in_place_source(index_tars(src, tars, limit), size, limit, crop)
    if in_place:
        raise UserError(f"--src {src} is no folder of .tar shards, and no lmdb")
    if tars:
        print(f"warning: {src} has .tar files beside its pictures: taking the pictures alone", file=sys.stderr)
    return pictures_source(place, names, size, limit, crop, *folder_labels(place, names), folder_captions(place, names))


# ---- CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html) --------------------------------------

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def download_cifar(path):
    """Download the archive once and keep it: the server can take an hour."""
    try:
        with urllib.request.urlopen(CIFAR_URL, timeout=60) as reply:
            total = int(reply.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(reply, "read", total=total, desc=CIFAR_URL) as stream:
                shutil.copyfileobj(stream, buffer := io.BytesIO())
        blob = buffer.getvalue()
        if hashlib.sha256(blob).hexdigest() != CIFAR_SHA256:
            raise OSError("what arrived is not the published file: its sha256 differs")
        write_file(path, lambda f: f.write(blob))
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot download {CIFAR_URL} ({e}): get it some other way, put it at {path}, and try again")


def cifar_source(src, size, limit):
    """The 50,000 training pictures, read from inside the archive of the binary version. A record is one
    byte for the class and 3 x 32 x 32 for the picture."""
    if not os.path.isfile(src):
        raise UserError(f"--src {src} is not a file; it should be cifar-10-binary.tar.gz")
    blob = Path(src).read_bytes()
    if hashlib.sha256(blob).hexdigest() != CIFAR_SHA256:
        raise UserError(f"{src} is not the published cifar-10-binary.tar.gz, or not all of it: its sha256 differs")
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        batches = [tar.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read() for i in range(1, 6)]
    records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 3073)[:limit]
    items = ((record[1:].reshape(3, 32, 32), record[0], None) for record in records)
    return Source(len(records), size, CIFAR_CLASSES, items, src, dict(sha256=CIFAR_SHA256), [])


# ---- the sets of the paper -----------------------------------------------------------------------

def read_table(place, stem, columns=None):
    """A table of CelebA, as .txt or as Kaggle's .csv: lines of a file name and integers, perhaps below a line of column
    names -> {file without extension: its integers in these columns, or the last one}; {} if there is no such table.
    (The tables say .jpg, but the faces are published as .png, too.)"""
    for table in place.find(stem + r"\.(txt|csv)"):
        rows = [line.split() for line in place.text(table).replace(",", " ").splitlines() if line.strip()]
        try:
            first = next(i for i, cells in enumerate(rows) if cells[0].lower().endswith(EXTENSIONS))
            head, at = rows[first - 1] if first else [], [-1]
            if columns:
                if unknown := [c for c in columns if c not in head]:
                    raise UserError(f"--classes: no {', '.join(unknown)} in {table}; there are {', '.join(head)}")
                at = [head.index(c) - len(head) for c in columns]
            return {Path(cells[0]).stem: [int(cells[i]) for i in at] for cells in rows[first:]}
        except (StopIteration, ValueError, IndexError):
            raise UserError(f"{table} in {place.src} is not the published table of files and integers")
    return {}


def faces_source(src, size, limit, crop, classes, images, attributes, split=None):
    """CelebA and CelebA-HQ: the folder `images`, the table `attributes`, and the table `split`, 0 for training. If
    attributes are asked for as classes, each combination of having and not having them is a class."""
    place = open_files(src)
    names = [name for name in place.pictures() if images in name.split("/")[:-1]] or place.pictures()   # not the masks
    names.sort(key=lambda name: (len(name), name))                                  # 2.jpg before 10.jpg
    if split and (part := read_table(place, split)):
        names = [name for name in names if part.get(Path(name).stem) == [0]]
    elif split:
        print(f"warning: {src} has no {split}: taking all pictures, not only the training ones", file=sys.stderr)
    if not classes:
        return pictures_source(place, names, size, limit, crop)
    table = read_table(place, attributes, classes)
    rows = {name: table.get(Path(name).stem) for name in names}
    if missing := [name for name in names if not rows[name]]:
        raise UserError(f"there is no {attributes}.txt in {src}, or nothing of {missing[0]} in it: no --classes then")
    combinations = [", ".join(c if i >> k & 1 else f"not {c}" for k, c in enumerate(classes))
                    for i in range(2 ** len(classes))]
    return pictures_source(place, names, size, limit, crop, combinations,
                           label=lambda name: sum((value > 0) << k for k, value in enumerate(rows[name])))


def birds_source(src, size, limit, crop):
    """The training pictures of CUB-200-2011, with the ten captions each that Reed et al. collected, if they are there.
    The box is StackGAN-v2's: a window of 1.5 times the bird's longer side around it."""
    place, label, boxes = open_files(src), {}, {}

    def table(name):                                    # lines of a number and what it stands for
        return dict(line.split(" ", 1) for line in place.text(top + name).splitlines() if line)

    def bird(name):                                     # its species and number, without the extension
        return os.path.splitext("/".join(name.split("/")[-2:]))[0]

    try:
        top = place.find(r"train_test_split\.txt")[0].removesuffix("train_test_split.txt")
        kinds, kind, box = table("classes.txt"), table("image_class_labels.txt"), table("bounding_boxes.txt")
        training = table("train_test_split.txt")
        for number, file in table("images.txt").items():
            if training[number] == "1":
                x, y, w, h = (int(float(v)) for v in box[number].split())
                r, cx, cy = int(max(w, h) * 0.75), (2 * x + w) // 2, (2 * y + h) // 2
                boxes[f"{top}images/{file}"] = f"{cx - r},{cy - r},{cx + r},{cy + r}"
                label[f"{top}images/{file}"] = int(kind[number]) - 1
        classes = [kinds[str(i + 1)].split(".")[-1].replace("_", " ") for i in range(len(kinds))]
    except (OSError, IndexError, KeyError, ValueError) as e:
        raise UserError(f"{src} is not CUB-200-2011 as published: {type(e).__name__} {e}")

    texts = {bird(name): name for name in place.find(r".*\.txt") if "text_c10" in name.split("/")}
    if not texts:
        print(f"warning: {src} has no text_c10, the captions of Reed et al.: a set without captions", file=sys.stderr)

    def captions(name):
        return caption_lines(place.text(texts[bird(name)])) if bird(name) in texts else [""]

    return pictures_source(place, sorted(label), size, limit, crop, classes, label.get, captions if texts else None,
                           boxes)


def imagenet_source(src, size, limit):
    """ImageNet as shrunk by Chrabaszcz et al.: train_data_batch_1.npz .. 10, read row by row. Their labels follow a
    list of their own, map_clsloc.txt. If it is there, classes get names, and the order that they have in other sets of
    ImageNet and in published networks: that of their WordNet ids."""
    place = open_files(src)
    names = sorted(place.find(r"train_data_batch_\d+\.npz"), key=lambda name: int(re.findall(r"\d+", name)[-1]))
    labels = []
    for name in names:
        with place.open(name) as f, np.load(f) as batch:
            labels.append(np.array(batch["labels"] if "labels" in batch else [0], np.int64) - 1)
    if not names or min(map(np.min, labels)) < 0 or max(map(np.max, labels)) > 999:
        raise UserError(f"no ImageNet in {src}: looked for train_data_batch_1.npz .. 10, with labels 1 .. 1000")
    if len(names) != 10:
        print(f"warning: {src} has {len(names)} of the 10 batches: taking those", file=sys.stderr)
    count = min(sum(map(len, labels)), limit or sys.maxsize)
    classes, order = numbered(1000), np.arange(1000)    # order: from their label to our class
    if tables := place.find(r"map_clsloc\.txt"):        # lines like `n02119789 1 kit_fox`
        listed = sorted(line.split() for line in place.text(tables[0]).splitlines() if line.strip())
        if sorted(int(number) for _, number, _ in listed) != list(range(1, 1001)):
            raise UserError(f"{tables[0]} in {src} is not the published list of 1,000 classes")
        classes = [f"{word.replace('_', ' ')} {wnid}" for wnid, _, word in listed]
        order[[int(number) - 1 for _, number, _ in listed]] = np.arange(1000)
    else:
        print(f"warning: {src} has no map_clsloc.txt: classes without names, in another order than elsewhere",
              file=sys.stderr)

    def rows():
        for name, ys in zip(names, labels):
            with place.open(name) as f, zipfile.ZipFile(f).open("data.npy") as pixels:
                np.lib.format.read_magic(pixels)
                shape, by_columns, kind = np.lib.format.read_array_header_1_0(pixels)
                if (shape, by_columns, kind) != ((len(ys), 3 * size * size), False, np.uint8):
                    raise UserError(f"{name} holds {kind} {shape}, not {len(ys)} pictures of {size} pixels a side")
                for y in order[ys]:
                    yield np.frombuffer(pixels.read(3 * size * size), np.uint8).reshape(3, size, size), y, None

    return Source(count, size, classes, itertools.islice(rows(), count), src, dict(sha256=place.sha256), [])


# ---- prepare: a source is converted, once --------------------------------------------------------
# flip: may training mirror pictures? Not emoji, which show letters and hands, and not where captions may speak of left
# and right (those of birds hardly do); None: if there are no captions. crop: how pictures are cut unless --crop asks
# for something else. src: what --src must be.

IN_PLACE = functools.partial(folder_source, in_place=True)              # CC12M and LAION as shards, bedroom as an lmdb
CELEBA = functools.partial(faces_source, images="img_align_celeba", attributes="list_attr_celeba",
                           split="list_eval_partition")
CELEBA_HQ = functools.partial(faces_source, images="CelebA-HQ-img", attributes="CelebAMask-HQ-attribute-anno")
BIRDS = dict(classes=numbered(200), captions=True, flip=True, source=birds_source, crop="bbox",
             src="the folder with CUB_200_2011 and, for captions, cvpr2016_cub")
SHARDS = dict(classes=[], captions=True, flip=False, source=IN_PLACE, crop="square",
              src="the folder of .tar shards that img2dataset wrote")
LSUN = dict(size=256, classes=[], captions=False, flip=True, crop="square")

BUILT_IN = {
    "shapes":      dict(size=32, classes=SHAPE_CLASSES, captions=False, flip=False, source=shapes_source),
    "shapes64":    dict(size=64, classes=SHAPE_CLASSES, captions=False, flip=False, source=shapes_source),
    "emoji64":     dict(size=64, classes=[], captions=True, flip=False, source=emoji_source),
    "emoji128":    dict(size=128, classes=[], captions=True, flip=False, source=emoji_source),
    "cifar10":     dict(size=32, classes=CIFAR_CLASSES, captions=False, flip=True, source=cifar_source),
    # U-ViT's and DDIM's box, 128 pixels a little below the middle of 178 x 218; --crop 140 is NCSN's
    "celeba64":    dict(size=64, classes=[], captions=False, flip=True, source=CELEBA, crop="25,57,153,185",
                        src="the folder with img_align_celeba and list_eval_partition.txt"),
    "celebahq256": dict(size=256, classes=[], captions=False, flip=True, source=CELEBA_HQ, crop="square",
                        src="the folder with CelebA-HQ-img"),
    "church128":   dict(LSUN, size=128, source=folder_source, src="church_outdoor_train_lmdb"),
    "church256":   dict(LSUN, source=folder_source, src="church_outdoor_train_lmdb"),
    "bedroom256":  dict(LSUN, source=IN_PLACE, src="bedroom_train_lmdb"),
    "cub64":       dict(BIRDS, size=64),
    "cub128":      dict(BIRDS, size=128),
    "imagenet64":  dict(size=64, classes=numbered(1000), captions=False, flip=True, source=imagenet_source,
                        src="the folder with train_data_batch_1.npz .. 10 and map_clsloc.txt"),
    "cc12m64":     dict(SHARDS, size=64),
    "laion128":    dict(SHARDS, size=128),
    "shapes-text": dict(size=32, classes=[], captions=True, flip=False, source=captions_source),
    "shapes64-text": dict(size=64, classes=[], captions=True, flip=False, source=captions_source),
}
OWN = dict(size=None, flip=None, source=folder_source, crop="square",           # the row of any other name
           src="a folder of pictures, a .zip, .tar shards or an lmdb")
SCORED = [name for name, row in BUILT_IN.items() if row["source"] in (shapes_source, captions_source)]
NO_SOURCE = [name for name, row in BUILT_IN.items() if row["source"] in (shapes_source, captions_source, emoji_source)]


def set_folder(name, data_dir):
    if not name or name.startswith((".", "-")) or "/" in name or "\\" in name:
        raise UserError(f"{name!r} cannot name a data set; a plain folder name, like cats, can")
    return os.path.join(data_dir, name)


def read_meta(folder, kinds=dict(name=str, size=int, n=int, classes=list, flip=bool, captions=bool)):
    """meta.json of a complete set, or of something else with other keys; None if there is none."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        raise UserError(f"{folder}/meta.json is damaged ({e}): {removal(folder)}, "
                        f"and {'encode' if 'encoder' in kinds else 'prepare'} again")
    wrong = [key for key in kinds if not isinstance(meta, dict) or type(meta.get(key)) is not kinds[key]]
    if wrong:                                           # the folder may be somebody's own
        raise UserError(f"{folder}/meta.json is of something else, or an earlier version: {', '.join(wrong)} missing, "
                        "or of the wrong type; choose another name, or move that away")
    return meta


def check_asked(name, row, size, crop, classes):
    """UserError if the set of this name, and row of BUILT_IN, cannot be made as its arguments ask: see prepare."""
    if size is not None and row["size"] not in (None, size):
        raise UserError(f"--size {size}: {name} is always {row['size']} pixels")
    if size is not None and size < 8:
        raise UserError(f"--size {size}: must be at least 8")
    if crop is not None and "crop" not in row:
        raise UserError(f"--crop: the pictures of {name} are square already")
    if crop == "bbox" and row["crop"] != "bbox":
        raise UserError(f"--crop {crop}: {name} has no such boxes")
    if crop is not None and not re.fullmatch(CROP, crop):
        raise UserError(f"--crop {crop} is none of: {CROPS}")
    if classes is not None and row["source"] not in (CELEBA, CELEBA_HQ):
        raise UserError("--classes: only celeba64 and celebahq256 have attributes")
    if classes is not None and len(classes) > 10:
        raise UserError(f"--classes: {len(classes)} attributes make 2^{len(classes)} classes; at most 10 go together")


def prepare(name, data_dir, src=None, size=None, limit=None, crop=None, classes=None):
    """Convert a set into DATA_DIR/NAME. True if that was done now, False if it was done before.

    src: where its pictures are (emoji: the font); size: pixels a side, for sets of your own; limit: at most so many
    pictures; crop: see CROP; classes: attributes of faces. UserError if the source is no good, the disk is
    too small, or the set is already there with another src, size, limit, crop or classes."""
    folder, row = set_folder(name, data_dir), BUILT_IN.get(name, OWN)
    check_asked(name, row, size, crop, classes)
    src = src and os.path.abspath(os.path.expanduser(src))
    if src and Path(src).resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"--src {src} lies in {folder}, where the set goes: move the pictures away")
    if meta := read_meta(folder):
        asked = dict(src=src, size=size, limit=limit, crop=crop, classes=classes and ",".join(classes))
        there = dict(meta, src=meta.get("source"), classes=",".join(meta.get("attributes") or []))
        if other := [f"--{k} {there[k]}" if there.get(k) else f"no --{k}" for k, v in asked.items()
                     if v is not None and v != there.get(k)]:
            raise UserError(f"{folder} is already there, with {', '.join(other)}; "
                            f"to prepare it anew: {removal(folder)}")
        return False
    if "src" in row and src is None:
        raise not_there(name, data_dir) if name in BUILT_IN else UserError(
            f"which pictures? Name their folder with --src FOLDER: {row['src']}")
    # a killed prepare leaves a lock; whatever else it left is replaced
    files = os.listdir(folder) if os.path.isdir(folder) else []
    if ".lock" not in files and any(not name.startswith(".") for name in files):
        raise UserError(f"{folder} holds files, and no set: choose another name, or move them away")
    if "text" in files:                                 # perhaps days of work, so not ours to replace
        raise UserError(f"{folder} holds features of captions that were there before: "
                        f"{removal(Path(folder, 'text'))}, or move that away")
    try:
        with alone(folder):
            if read_meta(folder):                       # another process was first: is it what is asked for?
                return prepare(name, data_dir, src, size, limit, crop, classes)
            if name == "cifar10" and src is None:       # beside the set, to survive `rm -r`
                src = os.path.abspath(os.path.join(data_dir, os.path.basename(CIFAR_URL)))
                if not os.path.exists(src):
                    download_cifar(src)
            how = dict(crop=crop or row["crop"]) if "crop" in row else {}
            if row["source"] in (CELEBA, CELEBA_HQ):
                how["classes"] = classes
            convert(row["source"](src, size or row["size"], limit, **how), folder,
                    dict(name=name, flip=row["flip"], limit=limit, attributes=classes))
    except (OSError, EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"cannot prepare {name}: {e}")      # RuntimeError: a zip with a password
    return True


def convert(source, folder, about):
    """Write the files of a set, meta.json last. What a killed prepare left behind is replaced."""
    for old in ("images.npy", "index.npy", "labels.npy", "captions.jsonl", "skipped.txt", "meta.json"):
        for path in (Path(folder, old), Path(folder, old + ".part")):
            path.unlink(missing_ok=True)
    S, skipped, index = source.size, source.skipped, source.index
    need = source.count * (3 * S * S + 8) if index is None else index.nbytes
    print(f"writing {source.count:,} pictures of {S}x{S} to {folder}: {need:,} bytes"
          + (f"; they stay in {source.origin}" if index is not None else ""))
    check_room(folder, need, "--data-dir on another disk, or --limit")
    labels, captions = [], []

    def write_images(images):
        # row by row, not through a writable memory map: with a full disk that ends in a bus error
        npy_header(images, "|u1", source.count, 3, S, S)
        for square, label, texts in tqdm(source.items, total=source.count, disable=None):
            images.write(square.tobytes())
            labels.append(label)
            if texts is not None:
                captions.append(json.dumps(texts))
        if not labels:
            raise UserError("none of the pictures can be read; the first is {!r} ({})".format(*skipped[0]))
        images.seek(0)                                  # some may have dropped out
        npy_header(images, "|u1", len(labels), 3, S, S)

    def write(name, how):
        write_file(os.path.join(folder, name), how)

    def write_lines(name, lines):
        text = "".join(line + "\n" for line in lines).encode(errors="backslashreplace")
        write(name, lambda f: f.write(text))

    if index is None:
        write("images.npy", write_images)
        if captions:
            write_lines("captions.jsonl", captions)
        if source.classes:
            write("labels.npy", lambda f: np.save(f, np.array(labels, np.int64)))
    else:
        write("index.npy", lambda f: np.save(f, index))
    if skipped:
        write_lines("skipped.txt", (f"{path}\t{reason}" for path, reason in skipped))
        print(f"skipped {len(skipped)} unreadable files, listed in {folder}/skipped.txt; the first: "
              "{!r} ({})".format(*skipped[0]))
    has_captions = bool(captions) or source.notes.get("place") == "Tars" and bool(index[:, 5].any())
    flip = not has_captions if about["flip"] is None else about["flip"]
    meta = dict(about, flip=flip, size=S, n=len(labels) if index is None else len(index), classes=source.classes,
                captions=has_captions, source=source.origin, skipped=len(skipped), **source.notes)
    write_lines("meta.json", [json.dumps(meta, indent=1)])
    few = ", ".join(source.classes[:5]) + (", .." if len(source.classes) > 5 else "")
    classes = f"{len(source.classes)} classes: {few}" if few else "no classes"
    texts = ("captions" if has_captions else "no captions") + (
        f" like {json.loads(captions[0])[0][:80]!r}" if captions else "")
    print(f"{meta['n']:,} pictures; {classes}; {texts}")


# ---- a prepared set ------------------------------------------------------------------------------

class Rows:
    """Like a list of n entries. get(i) makes entry i when it is asked for."""

    def __init__(self, n, get):
        self.n, self.get = n, get

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        return self.get(int(i))


def read_lines(path):
    """A file of JSON lines as Rows. It stays on the disk; memory holds only where each line ends."""
    with open(path, "rb") as f:
        ends = np.cumsum(np.fromiter(map(len, f), np.int64))
    text = np.memmap(path, np.uint8, "r")

    def entry(i):
        try:
            found = json.loads(text[ends[i - 1] if i else 0:ends[i]].tobytes())
        except ValueError:
            found = None
        if not isinstance(found, list) or not found or not all(isinstance(line, str) for line in found):
            raise LocalError(f"line {i + 1} of {path} is damaged: it should be a list of captions, as JSON; "
                             f"{removal(os.path.dirname(path))}, and prepare again")
        return found

    return Rows(len(ends), entry)


def open_place(folder, meta):
    """The Tars or Lmdb with the pictures of a set that was not converted; its names are those of the set's pictures."""
    names = np.load(os.path.join(folder, "index.npy"), mmap_mode="r")
    try:
        if meta["place"] == "Lmdb":
            return Lmdb(meta["source"], names)
        place = Tars(meta["source"], names, meta["shards"])
    except OSError as e:
        raise UserError(f"the pictures of {folder} lie in {meta['source']}: {e}")
    if place.sha256 != meta["sha256"]:
        raise UserError(f"the shards in {meta['source']} have changed since {folder} was made of them: "
                        f"{removal(folder)}, and prepare it again")
    return place


class Pictures:
    """A prepared set: name, size, classes (names), flip; images uint8 (N, 3, S, S), memory-mapped, or else the place
    where they have stayed, to be decoded on demand; labels int64 (N,) and captions (like a list of lists of str), or
    None. The fingerprint tells apart sets of one name that were made from other pictures or in another way. UserError
    if its files are damaged."""

    def __init__(self, folder):
        meta = read_meta(folder)
        self.folder, self.images, self.place, self.labels, self.captions = folder, None, None, None, None
        with or_damaged(folder, f"{removal(folder)}, and prepare it again"):
            self.name, self.size, self.n = meta["name"], meta["size"], meta["n"]
            self.classes, self.flip = meta["classes"], meta["flip"]
            self.fingerprint = digest(str(meta.get(key)) for key in ("n", "size", "classes", "crop", "sha256"))[:16]
            if "place" in meta:
                self.place, self.crop = open_place(folder, meta), meta["crop"]
                if meta["captions"]:
                    place = self.place                  # not self: a reference cycle would keep it alive
                    self.captions = Rows(self.n, lambda i: place.captions(place.names[i]))
            else:
                self.images = np.load(os.path.join(folder, "images.npy"), mmap_mode="r")
                if (self.images.dtype, self.images.shape[1:]) != (np.uint8, (3, self.size, self.size)):
                    raise ValueError(f"its images are {self.images.dtype} {self.images.shape}")
                if meta["captions"]:
                    self.captions = read_lines(Path(folder, "captions.jsonl"))
            if self.classes:
                y = self.labels = np.load(os.path.join(folder, "labels.npy"))
                if (y.dtype, y.ndim) != (np.int64, 1) or not 0 <= y.min() <= y.max() < len(self.classes):
                    raise ValueError(f"its labels are not int64 classes below {len(self.classes)}")
            parts = (self.place.names if self.place else self.images, self.labels, self.captions)
            if any(len(part) != self.n for part in parts if part is not None):
                raise ValueError("its files are of different lengths")

    def __len__(self):
        return self.n

    def __reduce__(self):                               # a pickled memory map takes its data along
        return Pictures, (self.folder,)

    def take(self, index, n=None):
        """int64 (B,) -> the pictures of these numbers, uint8 (B, 3, S, S), and their numbers int64 (B,). In a set that
        stays in place, a picture that cannot be read is replaced by the next one that can, of the first n."""
        if self.place is None:
            return self.images[index], index
        images, numbers = zip(*(self.next_readable(int(i), n or self.n) for i in index))
        return np.stack(images), np.array(numbers, np.int64)

    def next_readable(self, number, n):
        """The picture of this number, or else the next of the first n that can be read; and its number."""
        skipped = os.path.join(self.folder, "skipped.txt")
        for i in range(number, number + 100):
            i %= n
            name = self.place.names[i]
            file = self.place.open(name)                # if this fails, it is the disk's fault, not a picture's
            square = load_or_reason(lambda: file, self.size, self.crop)
            if not isinstance(square, str):
                return square, i
            line = f"{self.place.title(name)}\t{square}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError), open(skipped, "a+b") as f:
                f.seek(0)
                if line not in f.readlines():           # once, by whichever process
                    f.write(line)
        raise LocalError(f"100 pictures in a row cannot be read, number {number} and after: see {skipped}")


def not_there(name, data_dir):
    where = "" if data_dir == "datasets" else f" --data-dir {shlex.quote(str(data_dir))}"
    if name in BUILT_IN:
        src = BUILT_IN[name].get("src")
        where = (" --src PATH" if src else "") + where
        return UserError(f"{name} is not in {data_dir} yet: `python data.py prepare {name}{where}`"
                         + (f", where PATH is {src}" if src else ""))
    return UserError(f"no data set {name!r} in {data_dir}; built-in sets are {', '.join(BUILT_IN)}; "
                     f"`python data.py prepare {name} --src FOLDER{where}` makes one")


def describe(name, data_dir):
    """dict(size=, classes=, flip=) of a set. A built-in one need not be prepared yet."""
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


# ---- text features: what a network reads of a caption ---------------------------------------------
# An encoder turns a caption into tokens, vectors of its `width`. They are computed once, and stored without padding, in
# parts of PART pictures:
#
#     DIR/NAME/text/ENCODER/000000/tokens.npy     float16 (T, d), the tokens of all captions in a row
#                                  offsets.npy    int64 (M + 1,): caption m has the tokens offsets[m] up to [m + 1]
#                                  caption_of.npy int64 (N + 1,): picture i has the captions caption_of[i] up to [i + 1]
#                                  meta.json      written last
#                           meta.json             about all parts, once the last is done
#
# The last caption of a part belongs to no picture. It is "", the null condition of classifier-free guidance. Every
# caption ends in an end token, so none is without tokens. Processes can share the work:
#
#     torchrun --nproc_per_node=8 -- data.py encode cc12m64 --encoder google/t5-v1_1-xxl

MAX_TOKENS = 256                                        # the paper's context; longer captions are cut off
PART, CHUNK = 5000, 1000                                # pictures; a killed encode loses at most the part it was at
OPEN_PARTS = 64                                         # parts that a process keeps mapped
FEATURES = dict(encoder=str, width=int, n=int, part=int)        # what their meta.json must hold
INSTALL_T5 = "pip install transformers sentencepiece protobuf"


@functools.lru_cache(maxsize=100_000)
def random_vector(*address, width):
    """float64 (width,), uniform, of mean 0 and variance 1."""
    return (uniform(WORD, *address, np.arange(width)) - 0.5) * math.sqrt(12)


class Words:
    """The built-in encoder: nothing to download, nothing trained. A word or punctuation mark is a random vector given
    by its letters in lower case, plus another given by its place in the caption. (For languages with spaces between
    words.)"""

    name, width = "words", 256

    def tokens(self, texts):
        """[str] -> [[token]]; the end is the word of no letters."""
        return [[*re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", text.lower())), ""] for text in texts]

    def vectors(self, tokens):
        """[[token]] -> [float16 (L, d)]"""
        return [np.stack([random_vector(0, *word.encode(errors="replace"), width=self.width)
                          + random_vector(1, place, width=self.width) for place, word in enumerate(words)])
                .astype(np.float16) for words in tokens]


class T5:
    """The encoder half of a T5 from Hugging Face: a folder, or a name on its hub. Frozen, in bfloat16, as T5 was
    trained: it overflows in float16, but its output fits there, with three more bits of mantissa."""

    def __init__(self, name):
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError:
            raise UserError(f"the encoder {name} needs a package: `{INSTALL_T5}`; the encoder words needs none")
        self.name = os.path.abspath(name) if os.path.isdir(name) else name
        self.device = torch.device("cpu")
        if count := torch.cuda.device_count():          # a process may see only its own
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % count)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name)
            net, found = T5EncoderModel.from_pretrained(self.name, torch_dtype=torch.bfloat16, output_loading_info=True)
            net = net.to(self.device)
        except Exception as e:                          # a missing package can raise anything
            kind = LocalError if isinstance(e, RuntimeError) else UserError     # a full GPU may be this process's alone
            raise kind(f"cannot load the T5 encoder {name} ({first_line(e)}); its tokenizer may need `{INSTALL_T5}`")
        strange = [key for key in found["unexpected_keys"] if key.startswith("encoder.")]
        if wrong := [*found["missing_keys"], *strange]:             # CLIP, say, would be loaded as random weights
            raise UserError(f"{name} is no T5 encoder: {len(wrong)} weights are missing or unknown, such as {wrong[0]}")
        self.net, self.width = net.eval().requires_grad_(False), net.config.d_model

    def tokens(self, texts):
        texts = [text.encode(errors="replace").decode() for text in texts]      # halves of emoji are no text
        end, found = self.tokenizer.eos_token_id, self.tokenizer(texts, verbose=False).input_ids
        return [ids if ids and ids[-1] == end else [*ids, end] for ids in found]

    @torch.no_grad()
    def vectors(self, tokens):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in tokens], batch_first=True)      # with 0, as T5
        mask = (torch.arange(ids.shape[1]) < torch.tensor(list(map(len, tokens)))[:, None]).long()
        h = self.net(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        return [v[:len(t)] for v, t in zip(h.to("cpu", torch.float16).numpy(), tokens)]


def load_encoder(name):
    return Words() if name == "words" else T5(name)


def encode(encoder, texts):
    """[str] -> [float16 (L, d)], L at most MAX_TOKENS. A batch holds texts of similar length, to save padding."""
    tokens = [t if len(t) <= MAX_TOKENS else [*t[:MAX_TOKENS - 1], t[-1]] for t in encoder.tokens(texts)]
    order, rows = sorted(range(len(tokens)), key=lambda i: -len(tokens[i])), [None] * len(tokens)
    while order:
        n = 8192 // len(tokens[order[0]])               # at most 8192 tokens in a batch, padding included
        for i, row in zip(order, encoder.vectors([tokens[i] for i in order[:n]])):
            rows[i] = row
        order = order[n:]
    return rows


def text_folder(folder, encoder):
    """Where the features of a set lie. google/t5-v1_1-xxl and ~/models/t5-v1_1-xxl share a folder: training finds it
    by either name."""
    return os.path.join(folder, "text", os.path.basename(encoder.rstrip("/")))


def same_encoder(one, other):
    """Whether two names mean one encoder, as google/t5-v1_1-xxl, t5-v1_1-xxl and ~/models/t5-v1_1-xxl do."""
    return text_folder("", one) == text_folder("", other)


def part_name(number):
    return f"{number:06d}"


def encode_part(folder, captions, numbers, encoder, tell):
    """Write the features of the captions (lists of str) of these pictures, a range. After every CHUNK of them,
    tell(pictures, bytes) what was done since it last told."""
    of, sizes = [], []                                  # captions of each picture, tokens of each caption

    def write_tokens(f):
        npy_header(f, "<f2", 0, encoder.width)
        for first in range(0, len(numbers), CHUNK):
            here = [captions[i] for i in numbers[first:first + CHUNK]]
            rows = encode(encoder, [text for texts in here for text in texts])
            of.extend(map(len, here))
            sizes.extend(map(len, rows))
            f.writelines(row.tobytes() for row in rows)
            tell(len(here), sum(row.nbytes for row in rows))
        null = encode(encoder, [""])[0]
        sizes.append(len(null))
        f.write(null.tobytes())
        f.seek(0)
        npy_header(f, "<f2", sum(sizes), encoder.width)

    write_file(folder / "tokens.npy", write_tokens)
    for name, steps in (("offsets", sizes), ("caption_of", of)):
        ends = np.cumsum([0, *steps], dtype=np.int64)
        write_file(folder / f"{name}.npy", lambda f: np.save(f, ends))
    meta = dict(encoder=encoder.name, width=encoder.width, n=len(of), part=PART, captions=len(sizes) - 1,
                tokens=sum(sizes))
    write_file(folder / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode()))


def encode_set(pictures, encoder, limit=None, rank=0, world=1):
    """Write the text features of a set, or of its first `limit` pictures. Each of world processes takes every world-th
    part, and the last to finish marks the whole as complete. False if all was done before."""
    folder, n = Path(text_folder(pictures.folder, encoder.name)), min(limit or len(pictures), len(pictures))

    def complete(name, count):
        """The meta.json of a part, or of the whole for "", with so many pictures; None if that is not done yet."""
        meta = read_meta(folder / name, FEATURES)
        if meta and (meta["n"], meta["encoder"], meta["part"]) != (count, encoder.name, PART):
            kind = LocalError if name else UserError    # a part is seen by one process alone
            raise kind(f"{folder / name} is already there, of {meta['n']:,} pictures by {meta['encoder']}; to encode "
                       f"anew: {removal(folder / name)}")
        return meta

    if complete("", n):
        return False
    parts = {part_name(i): range(n)[i * PART:(i + 1) * PART] for i in range(math.ceil(n / PART))}
    todo = [name for name in list(parts)[rank::world] if not complete(name, len(parts[name]))]
    total, started, forecast = sum(len(parts[name]) for name in todo), time.time(), rank == 0

    def tell(done, size):
        nonlocal forecast
        bar.update(done)
        if forecast:                                    # once, after the first chunk: before the hours begin
            forecast, left = False, total - done
            need, hours = size * left // done * world, (time.time() - started) * left / done / 3600
            if need > 1e9 or hours > 0.1:
                bar.write(f"{folder}: {need:,} bytes and about {hours:.1f} hours to go")
            check_room(folder, need, "--limit, or a narrower encoder")

    with tqdm(total=total, unit="picture", desc=f"captions by {encoder.name}", disable=rank > 0 or None) as bar:
        for name in todo:
            with alone(folder / name):
                if not complete(name, len(parts[name])):            # by another process, meanwhile
                    encode_part(folder / name, pictures.captions, parts[name], encoder, tell)
    metas = [complete(name, len(parts[name])) for name in parts]
    if all(metas):
        sums = {key: sum(meta[key] for meta in metas) for key in ("n", "captions", "tokens")}
        whole = dict(encoder=encoder.name, width=encoder.width, part=PART, **sums)
        with alone(folder):                             # two may finish at once
            write_file(folder / "meta.json", lambda f: f.write(json.dumps(whole, indent=1).encode()))
    return True


class Features:
    """The text features of a set: encoder (its name), width d, n (pictures that have some) and null, float16 (L, d),
    the empty caption. The files of parts are opened on demand, a few at a time."""

    def __init__(self, folder):
        self.folder, meta = folder, read_meta(folder, FEATURES)
        if not meta:
            raise UserError(f"{folder} holds no complete text features: encode first")
        self.encoder, self.width, self.n, self.part_size = (meta[key] for key in ("encoder", "width", "n", "part"))
        self.part = functools.lru_cache(OPEN_PARTS)(self.open)
        tokens, offsets, _ = self.part(0)
        self.null = np.array(tokens[offsets[-2]:])

    def __reduce__(self):                               # as in Pictures
        return Features, (self.folder,)

    def open(self, number):
        """The three arrays of a part."""
        folder = os.path.join(self.folder, part_name(number))
        remedy = f"{removal(folder)} {shlex.quote(f'{self.folder}/meta.json')}, and encode again"
        with or_damaged(folder, remedy, LocalError):
            tokens, offsets, caption_of = (np.load(os.path.join(folder, f"{file}.npy"), mmap_mode="r")
                                           for file in ("tokens", "offsets", "caption_of"))
            if (tokens.shape != (offsets[-1], self.width) or caption_of[-1] != len(offsets) - 2
                    or len(caption_of) != min(self.part_size, self.n - number * self.part_size) + 1):
                raise ValueError("its files do not fit each other")
        return tokens, offsets, caption_of

    def row(self, i, draw=0):
        """float16 (L, d): the tokens of one caption of picture i, the first or the one that any number `draw` picks."""
        number, place = divmod(i, self.part_size)
        tokens, offsets, caption_of = self.part(number)
        first, end = caption_of[place:place + 2].tolist()
        caption = first + draw % (end - first)
        return np.array(tokens[offsets[caption]:offsets[caption + 1]])

    def rows(self, index, draw):
        """One caption of each picture, picked by a random number: index, draw (B,) -> [float16 (L, d)]."""
        return [self.row(i, d) for i, d in zip(index.tolist(), draw.tolist())]


# ---- whose captions, by which encoder -------------------------------------------------------------

def text_set(name):
    """The set that --cond text learns from: shapes have one of their own, with up to two objects."""
    return f"{name}-text" if f"{name}-text" in BUILT_IN else name


def find_encoder(name, data_dir, asked):
    """--encoder -> (full name, width) of an encoder whose features a set has (those of words may come later). Without
    --encoder: words for drawn captions and emoji, else the only one there is. Otherwise UserError, with a list."""
    folder = set_folder(name, data_dir)
    meta = read_meta(folder)
    if not meta and name not in NO_SOURCE:
        raise not_there(name, data_dir)
    if meta and not meta["captions"]:
        raise UserError(f"{name} has no captions: prepare it with some, or leave --cond text out")
    files = sorted(Path(folder, "text").glob("*/meta.json"))
    there = {file.parent.name: read_meta(file.parent, FEATURES) for file in files}
    if not asked:
        asked = "words" if name in NO_SOURCE else list(there)[0] if len(there) == 1 else ""
    if known := there.get(os.path.basename(text_folder(folder, asked))):
        return known["encoder"], known["width"]
    if asked == "words":
        return Words.name, Words.width
    have = f"there are {', '.join(there)}" if there else "it has none"
    what = f"{name} has no text features by {asked}" if asked else f"which text features of {name}? Name an --encoder"
    where = "" if data_dir == "datasets" else f" --data-dir {shlex.quote(str(data_dir))}"
    raise UserError(f"{what}; {have}. `python data.py encode {name} --encoder {asked or 'words'}{where}` makes some")


# ---- conditions of a batch ------------------------------------------------------------------------

def pad(rows, multiple=8):
    """[float16 (L_i, d)] -> float16 (B, L, d), 0 beyond each text, and mask (B, L), True where it has a token. L is the
    longest, rounded up to a multiple of 8, or of more: shapes are then few and suit hardware."""
    sizes = torch.tensor([len(row) for row in rows])
    L = math.ceil(int(sizes.max()) / multiple) * multiple
    features = torch.zeros(len(rows), L, rows[0].shape[1], dtype=torch.float16)
    for i, row in enumerate(rows):
        features[i, :len(row)] = torch.as_tensor(row)
    return features, torch.arange(L) < sizes[:, None]


def null_like(cond, null):
    """The null condition in the shape of cond: (), (y,) or (features, mask). null is the null class, or the features
    (L, d) of the empty caption, which is never longer than a padded batch."""
    if len(cond) < 2:
        return tuple(torch.full_like(y, null) for y in cond)
    features, mask = (torch.zeros_like(c) for c in cond)
    features[:, :len(null)], mask[:, :len(null)] = torch.as_tensor(null).to(features), True
    return features, mask


def drop(cond, null, chosen):
    """cond, with the null condition in the chosen rows, bool (B,). Guidance needs a network that learned both."""
    return [torch.where(chosen.view(-1, *[1] * (c.dim() - 1)), empty, c)
            for c, empty in zip(cond, null_like(cond, null))]


# ---- batches -------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=2)                         # a batch can lie across the end of an epoch
def permutation(seed, epoch, n):
    """The order of the pictures in an epoch, uint32 (n,), because every worker keeps one in memory."""
    h = mix(seed, epoch, SHUFFLE)
    return np.random.RandomState([h % 2 ** 32, h >> 32]).permutation(n).astype(np.uint32)       # frozen, says NEP 19


class Batches(torch.utils.data.Dataset):
    """Batches[step] -> x uint8 (b, 3, S, S), y int64 (b,), all 0 in a set without classes. With text features, these
    replace y, padded as `pad` does, to a `multiple` of tokens: float16 (b, L, d), mask (b, L). Pictures without
    features are then left out.

    batch: size of the global batch; rows: the b of its rows that this process takes; flip: mirror
    half the pictures. Everything about sample number k = step * batch + row follows from (seed, k):
    it is the same for any number of workers and processes, and after any resume."""

    def __init__(self, pictures, batch, rows, seed, flip, features=None, multiple=8):
        self.pictures, self.batch, self.seed, self.flip, self.features = pictures, batch, seed, flip, features
        self.multiple = multiple
        self.n = features.n if features else len(pictures)
        self.rows = np.array(rows, np.int64)

    def __getitem__(self, step):
        k = step * self.batch + self.rows
        index = np.array([permutation(self.seed, i // self.n, self.n)[i % self.n] for i in k.tolist()], np.int64)

        order = np.argsort(index)                       # the disk is read in one direction
        taken, numbers = self.pictures.take(index[order], self.n)
        x = np.empty_like(taken)
        x[order], index[order] = taken, numbers         # numbers: others where a picture cannot be read
        if self.flip:
            mirrored = mix(self.seed, k, MIRROR) % 2 == 1
            x[mirrored] = x[mirrored, ..., ::-1]
        if self.features:
            return torch.from_numpy(x), *pad(self.features.rows(index, mix(self.seed, k, CAPTION)), self.multiple)
        y = np.zeros_like(k) if self.pictures.labels is None else self.pictures.labels[index]
        return torch.from_numpy(x), torch.from_numpy(y)


# ---- shapes: reading a picture back --------------------------------------------------------------
# The limits were set on 1,500 held-out pictures of 32 pixels: with a blur of 1 / 45 of the side and
# noise of 8 grey levels, the worst overlap is 0.87; a diamond's best is 0.85, a Gaussian spot's 0.78.

FAINT = 40                # grey levels; a picture of less contrast is empty
OFF_PALETTE = 70          # grey levels; what is further from every colour is none of them
POOR_FIT = 0.86           # overlap; if even the best shape has less, it is none of them
AREA = (math.pi / 4, 1, 1 / 2, 5 / 9)                   # of each shape, in a box of side 1


def harden(alpha):
    """Count pixels that are nearly in as in, and nearly out as out. This forgives noise and blur."""
    return np.clip(1.5 * (alpha - 0.5) + 0.5, 0, 1)


def fit_shape(alpha, poor=POOR_FIT):
    """Coverage float (S, S), not quite in [0, 1] -> index into SHAPES, or -1, and centre and side of its box, as in
    Object. Each shape is laid over the object with the same area and centre of mass, in which noise averages out; the
    best overlap wins."""
    S = len(alpha)
    rows, columns = np.nonzero(alpha > 0.5)
    if len(rows) == 0:
        return -1, 0, 0, 0
    mass = np.zeros_like(alpha)                         # the object, with a margin of two pixels for soft edges
    near = np.s_[max(0, rows.min() - 2):rows.max() + 3, max(0, columns.min() - 2):columns.max() + 3]
    mass[near] = alpha[near]
    total, pixels = mass.sum(), (np.arange(S) + 0.5) / S
    if total < 1:
        return -1, 0, 0, 0
    x, y = (mass.sum(0) * pixels).sum() / total, (mass.sum(1) * pixels).sum() / total
    mass, fits = harden(mass), []
    for shape in range(4):
        box = math.sqrt(total / AREA[shape]) / S
        top = box / 6 if SHAPES[shape] == "triangle" else 0             # its mass sits low
        fit = harden(coverage(shape, x, y - top, box, S))
        overlap = np.minimum(mass, fit).sum() / np.maximum(mass, fit).sum()
        fits.append((overlap, shape, x, y - top, box))
    overlap, shape, x, y, box = max(fits, key=lambda fit: fit[0])
    return shape if overlap > poor else -1, x, y, box


def backdrop(p):
    """Picture float (3, S, S) -> its background (3, 1, 1) and each pixel's contrast with it, (S, S)."""
    border = np.concatenate([p[:, 0], p[:, -1], p[:, :, 0], p[:, :, -1]], axis=1)
    background = np.median(border, axis=1)[:, None, None]
    return background, np.linalg.norm(p - background, axis=0)


def read_colour(p, background, core):
    """The object seen where core (S, S) is True -> row of COLOURS, or -1, and its coverage of each pixel, (S, S)."""
    found = np.median(p[:, core], axis=1)               # (3,) the object's middle
    off = np.linalg.norm(COLOURS - found, axis=1)
    # a pixel's coverage is its position on the line from the background's colour to the object's
    line = found[:, None, None] - background
    alpha = ((p - background) * line).sum(0) / max((line ** 2).sum(), 1)
    return int(off.argmin()) if off.min() <= OFF_PALETTE else -1, alpha


def read_shape(image):
    """One picture uint8 (3, S, S) -> (colour, shape), each -1 where it cannot tell."""
    p = image.astype(np.float32)
    background, contrast = backdrop(p)
    full = np.percentile(contrast, 97)                  # the smallest shape covers 8% of a picture
    if full < FAINT:
        return -1, -1
    colour, alpha = read_colour(p, background, contrast > 0.7 * full)
    return (colour, fit_shape(alpha)[0]) if colour >= 0 else (-1, -1)


def score_shapes(images, labels):
    """How many pictures show the class asked for -> dict(n, shape, colour, both), in percent but for n. Needs no
    network. Of real pictures all are right, of noise none, of pictures of random classes 4%."""
    labels = np.asarray(labels)
    colour, shape = np.array([read_shape(image) for image in images], np.int64).reshape(-1, 2).T
    right = dict(shape=shape == labels % 4, colour=colour == labels // 4)
    right["both"] = right["shape"] & right["colour"]
    return dict(n=len(labels), **{key: 100 * float(hit.mean()) for key, hit in right.items()})


# ---- shapes with captions: reading a picture back -------------------------------------------------

CLEAR = 50                # grey levels from the background at which an object begins; speckle is nearer
SPECK = 0.008             # part of a picture; less is no object. The smallest, a triangle, covers 4.5%
MIDDLE = 0.1              # a centre nearer than this to the picture's is "in the middle"
LARGE = 0.38              # side of the box, between the two sizes
SCENE_FIT = 0.78          # replaces POOR_FIT: a shape 10 pixels wide is mostly edge. Lets a diamond pass for a circle

THING = rf"an? (?:({'|'.join(SIDES)}) )?({'|'.join(PALETTE)}) ({'|'.join(SHAPES)})"
CAPTION_FORM = re.compile(rf"{THING}(?: ({'|'.join(PLACES)})| ({'|'.join(RELATIONS)}) {THING})?\.?")


def neighbours(mask):
    """The four neighbours of every pixel, (4, S, S), 0 beyond the border."""
    wide = np.pad(mask, 1)
    return np.stack([wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]])


def pieces(mask):
    """bool (S, S) -> its connected pieces, a list of bool (S, S), the largest first, without specks."""
    label, last = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0), None
    while not np.array_equal(label, last):              # the highest number of a piece spreads over it
        label, last = np.where(mask, np.maximum(label, neighbours(label).max(0)), 0), label
    numbers, sizes = np.unique(label[mask], return_counts=True)
    return [label == numbers[i] for i in np.argsort(-sizes, kind="stable") if sizes[i] > SPECK * mask.size]


class Seen(NamedTuple):
    size: str             # words of captions; None: none of them
    colour: str
    shape: str
    x: float              # centre, in units of the picture's side
    y: float


NOTHING = Seen(None, None, None, 0, 0)


def read_scene(image):
    """One picture uint8 (3, S, S) -> what is Seen in it, the largest first."""
    p = image.astype(np.float32)
    background, contrast = backdrop(p)
    found, seen = pieces(contrast > CLEAR), []
    for piece in found:
        core = piece & (contrast > 0.7 * np.percentile(contrast[piece], 80))
        colour, alpha = read_colour(p, background, core)
        others = np.any(found, axis=0) & ~piece
        alpha[others | neighbours(others).any(0)] = 0
        shape, x, y, box = fit_shape(alpha, SCENE_FIT)
        names = [*PALETTE, None][colour], [*SHAPES, None][shape]                # number -1, nothing known, gives None
        seen.append(Seen("large" if box > LARGE else "small", *names, x, y))
    return seen


def direction(dx, dy, names):
    """Which of names, word -> (x, y), points most in this direction."""
    return max(names, key=lambda name: dx * names[name][0] + dy * names[name][1])


def judge_scene(objects, asked):
    """What is Seen, the largest first, and the match of CAPTION_FORM with a caption -> {what was asked: is it so?}."""
    words = asked.groups()                              # size, colour, shape; place, relation; size, colour, shape
    place, relation = words[3:5]
    things = [Seen(*thing, 0, 0) for thing in (words[:3], words[5:]) if thing[1]]
    seen = [*objects, NOTHING, NOTHING][:len(things)]
    # which is which: the order in which more colours and shapes are as asked
    seen = max((seen, seen[::-1]), key=lambda order: sum(
        (o.colour == thing.colour) + (o.shape == thing.shape) for o, thing in zip(order, things)))
    right = {name: all(getattr(o, name) == getattr(thing, name) for o, thing in zip(seen, things))
             for name in ("colour", "shape")}
    if any(thing.size for thing in things):
        right["size"] = all(thing.size in (None, o.size) for o, thing in zip(seen, things))
    if place:
        dx, dy = seen[0].x - 0.5, seen[0].y - 0.5
        where = "in the middle" if max(abs(dx), abs(dy)) < MIDDLE else direction(dx, dy, PLACES)
        right["place"] = NOTHING not in seen and place == where
    if relation:
        dx, dy = seen[0].x - seen[1].x, seen[0].y - seen[1].y
        right["relation"] = NOTHING not in seen and relation == direction(dx, dy, RELATIONS)
    right["all"] = all(right.values()) and len(objects) == len(things)
    return right


def read_captions(captions):
    """Captions like draw_scene's, whose size, place and second object are optional -> [match of CAPTION_FORM].
    UserError if one has another form: pictures cannot be scored by it."""
    asked = [CAPTION_FORM.fullmatch(" ".join(caption.lower().split())) for caption in captions]
    if None in asked:
        raise UserError(f"{captions[asked.index(None)]!r} cannot be scored; this can: {draw_scene(1)[2]!r}, "
                        f"{draw_scene(0)[2]!r}")
    return asked


def score_captions(images, captions):
    """Pictures uint8 (N, 3, S, S) and captions (see read_captions)
    -> dict(n=, colour=, shape=, size=, place=, relation=, all=): in how many percent of the captions that mention it
    it is right, for both objects if there are two. What none mentions is left out. `all`: and nothing else is there."""
    right = [judge_scene(read_scene(image), match) for image, match in zip(images, read_captions(captions))]
    keys = [key for key in ("colour", "shape", "size", "place", "relation", "all") if any(key in r for r in right)]
    return dict(n=len(right), **{key: 100 * float(np.mean([r[key] for r in right if key in r])) for key in keys})


def asked_scenes(n):
    """n captions to ask for and score by, and the kind of each, in turn: one object, two objects, held-out. Their
    numbers are ones that no training has seen."""
    captions, number = [], SHAPE_COUNT
    kinds = [("one object", "two objects", "held-out")[i % 3] for i in range(n)]
    for kind in kinds:
        objects = ()
        while len(objects) != (1 if kind == "one object" else 2):
            _, objects, caption = draw_scene(number, held_out=kind == "held-out")
            number += 1
        captions.append(caption)
    return captions, kinds


# ---- commands ------------------------------------------------------------------------------------

def open_or_prepare(name, data_dir):
    """open_set, after making a built-in set that needs neither source nor download."""
    if name in NO_SOURCE:
        prepare(name, data_dir)
    return open_set(name, data_dir)


def with_caption(image, text, lines=2):
    """uint8 (3, S, S), or wider -> (3, H, W), at least 128 pixels wide, with lines of text below."""
    scale = max(1, 128 // image.shape[-1])
    image = image.repeat(scale, axis=1).repeat(scale, axis=2)
    W, H = max(128, image.shape[2]), image.shape[1]
    cell = Image.new("RGB", (W, H + 14 * lines), "white")
    cell.paste(Image.fromarray(image.transpose(1, 2, 0)))
    wrapped = textwrap.wrap(text.encode("ascii", "replace").decode(), W // 6, max_lines=lines, placeholder=" ..")
    ImageDraw.Draw(cell).text((1, H + 1), "\n".join(wrapped), "black", ImageFont.load_default())
    return np.asarray(cell).transpose(2, 0, 1)


def show(name, data_dir, out):
    """A sheet of up to 48 pictures, evenly spaced over the set, with their captions or classes."""
    pictures = open_or_prepare(name, data_dir)
    out = out or os.path.join(pictures.folder, "show.png")
    images, chosen = pictures.take(np.array(spread(range(len(pictures)), 48)))
    classes, texts = pictures.classes, [""] * len(chosen)
    if pictures.captions:
        texts = [pictures.captions[i][0] for i in chosen]
    elif classes:
        texts = [classes[pictures.labels[i]] for i in chosen]
    sheet = grid(np.stack([with_caption(image, text) for image, text in zip(images, texts)]), 8, gap=6)
    try:
        sheet.save(out)
    except (OSError, ValueError) as e:                  # ValueError: an unknown extension
        raise UserError(f"cannot write --out {out}: {e}")
    print(f"{out}: {len(chosen)} of {len(pictures):,} pictures of {pictures.size}x{pictures.size}, "
          + (f"{len(classes)} classes: {', '.join(classes[:30])}" if classes else "no classes"))


def export(name, data_dir, out, limit):
    """000000.png .. and images.npz: arr_0 uint8 (N, S, S, 3), arr_1 classes, for FID tools."""
    if os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        stopped = Path(out, "000000.png").exists() and not Path(out, "images.npz").exists()
        raise UserError(f"--out {out} is not a new or empty folder"
                        + (f": an export into it was stopped, or still runs; {removal(out)}" if stopped else ""))
    pictures = open_or_prepare(name, data_dir)
    n, S = min(len(pictures), limit or len(pictures)), pictures.size

    def save(i):
        image = Image.fromarray(pictures.take(np.array([i]))[0][0].transpose(1, 2, 0))
        image.save(os.path.join(out, f"{i:06d}.png"))
        return image.tobytes()

    def write(file):                                    # np.savez would hold all of it in memory
        with zipfile.ZipFile(file, "w") as npz:
            with npz.open("arr_0.npy", "w", force_zip64=True) as f:
                npy_header(f, "|u1", n, S, S, 3)
                f.writelines(tqdm(in_threads(save, range(n)), total=n, disable=None))
            if pictures.labels is not None:
                with npz.open("arr_1.npy", "w") as f:
                    np.lib.format.write_array(f, pictures.labels[:n])

    os.makedirs(out, exist_ok=True)
    write_file(os.path.join(out, "images.npz"), write)
    print(f"{out}: {n:,} PNGs, and images.npz with {1 if pictures.labels is None else 2} array(s)")


def encode_command(name, data_dir, encoder, limit):
    """Under torchrun the processes share the parts of a set; but one that is drawn here, the first does alone."""
    rank, world = processes()
    name = text_set(name)
    if name in NO_SOURCE:
        if rank > 0:
            return
        world = 1
    pictures = open_or_prepare(name, data_dir)
    if pictures.captions is None:
        raise UserError(f"{name} has no captions to encode")
    encoder = load_encoder(encoder)
    folder = text_folder(pictures.folder, encoder.name)
    if not encode_set(pictures, encoder, limit, rank, world):
        print(f"{folder} is there already: nothing to do")
    elif meta := read_meta(folder, FEATURES):
        print(f"{folder}: {meta['captions']:,} captions of {meta['n']:,} pictures, {meta['tokens']:,} tokens, "
              f"{2 * meta['tokens'] * meta['width']:,} bytes")
    else:
        print(f"{folder}: process {rank} of {world} has finished its parts; others have not")


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
    p.add_argument("--src", metavar="PATH", help="folder, zip, lmdb or tar shards; emoji: font; cifar10: archive")
    p.add_argument("--size", metavar="S", type=int, help="pixels a side; default: 32 or 64, as fits")
    p.add_argument("--limit", metavar="N", type=int, help="at most so many pictures")
    p.add_argument("--crop", metavar="MODE", help=f"{CROPS}; default: the set's usual crop")
    p.add_argument("--classes", metavar="A,B", type=lambda text: text.split(","),
                   help="celeba64, celebahq256: attributes to be classes, like Smiling")
    p = command("show", "draw a sheet of its pictures")
    p.add_argument("--out", metavar="FILE.png", help="default: show.png in the set's folder")
    p = command("export", "write single PNGs and an .npz")
    p.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder")
    p.add_argument("--limit", metavar="N", type=int, help="only the first N")
    p = command("encode", "compute text features of its captions")
    p.add_argument("--encoder", metavar="NAME", required=True, help="words, or a T5: a folder, or a name on the hub")
    p.add_argument("--limit", metavar="N", type=int, help="only of the first N pictures")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"there is no {' '.join(unknown)}")
    if empty := [flag for flag, value in vars(args).items() if value == "" and flag != "name"]:
        raise UserError(f"--{empty[0].replace('_', '-')} must not be empty")
    if getattr(args, "limit", None) is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    return args


def main():
    args = parse(sys.argv[1:])
    if args.command == "show":
        show(args.name, args.data_dir, args.out)
    elif args.command == "encode":
        encode_command(args.name, args.data_dir, args.encoder, args.limit)
    elif args.command == "export":
        export(args.name, args.data_dir, args.out, args.limit)
    elif not prepare(args.name, args.data_dir, args.src, args.size, args.limit, args.crop, args.classes):
        folder = set_folder(args.name, args.data_dir)
        print(f"{folder} is already prepared, with {read_meta(folder)['n']:,} pictures: nothing to do")


if __name__ == "__main__":
    run(main)
