"""A second opinion on drawn shapes: a small convnet that has only ever seen real ones.

    python sample.py --n 480 --npz samples.npz
    python tests/judge.py samples.npz

It shares nothing with the scorer of data.py, so where both agree that a sample shows its class, it does.
Trains in about a minute and a half on one CPU core. Each run trains it anew and first shows how well it reads real
pictures.
"""
import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data


def convnet(classes=24):
    """uint8 pictures, scaled to [-1, 1], of any size -> logits (B, classes)."""
    def layer(a, b, stride):
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

    return nn.Sequential(layer(3, 24, 1), layer(24, 48, 2), layer(48, 96, 2), layer(96, 96, 1),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, classes))


def to_float(pictures):
    return torch.as_tensor(pictures).float() / 127.5 - 1


def augment(x):
    """Brighter or darker, a little blurred, a little noisy: samples are too, and must not fail for it."""
    shift, blur, noise = (torch.rand(len(x), 1, 1, 1) for _ in range(3))
    x = x + 0.3 * (shift - 0.5)                                         # at most 19 grey levels
    x = x.lerp(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1), 0.7 * blur)
    return x + 0.15 * noise * torch.randn_like(x)                       # a deviation of at most 19 grey levels


def train_judge(size=32, epochs=3, batch=64, seed=0):
    """A convnet in eval mode that names the class of a picture, trained on the 20,000 pictures of the shapes set."""
    torch.manual_seed(seed)
    pictures, labels = data.draw_shapes(np.arange(data.SHAPE_COUNT), size)
    net, labels = convnet(), torch.from_numpy(labels)
    order = torch.cat([torch.randperm(len(labels)) for _ in range(epochs)]).split(batch)
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=5e-3, total_steps=len(order))
    for rows in tqdm(order, desc="the judge looks at real pictures", disable=None):
        loss = F.cross_entropy(net(augment(to_float(pictures[rows.numpy()]))), labels[rows])
        opt.zero_grad()
        loss.backward()
        opt.step()
        plan.step()
    return net.eval()


@torch.no_grad()
def judge(net, pictures, labels):
    """uint8 (N, 3, S, S) and the classes asked, (N,) -> percent read as asked: dict(shape=, colour=, both=)."""
    seen = torch.cat([net(to_float(part)).argmax(dim=1) for part in np.array_split(pictures, len(pictures) // 500 + 1)])
    labels = torch.as_tensor(labels)
    right = dict(shape=seen % 4 == labels % 4, colour=seen // 4 == labels // 4, both=seen == labels)
    return {what: 100 * hit.float().mean().item() for what, hit in right.items()}


def held_out(size, n=2000):
    """Real pictures that no training has seen, and their classes."""
    return data.draw_shapes(np.arange(data.SHAPE_COUNT, data.SHAPE_COUNT + n), size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("npz", help="what `python sample.py --npz` writes")
    path = parser.parse_args().npz
    try:
        with np.load(path) as arrays:
            pictures, labels = arrays["arr_0"].transpose(0, 3, 1, 2), arrays["arr_1"].astype(np.int64, casting="safe")
        if len(pictures) != len(labels):
            raise ValueError
    except (EOFError, OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        raise data.UserError(f"cannot read {path} as pictures with classes, as `python sample.py --npz` writes them")
    size = pictures.shape[-1]
    net = train_judge(size)
    for what, asked in {"held-out real pictures": held_out(size), path: (pictures, labels)}.items():
        score = judge(net, *asked)
        print(f"{what}: {score['both']:.1f}% read as asked "
              f"(shape {score['shape']:.1f}%, colour {score['colour']:.1f}%)")


if __name__ == "__main__":
    data.run(main)
