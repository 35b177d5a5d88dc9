"""Whether this machine's GPU computes what its CPU does: a script that prints, not a test.

    python tests/gpu.py             all backbones, each compiled six times: minutes
    python tests/gpu.py iuvit

For a tiny network of every backbone with every condition, it prints how far its output, its whole gradient and the
gradient of its worst parameter are from the CPU's in float32, as |gpu - cpu| / |cpu|: in float32 (plain, with gradient
checkpointing, and compiled) and in bfloat16 (plain, and compiled). Then it prints how often sampling makes Python wait
for the GPU, as far as PyTorch's sync debug mode sees it. The exit code is 1 if output or gradient are off by more than
1e-4 in float32, or 0.05 in bfloat16, any one parameter's by more than 0.01 or 0.3, or a step of a sampler waits.
"""
import contextlib
import copy
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch

import data
import diffusion
import sample
import train
from test_models import MODELS, awake

CONDITIONS = dict(none={}, **{"class": dict(num_classes=5)}, text=dict(text_dim=24))


def run(f, net, batch, g, device, precision=contextlib.nullcontext()):
    """Output of f(*batch) and the gradients of net's parameters, on the CPU."""
    net.zero_grad()
    with precision:
        out = f(*[part.to(device) for part in batch])
    out.float().backward(g.to(device))
    return out.detach().float().cpu(), [p.grad.float().cpu() for p in net.parameters()]


def errors_of(found, truth):
    """Of the output, of the whole gradient, and of the worst parameter's. (One whose gradient should be zero, as that of
    a bias before a norm, has nothing to compare with: less than 1e-4 of the whole counts as that much.)"""
    (out, gradients), (true_out, true_gradients) = found, truth
    off = torch.stack([(a - b).norm() for a, b in zip(gradients, true_gradients)])
    size = torch.stack([b.norm() for b in true_gradients])
    return [float((out - true_out).norm() / true_out.norm()), float(off.norm() / size.norm()),
            float((off / size.clamp(min=1e-4 * size.norm())).max())]


def compare(model, condition, device):
    """{way: its errors_of}"""
    torch.manual_seed(0)
    net = awake(model, img_size=32, **CONDITIONS[condition])
    gpu, thrifty = (copy.deepcopy(net).to(device, memory_format=torch.channels_last) for _ in range(2))
    train.checkpoint_blocks(thrifty)
    x, t, g = torch.randn(4, 3, 32, 32), torch.rand(4), torch.randn(4, 3, 32, 32)
    y = {"none": (), "class": (torch.arange(4),),
         "text": (torch.randn(4, 7, 24), torch.arange(7) < torch.tensor([[7], [3], [2], [1]]))}[condition]
    batch, half = (x, t, *y), torch.autocast(device.type, torch.bfloat16)
    truth = run(net, net, batch, g, "cpu")
    ways = {"float32": run(gpu, gpu, batch, g, device), "checkpointed": run(thrifty, thrifty, batch, g, device),
            "compiled": run(torch.compile(gpu), gpu, batch, g, device),
            "bfloat16": run(gpu, gpu, batch, g, device, half),
            "compiled bfloat16": run(torch.compile(gpu), gpu, batch, g, device, half)}
    return {way: errors_of(found, truth) for way, found in ways.items()}


def waits(sampler, device):
    """How often Python waits for the GPU in 10 steps of a sampler."""
    net, schedule = awake("unet", img_size=32).to(device), diffusion.Cosine()
    noise = diffusion.ImageNoise(range(4), (3, 32, 32), device)
    denoise = diffusion.denoiser(net, schedule, "v")
    diffusion.sample(denoise, noise, schedule, sampler, 10)             # warm-up: some waits come only once
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        diffusion.sample(denoise, noise, schedule, sampler, 10)
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


def main():
    device = sample.pick_device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    good = True
    for model in sys.argv[1:] or MODELS:
        for condition in CONDITIONS:
            errors = compare(model, condition, device)
            for way, (out, gradient, worst) in errors.items():
                most, most_of_one = (0.05, 0.3) if "bfloat16" in way else (1e-4, 0.01)
                good &= max(out, gradient) < most and worst < most_of_one
            print(f"{model:8}{condition:7}", *(f"{way} {' '.join(f'{e:.0e}' for e in each)}"
                                               for way, each in errors.items()), sep="  ", flush=True)
    for sampler in diffusion.SAMPLERS:
        good &= not (n := waits(sampler, device))
        print(f"{sampler}: 10 steps wait {n} times for the GPU")
    print("good" if good else "NOT good")
    sys.exit(not good)


if __name__ == "__main__":
    data.run(main)
