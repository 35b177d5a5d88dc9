"""Train a diffusion model.

    python train.py                                                  a laptop: coloured shapes, minutes
    python train.py --model iuvit --data cifar10                     one GPU: the paper's CIFAR-10 run
    torchrun --nproc_per_node=8 train.py --model ascend --data cifar10
    python train.py --preset unet-shapes --lr 5e-4 --out runs/mine   any field of Config is a flag
    python train.py --init-from celeba64_uvit_small.pth --data cats  start from weights, your own or published ones

The same command again resumes from the run's checkpoint: bit for bit on a CPU, with the same numbers of processes and
threads and the same --accum. A larger --steps trains further.
"""
import argparse
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import inspect
import json
import math
import os
import re
import reprlib
import shlex
import signal
import sys
import textwrap
import weakref
from pathlib import Path
from time import perf_counter as now    # seconds since some moment, on a clock that is never set

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from PIL import Image
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import diffusion
import sample
from sample import MODELS, fail


# ---- configuration -----------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    """Everything that decides a run; the comments are also what --help says. Precedence: defaults < the preset < the
    command line, which may not contradict the weights of --init-from (see inherited)."""
    preset: str = ""                # a row of PRESETS; default: the one nearest to --model, --data and --cond
    # what
    model: str = "unet"             # unet, uvit, iuvit, ascend
    data: str = "shapes"            # a built-in set, or a prepared one: see data.py
    cond: str = "none"              # none, class, text
    encoder: str = ""               # of text: words, or the T5 used in `data.py encode`; default: see data.find_encoder
    flip: bool = None               # mirror half of the pictures; default: as the set says, see data.py
    net: dict = dataclasses.field(default_factory=dict)     # the network's constructor arguments, as JSON
    # diffusion
    schedule: str = "linear"        # linear, cosine
    prediction: str = "eps"         # eps (the paper), v
    time_shift: float = 1.0         # 1: t uniform (the paper); above 1: more high noise
    time_spread: float = 1.0        # below 1: t gathered around its median, time_shift / (1 + time_shift)
    clock: str = "plain"            # how the network counts time: plain, uvit, adm; see sample.CLOCKS
    drop: float = 0.1               # how often the null condition replaces the real one, for guidance (assumed)
    # optimisation: AdamW; warm-up, then a constant rate, then a cool-down if there is one
    steps: int = 500_000
    batch: int = 128                # global: each process takes batch / (processes * accum) at a time
    accum: int = 1                  # micro-batches per step
    lr: float = 2e-4
    warmup: int = 5000              # steps of linear warm-up
    cooldown: float = 0.0           # last fraction of the run, in which the rate falls linearly to zero
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0          # maximum gradient norm
    ema: float = 0.9999             # decay of the averaged weights; it rises to this in 90,000 steps (9,000 for 0.999)
    # sampling: the grids drawn in training, and the defaults of sample.py
    samples: int = 64               # pictures in a grid
    sampler: str = "dpm"            # em, ddim, dpm
    sample_steps: int = 20          # network evaluations
    cfg: float = 1.0                # guidance scale; 1 is none
    clip: str = "static"            # none, static, dynamic
    # the run
    init_from: str = ""             # start from these weights: a checkpoint, or a file by U-ViT's or ADM's authors
    out: str = ""                   # default: runs/PRESET[-COND], MODEL-DATA[-COND], or DATA-from-FILE (--init-from)
    data_dir: str = "datasets"
    seed: int = 0
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "auto"             # auto, float32, bfloat16
    compile: bool = None            # default: on CUDA
    grad_ckpt: bool = False         # keep only a fraction of the activations, and compute the rest again
    workers: int = 0                # processes that load batches ahead
    timeout: int = 1800             # seconds to wait for a process that hangs, before all give up
    log_every: int = 100
    sample_every: int = 5000
    save_every: int = 5000
    keep_every: int = 0             # steps between checkpoints that are kept, as ckpt_0050000.pt; 0: only the last


POSITIVE = ["time_shift", "time_spread", "steps", "batch", "accum", "lr", "grad_clip", "samples", "sample_steps",
            "log_every", "sample_every", "save_every", "timeout"]
# fields that may change when a run is resumed; resume refuses all others. (device changes t, noise and which conditions
# are dropped; accum, which units drop out; dtype, compile and grad_ckpt, rounding; steps, the cool-down.)
FREE = ["steps", "accum", "out", "data_dir", "device", "dtype", "compile", "grad_ckpt", "workers", "timeout",
        "log_every", "sample_every", "save_every", "keep_every", "samples", "sampler", "sample_steps", "cfg", "clip"]

# Minutes on a laptop:
#   cosine                  on the linear schedule eps hardly learns outlines in this time
#   v                       or eps, which cares less for high noise (layout) and more for lower (outlines, detail).
#                           Which is better varies with network and condition (README, "What is predicted, and ..")
#   shift 1.6, spread 0.4   times gather around t = 0.6, where outlines are decided
#   batch 16                a picture teaches 1.5 times as much as in batches of 32 (8 is as good, but slower on CPUs)
#   cooldown 0.4            the rate falls to zero over the last 40%
#   em, 200 steps           short runs draw oblong squares and crooked crosses, large mistakes made early: fresh noise
#                           corrects them, a deterministic path keeps them. 200, because the noise that stays in the
#                           picture is then of 2 grey levels on this schedule
#   cfg 1                   guidance gains little
LAPTOP = dict(data="shapes", cond="class", schedule="cosine", prediction="v", time_shift=1.6, time_spread=0.4,
              steps=6000, batch=16, lr=2e-3, warmup=100, cooldown=0.4, beta2=0.99, ema=0.999, samples=24,
              sampler="em", sample_steps=200, cfg=1.0, sample_every=1500, save_every=500)

# The set shapes-text, encoded by words: one or two objects and where they are. In these steps the U-Net and ASCEND get
# single objects right, but few pairs (the U-Net half of them in 24,000).
LAPTOP_TEXT = dict(LAPTOP, cond="text", steps=7000, cfg=1.5, sample_every=1750)

# Small sets of real pictures, for an hour or a night. time_shift is higher, because larger pictures lose their outlines
# at higher noise; the spread is wider, because detail is learnt at low noise (LAPTOP hardly trains it, so its samples
# are grainy). Emoji have names, and a network that reads them draws faces in half the steps of one that does not.
SMALL64 = dict(LAPTOP, data="emoji64", cond="text", cfg=2.0, time_shift=2.0, time_spread=0.8, steps=8000, lr=1e-3,
               samples=32, sample_every=1000, sampler="dpm", sample_steps=20)

# Narrow networks, because in minutes the number of steps matters more than width. Width 16, because CPUs multiply 16
# numbers at a time. Most of the width is where maps are small, since a channel costs the most time at full size: with
# the width doubled at 16 pixels already, shapes were learnt later (PYRAMID64 doubles it at half size, 32).
# text_dim is the width of `words`; a run takes that of its own encoder.
PYRAMID = dict(dim=16, dim_mults=[1, 1, 2, 4], num_blocks=1, attn_sizes=[8, 4], head_dim=16, dropout=0.0)
PYRAMID64 = dict(PYRAMID, dim_mults=[1, 2, 4, 8, 8], attn_sizes=[16, 8], text_dim=256)


def vit(patch_size, dim, depth, heads, **more):
    return dict(patch_size=patch_size, dim=dim, depth=depth, heads=heads, **more)


VIT, VIT64 = vit(4, 96, 7, 3), vit(4, 256, 9, 4, text_dim=256)
PRESETS = {
    "unet-shapes":    dict(LAPTOP, model="unet", net=dict(PYRAMID, resample="conv")),
    "uvit-shapes":    dict(LAPTOP, model="uvit", net=VIT, steps=12_000, sample_every=3000),
    "iuvit-shapes":   dict(LAPTOP, model="iuvit", net=VIT, steps=12_000, sample_every=3000),
    # time_shift: at 1.6, eps left a tint in backgrounds, which only high noise decides
    "ascend-shapes":  dict(LAPTOP, model="ascend", net=PYRAMID, prediction="eps", time_shift=2.2, steps=4500,
                           sample_every=1125),

    # time_shift: at 1.6 one seed of three had places wrong in nearly half of its pictures
    "unet-shapes-text":  dict(LAPTOP_TEXT, model="unet", prediction="eps", time_shift=2.2,
                              net=dict(PYRAMID, resample="conv", text_dim=256)),
    # in 14,000 steps one seed of three had not learnt which word belongs to which object. Which object is above the
    # other is decided at higher noise: at shift 1.6, spread 0.4, less than half of the pictures had that right
    "iuvit-shapes-text": dict(LAPTOP_TEXT, model="iuvit", time_shift=3.0, time_spread=0.6, steps=24_000,
                              sample_every=4000, net=dict(VIT, text_dim=256)),
    "ascend-shapes-text": dict(LAPTOP_TEXT, model="ascend", prediction="eps", time_shift=2.2,
                               net=dict(PYRAMID, text_dim=256)),

    "unet-emoji64":   dict(SMALL64, model="unet", net=dict(PYRAMID64, resample="conv")),
    "uvit-emoji64":   dict(SMALL64, model="uvit", net=VIT64),
    "iuvit-emoji64":  dict(SMALL64, model="iuvit", net=VIT64),
    "ascend-emoji64": dict(SMALL64, model="ascend", net=PYRAMID64),
}

# With --init-from and no --preset, the file decides network, condition, schedule, prediction and clock; the rest is
# this. The rate is low, because the weights are good already.
FINE_TUNE = dict(data="shapes", steps=20_000, batch=32, lr=1e-4, warmup=500, ema=0.999, samples=24, sample_every=500,
                 save_every=500)


# The paper's runs, and those it compares with. Where the paper is silent, IU-ViT and ASCEND are assumed to be trained
# like U-ViT (except that all rows clip gradients at a norm of 1, like DDPM). Parameters are counted for text of the
# width in the paper's table, 1024; T5-XXL is --net '{"text_dim": 4096}'.
AS_UVIT = dict(weight_decay=0.03, beta1=0.99, beta2=0.99, sampler="em", sample_steps=1000, sample_every=25_000)
PAPER = dict(unet=dict(sampler="em", sample_steps=1000, sample_every=25_000),
             uvit=AS_UVIT, iuvit=AS_UVIT, ascend=dict(AS_UVIT, schedule="cosine"))
CIFAR10 = dict(beta2=0.999, warmup=2500)                                                # U-ViT's on CIFAR-10
WORKERS = dict(workers=8)                                                               # to decode pictures in parallel
CLASS = dict(cond="class", drop=0.0, sampler="dpm", sample_steps=50)                    # U-ViT's: without guidance
TEXT = dict(WORKERS, cond="text", sampler="ddim", cfg=3.0)                              # the paper's DDIM; else assumed
ADM_LSUN, ADM_IMAGENET64 = dict(WORKERS, warmup=0), dict(CLASS, warmup=0, schedule="cosine")
DDIM64 = dict(dim=128, dim_mults=[1, 2, 2, 2, 4], num_blocks=2, attn_sizes=[16], resample="conv")
DDPM256 = dict(DDIM64, dim_mults=[1, 1, 2, 2, 4, 4], dropout=0.0)
ADM256 = dict(dim=256, dim_mults=[1, 1, 2, 2, 4, 4], num_blocks=2, attn_sizes=[32, 16, 8])
ADM64 = dict(dim=192, dim_mults=[1, 2, 3, 4], num_blocks=3, attn_sizes=[32, 16, 8])
UNET_300M = dict(dim=192, dim_mults=[1, 2, 4, 4], num_blocks=2, attn_sizes=[16, 8], text_dim=1024)
ASCEND128 = dict(dim=128, dim_mults=[1, 2, 2, 2, 2], num_blocks=2, attn_sizes=[16, 8])
ASCEND256 = dict(ASCEND128, dim_mults=[1, 1, 2, 2, 4, 4])
ASCEND_590M = dict(dim=192, dim_mults=[1, 2, 3, 4, 4], num_blocks=4, attn_sizes=[16],       # with 8 as well it has 636M
                   dropout=0.0, text_dim=1024)

PAPER_RUNS = [
    # preset                    steps  batch    lr  network                             else      source, size; FID
    ("unet-cifar10",          800_000,  128, 2e-4, {},                                  {}),    # DDPM; 3.17
    ("unet-celeba64",         500_000,  128, 2e-4, DDIM64,                              {}),    # DDIM; 3.26
    # steps of DDIM's row and of the next two are assumed, ADM's numbers are quoted from memory (and its learnt
    # variances, with their part of the loss, left out), CC12M's are all assumed
    ("unet-church256",        500_000,   64, 2e-5, DDPM256,                             {}),    # DDPM; 7.89
    ("unet-bedroom256",       500_000,   64, 2e-5, DDPM256,                        WORKERS),    # DDPM; 6.36
    ("unet-bedroom256-adm",   500_000,  256, 1e-4, ADM256,                        ADM_LSUN),    # ADM; 1.90
    ("unet-imagenet64",       540_000, 2048, 3e-4, ADM64,                   ADM_IMAGENET64),    # ADM; 2.07
    ("unet-cc12m64",          150_000,  256, 1e-4, UNET_300M,                         TEXT),    # "about 300M"

    ("uvit-cifar10",          500_000,  128, 2e-4, {},                             CIFAR10),    # U-ViT; 3.11
    ("uvit-celeba64",         500_000,  128, 2e-4, vit(4, 512, 13, 8),                  {}),    # U-ViT; 2.87
    ("uvit-imagenet64",       300_000, 1024, 3e-4, vit(4, 768, 17, 12),              CLASS),    # U-ViT-M; 5.85
    ("uvit-imagenet64-large", 300_000, 1024, 3e-4, vit(4, 1024, 21, 16),             CLASS),    # U-ViT-L; 4.26

    # from here to the end the batch is assumed, and so is the rate where it is 2e-4. IU-ViT's networks are derived from
    # the paper's numbers of parameters; its 150,000 steps were no finished run, and are assumed for -wide and -p8
    ("iuvit-cifar10",         500_000,  128, 2e-4, {},                             CIFAR10),    # 45M; 2.56
    ("iuvit-celeba64",        500_000,  128, 2e-4, vit(4, 512, 13, 8),                  {}),    # 45M
    ("iuvit-church128",       450_000,  256, 2e-4, vit(8, 1408, 17, 22),                {}),    # 442M; the set assumed
    ("iuvit-church256",       150_000,  256, 2e-4, vit(16, 1536, 17, 24),               {}),    # 527M
    ("iuvit-church256-wide",  150_000,  256, 2e-4, vit(16, 2048, 17, 32),               {}),    # 935M
    ("iuvit-church256-p8",    150_000,  256, 2e-4, vit(8, 1536, 17, 24),                {}),    # 527M, 1024 tokens
    ("iuvit-cc12m64",         150_000,  256, 1e-4, vit(4, 1024, 17, 16, text_dim=1024), TEXT),  # 307M
    ("iuvit-laion128",        150_000,  256, 1e-4, vit(8, 1408, 17, 22, text_dim=1024), TEXT),  # assumed

    # for ASCEND the steps and networks are assumed as well, since the values of the paper's table are not available to
    # us, and that birds have no condition
    ("ascend-cifar10",        500_000,  128, 2e-4, {},                             CIFAR10),    # 2.98
    ("ascend-celeba64",       500_000,  128, 2e-4, {},                                  {}),
    ("ascend-cub64",          200_000,  128, 2e-4, {},                                  {}),
    ("ascend-cub128",         200_000,  128, 2e-4, ASCEND128,                           {}),
    ("ascend-bedroom256",     500_000,  128, 2e-4, ASCEND256,                      WORKERS),
    ("ascend-celebahq256",    500_000,  128, 2e-4, ASCEND256,                           {}),
    ("ascend-laion128",       150_000,  256, 1.2e-4, ASCEND_590M,                     TEXT),  # 590M, dim_mults: paper's
]


def paper_run(name, steps, batch, lr, net, other):
    model, dataset = name.split("-")[:2]
    return dict(PAPER[model], model=model, data=dataset, steps=steps, batch=batch, lr=lr, net=net, **other)


PRESETS |= {row[0]: paper_run(*row) for row in PAPER_RUNS}


# ---- the command line ---------------------------------------------------------------------------------

def json_object(text):
    """The type of --net."""
    try:
        return dict(**json.loads(text))                 # a TypeError for anything but an object
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"""{text!r} is no JSON object, like '{{"dim": 64}}'""")


def nearest_preset(asked):
    """The first row with the model, data and cond asked for. A set without a row takes one of the nearest size: one of
    the paper's runs if it is a published set, and else, where there is one, one for laptops."""
    model, name = asked.get("model", "unet"), asked.get("data", "shapes")
    rows = {p: row for p, row in PRESETS.items() if row["model"] == model}
    fits = [p for p, row in rows.items() if row["data"] == name]
    if fits:
        return next((p for p in fits if rows[p].get("cond", Config.cond) == asked.get("cond")), fits[0])
    size = data.describe(name, asked.get("data_dir", Config.data_dir))["size"]
    small = name not in data.BUILT_IN or name in data.NO_SOURCE
    return min(rows, key=lambda p: (abs(math.log(data.BUILT_IN[rows[p]["data"]]["size"] / size)),
                                    (rows[p]["data"] in data.NO_SOURCE) != small,
                                    rows[p].get("cond") != "text" and asked.get("cond") == "text"))


def stem(path):
    """A name for weights: that of their file or, for a checkpoint, of its run."""
    path = Path(path).absolute()                        # ckpt.pt, or ckpt_0050000.pt
    own = re.fullmatch(r"ckpt(_\d+)?\.pt", path.name)
    return path.parent.name + (own[1] or "").replace("_", "-") if own else path.stem


def recorded(out):
    """The config.json of the run in a folder, which is written before its first checkpoint; {} if there is none, or it
    is something else."""
    try:
        return dict(json.loads(Path(out, "config.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def inherited(asked, fresh):
    """The fields of the config that the weights of --init-from decide. Flags (but --cond, and dropout) and a preset's
    model may not contradict them; the preset's other fields give way.

    Once the run has its own checkpoint, which says the same, the file is no longer needed."""
    path, name = asked["init_from"], asked["data"]
    own = recorded(asked["out"]) if Path(asked["out"], "ckpt.pt").exists() and not fresh else {}
    there = own if own.get("init_from") == path else sample.read(path)[0]
    fixed = {key: there[key] for key in ("model", "schedule", "prediction", "clock")}
    defaults = {key: p.default for key, p in inspect.signature(MODELS[there["model"]]).parameters.items()}
    full = json.loads(json.dumps({**defaults, **there["net"]}))             # so that tuples are lists, as in --net

    net, old, new = dict(there["net"]), there["info"]["size"], data.describe(name, asked["data_dir"])["size"]
    if old != new and "attn_sizes" not in full:
        fail(f"{path} is of {old}x{old} pictures and {name} of {new}x{new}: a {there['model']} keeps its size")
    if old != new:                                      # convolutional: attention stays at the same levels
        net["attn_sizes"] = full["attn_sizes"] = [size * new // old for size in full["attn_sizes"]]

    model = PRESETS[asked["preset"]]["model"] if asked.get("preset") else there["model"]
    asked = {"model": model, **asked}
    pairs = [(f"--{key}", asked.get(key, value), value) for key, value in fixed.items()]
    pairs += [(f"--net {key}", value, full.get(key)) for key, value in asked.get("net", {}).items() if key != "dropout"]
    wrong = [f"{flag} {mine!r} asked, {theirs!r} there" for flag, mine, theirs in pairs if mine != theirs]
    if wrong:
        fail(f"{path} decides on the network, its schedule, prediction and clock: {'; '.join(wrong)}")
    return dict(fixed, net=net, cond=there["cond"])


def parse(argv):
    """argv -> (Config, fresh, dry_run). Every mistake is a data.UserError that says what is allowed.

    fresh: start over, as --fresh asks."""
    presets = textwrap.fill(" ".join(PRESETS), break_on_hyphens=False)
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, epilog=f"presets:\n{presets}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message} (python train.py --help lists all flags)")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.MULTILINE))
    choices = sample.CHOICES | sample.WHERE
    kinds = {bool: dict(action=argparse.BooleanOptionalAction), dict: dict(type=json_object)}
    for field in dataclasses.fields(Config):
        kind = kinds.get(field.type, dict(type=field.type, choices=choices.get(field.name)))
        parser.add_argument("--" + field.name.replace("_", "-"), help=comments.get(field.name), **kind)
    parser.add_argument("--fresh", action="store_true", default=False, help="start over; the old run is moved aside")
    parser.add_argument("--dry-run", action="store_true", default=False, help="print the resolved config and stop")
    asked = vars(parser.parse_args(argv))
    fresh, dry_run = asked.pop("fresh"), asked.pop("dry_run")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        fresh = False                                   # torchrun has replaced a rank that died: the run must go on
    if fresh and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":    # restarts that other nodes cause are not counted
        fail("--fresh on several nodes would start over whenever torchrun replaces a rank: move the old run yourself")

    if empty := [field for field, value in asked.items() if value == ""]:           # --init-from "$FORGOTTEN"
        fail(f"--{empty[0].replace('_', '-')} must not be empty")
    config = resolve(asked, fresh)
    check(config)
    return config, fresh, dry_run


def resolve(asked, fresh):
    """The flags given, {field: value} -> a Config: a row of PRESETS and what else they imply. fresh: see parse."""
    name = asked.get("preset") or ("" if asked.get("init_from") else nearest_preset(asked))
    if name and name not in PRESETS:
        fail(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    row = PRESETS[name] if name else FINE_TUNE
    if asked.get("init_from"):
        # what the weights decide overrides the row, and flags may not contradict it. Set and folder must be known
        # first, since the run may already have a checkpoint, which then decides
        asked = {"data": row["data"], "data_dir": Config.data_dir, **asked}
        asked = {"out": f"runs/{asked['data']}-from-{stem(asked['init_from'])}", **asked}
        try:
            row = {**row, "data": asked["data"], **inherited(asked, fresh)}
        except (KeyError, TypeError) as e:
            fail(f"{asked['init_from']} does not fit this code: {e!r}")
    if asked.get("model", row["model"]) != row["model"]:
        fail(f"the preset {name} is of {row['model']}: leave out --model {asked['model']}, or --preset")
    config = Config(**{**row, **asked, "preset": name, "net": {**row["net"], **asked.get("net", {})}})
    classes = data.describe(config.data, config.data_dir)["classes"]
    plain = "class" if classes else "none"
    if "cond" not in asked and config.data != row["data"]:
        config.cond = plain                             # the row was made for another set
    if config.cond == "text":
        config.net.setdefault("text_dim", 1024)         # as in the paper's table; a run takes its features' width
        if not data.BUILT_IN.get(data.text_set(config.data), {}).get("captions", True):
            fail(f"{config.data} has no captions: use --cond {plain}")
    elif config.encoder:
        fail("--encoder is for --cond text")
    else:
        config.net.pop("text_dim", None)
    if config.cond == "class" and not classes:
        fail(f"{config.data} has no classes: use --cond none")
    if config.drop == 0 and config.cond != "none" and config.cfg != 1:
        fail("--drop 0 never trains the null condition, without which there is no guidance: add --cfg 1")
    if "clip" not in {**row, **asked}:
        config.clip = sample.usual_clip(config.cond, config.cfg)
    # a run with another condition than the usual one has a folder of its own
    own = config.data == row["data"]
    base, usual = (name, row.get("cond", "none")) if own else (f"{config.model}-{config.data}", plain)
    config.out = config.out or f"runs/{base}" + ("" if config.cond == usual else f"-{config.cond}")
    if Path(config.out).name in ("", ".."):
        fail(f"--out must name a folder of its own, not {config.out}")
    if fresh and config.init_from and Path(config.out).resolve() in Path(config.init_from).resolve().parents:
        fail(f"--fresh would move {config.init_from} away, which --init-from is to read: choose another --out")
    return config


def check(config):
    """UserError if a number makes no sense."""
    for field, value in dataclasses.asdict(config).items():
        flag = f"--{field.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"{flag} must be a finite number, not {value}")
        if field in POSITIVE and not 0 < value < 1e9:
            fail(f"{flag} must be above 0, and below 10^9, not {value}")
        if field in ("drop", "cooldown", "ema", "beta1", "beta2") and not 0 <= value < 1:
            fail(f"{flag} must lie in [0, 1), not at {value}")
        if field in ("warmup", "workers", "weight_decay", "seed", "keep_every") and not 0 <= value < 2**63:
            fail(f"{flag} must not be negative, nor 2^63 or more")


# ---- pieces of a run -----------------------------------------------------------------------------------
# in the order in which main() calls them; what another piece needs comes before it

def choose_encoder(config, set_name, fresh):
    """Choose the encoder whose features are read: --encoder, or else the one that the run began with, even if there are
    others by now. Its width becomes the network's text_dim."""
    old = {} if fresh else recorded(config.out)
    own = str(old.get("encoder", "")) if old.get("data") == config.data else ""
    config.encoder, width = data.find_encoder(set_name, config.data_dir, config.encoder or own)
    preset = PRESETS.get(config.preset, {}).get("net", {}).get("text_dim", 1024)
    if config.net["text_dim"] not in (width, preset):
        fail(f"--net has a text_dim of {config.net['text_dim']}, and the features by {config.encoder} are {width} "
             "wide: leave it out" + ("; with --init-from name the --encoder its weights know" if config.init_from
                                     else ""))
    config.net["text_dim"] = width


def kind_of(value):
    """The kind of a value in --net, to be checked: Python takes "false" for true, and finds no 16 in ["16"]."""
    if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
        return "list of integers"
    return {int: "number", float: "number"}.get(type(value), type(value).__name__)


def measure(config, info, tokens=data.MAX_TOKENS):
    """(parameters, floating-point operations of one forward pass of one image). A multiply-add counts as two; `tokens`
    is the length of a text.

    The forward pass has shapes but no numbers, so it costs little. UserError if the network cannot be built, or does
    not fit the pictures: that is found here, before a run has a folder."""
    from torch.utils.flop_counter import FlopCounterMode
    usual = inspect.signature(MODELS[config.model]).parameters
    try:
        for key, value in config.net.items():
            if key in usual and kind_of(value) != kind_of(usual[key].default):
                raise TypeError(f"{key} {value!r} is no {kind_of(usual[key].default)}")
        with torch.device("meta"), torch.no_grad():
            net, x, t = sample.build(vars(config), info), torch.zeros(1, 3, info["size"], info["size"]), torch.zeros(1)
            assert all(p.numel() for p in net.parameters()), "it has a layer of no width"
            text = torch.zeros(1, tokens, config.net.get("text_dim", 1)), torch.ones(1, tokens, dtype=torch.bool)
            cond = {"none": (), "class": (torch.zeros(1, dtype=torch.int64),), "text": text}
            with FlopCounterMode(display=False) as counter:
                net(x, t, *cond[config.cond])
    except (AssertionError, ArithmeticError, TypeError, ValueError, RuntimeError) as e:
        fail(f"{config.model} with --net {json.dumps(config.net)} on {config.data}, {info['size']} pixels: "
             f"{data.first_line(e)}")
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()


def check_compiling(device, dtype):
    """UserError where torch.compile makes wrong gradients: on a CPU in bfloat16, PyTorch 2.13 makes those of all that
    lies below an up-sampling zero, without a word."""
    if device.type == "cpu" and sample.pick_dtype(dtype, device) == "bfloat16":
        fail("compiled for a CPU in bfloat16, gradients are wrong (PyTorch 2.13: zero below an up-sampling): "
             "add --dtype float32, or leave out --compile")


def claim(out):
    """Make the run's folder if it is not there -> an open file. As long as it is open, and this process lives, no other
    process can claim the folder: two trainings would overwrite each other's checkpoints."""
    try:
        Path(out, "samples").mkdir(parents=True, exist_ok=True)
        f = open(Path(out, ".lock"), "a")
    except OSError as e:
        fail(f"cannot write to --out {out}: {e}")
    if not data.lock(f):
        fail(f"another training is writing to {out}: stop it, or choose another --out")
    return f


def move_aside(out):
    """--fresh: rename the folder of an existing run, to keep its files; fail if it is running. A folder that holds no
    run itself, such as a folder of runs, stays where it is."""
    if not any(Path(out, file).exists() for file in ("config.json", "ckpt.pt")):
        return
    claim(out).close()
    real = out.resolve()
    aside = next(p for i in range(1, 10**6) if not (p := real.with_name(f"{real.name}-old{i}")).exists())
    real.rename(aside)
    if out.is_symlink():                                # a link stays, and leads to the new run: to another disk, say
        real.mkdir()
    print(f"the old run is now {aside}")


def join(config, device):
    """Join the other processes that torchrun has started -> the store that they share."""
    # torchrun keeps one store across its restarts, in which a new group would find the addresses of the dead one. So on
    # one node each restart has its own keys (not on several, as each node counts its own restarts: see the README)
    timeout = datetime.timedelta(seconds=config.timeout)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store.delete_key("exception_dump")                  # set by NCCL at a time-out: it would end the new group, too
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timeout)
    return store


def keep_freed_memory():
    """Make glibc keep the memory that one step frees for the next. By default, large blocks go back to the system; the
    5,000 to 34,000 page faults of getting them back made a step of the laptop presets a tenth to a quarter slower."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 2**30)                              # M_TRIM_THRESHOLD: up to 1 GiB is kept
        mallopt(-3, 2**25)                              # M_MMAP_THRESHOLD: for blocks up to 32 MiB, the most it allows


def start_from(net, config, info):
    """Load the weights of --init-from. If the classes differ, their embedding starts anew, null class included; all
    else must fit."""
    there, weights = sample.read(config.init_from)
    if there["cond"] == config.cond == "text" and not data.same_encoder(there["text"]["encoder"], config.encoder):
        fail(f"{config.init_from} reads captions by the encoder {there['text']['encoder']}, and not by "
             f"{config.encoder}: name it with --encoder")
    own, key, classes = net.state_dict(), "class_embed.weight", info["classes"]
    # published files have numbers for names, in the order of the WordNet ids, which are the last words of ours
    sorted_too = config.data != "imagenet64" or classes == sorted(classes, key=lambda name: name.split()[-1])
    numbers = [str(i) for i in range(len(classes))] if sorted_too else []
    kept = there["cond"] == config.cond == "class" and there["info"]["classes"] in (classes, numbers)
    try:
        if not kept:
            weights.pop(key, None)
            if key in own:
                weights[key] = own[key]
        sample.load_weights(net, weights)
    except (AttributeError, TypeError, ValueError) as e:
        fail(f"the weights of {config.init_from} do not fit {config.model} with --cond {config.cond} and "
             f"{info['size']}x{info['size']} pictures: {e}")
    anew = f"; the embedding of the {len(classes)} classes starts anew" if key in own and not kept else ""
    if data.processes()[0] == 0:
        print(f"starting from {config.init_from}{anew}")


def make_data(config, set_name):
    """On first use, make a built-in set (which may be a long download), and features of its captions by words."""
    if set_name in data.BUILT_IN:
        data.prepare(set_name, config.data_dir)
    words = Path(data.set_folder(set_name, config.data_dir), "text/words/meta.json")
    if config.encoder == "words" and not words.exists():            # find_encoder refuses any other that is absent
        data.encode_set(data.open_set(set_name, config.data_dir), data.Words())


def grid_text(pictures, features, n):
    """What a checkpoint keeps of the text, so that sampling needs neither set nor encoder: n captions from all over the
    set, for the sample grids, with their features and those of the empty caption, float16 (L, d) each."""
    chosen = [i * features.n // n for i in range(n)]
    return dict(encoder=features.encoder, null=torch.from_numpy(features.null),
                captions=[pictures.captions[i][0] for i in chosen],
                rows=[torch.from_numpy(features.row(i)) for i in chosen])


def facts(record):
    """All that decides a run, in one flat dict: fields, the network's arguments, and what is known of the set (its flip
    in place of the field's, which may be None)."""
    arguments = {f"net {name}": value for name, value in record["net"].items()}
    fields = {name: value for name, value in record.items() if name not in ("net", "info")}
    info = dict(record["info"])
    return {"pictures, by their fingerprint": info.pop("fingerprint", None), **fields, **arguments, **info}


def differing(runs, free):
    """{name: its value in each of the runs} for the facts in which they differ, but for the free ones."""
    values = {name: [run.get(name) for run in runs] for run in runs for name in run if name not in free}
    return {name: seen for name, seen in values.items() if any(value != seen[0] for value in seen)}


def resume(record, net, ema, opt):
    """Load the checkpoint in the run's folder -> (steps done, seconds taken, steps skipped), zeros for a new run. A
    folder that holds another run than that of `record` is refused, and the message shows the difference."""
    out, new = Path(record["out"]), (0, 0.0, 0)
    ckpt = data.read_dict(out / "ckpt.pt") if (out / "ckpt.pt").exists() else None
    if ckpt is None and not (out / "config.json").exists():
        return new
    try:
        old = recorded(out) if ckpt is None else ckpt["config"]     # recorded: it was stopped before it saved
        old = facts(dict(dataclasses.asdict(Config()), **old))
    except (ValueError, TypeError, LookupError, AttributeError):
        file = out / ("config.json" if ckpt is None else "ckpt.pt")
        fail(f"{file} is not of a run: choose another --out")
    asked = facts(json.loads(json.dumps(record)))                   # in JSON, tuples are lists
    if data.same_encoder(str(old.get("encoder")), asked["encoder"]):    # which may have moved since
        old["encoder"] = asked["encoder"]
    changed = [f"{name}: {reprlib.repr(there)} there, {reprlib.repr(mine)} asked"
               for name, (there, mine) in differing([old, asked], FREE).items()]
    if changed:
        fail(f"{out} holds another run ({'; '.join(changed)}): choose another --out, or --fresh to start over")
    if ckpt is None:
        return new
    try:
        sample.load_weights(net, ckpt["model"])
        sample.load_weights(ema, ckpt["ema"])
        opt.load_state_dict(ckpt["opt"])
        if any(moment.shape != p.shape for p, state in opt.state.items()            # fused AdamW would not notice
               for moment in (state["exp_avg"], state["exp_avg_sq"])):
            raise ValueError("moments of other shapes than the weights")
        return int(ckpt["step"]), float(ckpt["seconds"]), int(ckpt["skipped"])
    except torch.OutOfMemoryError:                                  # the checkpoint is good
        raise
    except Exception as e:                                          # torch raises half a dozen kinds
        fail(f"{out / 'ckpt.pt'} is damaged or of other code ({type(e).__name__} {data.first_line(e)}): "
             "choose another --out, or --fresh to start over")


def agree(record, start):
    """UserError if processes differ in flags (but in where things lie), in the steps done, or in their pictures."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, {"steps done in --out": start, **facts(record)})
    other = [f"{name}: {reprlib.repr(seen)}" for name, seen in differing(found, ["out", "data_dir", "workers"]).items()]
    if other:
        fail(f"processes differ ({'; '.join(other)}): all nodes need the same flags, --out and pictures")


def announce(config, size, n, net, n_params, flops):
    """Print what is trained, on n pictures of that size."""
    print(f"training {config.model}, preset {config.preset or 'none'}, condition {config.cond} ({n_params / 1e6:.1f}M "
          f"parameters, {flops / 1e9:.2f} GFLOPs a picture) on {n:,} pictures of {config.data}, {size}x{size}; the "
          f"CIFAR-10 run of this model: torchrun --nproc_per_node=8 train.py --model {config.model} --data cifar10")
    attending = [name for name, m in net.named_modules() if type(m).__name__ == "SpatialAttention"]
    if attending == ["middle.1"] and config.net.get("attn_sizes") != []:
        print(f"note: with {size}x{size} pictures no map has a size in attn_sizes, so only the middle has attention: "
              "name others in --net")


def trim_log(path, step):
    """Drop the rows of log.csv beyond the step a run resumes from: they will be written again."""
    if path.exists():
        head, *rows = path.read_text(errors="replace").splitlines() or [""]
        kept = [row for row in rows if row.split(",")[0].isdecimal() and int(row.split(",")[0]) <= step]
        lines = [head, *kept] if kept else []           # an empty file gets its head with the first row
        data.write_file(path, lambda f: f.write("".join(line + "\n" for line in lines).encode()))


def checkpoint_blocks(net):
    """Gradient checkpointing: blocks keep only their input and compute the rest again in the backward pass. This takes
    a fraction of the memory and up to a third more time. (The middle, a single block, stays as it is.)"""
    for blocks in net.children():
        if isinstance(blocks, torch.nn.ModuleList):
            for block in blocks:
                block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]    # Windows: two


def listen_for_stops(worker=None):
    """Catch Ctrl-C, SIGTERM and a closed terminal -> a list, to which signals are appended for the loop to see; after 3
    seconds, another one kills. (Not a tensor: while torch.compile traces, a new one would be a fake.) A grid that is
    being drawn is finished first, which may take longer than a scheduler waits; but the checkpoint was saved before it.

    Loader workers survive the first signal, too: the step that training still finishes may need their batch. (`worker`
    is what DataLoader passes them.)"""
    stops = []                                          # when they came

    def remember(sig, _):
        # within 3 seconds it is the same stop: a scheduler signals all processes of a job, and torchrun its own again
        if stops and now() - stops[0] > 3:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        if not stops and worker is None and data.processes()[0] == 0:
            with contextlib.suppress(OSError):          # not print: the signal may come while something is printed
                os.write(2, b"\nstopping once this step, sheet or compiling is done; a later signal stops at once\n")
        stops.append(now())

    for sig in STOPS:
        if sig.name != "SIGHUP" or signal.getsignal(sig) != signal.SIG_IGN:     # nohup has it ignored
            signal.signal(sig, remember)
    return stops


def read_ahead(shares, config, start, device):
    """An iterator over `shares`, data.Batches, from step `start` on. With --workers, so many processes read ahead."""
    data.permutation(config.seed, start * config.batch // shares.n, shares.n)   # cached now, so that workers inherit it
    if config.workers and os.path.isdir("/dev/shm"):    # where workers put batches, two each; without room they hang
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * config.workers
        text = 2 * shares.multiple * shares.features.width if shares.features else 0
        need = 2 * here * len(shares.rows) * (3 * shares.pictures.size**2 + text)               # bytes, at least
        data.check_room("/dev/shm", need, "fewer --workers, or in Docker a larger --shm-size")
    batches = iter(torch.utils.data.DataLoader(
        shares, sampler=range(start, config.steps), batch_size=None, num_workers=config.workers,
        worker_init_fn=listen_for_stops, pin_memory=device.type == "cuda"))
    if config.workers:
        # at exit, end those that an error has kept alive: Python itself sends them one SIGTERM, which they survive, and
        # would then wait for ever. (A weak reference, which does not keep them alive itself.)
        alive = weakref.ref(batches)
        atexit.register(lambda: alive() is not None and alive()._shutdown_workers())
    return batches


class Log:
    """The rows of log.csv. Losses are summed on the device, so that no step has to wait for them."""

    def __init__(self, path, device, seconds):                      # seconds: that the run took before it was resumed
        self.path = path
        self.began, self.since = now() - seconds, now()             # since: of the last row, later by all pauses
        self.sums = torch.zeros(2, 4, device=device)                # loss and count in four bins of t

    def add(self, t, losses):                                       # (b,), (b,)
        bins = (t * 4).long().clamp(max=3)
        self.sums.index_add_(1, bins, torch.stack([losses.detach(), torch.ones_like(losses)]))

    def seconds(self):
        return now() - self.began

    @contextlib.contextmanager
    def paused(self):
        """What is done in this block does not count in images_per_s."""
        start = now()
        yield
        self.since += now() - start

    def write(self, step, norm, lr, skipped):
        """Write a row about the steps since the last one, of all processes -> {column: value}."""
        rank, world = data.processes()
        if world > 1:
            dist.all_reduce(self.sums)
        total, count = self.sums.tolist()
        row = dict(step=step, loss=sum(total) / max(1, sum(count)),
                   **{f"loss_t{i}": a / b if b else math.nan for i, (a, b) in enumerate(zip(total, count))},
                   grad_norm=float(norm), lr=lr, images_per_s=sum(count) / (now() - self.since),
                   seconds=self.seconds(), skipped=int(skipped))
        if rank == 0:
            with open(self.path, "a", newline="") as f:
                if not f.tell():
                    print(*row, sep=",", file=f)
                print(*(v if isinstance(v, int) else f"{v:.6g}" for v in row.values()), sep=",", file=f)
        self.sums.zero_()
        self.since = now()
        return row


def draw_progress(folder, size):
    """progress.png: the first rows of at most twelve of the sample grids, early training at the top."""
    files, strips = sorted(folder.glob("step_*.png")), []
    for i in np.unique(np.linspace(0, len(files) - 1, 12).round().astype(int)):
        try:
            sheet = Image.open(files[i])
            strips.append(sheet.crop((0, 0, sheet.width, size + 2)))
        except Exception:                               # damaged: the run is worth more than one of its strips
            continue
    sheet = Image.new("RGB", (max(s.width for s in strips), (size + 2) * len(strips)), "white")
    for i, strip in enumerate(strips):
        sheet.paste(strip, (0, i * (size + 2)))
    data.write_file(folder / "progress.png", lambda f: sheet.save(f, "png"))


def draw_grid(net, record, path, at_once, device):
    """Draw a grid of samples, always from the same noise and the same classes or captions, and progress.png from all
    grids so far. Each process draws its share, as many pictures at a time as it trains on."""
    rank, world = data.processes()
    drawn, mine = {}, range(rank, record["samples"], world)
    for first in range(0, len(mine), at_once):
        ids = mine[first:first + at_once]
        classes = torch.tensor(ids) % max(1, len(record["info"]["classes"]))
        asked = [record["text"]["rows"][i] for i in ids] if record["text"] else classes
        drawn.update(zip(ids, sample.draw(net, record, asked, ids, device)))
    drawn = sample.gather(drawn, rank, world)
    if rank == 0:
        sheet = data.grid(np.stack([drawn[i] for i in range(record["samples"])]), columns=8)
        data.write_file(path, lambda f: sheet.save(f, "png"))
        draw_progress(path.parent, record["info"]["size"])


def draw_noise(config, size, step, device):
    """For this process's rows of the batch: times t (b,), noise eps (b, 3, S, S) and dropped (b,), True where the null
    condition is learnt. They follow from seed, step and kind of device, so a resumed run draws the same."""
    rank, world = data.processes()
    g = torch.Generator(device).manual_seed(data.seed32(config.seed, step))
    t = diffusion.draw_times(config.batch, config.time_shift, config.time_spread, g, device)
    eps = torch.randn(config.batch, 3, size, size, generator=g, device=device)
    dropped = torch.rand(config.batch, generator=g, device=device) < config.drop
    return t[rank::world], eps[rank::world].contiguous(), dropped[rank::world]      # a copy frees the others' noise


def learning_rate(config, step):
    """The rate of a step: linear warm-up, constant, and linear decay to zero over the last `cooldown` of the run.

    It depends on the run's length: if a larger --steps continues it, the rate goes back up to the longer run's."""
    left = 1 - step / config.steps                                  # of the run, in (0, 1]
    return config.lr * min(1, (step + 1) / max(1, config.warmup), left / config.cooldown if config.cooldown else 1)


# ---- the run -----------------------------------------------------------------------------------------

BAD_STEPS = 100         # a run stops after this many non-finite gradients in a row, checked when it logs


def main():
    config, fresh, dry_run = parse(sys.argv[1:])
    set_name = data.text_set(config.data) if config.cond == "text" else config.data
    info = data.describe(set_name, config.data_dir)
    if config.cond == "text" and not dry_run:
        choose_encoder(config, set_name, fresh)
    n_params, flops = measure(config, info)

    rank, world = data.processes()                                  # one by default, or as many as torchrun started
    unit = world * config.accum
    if config.batch % unit:
        fail(f"--batch {config.batch} does not divide among {world} processes x {config.accum} micro-batches; "
             f"nearest that does: {max(1, round(config.batch / unit)) * unit}")
    if dry_run:
        if rank == 0:
            print(json.dumps(dict(vars(config), params=n_params, gflops=round(flops / 1e9, 3))))
        return

    # device and precision
    device = sample.pick_device(config.device)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    if compiled:
        check_compiling(device, config.dtype)
    if fresh and rank == 0:             # at once: if a rank dies from here on, its replacement goes on with the new run
        move_aside(Path(config.out))
    store = join(config, device) if world > 1 else None
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")                      # TF32 on CUDA for what autocast leaves in float32
    torch.backends.cudnn.benchmark = True                           # convolutions see few shapes
    precision = sample.autocast(device, config.dtype)

    # network. `net` is the raw module: it is what is saved and averaged
    out = Path(config.out)
    torch.manual_seed(config.seed)
    net = sample.build(vars(config), info)
    # weights that do not fit are refused here, before there is a folder; resume(), below, loads a run's own
    if config.init_from and not (out / "ckpt.pt").exists():
        start_from(net, config, info)

    # data, and the run's folder: rank 0 makes what is missing, and the others wait
    if rank == 0:
        make_data(config, set_name)
        lock = claim(out)                                           # held to the end of this function
        if store:
            store.set("ready", "yes")
    else:
        store.wait(["ready"], datetime.timedelta(hours=12))
    pictures, features, text = data.open_set(set_name, config.data_dir), None, None
    info["fingerprint"] = pictures.fingerprint                      # a set made anew is not the one a run began with
    info["flip"] = info["flip"] if config.flip is None else config.flip
    if config.cond == "text":
        features = data.Features(data.text_folder(pictures.folder, config.encoder))
        text = grid_text(pictures, features, config.samples)
        if features.n < len(pictures):
            info["captioned"] = features.n                          # only these are learnt, in an order of their own
    record = dict(dataclasses.asdict(config), info=info)            # the `config` of checkpoints, and of sample.py

    # the running average of the weights, optimiser, and the run so far
    net = net.to(device, memory_format=torch.channels_last)                         # fastest for convolutions
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    params, averaged = list(net.parameters()), list(ema.parameters())
    opt = torch.optim.AdamW(params, lr=config.lr, betas=(config.beta1, config.beta2),
                            weight_decay=config.weight_decay, fused=True)
    start, seconds, skipped = resume(record, net, ema, opt)         # skipped: steps whose gradient was not finite
    if world > 1:
        agree(record, start)
    if rank == 0 and start < config.steps:
        announce(config, info["size"], features.n if features else len(pictures), net, n_params, flops)
        if start:
            print(f"going on from step {start}")
        if compiled:
            print("compiling first, which takes a minute, or several for large networks (--no-compile does without)")
        data.write_file(out / "config.json", lambda f: f.write(json.dumps(record, indent=1).encode()))
        trim_log(out / "log.csv", start)

    if config.grad_ckpt:
        checkpoint_blocks(net)                                      # but not in ema, which needs no gradients
    model = net                                                     # what is trained: net, maybe compiled, maybe in DDP
    if compiled:
        # no graphs for gradients summed over passes, which they get wrong (PyTorch's issue 169545), nor with DDP or
        # --grad-ckpt, where they have not been tried
        model = sample.compile_network(model, graphs=world == 1 and config.accum == 1 and not config.grad_ckpt)
    if world > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False                             # they are constant; DDP's argument is deprecated

    schedule = diffusion.SCHEDULES[config.schedule]
    null = text["null"].to(device) if text else len(info["classes"])
    stops = listen_for_stops()                                      # if one comes: finish the step, save, leave
    again = "the same command" + (" without --fresh" if "--fresh" in sys.argv else "")
    mine = range(rank, config.batch, world)                         # this process's rows of every global batch
    micro = len(mine) // config.accum
    # to this loader, a sample is this process's share of batch number `step`, so it can begin at any step
    multiple = 64 if compiled else 8                                # of tokens: it is compiled anew for each length
    shares = data.Batches(pictures, config.batch, mine, config.seed, info["flip"], features, multiple)
    batches = read_ahead(shares, config, start, device)

    log = Log(out / "log.csv", device, seconds)
    skipped, in_row = torch.tensor([skipped, 0.0], device=device)       # in_row: skipped in a row
    saved = start                                                   # the step of the last checkpoint
    bar = tqdm(total=config.steps, initial=start, disable=rank > 0, unit="step", dynamic_ncols=True,
               mininterval=1 if sys.stderr.isatty() else 60)        # a log file would grow by a line a second

    def explain(kind, e, trace):                                    # the last line of an unexpected error says where
        bar.close()                                                 # what follows is below it, and stays the last
        of_compiler = kind.__module__.startswith(sample.COMPILER)
        if of_compiler and stops:                                   # Ctrl-C also ends the C compiler that it started
            print(f"stopped while compiling, at step {saved}; {again} resumes", file=sys.stderr)
            return
        if issubclass(kind, torch.OutOfMemoryError):
            print(f"out of memory with {micro} pictures at a time: use a larger --accum (now {config.accum}), "
                  f"--grad-ckpt, or a smaller --batch (now {config.batch})", file=sys.stderr)
        else:
            sys.__excepthook__(kind, e, trace)
        if of_compiler:
            print("torch.compile failed; --no-compile does without", file=sys.stderr)
        print(f"rank {rank} failed at step {step}; {again} goes on from step {saved}", file=sys.stderr)

    def due(every):                                                 # is what comes every `every` steps due now?
        return step > 0 and every > 0 and step % every == 0

    # each pass first logs, saves and draws what is due after the `step` steps done so far, and then does one more; the
    # last pass does none
    sys.excepthook = explain
    for step in range(start, max(start, config.steps) + 1):
        leaving = torch.tensor([float(len(stops) > 0)])             # a signal may come any time, and ranks must agree
        if world > 1:
            dist.all_reduce(leaving, dist.ReduceOp.MAX)             # on the CPU: no GPU is kept waiting
        last = step >= config.steps
        if step > start and (due(config.log_every) or leaving or last):
            row = log.write(step, norm, opt.param_groups[0]["lr"], skipped)
            bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s")
            if in_row >= BAD_STEPS:
                good = f"{out / 'ckpt.pt'} is of step {saved}" if saved else "nothing was saved yet"
                fail(f"the last {int(in_row)} gradients were not finite, up to step {step}, and no step was taken; "
                     f"{good}. Go on with --dtype float32, or begin anew with a smaller --lr")
        keep, show = due(config.keep_every), due(config.sample_every) or last
        with log.paused():
            if step > saved and (due(config.save_every) or keep or show or leaving):
                if rank == 0:
                    # what a resumed run cannot work out: the rest follows from config and step. (text is for sample.py)
                    ckpt = dict(model=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), text=text,
                                step=step, skipped=int(skipped), seconds=log.seconds(), config=record)
                    for name in [f"ckpt_{step:07d}.pt", "ckpt.pt"] if keep else ["ckpt.pt"]:
                        data.write_file(out / name, lambda f: torch.save(ckpt, f))
                saved = step
            sheet = out / f"samples/step_{step:07d}.png"
            drawn = step == start and sheet.exists()                # before the run was resumed here
            if show and not (drawn or leaving):                     # drawing may take minutes
                with precision:
                    draw_grid(ema, dict(record, text=text), sheet, micro, device)
        if leaving or last:
            break

        # the next step, on this process's rows of the next batch
        t, eps, dropped = draw_noise(config, info["size"], step, device)        # (b,), (b, 3, S, S), (b,)
        pinned = device.type == "cuda"          # on Macs the memory may be reused too soon (PyTorch's issue 189690)
        x0, *cond = (part.to(device, non_blocking=pinned) for part in next(batches))
        x0 = x0.float().div_(127.5).sub_(1)                         # (b, 3, S, S) in [-1, 1]
        cond = data.drop(cond, null, dropped) if config.cond != "none" else []      # drop: for guidance
        if config.cond == "text":
            cond[0] = cond[0].float()                               # (b, L, d); cond[1]: mask (b, L)

        # forward, backward, update
        opt.param_groups[0]["lr"] = learning_rate(config, step)
        for m in range(config.accum):
            torch.manual_seed(data.seed32(config.seed, step, m, rank))                  # for nn.Dropout
            part = slice(m * micro, (m + 1) * micro)
            if world > 1:
                model.require_backward_grad_sync = m == config.accum - 1                # one exchange per step
            with precision:
                losses = diffusion.loss(model, x0[part], t[part], eps[part], schedule, config.prediction,
                                        [c[part] for c in cond])
            (losses.mean() / config.accum).backward()
            log.add(t[part], losses)
        norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip)
        bad = (~norm.isfinite()).float()
        opt.found_inf = bad                             # as GradScaler does: fused AdamW skips the step if bad is 1
        if device.type != "mps" or not bad:             # on Macs it may not (PyTorch's pull request 186360)
            opt.step()
        skipped, in_row = skipped + bad, bad * (in_row + 1)
        opt.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + step) / (10 + step))           # a shorter memory early on (assumed)
        with torch.no_grad():                                       # or autograd would remember every average so far
            torch._foreach_lerp_(averaged, params, 1 - decay)
        bar.update()

    bar.close()
    if rank == 0:
        hint = f"{again} resumes"
        if last:
            ckpt = shlex.quote(str(out / "ckpt.pt"))
            hint = f"draw more with `python sample.py --ckpt {ckpt}`, or go on with a larger --steps"
        print(f"{out} is {'finished' if last else 'stopped'} at step {step}, {log.seconds() / 60:.1f} minutes "
              f"in all: look at {out / 'samples'}; {hint}")
    if world > 1:
        del model               # if DDP were the last to free the group, it would hold Python's lock, and might hang
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
