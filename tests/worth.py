"""What a word of the condition is worth to a network: how much its loss rises if that word is wrong.

    python tests/worth.py runs/unet-shapes/ckpt.pt
    python train.py --model iuvit --cond text --keep-every 1000
    python tests/worth.py runs/iuvit-shapes-text/ckpt_*.pt --t 0.9

For networks that were trained on drawn shapes. They see new pictures (numbers from 20,000 on) under noise, first with
the right condition and then, all else equal, with a wrong one. If the loss stays the same, the network does not read
that word, and samples get it right only by chance. The loss shows sooner and more finely than samples what is learnt.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import diffusion
import sample


def other(value, values, i):
    """One of the other values, in turn."""
    values = [v for v in values if v != value]
    return values[i % len(values)]


def wrong_classes(labels):
    """Classes (N,) -> {what is wrong: classes (N,)}"""
    colour, shape, turn = labels // 4, labels % 4, np.arange(len(labels))
    return {"another colour": (colour + 1 + turn % 5) % 6 * 4 + shape,
            "another shape": colour * 4 + (shape + 1 + turn % 3) % 4}


def wrong_captions(captions):
    """Captions like draw_scene's, all with one object or all with two -> {what is wrong: captions}."""
    relations = list(data.RELATIONS)

    def opposite(relation):
        return relations[relations.index(relation) ^ 1]

    def parts(caption):
        return list(data.CAPTION_FORM.fullmatch(caption).groups())

    def text(size, colour, shape, place, relation, *second):
        first = f"a {size} {colour} {shape}"
        return f"{first} {place}" if place else f"{first} {relation} a {' '.join(second)}"

    def change(edit):
        return [text(*edit(parts(caption), i)) for i, caption in enumerate(captions)]

    def replace(k, values):
        return change(lambda p, i: [*p[:k], other(p[k], values, i), *p[k + 1:]])

    def exchange(k):                                    # swap a word of the first thing with the second's
        return change(lambda p, i: [p[k + 5] if j == k else p[k] if j == k + 5 else v for j, v in enumerate(p)])

    if parts(captions[0])[4] is None:
        return {"another size": replace(0, data.SIDES), "another colour": replace(1, data.PALETTE),
                "another shape": replace(2, data.SHAPES), "another place": replace(3, data.PLACES)}
    return {"sizes exchanged": exchange(0), "colours exchanged": exchange(1), "shapes exchanged": exchange(2),
            "opposite relation": change(lambda p, i: [*p[:4], opposite(p[4]), *p[5:]])}


def scenes(n, objects):
    """n new scenes of the caption task with one object, or with two of which size, colour and shape all differ."""
    found, number = [], data.SHAPE_COUNT
    while len(found) < n:
        scene, number = data.draw_scene(number), number + 1
        words = data.CAPTION_FORM.fullmatch(scene[2]).groups()
        if (words[4] is None) == (objects == 1) and not any(a == b for a, b in zip(words[:3], words[5:])):
            found.append(scene)
    return found


def questions(config, n):
    """[(what is shown, pictures uint8 (N, 3, S, S), the right condition, {what is wrong: condition})]"""
    size = config["info"]["size"]
    if config["data"] not in data.SCORED or config["cond"] == "none":
        sample.fail("this reads networks with a condition that were trained on shapes or shapes64")
    if config["cond"] == "class":
        pictures, labels = data.draw_shapes(np.arange(data.SHAPE_COUNT, data.SHAPE_COUNT + n), size)
        return [("one object", pictures, labels, wrong_classes(labels))]
    asked = []
    for kind, objects in {"one object": 1, "two objects": 2}.items():
        drawn = scenes(n, objects)
        captions = [caption for *_, caption in drawn]
        asked.append((kind, np.stack([data.paint(grey, things, size) for grey, things, _ in drawn]), captions,
                      wrong_captions(captions)))
    return asked


@torch.no_grad()
def mean_loss(net, config, pictures, asked, times):
    """The loss with this condition, classes (N,) or N captions. Noise and times are the same in every call."""
    g = torch.Generator().manual_seed(0)
    x0 = torch.from_numpy(pictures).float() / 127.5 - 1
    eps = torch.randn(x0.shape, generator=g)
    t = torch.linspace(*times, len(x0))[torch.randperm(len(x0), generator=g)]
    if config["cond"] == "text":
        rows = data.encode(data.load_encoder(config["encoder"]), asked)
    losses = []
    for part in torch.arange(len(x0)).split(64):
        if config["cond"] == "class":
            cond = [torch.from_numpy(asked[part.numpy()])]
        else:
            features, mask = data.pad([rows[i] for i in part])
            cond = [features.float(), mask]
        losses.append(diffusion.loss(net, x0[part], t[part], eps[part], diffusion.SCHEDULES[config["schedule"]],
                                     config["prediction"], cond))
    return torch.cat(losses).mean().item()


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("ckpt", nargs="+", help="checkpoints of train.py")
    p.add_argument("--n", type=int, default=512, help="pictures of each kind")
    p.add_argument("--t", type=float, nargs="+", default=[0.2, 0.9], help="a time, or the first and the last of a span")
    args = p.parse_args()
    if args.n < 1 or len(args.t) > 2 or not all(0 <= t < 1 for t in args.t):
        sample.fail("--n is at least 1, --t one or two times from 0 to below 1")
    for path in args.ckpt:
        net, config = sample.load(path)
        asked = questions(config, args.n)
        print(f"{path}, step {data.read_dict(path)['step']:,}: {config['prediction']}, {args.n} pictures, t from "
              f"{args.t[0]} to {args.t[-1]}")
        for kind, pictures, right, wrong in asked:
            loss = mean_loss(net, config, pictures, right, (args.t[0], args.t[-1]))
            print(f"    {kind:20} {loss:.4f}")
            for what, instead in wrong.items():
                risen = mean_loss(net, config, pictures, instead, (args.t[0], args.t[-1]))
                print(f"    {what:>20} {risen - loss:+.4f}   x {risen / loss:.2f}")


if __name__ == "__main__":
    data.run(main)
