"""How fast the presets train and sample here: a script that prints, not a test.

    python tests/bench.py                                  the four laptop presets
    python tests/bench.py iuvit-church256 --batch 32       one preset, the batch of one process
    python tests/bench.py all                              every preset, with an eighth of its batch: one GPU of eight
    python tests/bench.py --grow                           images/s against width, resolution, patch and processes

One row is one process, so that its peak memory is its own. A training step is train.py's: loss, backward, clipping,
fused AdamW, average. Sampling is one evaluation of the network per picture, without guidance. "of peak" compares the
operations of a training step (three forwards' worth) with a large matrix product of the same precision in the same run.
"""
import argparse
import copy
import csv
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch

import data
import diffusion
import sample
import train

MODES = ["eager", "compiled", "grad-ckpt"]


def seconds_of(f, device, at_least):
    """The mean time of a call, over as many calls as take about `at_least` seconds, after four to warm up."""
    def seconds(calls):
        start = time.perf_counter()
        for _ in range(calls):
            f()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()   # once, at the end: as in training, Python runs ahead of the GPU
        return time.perf_counter() - start

    seconds(2)
    calls = max(1, round(at_least / min(seconds(1), seconds(1))))
    return seconds(calls) / calls


def peak_flops(device, dtype, at_least):
    """Multiplications and additions per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, device, at_least)


def measure_row(preset, argv, batch, dtype, mode, at_least):
    """One row of the table, as a dict."""
    config, _, _ = train.parse(["--preset", preset, *argv])
    info = data.describe(config.data, config.data_dir)
    params, flops = train.measure(config, info)
    device = sample.pick_device(config.device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    precision = sample.autocast(device, dtype)
    S = info["size"]
    net = sample.build(vars(config), info).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    opt = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    if mode == "grad-ckpt":
        train.checkpoint_blocks(net)
    model, sampler = net, ema
    if mode == "compiled":
        train.check_compiling(device, dtype)
        model, sampler = (sample.compile_network(each, graphs=True) for each in (net, ema))
    schedule = diffusion.SCHEDULES[config.schedule]
    with device:
        x, t, eps = torch.randn(batch, 3, S, S), torch.rand(batch), torch.randn(batch, 3, S, S)
        text = torch.randn(batch, data.MAX_TOKENS, config.net.get("text_dim", 1)), torch.ones(batch, data.MAX_TOKENS) > 0
        cond = {"none": (), "class": (torch.zeros(batch, dtype=torch.int64),), "text": text}[config.cond]

    def step():
        with precision:
            loss = diffusion.loss(model, x, t, eps, schedule, config.prediction, cond).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 0.001)

    def evaluate():
        with precision, torch.no_grad():
            sampler(x, t, *cond)

    step(), evaluate()                                  # these compile
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    training = seconds_of(step, device, at_least)
    memory = (torch.cuda.max_memory_reserved() if device.type == "cuda" else    # only this counts what CUDA graphs use
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    sampling = seconds_of(evaluate, device, at_least / 2)
    peak = peak_flops(device, torch.bfloat16 if dtype == "bfloat16" else torch.float32, at_least / 4)
    return dict(preset=preset, params=params, gflops=flops / 1e9, batch=batch, dtype=dtype, mode=mode, step=training,
                train=batch / training, sample=batch / sampling, memory=memory / 2**30,
                share=3 * flops * batch / training / peak, peak=peak / 1e12)


def row(*args):
    """measure_row in a process of its own: a dict, or the last line of its error."""
    done = subprocess.run([sys.executable, __file__, "--row", json.dumps(args)], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.splitlines() or ["killed"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def print_table(presets, argv, batch, dtypes, modes, at_least):
    print(f"{'preset':24}{'params':>8}{'GFLOPs':>9}{'batch':>6}  {'precision':10}{'mode':11}"
          f"{'ms a step':>10}{'train img/s':>12}{'eval img/s':>12}{'of peak':>9}{'peak GiB':>9}")
    for preset in presets:
        laptop = train.PRESETS[preset]["data"] in data.NO_SOURCE
        size = batch or max(1, train.PRESETS[preset]["batch"] // (1 if laptop else 8))
        for dtype, mode in itertools.product(dtypes, modes):
            r = row(preset, argv, size, dtype, mode, at_least)
            if isinstance(r, str):
                print(f"{preset:24}{size:23}  {dtype:10}{mode:11} {r}", flush=True)
            else:
                print(f"{preset:24}{r['params'] / 1e6:7.1f}M{r['gflops']:9.2f}{size:6}  {dtype:10}{mode:11}"
                      f"{1000 * r['step']:10.1f}{r['train']:12.1f}{r['sample']:12.1f}{100 * r['share']:8.1f}%"
                      f"{r['memory']:9.2f}", flush=True)


def print_growth(batch, dtype, mode, at_least):
    """Images per second of an IU-ViT and a U-Net, as one thing at a time grows: on a CPU networks for laptops, on a GPU
    those of CIFAR-10; in more and more processes, unet-shapes on both."""
    if mode == "compiled":
        train.check_compiling(sample.pick_device("auto"), dtype)
    # presets, the middle width of each, and patches along a side of the pictures that grow
    vit, unet, vit_dim, unet_dim, grid = (("iuvit-cifar10", "unet-cifar10", 512, 128, 16) if torch.cuda.is_available()
                                          else ("iuvit-shapes", "unet-shapes", 192, 32, 8))

    def line(what, preset, argv):
        r = row(preset, argv, batch, dtype, mode, at_least)
        numbers = r if isinstance(r, str) else (f"{r['params'] / 1e6:8.2f}M{r['gflops']:9.3f} GFLOPs"
                                                f"{r['train']:9.1f} images/s")
        print(f"{preset:14}{what:28}{numbers}", flush=True)

    for dim in (vit_dim // 2, vit_dim, vit_dim * 2):
        line(f"width {dim}", vit, ["--net", json.dumps(dict(dim=dim, heads=dim // 64 or 1))])
    for patch in (8, 4, 2):
        line(f"patch {patch}, {(32 // patch)**2} tokens", vit,
             ["--net", json.dumps(dict(patch_size=patch, dim=vit_dim))])
    for dim in (unet_dim // 2, unet_dim, unet_dim * 2):
        line(f"width {dim}", unet, ["--net", json.dumps(dict(dim=dim, head_dim=min(dim, 64)))])
    for name, size in (("shapes", 32), ("shapes64", 64), ("emoji128", 128)):
        line(f"{size} pixels", unet, ["--data", name, "--cond", "none"])
        patch = size // grid
        changes = json.dumps(dict(patch_size=patch, dim=32 * grid, heads=grid // 2))    # 16 * 16 numbers of a patch fit
        line(f"{size} pixels, patch {patch}", vit, ["--data", name, "--cond", "none", "--net", changes])
    for n in (1, 2, 4, 8)[:(torch.cuda.device_count() or os.cpu_count()).bit_length()]:
        speed = speed_of_processes(n, batch, dtype, mode, steps=max(20, round(20 * at_least)))
        print(f"{'unet-shapes':14}{f'{n} processes of one ' + ('GPU' if torch.cuda.is_available() else 'thread'):28}"
              f"{speed:37.1f} images/s", flush=True)


def speed_of_processes(n, batch, dtype, mode, steps):
    """Images per second of train.py under torchrun, `batch` pictures in each process, from its own log."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--"]
        flags = ["--preset", "unet-shapes", "--batch", batch * n, "--steps", steps, "--log-every", steps // 2,
                 "--dtype", dtype, "--sample-every", 10**6, "--sample-steps", 1, "--out", Path(folder, "run"),
                 "--data-dir", folder, "--compile" if mode == "compiled" else "--no-compile",
                 "--grad-ckpt" if mode == "grad-ckpt" else "--no-grad-ckpt"]
        subprocess.run([*launch, ROOT / "train.py", *map(str, flags)], check=True, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        with open(Path(folder, "run", "log.csv")) as f:
            return float(list(csv.DictReader(f))[-1]["images_per_s"])


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("presets", nargs="*", default=["unet-shapes", "uvit-shapes", "iuvit-shapes", "ascend-shapes"])
    p.add_argument("--batch", type=int, help="pictures of one process at a time")
    p.add_argument("--dtypes", default="float32,bfloat16")
    p.add_argument("--modes", default=",".join(MODES))
    p.add_argument("--net", help="changes to the network, as for train.py")
    p.add_argument("--seconds", type=float, default=8, help="to measure a row for")
    p.add_argument("--grow", action="store_true")
    p.add_argument("--row", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.row:
        print(json.dumps(measure_row(*json.loads(args.row))))
        return
    presets = list(train.PRESETS) if args.presets == ["all"] else args.presets
    dtypes, modes = args.dtypes.split(","), args.modes.split(",")
    for asked, known in (presets, train.PRESETS), (dtypes, ["float32", "bfloat16"]), (modes, MODES):
        if unknown := [name for name in asked if name not in known]:
            p.error(f"there is no {unknown[0]}; there are {', '.join(known)}")
    if args.batch is not None and args.batch < 1:
        p.error(f"--batch must be at least 1, not {args.batch}")
    if not args.seconds > 0:
        p.error(f"--seconds must be above 0, not {args.seconds}")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}")
    if args.grow:
        print_growth(args.batch or (128 if torch.cuda.is_available() else 16), dtypes[0], modes[0], args.seconds)
    else:
        print_table(presets, ["--net", args.net] if args.net else [], args.batch, dtypes, modes, args.seconds)


if __name__ == "__main__":
    data.run(main)
