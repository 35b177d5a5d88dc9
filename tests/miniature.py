"""The paper in miniature: its claims, put to small tests on drawn shapes. A script: hours in all, on two cores.

    python tests/miniature.py                     all missing runs but those of large, one on each core; then the tables
    python tests/miniature.py head-ffn text       some of the experiments
    python tests/miniature.py --tables            no runs, only tables and figures of those that are finished
    python tests/miniature.py large --jobs 4      head and FFN again, at 64 pixels: needs a GPU, and runs only if named

A run is a command of train.py and lies in runs/miniature/; if killed, it goes on where it was. All runs of an
experiment spend equal numbers of floating-point operations on training (a step counts as three forwards), so a larger
network takes fewer steps. They are compared by the loss on pictures that no training has seen, and by data.py's scores
of samples. The tables go into README.md, between the comments that name them, and the figures into assets/.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import diffusion
import sample
import train

# ---- what is tried -----------------------------------------------------------------------------------------

TERAFLOPS = 10          # of training per run: one to eleven minutes on one busy core
LARGE = 5000            # the same for the experiment "large": minutes on a GPU
FOLDER = ROOT / "runs" / "miniature"
LONG_RUN = ROOT / "runs" / "unet-shapes" / "ckpt.pt"        # of `python train.py`, for the experiments with sampling


def net(**changes):
    return ["--net", json.dumps(changes)]


# as in the other presets, so that losses are comparable: of v, and at the same times
TIMES = ["--time-shift", str(train.LAPTOP["time_shift"]), "--time-spread", str(train.LAPTOP["time_spread"])]
ASCEND = ["--preset", "ascend-shapes", "--prediction", train.LAPTOP["prediction"], *TIMES]
TEXT = ["--preset", "iuvit-shapes-text", *TIMES]
PATCHES_256 = ["--preset", "iuvit-emoji64", "--data", "shapes64", "--cond", "class", "--batch", "64"]

# name of a run -> flags of train.py. Experiments may share a run
RUNS = {
    "unet":             ["--preset", "unet-shapes"],
    "uvit":             ["--preset", "uvit-shapes"],
    "iuvit":            ["--preset", "iuvit-shapes"],
    "ascend":           ASCEND,

    "iuvit-linear":     ["--preset", "iuvit-shapes", *net(head="linear")],
    "iuvit-mlp":        ["--preset", "iuvit-shapes", *net(ffn="mlp")],
    "iuvit-linear-mlp": ["--preset", "iuvit-shapes", *net(head="linear", ffn="mlp")],

    "text-separate":    TEXT,
    "text-concat":      [*TEXT, *net(text_attn="concat")],

    "ascend-swin-swin": [*ASCEND, *net(decoder="swin")],
    "ascend-conv-swin": [*ASCEND, *net(encoder="conv", decoder="swin")],
    "ascend-no-skips":  [*ASCEND, *net(skips=False)],
    "ascend-merge":     [*ASCEND, *net(resample="merge")],

    "unet-eps":         ["--preset", "unet-shapes", "--prediction", "eps"],
    "unet-linear":      ["--preset", "unet-shapes", "--schedule", "linear"],
    "unet-eps-linear":  ["--preset", "unet-shapes", "--prediction", "eps", "--schedule", "linear"],

    "iuvit-wide":       ["--preset", "iuvit-shapes", *net(dim=192)],
    "iuvit-p8":         ["--preset", "iuvit-shapes", *net(patch_size=8, dim=192)],
    "iuvit-p8-wide":    ["--preset", "iuvit-shapes", *net(patch_size=8, dim=384, heads=6)],

    "large":            PATCHES_256,
    "large-linear":     [*PATCHES_256, *net(head="linear")],
    "large-mlp":        [*PATCHES_256, *net(ffn="mlp")],
    "large-linear-mlp": [*PATCHES_256, *net(head="linear", ffn="mlp")],
}

# name of an experiment -> number of seeds, {what a row is called: its run}
EXPERIMENTS = {
    "head-ffn": (3, {"rearrange first, depth-wise (the paper's)": "iuvit", "linear first, depth-wise": "iuvit-linear",
                     "rearrange first, plain MLP": "iuvit-mlp", "linear first, plain MLP": "iuvit-linear-mlp"}),
    "backbones": (3, {"U-Net": "unet", "U-ViT": "uvit", "IU-ViT": "iuvit", "ASCEND": "ascend"}),
    "text": (3, {"separate (the paper's)": "text-separate", "concatenated": "text-concat"}),
    "ascend": (3, {"Swin encoder, conv decoder (the paper's)": "ascend",
                   "conv encoder, conv decoder: a U-Net": "unet",
                   "Swin encoder, Swin decoder": "ascend-swin-swin", "conv encoder, Swin decoder": "ascend-conv-swin",
                   "without skips": "ascend-no-skips", "patch merging and expanding": "ascend-merge"}),
    "prediction": (3, {"v, cosine": "unet", "v, linear": "unet-linear", "eps, cosine": "unet-eps",
                       "eps, linear (the paper's)": "unet-eps-linear"}),
    "patch": (3, {"patch 4, width 96": "iuvit", "patch 4, width 192": "iuvit-wide",
                  "patch 8, width 192": "iuvit-p8", "patch 8, width 384": "iuvit-p8-wide"}),
    "large": (1, {"rearrange first, depth-wise (the paper's)": "large", "linear first, depth-wise": "large-linear",
                  "rearrange first, plain MLP": "large-mlp", "linear first, plain MLP": "large-linear-mlp"}),
}

# sampling from LONG_RUN: name of an experiment -> {what a row is called: flags of sample.py}
SAMPLING = {
    "samplers": {f"{sampler} {steps}": ["--sampler", sampler, "--steps", steps, "--cfg", 1]
                 for sampler, counts in dict(dpm=(5, 10, 20, 50), ddim=(5, 10, 20, 50),
                                             em=(20, 50, 100, 200, 1000)).items() for steps in counts},
    "guidance": {f"guidance {scale}": ["--cfg", scale] for scale in (1, 2, 4)},
}
ROWS = dict(dpm="DPM-Solver++ (`dpm`)", ddim="DDIM (`ddim`)", em="Euler-Maruyama (`em`)",
            guidance="Euler-Maruyama in 200 steps")
COLUMNS = dict(samplers="evaluations of the network", guidance="guidance scale")
SHOWN, SCORED = 10, 96                                      # samples in a figure, and in the score of a run of minutes
SCORED_LONG = 480                                           # of the long run, of which little is wrong: finer


# ---- one run -------------------------------------------------------------------------------------------------

def command(run, seed):
    """The command line of a run, and the facts of its row."""
    config, _, _ = train.parse(RUNS[run])
    info = data.describe(data.text_set(config.data) if config.cond == "text" else config.data, config.data_dir)
    params, flops = train.measure(config, info, tokens=16)  # as captions of shapes have, with padding
    steps = round((LARGE if run.startswith("large") else TERAFLOPS) * 1e12 / (3 * flops * config.batch))
    argv = [*RUNS[run], "--seed", seed, "--steps", steps, "--out", FOLDER / f"{run}-{seed}",
            "--samples", SHOWN, "--sampler", "dpm", "--sample-steps", 20, "--cfg", 2,
            "--sample-every", -(-steps // 4)]               # four sheets, the last at the end
    return list(map(str, argv)), dict(params=params, steps=steps)


def held_out(config, n=512):
    """Pictures that no training has seen, float (n, 3, S, S), and their conditions, as a network takes them."""
    index, size = range(data.SHAPE_COUNT, data.SHAPE_COUNT + n), config["info"]["size"]
    if config["cond"] == "class":
        pictures, labels = data.draw_shapes(np.array(index), size)
        cond = (torch.from_numpy(labels),)
    else:
        scenes = [data.draw_scene(i) for i in index]
        pictures = np.stack([data.paint(grey, objects, size) for grey, objects, _ in scenes])
        features, mask = data.pad(data.encode(data.Words(), [caption for *_, caption in scenes]))
        cond = (features.float(), mask)
    return torch.from_numpy(pictures).float() / 127.5 - 1, cond


@torch.no_grad()
def losses_of(network, config):
    """The mean loss in each quarter of t, on held-out pictures with the same noise for all."""
    x0, cond = held_out(config)
    t = (torch.arange(len(x0)) + 0.5) / len(x0)
    t = t[torch.randperm(len(x0), generator=torch.Generator().manual_seed(0))]    # t must not follow from the number
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    schedule = diffusion.SCHEDULES[config["schedule"]]
    parts = [diffusion.loss(network, *(p[i:i + 64] for p in (x0, t, eps)), schedule, config["prediction"],
                            [c[i:i + 64] for c in cond]) for i in range(0, len(x0), 64)]
    return [torch.cat(parts)[(t * 4).long() == quarter].mean().item() for quarter in range(4)]


def score_of(file):
    """What `sample.py --npz` wrote -> {kind of picture: percent}."""
    with np.load(file) as arrays:
        pictures, asked = arrays["arr_0"].transpose(0, 3, 1, 2), arrays["arr_1"]
    if asked.dtype.kind == "i":
        score = data.score_shapes(pictures, asked)
        return {key: score[key] for key in ("both", "colour")}
    _, kinds = data.asked_scenes(len(asked))
    scores = {kind: data.score_captions(*zip(*[(p, a) for p, a, k in zip(pictures, asked, kinds) if k == kind]))
              for kind in dict.fromkeys(kinds)}
    return {f"{kind}: {key}": score[key] for kind, score in scores.items() for key in ("all", "colour", "shape")}


def call(script, *argv):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise data.UserError(f"{script}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")


def train_and_judge(run, seed):
    """Train, sample, score: writes result.json into the run's folder."""
    argv, facts = command(run, seed)
    out = FOLDER / f"{run}-{seed}"
    if not (out / "ckpt.pt").exists() or data.read_dict(out / "ckpt.pt")["step"] < facts["steps"]:
        call("train.py", *argv)
    network, config = sample.load(out / "ckpt.pt")
    facts["minutes"] = data.read_dict(out / "ckpt.pt")["seconds"] / 60
    facts["loss"] = losses_of(network, config)
    call("sample.py", "--ckpt", out / "ckpt.pt", "--n", SCORED, "--score", "--npz", out / "samples.npz", "--out",
         out / "samples.png")                               # --score: for text, it asks for unseen scenes
    facts["score"] = score_of(out / "samples.npz")
    data.write_file(out / "result.json", lambda f: f.write(json.dumps(facts, indent=1).encode()))


def draw_and_judge(name, label):
    """Sample from the long run and score: writes a .json into the folder of runs."""
    file = FOLDER / f"{name}-{label}"
    call("sample.py", "--ckpt", LONG_RUN, "--n", SCORED_LONG, *SAMPLING[name][label], "--npz", f"{file}.npz", "--out",
         f"{file}.png")
    facts = dict(score=score_of(f"{file}.npz"))
    data.write_file(Path(f"{file}.json"), lambda f: f.write(json.dumps(facts, indent=1).encode()))


# ---- tables and figures ----------------------------------------------------------------------------------------

def read(file):
    return json.loads(file.read_text()) if file.exists() else None


def mean(numbers, form="{:.1f}"):
    """Mean and standard deviation over seeds, as text."""
    spread = f" ± {form.format(np.std(numbers, ddof=1))}" if len(numbers) > 1 else ""
    return form.format(np.mean(numbers)) + spread


def results(rows, seeds):
    """{row: [result of each finished seed]} for the rows that have any."""
    found = {row: [read(FOLDER / f"{run}-{seed}" / "result.json") for seed in range(seeds)]
             for row, run in rows.items()}
    return {row: [result for result in each if result] for row, each in found.items() if any(each)}


def table(name):
    """Markdown, a list of lines; empty if nothing is finished."""
    if name in SAMPLING:                                    # labels that differ only in their last number share a row
        found = {}
        for label in SAMPLING[name]:
            if result := read(FOLDER / f"{name}-{label}.json"):
                row, number = label.rsplit(" ", 1)
                found.setdefault(ROWS[row], {})[number] = f"{result['score']['both']:.1f}"
        numbers = sorted({number for cells in found.values() for number in cells}, key=int)
        lines = [f"| {row} | " + " | ".join(cells.get(n, "") for n in numbers) + " |" for row, cells in found.items()]
        head = f"| shape and colour as asked, %, by {COLUMNS[name]} | " + " | ".join(numbers) + " |"
        return [head, "|" + "---|" * (len(numbers) + 1), *lines] if lines else []
    seeds, rows = EXPERIMENTS[name]
    found = results(rows, seeds)
    if not found:
        return []
    titles = {"both": "shape and colour right, %", "colour": "colour, %", "one object: all": "one object: all right, %",
              "one object: colour": "its colour", "one object: shape": "its shape",
              "two objects: all": "two objects: all right, %", "held-out: all": "held-out: all right, %"}
    keys = [key for key in titles if key in next(iter(found.values()))[0]["score"]]
    head = ["", "parameters", "steps", "minutes", "loss: t < ¼", "¼ – ½", "½ – ¾", "¾ – 1",
            *(titles[key] for key in keys)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, each in found.items():
        minutes = np.mean([r["minutes"] for r in each])
        row += f" ({len(each)} of {seeds} seeds)" if len(each) < seeds else ""
        cells = [row, f"{each[0]['params'] / 1e6:.1f}M", f"{each[0]['steps']:,}", f"{minutes:.1f}",
                 *(mean([r["loss"][q] for r in each], "{:.4f}") for q in range(4)),
                 *(mean([r["score"][key] for r in each]) for key in keys)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def figure(name):
    """For each row: samples of its first seed, all from the same noise, and the loss of every seed as a dot."""
    seeds, rows = EXPERIMENTS[name]
    found = results(rows, seeds)
    if not found:
        return
    strips = {}
    for row in found:
        files = [FOLDER / f"{rows[row]}-{seed}" / "samples.npz" for seed in range(seeds)]
        pictures = np.load(next(filter(Path.exists, files)))["arr_0"][:SHOWN].transpose(0, 3, 1, 2)
        strips[row] = data.grid(pictures, SHOWN)
    left = 16 + round(max(ImageFont.load_default().getlength(row) for row in found))
    W, H, right = strips[row].width - 2, strips[row].height + 2, 260
    sheet = Image.new("RGB", (left + W + right, H * len(found) + 26), "white")
    draw = ImageDraw.Draw(sheet)
    # the loss at 1/4 < t < 3/4, where outlines are decided, on a logarithmic axis
    losses = {row: [np.mean(r["loss"][1:3]) for r in each] for row, each in found.items()}
    every = np.concatenate(list(losses.values()))
    low, high = np.log(every.min() * 0.9), np.log(every.max() * 1.1)
    for i, (row, values) in enumerate(losses.items()):
        y = i * H
        middle = y + H // 2 - 1
        draw.text((4, middle - 6), row, "black")
        sheet.paste(strips[row], (left - 2, y))
        draw.line((left + W + 10, middle, left + W + right - 10, middle), (220, 220, 220))
        for value in values:
            x = left + W + 20 + (right - 40) * (np.log(value) - low) / (high - low)
            draw.ellipse((x - 4, middle - 4, x + 4, middle + 4), (210, 90, 30))
    for value in (every.min(), every.max()):
        x = left + W + 20 + (right - 40) * (np.log(value) - low) / (high - low)
        draw.text((x - 15, H * len(found) + 2), f"{value:.3f}", "black")
    draw.text((left + W + 75, H * len(found) + 14), "loss at 1/4 < t < 3/4", "black")
    sheet.save(ROOT / "assets" / f"miniature-{name}.png")


def side_by_side(strips, name):
    """Draw into assets/ how four pictures of each run change in training, from {title: progress.png}, if all exist."""
    if not all(file.exists() for file in strips.values()):
        return
    strips = {title: Image.open(file).convert("RGB") for title, file in strips.items()}
    width = 4 * 34 + 2
    sheet = Image.new("RGB", ((width + 14) * len(strips), 16 + max(strip.height for strip in strips.values())), "white")
    for i, (title, strip) in enumerate(strips.items()):
        ImageDraw.Draw(sheet).text((i * (width + 14) + 2, 2), title, "black")
        sheet.paste(strip.crop((0, 0, width, strip.height)), (i * (width + 14), 16))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.NEAREST).save(ROOT / "assets" / f"{name}.png")


def write_tables():
    """Put every table that has rows between its comments in README.md, and draw its figure."""
    file = ROOT / "README.md"
    text = file.read_text()
    for name in [*EXPERIMENTS, *SAMPLING]:
        lines, comments = table(name), rf"(<!-- miniature {name} -->\n).*?(<!-- end -->)"
        if not lines:
            continue
        print("", f"{name}:", *lines, sep="\n")
        if name in EXPERIMENTS:
            figure(name)
            lines = [f"![Samples of one seed, losses of all](assets/miniature-{name}.png)", "",
                     "<details>", "<summary>The numbers</summary>", "", *lines, "", "</details>"]
        text = re.sub(comments, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.DOTALL)
    data.write_file(file, lambda f: f.write(text.encode()))
    side_by_side({net.__name__: ROOT / "runs" / f"{model}-shapes" / "samples" / "progress.png"
                  for model, net in train.MODELS.items()}, "progress")
    side_by_side({row: FOLDER / f"{run}-0" / "samples" / "progress.png"
                  for row, run in EXPERIMENTS["patch"][1].items()}, "miniature-patch-progress")


# ---- the command -------------------------------------------------------------------------------------------------

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("names", nargs="*", help="of experiments: " + ", ".join([*EXPERIMENTS, *SAMPLING]))
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time: on a CPU each has one core")
    p.add_argument("--tables", action="store_true", help="only write tables and figures")
    p.add_argument("--do", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if unknown := [name for name in args.names if name not in {**EXPERIMENTS, **SAMPLING}]:
        raise data.UserError(f"no experiment {unknown[0]!r}; there are: {', '.join([*EXPERIMENTS, *SAMPLING])}")
    if args.do:
        name, which = args.do
        return train_and_judge(name, int(which)) if name in RUNS else draw_and_judge(name, which)

    # the jobs, in the order of the experiments, each in a process of its own
    names, todo = args.names or [name for name in [*EXPERIMENTS, *SAMPLING] if name != "large"], {}
    for name in [] if args.tables else names:
        if name in SAMPLING:
            if not LONG_RUN.exists():
                raise data.UserError(f"the experiments with sampling draw from {LONG_RUN}: run `python train.py` first")
            todo.update({(name, label): FOLDER / f"{name}-{label}.json" for label in SAMPLING[name]})
        else:
            seeds, rows = EXPERIMENTS[name]
            todo.update({(run, str(seed)): FOLDER / f"{run}-{seed}" / "result.json"
                         for seed in range(seeds) for run in rows.values()})
    todo = [job for job, file in todo.items() if not file.exists()]
    FOLDER.mkdir(parents=True, exist_ok=True)

    def work(job):
        env = {**os.environ, "OMP_NUM_THREADS": "1"} if args.jobs > 1 else None
        done = subprocess.run([sys.executable, __file__, "--do", *job], cwd=ROOT, env=env, capture_output=True,
                              text=True)
        print(*job, "done" if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    write_tables()


if __name__ == "__main__":
    data.run(main)
