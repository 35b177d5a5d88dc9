"""Draw pictures from a checkpoint, which also holds the configuration, or from published weights.

    python sample.py                                     the newest run, 64 pictures, one sheet
    python sample.py --ckpt runs/mine/ckpt.pt --n 480 --score
    python sample.py --classes 3,5 --cfg 4 --out samples/strong/    a folder of PNGs; the same command again goes on
    python sample.py --prompt "a small red circle above a large blue square" "a large green cross on the left"
    python sample.py --prompt @prompts.txt --cfg 1,2,4   prompts from a file, one a line; a row for each guidance scale
    python sample.py --ckpt cifar10_uvit_small.pth       weights that U-ViT's or ADM's authors have published
    torchrun --nproc_per_node=8 -- sample.py --n 50000 --npz samples/50k.npz

From a notebook: `from sample import load; net, config = load("ckpt.pt")`, then the samplers of diffusion.py.
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import diffusion
from ascend import ASCEND
from iuvit import IUViT
from unet import UNet
from uvit import UViT

MODELS = dict(unet=UNet, uvit=UViT, iuvit=IUViT, ascend=ASCEND)
COMPILER = ("torch._dynamo", "torch._inductor")                         # modules of torch.compile's exceptions
SHEET = 1024                                                            # pictures; nobody can look at a larger one
ASKED = ".asked.json"                                                   # in a folder of pictures: see what_decides


def fail(message):
    raise data.UserError(message)


# ---- where and how precisely to compute -----------------------------------------------------------------

def pick_device(name):
    """'auto' -> the best of cuda, mps, cpu that is here; under torchrun, this process's own GPU. LocalError if the
    device asked for by name, or a GPU for this process, is not here."""
    present = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    here = [device for device in present if present[device]]
    if name == "auto":
        name = here[0]
    if name not in here:
        raise data.LocalError(f"there is no {name} on this machine that PyTorch can use; there is {', '.join(here)}")
    if name == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count > 1:
            raise data.LocalError(f"process {local} of this machine has no GPU of its own: there are {count}")
        name = f"cuda:{local % count}"                          # a scheduler may show each process only its own GPU
        torch.cuda.set_device(name)
    return torch.device(name)


def compile_network(net, graphs):
    """torch.compile, anew for every batch size and every length of the texts (the first eight; PyTorch leaves further
    ones uncompiled): with lengths left open, gradients of attention fail.

    graphs: on a GPU, record CUDA graphs, because it finishes the kernels of a small network before Python has launched
    the next ones. Then each call overwrites what the last one returned. (Never on AMD's GPUs, where networks learnt
    less with graphs: PyTorch's issue 187715.)"""
    return torch.compile(net, mode="reduce-overhead" if graphs and not torch.version.hip else "default", dynamic=False)


def fast_bfloat16(device):
    """Whether the device multiplies bfloat16 faster than float32: NVIDIA's GPUs since Ampere do, and CPUs with AMX
    tiles, and AMD's CPUs with AVX512-BF16 (on Intel's without AMX, bfloat16 was slower)."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    amx, avx = (getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported",
                                                                       "_is_avx512_bf16_supported"))
    if amx or not avx or not os.path.exists("/proc/cpuinfo"):
        return amx
    with open("/proc/cpuinfo") as f:
        return "AuthenticAMD" in f.read()


def pick_dtype(name, device):
    """'auto' -> 'bfloat16' if the device multiplies it fast, else 'float32'."""
    assert name in ("auto", "float32", "bfloat16"), f"dtype is 'auto', 'float32' or 'bfloat16', not {name!r}"
    return name if name != "auto" else "bfloat16" if fast_bfloat16(device) else "float32"


def autocast(device, dtype):
    """The context in which networks run, for a dtype of pick_dtype. The loss and samplers' pictures stay in float32.
    bfloat16 on a CPU also sets, for the whole process, how attention is computed (and turns off flash attention, on a
    GPU too)."""
    if pick_dtype(dtype, device) == "float32":
        return contextlib.nullcontext()
    if device.type == "cpu":
        # despite their names these also choose the CPU's attention: two matrix products and a softmax, all in bfloat16,
        # take half the time of its flash kernel, or of the same in float32, forwards and backwards. (This is for texts,
        # which have a mask. Attention without one does not use these kernels: see attend in the backbones.)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return torch.autocast(device.type, torch.bfloat16)


# ---- clocks -----------------------------------------------------------------------------------------------------
# Networks trained elsewhere count time in their own way. Our networks multiply t by 1000, to get T = 1000 steps. A
# clock turns the t of diffusion.py, at which a picture has noise sigma(t), into the t that such a network was trained
# with.

CLOCKS = dict(
    plain=lambda t: t,                                  # ours: steps 1 .. 1000 are t = 1/1000 .. 1
    uvit=lambda t: 0.999 * t,                           # U-ViT's scripts give the network 999 t
    adm=lambda t: (t - 0.001).clamp(min=0))             # ADM numbers the same steps 0 .. 999


def on_clock(net, name):
    """net itself, with a hook that translates t, unless its clock is plain. From now on net(x, t, *cond) takes the t of
    diffusion.py, so that training and sampling need not know about clocks. (Calling net.forward directly bypasses the
    hook.)"""
    if name != "plain":
        net.register_forward_pre_hook(functools.partial(translate, name), with_kwargs=True)
    return net


def translate(clock, net, args, kwargs):
    """A forward pre-hook: the arguments of a call, with t translated to the network's clock."""
    if "t" in kwargs:
        return args, {**kwargs, "t": CLOCKS[clock](kwargs["t"])}
    return (args[0], CLOCKS[clock](args[1]), *args[2:]), kwargs


# ---- a checkpoint ---------------------------------------------------------------------------------------------

# what these fields of a config may hold; also the choices of flags of that name, here and in train.py
CHOICES = dict(model=MODELS, cond=["none", "class", "text"], schedule=diffusion.SCHEDULES, prediction=["eps", "v"],
               clock=CLOCKS, sampler=diffusion.SAMPLERS, clip=["none", "static", "dynamic"])
WHERE = dict(device=["auto", "cpu", "cuda", "mps"], dtype=["auto", "float32", "bfloat16"])      # choices of flags alone


def read(path, weights="ema"):
    """A checkpoint of train.py, or a published file of U-ViT or ADM -> (its config as a dict, its state_dict).

    They are told apart by content; anything else is a UserError. weights: 'ema' or 'raw', which only our own have."""
    whole = data.read_dict(path)
    if "config" not in whole:
        return read_published(path, whole, weights)
    try:
        config = {"clock": "plain", **whole["config"]}
        for key, allowed in CHOICES.items():
            if config[key] not in allowed:
                raise ValueError(f"its {key} is {config[key]!r}, and not one of {', '.join(allowed)}")
        if not all(isinstance(config[key], (int, float)) for key in ("sample_steps", "cfg", "drop")):
            raise ValueError("its sample_steps, cfg and drop are not all numbers")
        if config["cond"] == "text":
            config["text"] = {key: whole["text"][key] for key in ("encoder", "null", "captions", "rows")}
        return config, whole["ema" if weights == "ema" else "model"]
    except (KeyError, TypeError, ValueError) as e:
        fail(f"{path} does not fit this code: {e!r}")


def load_weights(net, weights):
    """Load weights into a network. ValueError names a few whose names or shapes are not the network's."""
    own, found = ({name: tuple(p.shape) for name, p in there.items()} for there in (net.state_dict(), weights))
    wrong = [f"{name} {found.get(name, 'is missing')}, not {own.get(name, 'expected')}"
             for name in {**own, **found} if own.get(name) != found.get(name)]
    if wrong:
        raise ValueError(f"of its weights, as they are called here, {len(wrong)} do not fit: {'; '.join(wrong[:3])}")
    net.load_state_dict(weights)


def build(config, info):
    """The network of a config (a dict), on its clock and on the default device. info holds the size of the pictures
    and their classes."""
    classes = len(info["classes"]) if config["cond"] == "class" else 0
    net = MODELS[config["model"]](img_size=info["size"], num_classes=classes, **config["net"])
    return on_clock(net, config["clock"])


def load(path, weights="ema", device="cpu"):
    """A checkpoint of train.py, or a published file of U-ViT or ADM -> (network in eval mode, its config as a dict).

    The network is the plain one, except that a call translates t to its own clock (on_clock): callers always pass the
    t of diffusion.py, even to networks that were trained elsewhere. weights: 'ema' or 'raw'. The config of a
    text-conditional network also holds `text`: the encoder's name, the features `null` of the empty caption, the
    captions and features (`rows`) of the training grid, and `limit`, the most tokens that the network reads."""
    config, state = read(path, weights)
    try:
        net = build(config, config["info"])
        load_weights(net, state)
        if config["cond"] == "text":
            config["text"]["limit"] = getattr(net, "text_len", data.MAX_TOKENS)
    except (AttributeError, KeyError, TypeError, AssertionError, ValueError, RuntimeError) as e:
        fail(f"{path} does not fit this code: {type(e).__name__} {data.first_line(e)}")
    return net.to(device, memory_format=torch.channels_last).requires_grad_(False).eval(), config


def draw(net, config, wanted, ids, device, multiple=8):
    """The pictures numbered `ids`, uint8 (B, 3, S, S), each from its own noise.

    config: as `load` returns it. wanted: what each shows, by config["cond"]: (), classes (B,), or features [(L, d)].
    multiple: of how many tokens texts are padded to."""
    size, cond = config["info"]["size"], ()
    null = len(config["info"]["classes"])                               # the null class
    if config["cond"] == "class":
        cond = (wanted.to(device),)
    elif config["cond"] == "text":
        features, mask = data.pad(wanted, multiple)
        cond, null = (features.to(device).float(), mask.to(device)), config["text"]["null"]
    noise = diffusion.ImageNoise(data.image_seeds(config["seed"], ids), (3, size, size), device)
    schedule = diffusion.SCHEDULES[config["schedule"]]
    denoise = diffusion.denoiser(net, schedule, config["prediction"], cond, data.null_like(cond, null), config["cfg"],
                                 config["clip"])
    x = diffusion.sample(denoise, noise, schedule, config["sampler"], config["sample_steps"])
    return data.to_uint8(x).cpu().numpy()


STRONG = 2              # guidance by text above which pictures get Imagen's dynamic threshold, or saturate (assumed)


def usual_clip(cond, scale):
    """How pictures are kept in range at this guidance, unless --clip says."""
    return "dynamic" if cond == "text" and scale > STRONG else "static"


def clip_for(scale, config):
    """The run's own clip, except that guidance by text of another scale than the run's has the usual (none stays)."""
    usual = config["cond"] == "text" and scale != config["cfg"] and config["clip"] != "none"
    return usual_clip("text", scale) if usual else config["clip"]


# ---- what is asked for ----------------------------------------------------------------------------------------

def newest_run():
    runs = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        fail("there is no run in runs/ yet: run `python train.py` first, or name one with --ckpt")
    return runs[-1]


def parse(argv):
    p = argparse.ArgumentParser(prog="sample.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message} (python sample.py --help lists all flags)")
    p.add_argument("--ckpt", help="default: the newest in runs/")
    p.add_argument("--n", type=int, help="how many pictures, for each scale of --cfg; default: 64 (8 for each "
                   "of several scales), or with --prompt up to as many, equally many of each")
    p.add_argument("--batch", type=int, default=64, help="pictures at a time")
    p.add_argument("--sampler", choices=CHOICES["sampler"], help="default: the run's own")
    p.add_argument("--steps", type=int, help="network evaluations a picture; default: the run's own")
    p.add_argument("--cfg", help="classifier-free guidance scale, 1 is none; several, like 1,2,4, are rows of a sheet; "
                   "default: the run's own")
    p.add_argument("--clip", choices=CHOICES["clip"], help="how pictures are kept in range; default: the run's own "
                   "(for text at another guidance than the run's: dynamic above 2, else static; none stays)")
    p.add_argument("--classes", help="numbers, like 3,5; default: image i gets class i mod the number of classes")
    p.add_argument("--prompt", nargs="+", metavar="TEXT", help="image i shows prompt i mod their number; @FILE has "
                   "one a line; default: the captions of the training's grid")
    p.add_argument("--encoder", help="where the text encoder lies, or what it is called, if no longer as in training")
    p.add_argument("--attend", metavar="WORD", help="show beside each picture where this word of the prompts was read")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default="samples.png", help="a .png is one sheet, all else a folder of PNGs")
    p.add_argument("--npz", type=Path, help="also arr_0, uint8 (N, H, W, 3), for FID, and arr_1, classes or prompts")
    p.add_argument("--score", action="store_true", help="on the shapes sets: how many show what was asked")
    p.add_argument("--weights", choices=["ema", "raw"], default="ema")
    p.add_argument("--device", choices=WHERE["device"], default="auto")
    p.add_argument("--dtype", choices=WHERE["dtype"], default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the network, for many pictures: takes minutes "
                   "first, and again for a last batch that is smaller, longer prompts, guidance 1 beside others")
    args = p.parse_args(argv)
    if empty := [name for name, value in vars(args).items() if value == ""]:
        fail(f"--{empty[0]} must not be empty")
    if args.out == Path():
        fail("--out must name a file, or a folder of its own")
    for name in ("n", "batch", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(args, name)}")
    try:
        args.cfg = args.cfg and [float(scale) for scale in args.cfg.split(",")]
    except ValueError:
        fail(f"--cfg takes a float, or several like 1,2,4, not {args.cfg!r}")
    if not np.isfinite(args.cfg or 0).all():
        fail(f"--cfg must be a finite number, not {args.cfg}")
    if args.cfg and len(args.cfg) > 1 and (args.npz or args.out.suffix != ".png"):
        fail("several scales of --cfg are rows of a sheet: --out is a .png then, and there is no --npz")
    if args.npz and args.npz.suffix != ".npz":
        fail(f"--npz names a file that ends in .npz, not {args.npz}")
    if args.compile and args.attend:
        fail("--attend watches the network from inside, which a compiled one does not allow: leave out --compile")
    if args.seed < 0:
        fail("--seed must not be negative")
    return args


def settle(args, config):
    """Fill in from the run what was not asked for: n, sampler, steps; scales, the list of --cfg; clips, how to clip at
    each of them. UserError for what its network cannot do."""
    cond = config["cond"]
    for name, needed in dict(classes="class", prompt="text", attend="text", encoder="text").items():
        if getattr(args, name) and cond != needed:
            fail(f"this model is of condition {cond}: it takes no --{name}")
    if args.score and not (config["data"] in data.SCORED and cond != "none"):
        fail(f"--score reads the pictures of conditional models of shapes; this one is of {config['data']}, "
             f"condition {cond}")
    if args.cfg not in (None, [1]) and (cond == "none" or config["drop"] == 0):
        fail("--cfg needs a model trained with and without its condition; this one was not"
             + ("; `python train.py --init-from` trains it so" if cond != "none" else ""))
    args.scales = args.cfg or [config["cfg"]]
    args.clips = {scale: args.clip or clip_for(scale, config) for scale in args.scales}
    args.sampler, args.steps = args.sampler or config["sampler"], args.steps or config["sample_steps"]
    args.prompt = args.prompt and [text for prompt in args.prompt for text in prompts_of(prompt)]
    if args.n is None:
        args.n = 8 if len(args.scales) > 1 else 64
        if args.prompt:                                                 # at most eight of each, and at least one
            args.n = max(1, args.n // max(8, len(args.prompt))) * len(args.prompt)
    if len(args.scales) > 1 and len(args.scales) * args.n > SHEET:
        fail(f"a sheet holds {SHEET:,} pictures, and {len(args.scales)} rows of {args.n:,} are more: use a smaller --n")


def prompts_of(prompt):
    """[prompt], or the lines of FILE for @FILE."""
    if not prompt.startswith("@"):
        return [prompt]
    try:
        lines = data.lines_of(data.to_text(Path(prompt[1:]).read_bytes()))
    except OSError as e:
        fail(f"cannot read --prompt {prompt}: {e.strerror}; @ begins the name of a file of prompts")
    if not any(map(str.strip, lines)):
        fail(f"--prompt {prompt}: the file holds no prompts")
    return [line.strip() for line in lines if line.strip()]


def classes_of(args, names):
    """The class of each of the n pictures, int64 (n,)."""
    try:
        asked = [int(c) for c in args.classes.split(",")] if args.classes else range(len(names))
    except ValueError:
        fail(f"--classes takes numbers, like 3,5, not {args.classes!r}")
    if any(not 0 <= c < len(names) for c in asked):
        known = ", ".join(f"{i} {name}" for i, name in enumerate(names[:30]))
        fail(f"--classes must lie in 0..{len(names) - 1}: {known}")
    return torch.tensor([asked[i % len(asked)] for i in range(args.n)])


def features_of(prompts, args, text):
    """[float16 (L, d)] of the prompts, by the encoder that the network was trained with, and which of their tokens are
    the word of --attend, bool (B, L), or None. The encoder, 9.5 GB for T5-XXL, is freed before drawing. text: as `load`
    returns it."""
    known = dict(zip(text["captions"], text["rows"]))                   # these need no encoder
    familiar = known.keys() >= set(prompts)
    if familiar and not args.attend:
        return [known[prompt] for prompt in prompts], None
    name = args.encoder or text["encoder"]
    encoder = data.load_encoder(name)
    here, there = torch.from_numpy(data.encode(encoder, [""])[0]).float(), text["null"].float()
    if here.shape != there.shape or F.cosine_similarity(here, there).min() < 0.98:      # devices round differently
        fail(f"the encoder {name} makes other features of the empty caption than {text['encoder']} did, by which the "
             "network was trained: name where that one lies now with --encoder")
    for prompt, tokens in zip(prompts, encoder.tokens(prompts)):
        if len(tokens) > text["limit"] and data.processes()[0] == 0:
            print(f"note: a prompt of {len(tokens):,} tokens is cut to {text['limit']}: {prompt[:60]!r}...")
    rows = [known[prompt] for prompt in prompts] if familiar else data.encode(encoder, prompts)
    return rows, mark(args.attend, prompts, encoder) if args.attend else None


class Asked(NamedTuple):
    """What n pictures are to show, and how to say so. What there is not is None, or () for wanted."""
    wanted: object = ()             # for `draw`: classes (n,), or features [(L, d)]
    array: np.ndarray = None        # the same for people, arr_1 of the .npz: classes or prompts
    labels: list = None             # what is written below the pictures
    kinds: list = None              # of the prompts, for the scorer
    marks: torch.Tensor = None      # bool (n, L): the tokens that --attend watches


def what_to_draw(args, config):
    """-> Asked. Picture i shows class, or prompt, i mod their number."""
    if config["cond"] == "none":
        return Asked()
    if config["cond"] == "class":
        names = config["info"]["classes"]
        wanted = classes_of(args, names)
        labels = [names[c] for c in wanted] if len(args.scales) > 1 else None
        return Asked(wanted, wanted.numpy(), labels)
    prompts, kinds = args.prompt or config["text"]["captions"], ["as asked"] * args.n
    if args.score and not args.prompt:
        prompts, kinds = data.asked_scenes(args.n)                      # no training has seen their pictures
    rows, marked = features_of(prompts, args, config["text"])
    which = [i % len(prompts) for i in range(args.n)]
    labels = [prompts[i] for i in which]
    if args.score:
        data.read_captions(labels)                                      # refuses what cannot be scored
    marks = marked[which] if args.attend else None
    return Asked([rows[i] for i in which], np.array(labels), labels, kinds, marks)


# ---- where the network looks --------------------------------------------------------------------------

@contextlib.contextmanager
def attention_maps(net, marked, size):                                  # marked (B, L) bool
    """`with attention_maps(...) as maps` sums how much each place of the pictures reads the marked tokens, over all
    cross-attentions of a network and all its evaluations in the block: maps (B, S, S). The network stays as it is:
    hooks watch the inputs of its cross-attentions and compute their softmax once more."""
    B, maps = len(marked), torch.zeros(len(marked), size, size)

    def watch(m, inputs, output):
        x, text, mask = (part[:B] for part in inputs)                   # guidance's second half reads the null caption
        q, k = m.q(x), m.kv(text).chunk(2, dim=-1)[0]                   # (B, N, D), (B, L, D)
        q, k = (part.float().unflatten(-1, (m.heads, -1)).transpose(1, 2) for part in (q, k))
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, None], -torch.inf)
        side = int(scores.shape[2] ** 0.5)                              # of the grid; IU-ViT's time token precedes it
        chosen = marked[:, None, None, :mask.shape[1]].to(scores)
        read = (scores.softmax(-1) * chosen).sum(-1).mean(1)[:, -side * side:]          # (B, side^2)
        read = read.view(B, 1, side, side).cpu()
        maps.add_(F.interpolate(read, (size, size), mode="bilinear")[:, 0])

    # by name, since each backbone's file has its own class
    hooks = [m.register_forward_hook(watch) for m in net.modules() if type(m).__name__ == "CrossAttention"]
    if not hooks:
        fail("--attend shows cross-attention, and this network has none: it reads text in some other way")
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def mark(word, prompts, encoder):
    """bool (B, L): the tokens of the prompts that make up the word, perhaps several in a row."""
    sought, rows = encoder.tokens([word])[0][:-1], encoder.tokens(prompts)      # without the end token
    marked = torch.zeros(len(rows), data.MAX_TOKENS, dtype=torch.bool)
    for i, tokens in enumerate(rows):
        for j in range(min(len(tokens), data.MAX_TOKENS) - len(sought)):
            if tokens[j:j + len(sought)] == sought:
                marked[i, j:j + len(sought)] = True
    if not marked.any():
        fail(f"--attend {word}: no prompt has this word; the first is {prompts[0][:80]!r}")
    return marked


def highlight(pictures, maps):
    """uint8 (N, 3, S, S), maps (N, S, S) -> (N, 3, S, 2 S): right of each a grey copy, orange where its map is high."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    heat = ((maps - low) / (high - low).clamp(min=1e-9))[:, None].numpy()           # (N, 1, S, S) in [0, 1]
    grey = 0.5 * pictures.mean(1, keepdims=True)
    shown = (grey + heat * (np.array([255, 140, 0]).reshape(3, 1, 1) - grey)).round().astype(np.uint8)
    return np.concatenate([pictures, shown], axis=3)


# ---- weights of other people ---------------------------------------------------------------------------------

def renamed(weights, theirs):
    """weights by our names, {part of theirs: part of ours}, with one more class: the null one, zero and untrained."""
    ours = {}
    for name, p in weights.items():
        for old, new in theirs.items():
            name = name.replace(old, new)
        ours[name] = F.pad(p, (0, 0, 0, 1)) if name == "class_embed.weight" else p
    return ours


# A reader takes a file, {name: tensor}, and returns the arguments of our network, its state_dict, and the settings
# it must be used with: see train.py's Config. Sizes are read from the file, so other widths and depths of the known
# layouts will do. ValueError, one line, if it is another network.

# The published files that work on pixels: (side, patch, with classes). Common to all, but not visible in the weights'
# shapes: heads of 64 channels, the linear schedule, eps, time as 999 t, and no class for "no class".
UVIT_FILES = {(32, 2, False): "cifar10_uvit_small",
              (64, 4, False): "celeba64_uvit_small",
              (64, 4, True): "imagenet64_uvit_mid, imagenet64_uvit_large"}


def read_uvit(weights):
    """A file of U-ViT's authors (github.com/baofff/U-ViT)."""
    if "context_embed.weight" in weights:
        raise ValueError("it is a text-to-image U-ViT, which works on latents of an autoencoder and not on pixels")
    dim, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
    classes = len(weights["label_emb.weight"]) if "label_emb.weight" in weights else 0
    grid = math.isqrt(weights["pos_embed"].shape[1] - (2 if classes else 1))
    img_size = patch_size * grid
    what = f"a U-ViT for {img_size}x{img_size}, {channels} channels, patches of {patch_size}, {classes} classes"
    if channels == 4:
        raise ValueError(f"it is {what}: 4 channels are latents of an autoencoder, not pixels")
    if "time_embed.0.weight" in weights:
        raise ValueError(f"it is {what}, with an MLP for time, which none of the published files for pixels has")
    if channels != 3 or (img_size, patch_size, classes > 0) not in UVIT_FILES or dim % 64:
        raise ValueError(f"it is {what}, width {dim}; those known here are {', '.join(UVIT_FILES.values())}, and the "
                         "like of other depths and of widths that are multiples of 64")

    arguments = dict(img_size=img_size, patch_size=patch_size, dim=dim, heads=dim // 64, num_classes=classes,
                     depth=sum(name.endswith(".norm1.weight") for name in weights))
    ours = renamed(weights, {"patch_embed.proj.": "patch_embed.", "label_emb.": "class_embed.", ".mlp.": ".ffn.",
                             "decoder_pred.": "to_pixels.", "final_layer.": "head."})
    return arguments, ours, dict(schedule="linear", prediction="eps", clock="uvit")


# The layouts of ADM's published files: (dim_mults) -> what shapes do not show. Common to all:
# attention at 32, 16 and 8 pixels with heads of 64 channels, eps, T = 1000 steps numbered from 0, and no class for
# "no class". In the legacy order the rows of qkv are sorted by head first, and then by q, k and v.
ADM_FILES = {(1, 2, 3, 4): dict(img_size=64, schedule="cosine", legacy=False),              # 64x64_diffusion
             (1, 1, 2, 2, 4, 4): dict(img_size=256, schedule="linear", legacy=True)}        # 256x256_*, lsun_*


def read_adm(weights):
    """A file of ADM's authors (github.com/openai/guided-diffusion). The three output channels that predict a variance
    are left out: no sampler here reads them."""
    if "out.2.weight" not in weights or "output_blocks.0.0.in_layers.0.weight" not in weights:
        raise ValueError("it is a classifier of ADM, which has no decoder")
    channels = weights["input_blocks.0.0.weight"].shape[1]
    if channels != 3:
        what = {6: "a super-resolution network of ADM: it also reads a small picture",
                4: "a U-Net for latents of an autoencoder, not for pixels"}
        raise ValueError(f"it is {what.get(channels, f'a U-Net for pictures of {channels} channels')}")
    if any(".op." in name for name in weights):
        raise ValueError("it is a U-Net that changes resolution by convolutions, as improved-diffusion's do; ADM's "
                         "published files do so in residual blocks")
    dim = weights["time_embed.0.weight"].shape[1]
    blocks = sum(name.startswith("output_blocks.") and name.endswith(".0.in_layers.2.weight") for name in weights)
    widths = [len(weights[f"output_blocks.{i}.0.in_layers.2.weight"]) for i in reversed(range(blocks))]
    fits = [(mults, n, known) for mults, known in ADM_FILES.items()     # n = num_blocks + 1 decoder blocks a level
            if (n := blocks // len(mults)) > 1 and widths == [dim * mult for mult in mults for _ in range(n)]]
    if not fits:
        levels = [w for w, previous in zip(widths, [0, *widths]) if w != previous]
        sizes = {(0.5, 1, 2, 4): "512x512_diffusion", (1, 2, 3, 4): "128x128_diffusion, whose heads vary in width"}
        what = sizes.get(tuple(w / dim for w in levels), "none of ADM's published files")
        raise ValueError(f"it is a U-Net of width {dim}, {blocks} decoder blocks of widths {levels}: {what}; those "
                         "known here are 64x64_diffusion, 256x256_diffusion, 256x256_diffusion_uncond and lsun_*")
    if dim % 64 or dim < 128:
        raise ValueError(f"its width {dim} does not divide into heads of 64 and 32 group norms of 4 channels or more")

    (mults, n, known), = fits
    classes = len(weights["label_emb.weight"]) if "label_emb.weight" in weights else 0
    arguments = dict(img_size=known["img_size"], dim=dim, dim_mults=list(mults), num_blocks=n - 1,
                     attn_sizes=[32, 16, 8], num_classes=classes)
    ours = renamed(weights, {
        "input_blocks.": "encoder.", "middle_block.": "middle.", "output_blocks.": "decoder.", "in_layers.0.": "norm1.",
        "in_layers.2.": "conv1.", "emb_layers.1.": "scale_shift.", "out_layers.0.": "norm2.", "out_layers.3.": "conv2.",
        "skip_connection.": "shortcut.", "proj_out.": "proj.", "label_emb.": "class_embed.", "out.0.": "norm.",
        "out.2.": "head."})
    for name, p in ours.items():
        if ".qkv." in name and known["legacy"]:
            p = p.unflatten(0, (-1, 3, 64)).transpose(0, 1).flatten(0, 2)
        if name.endswith((".qkv.weight", ".proj.weight")):
            p = p[..., None]                                            # 1-D convolutions there, 2-D ones here
        ours[name] = p[:3] if name.startswith("head.") else p
    return arguments, ours, dict(schedule=known["schedule"], prediction="eps", clock="adm")


# how to read a file, or else what it is, by a name that it holds
READERS = {"in_blocks.0.norm1.weight": ("uvit", read_uvit), "input_blocks.0.0.weight": ("unet", read_adm)}
FOREIGN = {"x_embedder.proj.weight": "a DiT", "down_blocks.0.resnets.0.conv1.weight": "a U-Net of diffusers",
           "down.0.block.0.conv1.weight": "a U-Net of DDPM's PyTorch ports", "cls_token": "a ViT that classifies",
           "state_dict": "another program's checkpoint", "model": "another program's checkpoint"}


def read_published(path, whole, weights):
    """What is in a file that is no checkpoint of train.py -> config and state_dict, as from `read`."""
    model, reader = next((known for name, known in READERS.items() if name in whole), (None, None))
    if not reader:
        names = "entries like " + ", ".join(map(str, list(whole)[:3]))
        what = next((what for name, what in FOREIGN.items() if name in whole), names)
        fail(f"{path} is neither a checkpoint of train.py (it holds no config) nor a file of U-ViT or ADM: "
             f"it holds {what}")
    if weights == "raw":
        fail(f"{path} is a published file, which holds one set of weights: leave out --weights raw")
    try:
        arguments, state, facts = reader(whole)
    except Exception as e:                                              # a damaged file can raise anything
        reason = e if isinstance(e, ValueError) else f"it is damaged: {e!r}"
        fail(f"{path} is no network that fits this code: {reason}")
    size, classes = arguments.pop("img_size"), [str(i) for i in range(arguments.pop("num_classes"))]
    return dict(model=model, net=arguments, data=Path(path).stem, cond="class" if classes else "none", **facts,
                drop=0.0, seed=0, sampler="dpm", sample_steps=20, cfg=1.0, clip="static",
                info=dict(size=size, classes=classes, flip=True)), state


# ---- the command --------------------------------------------------------------------------------------

def sheet_of(pictures, args, labels):
    """One PIL picture: a row for each guidance scale, else a column for each prompt, or about a square; labels (n,), or
    None."""
    columns = min(16, round(len(pictures) ** 0.5))
    if len(args.scales) > 1:
        columns, labels = args.n, [f"{scale:g}: {label}" for scale in args.scales for label in labels]
    elif args.prompt and 1 < len(args.prompt) <= 16:
        columns = len(args.prompt)
    pictures = pictures[:SHEET]
    if labels:
        pictures = np.stack([data.with_caption(picture, label, lines=3) for picture, label in zip(pictures, labels)])
    return data.grid(pictures, columns, gap=6 if labels else 2)


def file_of(out, i):
    return out / f"{i:06d}.png"


def write_picture(path, picture):                                       # uint8 (3, S, S)
    image = Image.fromarray(picture.transpose(1, 2, 0))
    data.write_file(path, lambda f: image.save(f, "png"), sync=False)   # 50,000 waits for the disk would take minutes


def what_decides(net, config, args, prompts):
    """All that determines the pictures in a folder, as JSON: the same command may go on with them later."""
    names = "n batch sampler steps scales clips classes attend seed device dtype compile".split()
    weights = data.digest(f"{name} {zlib.crc32(p.cpu().numpy().tobytes())}" for name, p in net.state_dict().items())
    asked = dict({name: getattr(args, name) for name in names}, prompts=prompts, weights=weights,
                 **{name: config[name] for name in ("schedule", "prediction", "clock")})
    return json.dumps(asked).encode()


def claim(args, command, rank):
    """Make the folders of --out and --npz. Fail now, not after an hour of drawing, if they cannot be written to, or if
    the folder --out holds anything but pictures that this same command has begun: those it goes on with.

    For such a folder rank 0 gets the open file in it that records the command. While it is open, no other command can
    draw into the folder."""
    folder, record = args.out.suffix != ".png", args.out / ASKED
    files = ([] if folder else [args.out]) + ([args.npz] if args.npz else [])
    for place in [file.parent for file in files] + ([args.out] if folder else []):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            fail(f"cannot write to {place}: {e}")
        if not os.access(place, os.W_OK):
            fail(f"no permission to write into {place}")
    if any(file.is_dir() for file in files):
        fail("a sheet and an .npz are files, and no folders that are there: choose another --out or --npz")
    if not folder:
        return None
    same = record.is_file() and record.read_bytes() == command
    if not same and any(path != record for path in args.out.iterdir()):
        fail(f"the folder {args.out} is not empty, and not of this very command: choose another --out, so that nothing "
             "is overwritten")
    if rank > 0:
        return None
    f = open(record, "ab")
    if not data.lock(f):
        fail(f"another command is drawing into {args.out}: wait for it, or choose another --out")
    if not same:
        f.truncate(0)
        f.write(command)
        f.flush()
    return f


@contextlib.contextmanager
def errors_in_a_line(batch):
    """Too little memory, or a failure of torch.compile, while a network runs becomes one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise data.LocalError(f"out of memory: use a smaller --batch (now {batch})")
    except Exception as e:
        if not type(e).__module__.startswith(COMPILER):
            raise
        raise data.LocalError(f"torch.compile failed, so leave out --compile: {data.first_line(e)}")


def gather(drawn, rank, world):
    """The dicts of all processes, merged on rank 0."""
    if world == 1:
        return drawn
    parts = [None] * world if rank == 0 else None
    dist.gather_object(drawn, parts)
    return {key: pictures for part in parts or [] for key, pictures in part.items()}


def tell_score(pictures, asked, kinds, how):
    """Print how many pictures show what was asked: prompts if there are kinds of them, else classes."""
    if not kinds:
        score = data.score_shapes(pictures, asked)
        print(f"of {len(asked)} pictures, {score['both']:.1f}% show the asked shape and colour "
              f"(shape {score['shape']:.1f}%, colour {score['colour']:.1f}%); {how}")
        return
    for kind in dict.fromkeys(kinds):
        chosen = [i for i, k in enumerate(kinds) if k == kind]
        score = data.score_captions(pictures[chosen], [asked[i] for i in chosen])
        parts = ", ".join(f"{key} {value:.1f}%" for key, value in score.items() if key not in ("n", "all"))
        print(f"{kind}: of {score['n']} pictures, {score['all']:.1f}% show all that was asked ({parts}); {how}")


def main():
    args = parse(sys.argv[1:])
    rank, world = data.processes()
    device = pick_device(args.device)
    if world > 1:
        # ranks exchange only finished pictures. Rank 0 may have to wait for them for as long as another one draws
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    args.device, args.dtype = device.type, pick_dtype(args.dtype, device)
    path = args.ckpt or newest_run()
    net, config = load(path, args.weights, device)
    settle(args, config)
    model = compile_network(net, graphs=True) if args.compile else net

    size = config["info"]["size"]
    asked = what_to_draw(args, config)

    # where it goes
    out, folder = args.out, args.out.suffix != ".png"
    command = what_decides(net, config, args, asked.labels) if folder or world > 1 else None
    held = claim(args, command, rank)                                   # until this function ends
    if world > 1:                                                       # all have looked, and the folder is ours
        commands = [None] * world
        dist.all_gather_object(commands, command)
        if len(set(commands)) > 1:
            fail("processes have different flags, or checkpoints: name one with --ckpt that no run replaces meanwhile")

    # fixed blocks of `batch` pictures, each on one rank: what is in a block does not depend on the number of ranks.
    # Picture i has the same noise at every guidance scale
    blocks = [(scale, range(args.n)[first:first + args.batch])
              for scale in args.scales for first in range(0, args.n, args.batch)]
    multiple = 64 if args.compile else 8                                # of tokens: it is compiled anew for each length
    drawn = {}
    with autocast(device, args.dtype), errors_in_a_line(args.batch):
        for scale, ids in tqdm(blocks[rank::world], disable=rank > 0, unit="block"):
            if folder and all(file_of(out, i).exists() for i in ids):
                continue                                                # drawn before the command was stopped
            part = slice(ids.start, ids.stop)
            how = dict(config, seed=args.seed, sampler=args.sampler, sample_steps=args.steps, cfg=scale,
                       clip=args.clips[scale])
            looking = (attention_maps(net, asked.marks[part].to(device), size) if args.attend
                       else contextlib.nullcontext())
            with looking as maps:
                pictures = draw(model, how, asked.wanted[part], ids, device, multiple)
            if args.attend:
                pictures = highlight(pictures, maps)
            if not folder:
                drawn[scale, ids] = pictures
                continue
            for _ in data.in_threads(lambda i: write_picture(file_of(out, i), pictures[i - ids.start]), ids):
                pass                                                    # they are kept there, and not in memory
    drawn = gather(drawn, rank, world)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return

    # write and tell
    if not folder:
        pictures = np.concatenate([drawn[block] for block in blocks])   # (scales * n, 3, S, S); --attend: 2 S wide
        sheet = sheet_of(pictures, args, asked.labels)
        data.write_file(out, lambda f: sheet.save(f, "png"))
    elif missing := [i for i in range(args.n) if not file_of(out, i).exists()]:
        fail(f"{out} lacks {len(missing):,} pictures, like {file_of(out, missing[0]).name}: all nodes must see it")
    elif args.npz or args.score:
        pictures = np.empty((args.n, 3, size, 2 * size if args.attend else size), np.uint8)
        for i in range(args.n):                                         # one by one: a list of them takes as much again
            pictures[i] = np.asarray(Image.open(file_of(out, i))).transpose(2, 0, 1)
    if args.npz:
        shown = {} if asked.array is None else dict(arr_1=asked.array)
        data.write_file(args.npz, lambda f: np.savez(f, arr_0=pictures[..., :size].transpose(0, 2, 3, 1), **shown))
    cut = f" (the first {SHEET:,})" if not folder and args.n > SHEET else ""
    print(f"{args.n * len(args.scales)} pictures from {path}: {out}{cut}" + (f", {args.npz}" if args.npz else ""))
    if args.score:
        for i, scale in enumerate(args.scales):
            these = pictures[i * args.n:(i + 1) * args.n, ..., :size]
            tell_score(these, asked.array, asked.kinds, f"{args.sampler} {args.steps}, guidance {scale:g}")


if __name__ == "__main__":
    data.run(main)
