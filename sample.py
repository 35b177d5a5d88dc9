"""Draw pictures from a checkpoint, which also holds the configuration, or from published weights.

    python sample.py                                     the newest run, 64 pictures, one sheet
    python sample.py --ckpt runs/mine/ckpt.pt --n 480 --score
    python sample.py --classes 3,5 --cfg 4 --out samples/strong/    a folder of single PNGs
    python sample.py --ckpt cifar10_uvit_small.pth       weights that U-ViT's or ADM's authors have published
    torchrun --nproc_per_node=8 -- sample.py --n 50000 --npz samples/50k.npz

From a notebook: `from sample import load; net, config = load("ckpt.pt")`, then the samplers of diffusion.py.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import diffusion
import unet
import uvit
from ascend import ASCEND
from iuvit import IUViT
from unet import UNet
from uvit import UViT

MODELS = dict(unet=UNet, uvit=UViT, iuvit=IUViT, ascend=ASCEND)

# what to do with weights of other people, by a name that they hold
PUBLISHED = {"in_blocks.0.norm1.weight": ("uvit", uvit.published), "input_blocks.0.0.weight": ("unet", unet.published)}
FOREIGN = {"x_embedder.proj.weight": "a DiT", "down_blocks.0.resnets.0.conv1.weight": "a U-Net of diffusers",
           "down.0.block.0.conv1.weight": "a U-Net of DDPM's PyTorch ports", "cls_token": "a ViT that classifies",
           "state_dict": "another program's checkpoint", "model": "another program's checkpoint"}


def read(path, weights="ema"):
    """A checkpoint of train.py, or a published file of U-ViT or ADM -> (its config as a dict, its state_dict).

    Told apart by content. UserError, one line, for anything else; weights: 'ema' or 'raw', which only our own have."""
    whole = data.read_dict(path)
    if "config" in whole:
        try:
            return {"clock": "plain", **whole["config"]}, whole["ema" if weights == "ema" else "model"]
        except (KeyError, TypeError) as e:
            raise data.UserError(f"{path} does not fit this code: {e!r}")
    model, published = next((known for name, known in PUBLISHED.items() if name in whole), (None, None))
    if not published:
        names = "entries like " + ", ".join(map(str, list(whole)[:3]))
        what = next((what for name, what in FOREIGN.items() if name in whole), names)
        raise data.UserError(f"{path} is neither a checkpoint of train.py (it holds no config) nor a file of U-ViT or "
                             f"ADM: it holds {what}")
    if weights == "raw":
        fail(f"{path} is a published file, which holds one set of weights: leave out --weights raw")
    try:
        net, state, facts = published(whole)
    except (ValueError, AssertionError, KeyError, IndexError, AttributeError) as e:
        reason = e if isinstance(e, (ValueError, AssertionError)) else f"it is damaged: {e!r}"
        raise data.UserError(f"{path} is no network that fits this code: {reason}")
    size, classes = net.pop("img_size"), [str(i) for i in range(net.pop("num_classes"))]
    return dict(model=model, net=net, data=Path(path).stem, cond="class" if classes else "none", **facts,
                drop=0.1 if facts["has_null"] else 0.0, sampler="dpm", sample_steps=20, cfg=1.0, clip="static",
                info=dict(size=size, classes=classes, flip=True)), state


def load(path, weights="ema", device="cpu"):
    """A checkpoint of train.py, or a published file of U-ViT or ADM -> (network in eval mode, its config as a dict).

    The network is the plain one, except that calling it sets its clock (diffusion.on_clock): t is that of diffusion.py
    also for networks that were trained elsewhere, and there is nothing to remember. weights: 'ema' or 'raw'."""
    config, state = read(path, weights)
    try:
        info = config["info"]
        classes = len(info["classes"]) if config["cond"] == "class" else 0
        net = MODELS[config["model"]](img_size=info["size"], num_classes=classes, **config["net"])
        net.load_state_dict(state)
        diffusion.on_clock(net, config["clock"])
    except (KeyError, TypeError, AssertionError, ValueError, RuntimeError) as e:
        raise data.UserError(f"{path} does not fit this code: {type(e).__name__} {str(e).splitlines()[0]}")
    return net.to(device, memory_format=torch.channels_last).requires_grad_(False).eval(), config


def newest_run():
    runs = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise data.UserError("there is no run in runs/ yet: run `python train.py` first, or name a checkpoint with --ckpt")
    return runs[-1]


def parse(argv):
    p = argparse.ArgumentParser(prog="sample.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = lambda message: fail(f"{message} (python sample.py --help lists all flags)")
    p.add_argument("--ckpt", help="default: the newest in runs/")
    p.add_argument("--n", type=int, default=64, help="how many pictures")
    p.add_argument("--batch", type=int, default=64, help="pictures at a time")
    p.add_argument("--sampler", choices=list(diffusion.SAMPLERS), help="default: the run's own")
    p.add_argument("--steps", type=int, help="network evaluations a picture; default: the run's own")
    p.add_argument("--cfg", type=float, help="classifier-free guidance scale, 1 is none; default: the run's own")
    p.add_argument("--clip", choices=["none", "static", "dynamic"], help="limits on pictures; default: the run's own")
    p.add_argument("--classes", help="numbers, like 3,5; default: image i gets class i mod the number of classes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="samples.png", help="a .png is one sheet; anything else a folder of single PNGs")
    p.add_argument("--npz", help="also write arr_0 (N, H, W, 3) uint8 and arr_1, the classes, for FID tools")
    p.add_argument("--score", action="store_true", help="on the shapes sets: how many show what was asked")
    p.add_argument("--weights", choices=["ema", "raw"], default="ema")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    args = p.parse_args(argv)
    for name in ("n", "batch", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.cfg is not None and not np.isfinite(args.cfg):
        fail(f"--cfg must be a finite number, not {args.cfg}")
    if args.seed < 0:
        fail("--seed must not be negative")
    return args


def fail(message):
    raise data.UserError(message)


def classes_of(args, config):
    """The class of each of the n pictures, int64 (n,), or None for an unconditional model."""
    names = config["info"]["classes"]
    if config["cond"] != "class":
        if args.classes:
            fail("this model is unconditional: it takes no --classes")
        return None
    try:
        asked = [int(c) for c in args.classes.split(",")] if args.classes else range(len(names))
    except ValueError:
        fail(f"--classes takes numbers, like 3,5, not {args.classes!r}")
    if any(not 0 <= c < len(names) for c in asked):
        fail(f"--classes must lie in 0..{len(names) - 1}: " + ", ".join(f"{i} {name}" for i, name in enumerate(names[:30])))
    return torch.tensor([asked[i % len(asked)] for i in range(args.n)])


def main():
    args = parse(sys.argv[1:])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = diffusion.pick_device(args.device)
    except ValueError as e:
        fail(e)
    if world > 1:
        dist.init_process_group("gloo")                                 # only finished pictures travel
    path = args.ckpt or newest_run()
    net, config = load(path, args.weights, device)
    if args.score and not (config["data"] in ("shapes", "shapes64") and config["cond"] == "class"):
        fail(f"--score reads the pictures of class-conditional models of shapes; this one is of {config['data']}, "
             f"condition {config['cond']}")
    if args.cfg not in (None, 1) and (config["cond"] == "none" or config["drop"] == 0):
        fail("--cfg needs a model trained with and without its condition; this one was not"
             + ("; `python train.py --init-from` trains it so" if config["cond"] != "none" else ""))
    for name, key in dict(sampler="sampler", steps="sample_steps", cfg="cfg", clip="clip").items():
        if getattr(args, name) is None:
            setattr(args, name, config[key])
    y, size = classes_of(args, config), config["info"]["size"]
    schedule = diffusion.SCHEDULES[config["schedule"]]
    out = Path(args.out)
    try:                                                                # now, not after an hour of drawing
        (out.parent if out.suffix == ".png" else out).mkdir(parents=True, exist_ok=True)
        Path(args.npz or ".").parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png" and out.is_dir() or args.npz and Path(args.npz).is_dir():
            fail("a sheet or an .npz is a file, and there is a folder of that name: choose another --out or --npz")
        if out.suffix != ".png" and any(out.iterdir()):
            fail(f"the folder {out} is not empty: choose another --out, so that nothing is overwritten")
    except OSError as e:
        fail(f"cannot write there: {e}")
    if world > 1:
        dist.barrier()                                                  # all have looked, before one writes

    # fixed blocks of `batch` pictures, each on one rank: what is in a block does not depend on the number of ranks
    blocks = range(0, args.n, args.batch)
    drawn = {}
    with diffusion.autocast(device, args.dtype):
        for first in tqdm(blocks[rank::world], disable=rank > 0, unit="block"):
            ids = range(first, min(first + args.batch, args.n))
            cond = () if y is None else (y[first:ids.stop].to(device),)
            null = tuple(torch.full_like(c, len(config["info"]["classes"])) for c in cond)
            noise = diffusion.ImageNoise(data.image_seeds(args.seed, ids), (3, size, size), device)
            denoise = diffusion.denoiser(net, schedule, config["prediction"], cond, null, args.cfg, args.clip)
            x = diffusion.sample(denoise, noise, schedule, args.sampler, args.steps)
            drawn[first] = data.to_uint8(x).cpu().numpy()
            if out.suffix != ".png":
                for i, picture in zip(ids, drawn[first]):
                    Image.fromarray(picture.transpose(1, 2, 0)).save(out / f"{i:06d}.png")
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(drawn, parts)
        dist.destroy_process_group()
        if rank > 0:
            return
        drawn = {first: block for part in parts for first, block in part.items()}
    pictures = np.concatenate([drawn[first] for first in blocks])      # (n, 3, S, S) uint8

    if out.suffix == ".png":
        columns = min(16, max(1, round(args.n ** 0.5)))
        sheet = data.grid(pictures[:1024], columns)                     # more would be no picture to look at
        data.write_file(out, lambda f: sheet.save(f, "png"))
    if args.npz:
        labels = {} if y is None else dict(arr_1=y.numpy())
        data.write_file(args.npz, lambda f: np.savez(f, arr_0=pictures.transpose(0, 2, 3, 1), **labels))
    print(f"{args.n} pictures from {path}: {out}" + (f", {args.npz}" if args.npz else ""))
    if args.score:
        score = data.score_shapes(pictures, y.numpy())
        print(f"of {args.n} pictures, {score['both']:.1f}% show the asked shape and colour "
              f"(shape {score['shape']:.1f}%, colour {score['colour']:.1f}%); {args.sampler} {args.steps}, guidance {args.cfg}")


if __name__ == "__main__":
    data.run(main)
