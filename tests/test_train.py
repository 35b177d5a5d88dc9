"""train.py: what a run promises, from its flags to the folder it leaves, in networks that train in a second."""
import contextlib
import copy
import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import diffusion
import train
from conftest import ROOT, command, tiny


def flags_of(model, datasets, out, **net):
    """A tiny run of two steps; what is appended to it wins."""
    return [*tiny(model, **net), "--data-dir", datasets, "--out", out, "--steps", 2, "--log-every", 1, "--samples", 4]


@pytest.fixture
def trained(datasets, tmp_path, monkeypatch):
    """trained("--lr", 1) is `python train.py --lr 1` with a tiny network, in this process, in an empty folder: two
    steps into run/, unless told otherwise. Returns the checkpoint."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, model="uvit", out="run", **net):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*flags_of(model, datasets, out, **net), *flags])])
        train.main()
        return data.read_dict(Path(out, "ckpt.pt"))

    return run


@pytest.fixture(scope="session")
def photos(datasets, tmp_path_factory):
    """A set of one's own: eight pictures of 16 x 16, which are one batch, in two classes; training may mirror them."""
    src = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(data.draw_shapes(range(8), 16)[0]):
        folder = src / ("odd" if i % 2 else "even")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.png")
    data.prepare("photos", str(datasets), str(src), size=16)
    return "photos"


def wait_for(path, process, seconds=100):
    """Wait until a process has written a file, or has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not path.exists():
        assert time.monotonic() < deadline, f"no {path} in {seconds} seconds"
        time.sleep(0.01)


def column(name, out="run"):
    """One column of log.csv, as numbers."""
    with open(Path(out, "log.csv")) as f:
        return [float(row[name]) for row in csv.DictReader(f)]


def contents(out="run"):
    """Every file of a folder, to see that nothing in it changes."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(Path(out).rglob("*")) if path.is_file()}


def differences(a, b, at=""):
    """Where two checkpoints, or parts of them, are not equal to the last bit: {place: by how much}."""
    if isinstance(a, (dict, list)):
        assert type(a) is type(b) and len(a) == len(b), f"{at}: {len(a)} entries and {len(b)}"
        keys = a if isinstance(a, dict) else range(len(a))
        return {place: by for k in keys for place, by in differences(a[k], b[k], f"{at}/{k}").items()}
    if torch.is_tensor(a):
        return {} if torch.equal(a, b) else {at: (a - b).abs().max().item() if a.shape == b.shape else "another shape"}
    return {} if a == b else {at: (a, b)}


def state(ckpt):
    """What a run continues from: all but the clock and the flags."""
    return {key: ckpt[key] for key in ("model", "ema", "opt", "step")}


class Calls:
    """In place of a function: counts its calls, and does something else at the nth."""

    def __init__(self, function, at=None, instead=None):
        self.function, self.at, self.instead, self.count = function, at, instead, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return (self.instead if self.count == self.at else self.function)(*args, **kwargs)


# ---- it learns -------------------------------------------------------------------------------------------

def test_a_batch_of_eight_is_overfitted_to_a_tenth_of_the_initial_loss(trained, photos):
    trained("--data", photos, "--prediction", "eps", "--time-shift", 1, "--time-spread", 1, "--steps", 150,
            "--lr", 3e-3, "--beta2", 0.99,
            model="unet", dim_mults=[1, 1], attn_sizes=[])
    loss = column("loss")
    start, end = loss[0], sum(loss[-25:]) / 25
    assert end < start / 10, f"the loss fell from {start:.3f} to {end:.3f} only"


def test_accumulated_gradients_give_the_same_loss_and_have_the_same_norm(trained):
    """The norm as well, because AdamW hides a constant factor."""
    trained("--steps", 4, "--lr", 1e-2, out="whole")
    trained("--steps", 4, "--lr", 1e-2, "--accum", 4, out="parts")
    assert column("loss", "parts") == pytest.approx(column("loss", "whole"), rel=1e-4)
    assert column("grad_norm", "parts") == pytest.approx(column("grad_norm", "whole"), rel=1e-3)


@pytest.mark.parametrize("model", train.MODELS)
def test_checkpointed_gradients_are_the_same_gradients(trained, monkeypatch, model):
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", Calls(torch.utils.checkpoint.checkpoint))
    net = dict(dropout=0.1) if model in ("unet", "ascend") else {}
    usual = trained("--lr", 1e-2, model=model, out="usual", **net)
    twice = trained("--lr", 1e-2, "--grad-ckpt", model=model, out="twice", **net)
    assert differences(state(usual), state(twice)) == {}
    assert torch.utils.checkpoint.checkpoint.count == 2 * (2 if "vit" in model else 8)     # two steps of so many blocks


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(trained, monkeypatch):
    loss = diffusion.loss
    monkeypatch.setattr(diffusion, "loss", Calls(loss, at=2, instead=lambda *args: loss(*args) * math.nan))
    ckpt = trained("--steps", 3)
    assert column("skipped") == [0, 1, 1]
    assert all(p.isfinite().all() for p in [*ckpt["model"].values(), *ckpt["ema"].values()])
    assert {int(s["step"]) for s in ckpt["opt"]["state"].values()} == {2}       # AdamW has counted two steps, not three


def test_too_many_gradients_in_a_row_that_are_not_finite_end_the_run_and_keep_the_checkpoint(trained, monkeypatch):
    trained("--steps", 2)
    before, loss = Path("run/ckpt.pt").read_bytes(), diffusion.loss
    monkeypatch.setattr(train, "BAD_STEPS", 3)
    monkeypatch.setattr(diffusion, "loss", lambda *args: loss(*args) * math.nan)
    with pytest.raises(data.UserError, match="the last 3 gradients were not finite, up to step 5.*is of step 2"):
        trained("--steps", 10)
    assert Path("run/ckpt.pt").read_bytes() == before


def test_a_run_goes_on_in_which_every_second_gradient_is_not_finite(trained, monkeypatch):
    factors, loss = itertools.cycle([1, math.nan]), diffusion.loss
    monkeypatch.setattr(train, "BAD_STEPS", 2)
    monkeypatch.setattr(diffusion, "loss", lambda *args: loss(*args) * next(factors))
    assert trained("--steps", 6)["skipped"] == 3


def test_the_average_leaves_no_trace_for_a_gradient_and_drops_out_nothing(trained, monkeypatch):
    """Else the graph grew by a link a step and parameter, and with it the memory; and units dropped out of sheets."""
    copies, deepcopy = [], copy.deepcopy
    monkeypatch.setattr(train.copy, "deepcopy", lambda what: copies.append(deepcopy(what)) or copies[-1])
    trained()
    average, = (what for what in copies if isinstance(what, torch.nn.Module))
    assert not any(p.requires_grad for p in average.parameters())
    assert not any(module.training for module in average.modules())


def test_the_average_has_a_short_memory_while_the_run_is_young(trained):
    average = trained("--steps", 1, "--lr", 1e-30, out="start")["model"]        # a rate that moves nothing
    for step in range(4):
        ckpt = trained("--steps", step + 1, "--ema", 0.28)
        decay = min(0.28, (1 + step) / (10 + step))                             # 0.1, 0.18, 0.25, 0.28
        average = {k: decay * average[k] + (1 - decay) * ckpt["model"][k] for k in average}
        torch.testing.assert_close(ckpt["ema"], average, msg=lambda text: f"step {step}, decay {decay}: {text}")


def test_the_optimizer_has_the_betas_and_the_decay_that_were_asked_for(trained):
    group, = trained("--steps", 1, "--beta1", 0.7, "--beta2", 0.8, "--weight-decay", 0.6)["opt"]["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ((0.7, 0.8), 0.6)


def test_a_dropped_class_is_the_one_after_the_last(trained, monkeypatch):
    seen, loss = [], diffusion.loss
    monkeypatch.setattr(diffusion, "loss", lambda *args: seen.append(args[-1][0].tolist()) or loss(*args))
    trained("--steps", 1, "--drop", 0.999)
    assert seen == [[24] * 8]


def test_each_picture_loses_its_class_as_often_as_asked_and_on_its_own(trained, monkeypatch):
    seen, loss = [], diffusion.loss
    monkeypatch.setattr(diffusion, "loss", lambda *args: seen.append(args[-1][0].tolist()) or loss(*args))
    trained("--steps", 40, "--drop", 0.3)
    dropped = [classes.count(24) for classes in seen]
    assert 70 < sum(dropped) < 122 and not {*dropped} <= {0, 8}, f"{dropped} of 8 in each of 40 steps"


def test_gradients_are_clipped_as_a_whole_and_logged_as_they_were(trained):
    def gradient(accum):                                                        # with a beta of 0, as it was taken
        ckpt = trained("--steps", 1, "--grad-clip", 1e-3, "--beta1", 0, "--accum", accum, out=f"accum{accum}")
        return torch.cat([state["exp_avg"].flatten() for state in ckpt["opt"]["state"].values()])

    one, four = gradient(1), gradient(4)
    assert one.norm() == pytest.approx(1e-3, rel=1e-3) and column("grad_norm", "accum1")[0] > 0.01
    assert (one - four).norm() < 1e-5, "each part was clipped by itself"


def test_another_seed_is_another_run_in_everything(trained, monkeypatch):
    """Its weights, pictures, times and noise, and the units that drop out."""
    seen, seeds, loss, manual_seed = [], [], diffusion.loss, torch.manual_seed
    monkeypatch.setattr(diffusion, "loss", lambda net, *parts: seen.append(parts[:3]) or loss(net, *parts))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    first, other = (trained("--steps", 1, "--lr", 1e-30, "--seed", seed, out=f"seed{seed}")["model"]["pos_embed"]
                    for seed in (0, 1))
    for a, b in zip((first, *seen[0]), (other, *seen[1])):
        assert not torch.isclose(a, b).all()
    assert len(seeds) == 4 and not {*seeds[:2]} & {*seeds[2:]}, seeds


def test_the_learning_rate_rises_in_a_line_and_then_stays(trained):
    trained("--steps", 6, "--warmup", 4, "--lr", 0.01)
    assert column("lr") == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_in_the_last_part_of_a_run_the_rate_falls_in_a_line_and_no_step_is_wasted_at_zero(trained):
    trained("--steps", 8, "--warmup", 2, "--cooldown", 0.5, "--lr", 0.01)
    assert column("lr") == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_a_cooled_run_continued_to_more_steps_takes_up_the_rates_of_the_longer_run(trained):
    trained("--steps", 4, "--cooldown", 0.5, "--lr", 0.01)
    trained("--steps", 8, "--cooldown", 0.5, "--lr", 0.01)
    assert column("lr") == pytest.approx([0.01, 0.01, 0.01, 0.005] + [0.01, 0.0075, 0.005, 0.0025])


def test_the_loss_is_logged_in_four_bins_of_time(trained):
    trained("--time-shift", 1e6)                                                # nearly every t is nearly 1
    last, *others = (column(f"loss_t{i}") for i in (3, 0, 1, 2))
    assert last == column("loss"), f"{last} is not all of {column('loss')}"
    assert all(math.isnan(loss) for bin in others for loss in bin), others


def test_a_bin_holds_the_losses_of_its_quarter_of_time(trained, monkeypatch):
    loss = diffusion.loss
    monkeypatch.setattr(diffusion, "loss", lambda net, x0, t, *more: t + 0 * loss(net, x0, t, *more))
    trained("--steps", 1, "--time-shift", 1, "--time-spread", 1)
    for i in range(4):
        assert i / 4 <= column(f"loss_t{i}")[0] < (i + 1) / 4, f"bin {i}"


def test_a_row_of_the_log_is_the_mean_of_the_steps_since_the_last(trained):
    trained("--steps", 4, out="each")
    trained("--steps", 4, "--log-every", 2, out="pairs")
    first, second, third, fourth = column("loss", "each")
    assert column("loss", "pairs") == pytest.approx([(first + second) / 2, (third + fourth) / 2], rel=1e-4)


def test_the_time_that_drawing_takes_is_no_time_of_training(trained, monkeypatch):
    clock, loss = [0], diffusion.loss

    def take(seconds):
        clock[0] += seconds

    monkeypatch.setattr(train, "now", lambda: clock[0])
    monkeypatch.setattr(diffusion, "loss", lambda *args: take(2) or loss(*args))
    monkeypatch.setattr(train, "draw_grid", lambda *args: take(100))
    trained("--steps", 3, "--log-every", 2, "--sample-every", 1)
    assert column("images_per_s") == [4, 4] and column("seconds") == [104, 206]


# ---- it stops and goes on --------------------------------------------------------------------------------

def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained, photos):
    """With all that draws random numbers: dropout, dropped conditions, mirrored pictures, an order for each epoch."""
    setup = dict(model="unet", dropout=0.2)
    whole = trained("--data", photos, "--steps", 4, out="whole", **setup)
    trained("--data", photos, "--steps", 2, out="halves", **setup)
    halves = trained("--data", photos, "--steps", 4, "--workers", 1, out="halves", **setup)
    assert differences(state(whole), state(halves)) == {}
    assert column("loss", "whole") == column("loss", "halves")


@pytest.mark.parametrize("name, workers", [(s.name, 0) for s in train.STOPS] + [("SIGINT", 1)])
def test_a_cooled_run_told_to_stop_finishes_its_step_and_resumes_to_the_same_bits(trained, monkeypatch, name, workers):
    def told_to_stop(*args):
        for process in multiprocessing.active_children():                       # a terminal tells the workers, too
            os.kill(process.pid, getattr(signal, name))
            process.join(timeout=1)
        signal.raise_signal(getattr(signal, name))
        return draw_times(*args)

    signal.signal(getattr(signal, name), signal.SIG_DFL)                        # these tests may run under nohup
    draw_times = diffusion.draw_times                                           # called at the beginning of each step
    monkeypatch.setattr(diffusion, "draw_times", Calls(draw_times, at=3, instead=told_to_stop))
    assert trained("--steps", 4, "--cooldown", 0.9, "--workers", workers)["step"] == 3
    resumed = trained("--steps", 4, "--cooldown", 0.9)
    assert differences(state(trained("--steps", 4, "--cooldown", 0.9, out="whole")), state(resumed)) == {}
    assert column("lr") == column("lr", "whole")


def test_a_run_told_to_stop_while_a_compiler_traces_it_stops(trained, monkeypatch):
    def told_to_stop(*args):
        with FakeTensorMode():                                                  # as torch.compile traces
            signal.raise_signal(signal.SIGTERM)
        return draw_times(*args)

    draw_times = diffusion.draw_times
    monkeypatch.setattr(diffusion, "draw_times", Calls(draw_times, at=1, instead=told_to_stop))
    assert trained("--steps", 3)["step"] == 1


def test_a_later_signal_kills_but_not_one_of_the_same_stop(monkeypatch):
    raised = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    stops = train.listen_for_stops()
    stop = signal.getsignal(signal.SIGTERM)
    stop(signal.SIGTERM, None), stop(signal.SIGTERM, None)
    assert len(stops) == 2 and not raised
    stops[0] -= 4                                                               # seconds
    stop(signal.SIGTERM, None)
    assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_under_nohup_does_not_stop_when_its_terminal_closes():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    train.listen_for_stops()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_run_told_to_stop_leaves_its_grid_to_be_drawn_by_the_next(trained, monkeypatch):
    def told_to_stop(*args):
        signal.raise_signal(signal.SIGTERM)
        return draw_times(*args)

    draw_times, sheet = diffusion.draw_times, Path("run/samples/step_0000002.png")
    with monkeypatch.context() as m:
        m.setattr(diffusion, "draw_times", Calls(draw_times, at=2, instead=told_to_stop))
        assert trained("--steps", 3, "--sample-every", 2)["step"] == 2 and not sheet.exists()
    trained("--steps", 3, "--sample-every", 2)
    assert sheet.exists()


@pytest.mark.parametrize("name, tee", [("SIGINT", "none"), ("SIGTERM", "none"), ("SIGINT", "dies")])
def test_a_run_of_which_all_processes_are_told_to_stop_saves_and_leaves_with_exit_code_0(datasets, tmp_path, name, tee):
    """Ctrl-C in a terminal, and torchrun's SIGTERM, reach the processes that read ahead as well, and tee."""
    argv = [*flags_of("uvit", datasets, "run"), "--steps", 10**6, "--workers", 1]
    run = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, argv)], cwd=tmp_path, start_new_session=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(tmp_path / "run" / "log.csv", run)
        if tee == "dies":
            run.stdout.close()
        os.killpg(run.pid, getattr(signal, name))
        printed = run.communicate(timeout=60)[0].decode() if tee == "none" else ""
        code = run.wait(timeout=60)
    finally:
        run.kill()                                                              # if it is still there
    assert code == 0, f"exit code {code}:\n{printed}"
    if tee == "none":
        assert "the same command resumes" in printed, printed
        assert printed.count("stopping once this step") == 1, "by the first process, and not by the loaders"
    saved = data.read_dict(tmp_path / "run" / "ckpt.pt")["step"]
    assert column("step", tmp_path / "run")[-1] == saved


def test_rows_of_the_log_beyond_the_checkpoint_are_dropped(trained):
    trained("--steps", 2)
    with open("run/log.csv", "a") as f:
        f.write("3,9,9,9,9,9,9,9,9,9\n4,9,9")                                   # a process that was killed, mid-line
    trained("--steps", 4)
    assert column("step") == [1, 2, 3, 4] and 9 not in column("loss")
    assert b"\r" not in Path("run/log.csv").read_bytes(), "lines end in two ways"
    Path("run/log.csv").write_text("")                                          # the disk was full when it was begun
    trained("--steps", 5)
    assert column("step") == [5]


def test_seconds_and_skipped_steps_go_on_where_the_checkpoint_was(trained, monkeypatch):
    loss = diffusion.loss
    monkeypatch.setattr(diffusion, "loss", Calls(loss, at=2, instead=lambda *args: loss(*args) * math.nan))
    torch.save({**trained("--steps", 2), "seconds": 1000.0}, "run/ckpt.pt")
    ckpt, seconds = trained("--steps", 4), column("seconds")
    assert column("skipped") == [0, 1, 1, 1] and ckpt["skipped"] == 1
    assert seconds[1] < 1000 <= seconds[2] <= seconds[3] < 2000 and 1000 < ckpt["seconds"] < 2000, seconds


def test_a_finished_run_says_so_and_changes_nothing(trained, capsys):
    trained()
    before = contents()
    for steps in (2, 1):                                                        # fewer than it has done, too
        trained("--steps", steps)
        assert "run is finished at step 2" in capsys.readouterr().out
        assert contents() == before


def test_a_folder_that_holds_another_run_is_refused_with_the_difference(trained):
    trained("--lr", 0.25)
    before = contents()
    with pytest.raises(data.UserError, match="lr: 0.25 there, 0.5 asked.*--fresh"):
        trained("--lr", 0.5)
    assert contents() == before


@pytest.mark.parametrize("flags, says", [
    (["--batch", 4], "batch: 8 there, 4 asked"),
    (["--data", "shapes64", "--data-dir", "new"], "data: 'shapes' there, 'shapes64' asked"),
    (["--seed", 1], "seed: 0 there, 1 asked"), (["--schedule", "linear"], "schedule: 'cosine' there, 'linear' asked"),
    (["--net", '{"patch_size": 8, "dim": 32, "depth": 3, "heads": 4}'], r"another run \(net heads: 2 there, 4 asked\)"),
    (["--model", "iuvit", "--net", '{"patch_size": 4}'], "model: 'uvit' there, 'iuvit' asked")])
def test_what_would_be_another_run_is_refused(trained, monkeypatch, flags, says):
    monkeypatch.setattr(data, "SHAPE_COUNT", 8)                                 # in a new set
    trained("--steps", 1)
    with pytest.raises(data.UserError, match=says):
        trained("--steps", 2, *flags)


MAY_CHANGE = """steps accum data_dir device dtype compile grad_ckpt workers timeout log_every sample_every save_every
    keep_every samples sampler sample_steps cfg clip""".split()


@pytest.mark.parametrize("field", sorted({f.name for f in dataclasses.fields(train.Config)} - {"out", "net", "flip"}))
def test_a_run_may_go_on_with_another_value_of_these_fields_alone(tmp_path, field):
    record = dict(dataclasses.asdict(train.Config(out=str(tmp_path))), info=data.describe("shapes", ""))
    (tmp_path / "config.json").write_text(json.dumps(record))
    refused = pytest.raises(data.UserError, match=rf"holds another run \({field}: .* there, 'another' asked\)")
    with contextlib.nullcontext() if field in MAY_CHANGE else refused:
        train.resume({**record, field: "another"}, None, None, None)


def test_a_set_that_was_prepared_anew_does_not_continue_a_run(trained, monkeypatch):
    trained("--steps", 1)
    monkeypatch.setattr(data, "digest", lambda lines: 64 * "0")
    says = "holds another run .pictures, by their fingerprint: '.*' there, '0+' asked"
    with pytest.raises(data.UserError, match=says):
        trained("--steps", 2)


@pytest.mark.parametrize("whole", [{}, dict(model={})], ids=str)
def test_a_checkpoint_that_is_not_of_a_run_is_refused_and_kept(trained, whole):
    trained()
    torch.save(whole, "run/ckpt.pt")
    with pytest.raises(data.UserError, match="run/ckpt.pt is not of a run: choose another --out"):
        trained("--steps", 9)
    assert data.read_dict("run/ckpt.pt") == whole


def test_fresh_moves_the_old_run_aside_whole(trained):
    old = {}
    for i in (1, 2):
        trained("--seed", i)
        old[f"run-old{i}"] = contents()
        trained("--seed", i + 1, "--fresh")
        assert {name: contents(name) for name in old} == old
        assert column("step") == [1, 2]


def test_fresh_leaves_a_link_to_another_disk_as_it_is(trained):
    Path("disk/run").mkdir(parents=True)
    Path("link").symlink_to(Path("disk/run").absolute())
    trained(out="link")
    old = contents("disk/run")
    trained("--seed", 1, "--fresh", out="link")
    assert Path("link").is_symlink() and contents("disk/run-old1") == old and column("step", "disk/run") == [1, 2]


def test_fresh_is_kept_by_the_replacement_of_a_process_that_died_early(trained, monkeypatch):
    def failing(*args):
        raise MemoryError

    trained("--steps", 1)
    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(train.sample, "autocast", failing)
        trained("--steps", 2, "--fresh")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")               # torchrun gives it the same command
    trained("--steps", 2, "--fresh")
    assert column("step", "run")[0] == 1 and data.read_dict("run-old1/ckpt.pt")["step"] == 1


def test_fresh_is_kept_by_the_replacement_of_a_group_that_never_met(trained, monkeypatch):
    def failing(*args):
        raise MemoryError

    trained("--steps", 1)
    monkeypatch.setattr(data, "processes", lambda: (0, 2))
    monkeypatch.setattr(train, "join", failing)
    with pytest.raises(MemoryError):
        trained("--steps", 2, "--fresh")
    assert data.read_dict("run-old1/ckpt.pt")["step"] == 1 and not Path("run").exists()


def test_a_stopped_fresh_run_is_not_told_to_start_over(trained, monkeypatch, capsys):
    draw_times = diffusion.draw_times
    for flags, says in ([], "the same command resumes"), (["--fresh"], "the same command without --fresh resumes"):
        monkeypatch.setattr(diffusion, "draw_times", lambda *args: signal.raise_signal(signal.SIGTERM) or draw_times(*args))
        trained("--steps", 9, *flags, out=f"run{len(flags)}")
        assert says in capsys.readouterr().out


def test_fresh_moves_nothing_that_is_no_run(trained):
    trained(out="runs/one")
    Path("runs/notes.txt").write_text("mine")
    before = contents("runs")
    trained("--fresh", out="runs")
    assert before.items() <= contents("runs").items() and not Path("runs-old1").exists()


def test_fresh_is_refused_on_several_nodes_whose_restarts_torchrun_does_not_count(trained, monkeypatch):
    trained()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(data.UserError, match="move the old run yourself"):
        trained("--fresh")
    assert column("step") == [1, 2] and not Path("run-old1").exists()


def test_the_embedding_of_classes_in_another_order_starts_anew(trained, capsys):
    """Else every class would begin as another one, and nobody would know."""
    ckpt, says = trained(out="first"), "the embedding of the 24 classes starts anew"
    ckpt["config"]["info"]["classes"].reverse()
    torch.save(ckpt, "reversed.pt")
    for file, anew in (("first/ckpt.pt", False), ("reversed.pt", True)):
        capsys.readouterr()
        tuned = trained("--init-from", file, "--steps", 1, "--lr", 1e-30, out=f"anew-{anew}")["model"]
        assert (says in capsys.readouterr().out) == anew
        assert torch.allclose(tuned["class_embed.weight"], ckpt["ema"]["class_embed.weight"]) == (not anew)


def test_fresh_does_not_move_the_weights_that_it_is_to_start_from(trained):
    trained()
    before = contents()
    with pytest.raises(data.UserError, match="--fresh would move run/ckpt.pt away"):
        trained("--init-from", "run/ckpt.pt", "--fresh")
    assert contents() == before and not Path("run-old1").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no files")
def test_two_trainings_in_one_folder_are_one_too_many_until_the_first_is_killed(trained, monkeypatch):
    trained()
    before = contents()
    code = "import train; lock = train.claim('run'); open('locked', 'w'); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
                              stdin=subprocess.PIPE)
    try:
        wait_for(Path("locked"), holder)
        for flags in (["--steps", 3], ["--fresh"]):
            with monkeypatch.context() as m, pytest.raises(data.UserError, match="another training is writing to run"):
                m.setattr(data, "read_dict", lambda path: pytest.fail("read before the first is done"))
                trained(*flags)
            assert contents() == before and not Path("run-old1").exists()
    finally:
        holder.kill()
        holder.communicate()
    assert trained("--steps", 3)["step"] == 3


def truncate(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


def run_a_program(file):
    torch.save({**torch.load(file), "more": Malice()}, file)


def drop_the_average(file):
    torch.save({key: value for key, value in torch.load(file).items() if key != "ema"}, file)


def change_a_moment(file):
    ckpt = torch.load(file)
    ckpt["opt"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(ckpt, file)


@pytest.mark.parametrize("damage, says", [
    (truncate, "cannot read the checkpoint run/ckpt.pt"), (flip_a_bit, "cannot read the checkpoint run/ckpt.pt"),
    (run_a_program, "cannot read the checkpoint run/ckpt.pt"),
    (drop_the_average, "run/ckpt.pt is damaged or of other code"),
    (change_a_moment, "run/ckpt.pt is damaged or of other code .*moments of other shapes")])
def test_a_damaged_checkpoint_is_refused_and_not_overwritten(trained, damage, says):
    trained()
    damage(Path("run/ckpt.pt"))
    before = contents()
    with pytest.raises(data.UserError, match=says):
        trained("--steps", 4)
    assert contents() == before and not Path("executed").exists()


def test_training_is_saved_before_samples_can_fail(trained):
    trained("--steps", 2)
    Path("run", "samples", "step_0000004.png").mkdir()                          # where a picture cannot be written
    with pytest.raises(OSError):
        trained("--steps", 4)
    Path("run", "samples", "step_0000004.png").rmdir()
    Path("run", "samples", "step_0000002.png").write_bytes(b"")                 # a damaged one is left out
    assert trained("--steps", 6)["step"] == 6 and column("step") == [1, 2, 3, 4, 5, 6]
    Path("run", "samples", "step_0000007.png").mkdir()
    with pytest.raises(OSError):
        trained("--steps", 9, "--sample-every", 7, "--save-every", 100)
    assert data.read_dict("run/ckpt.pt")["step"] == 7


def test_a_crash_in_the_middle_of_saving_leaves_the_old_checkpoint_whole(trained, monkeypatch):
    def full_disk(tensors, file):
        file.write(b"the first half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", Calls(torch.save, at=2, instead=full_disk))
    with pytest.raises((OSError, data.UserError), match="no space left"):
        trained("--steps", 4, "--save-every", 2)
    assert data.read_dict("run/ckpt.pt")["step"] == 2
    assert not list(Path("run").glob("*.part"))


# ---- what it leaves --------------------------------------------------------------------------------------

def test_the_folder_of_a_run_holds_what_the_readme_says(trained):
    ckpt = trained("--steps", 4, "--sample-every", 2)
    assert sorted(contents()) == [".lock", "ckpt.pt", "config.json", "log.csv", "samples/progress.png",
                                  "samples/step_0000002.png", "samples/step_0000004.png"]
    assert sorted(ckpt) == ["config", "ema", "model", "opt", "seconds", "skipped", "step", "text"]
    assert json.loads(Path("run/config.json").read_text()) == ckpt["config"]
    sheet, progress = (Image.open(f"run/samples/{name}.png") for name in ("step_0000004", "progress"))
    assert (sheet.size, progress.size) == ((138, 36), (138, 2 * 34))            # one row of four, and two such rows


def test_a_damaged_sheet_is_left_out_of_the_progress_and_a_wider_one_is_whole(trained):
    trained("--steps", 4, "--sample-every", 2)
    sheet = Path("run/samples/step_0000002.png")
    sheet.write_bytes(sheet.read_bytes()[:len(sheet.read_bytes()) // 2] + bytes(len(sheet.read_bytes()) // 2))
    fourth = Path("run/samples/step_0000004.png")
    Image.open(fourth).quantize(16).save(fourth)                                # made smaller by somebody
    trained("--steps", 5, "--samples", 6)
    progress = np.asarray(Image.open("run/samples/progress.png"))
    assert progress.shape == (2 * 34, 2 + 6 * 34, 3)
    assert (progress[:34, 2 + 4 * 34:] == 255).all(), "white beside the narrower strip"


def test_every_sheet_starts_from_the_same_noise_and_classes(trained):
    trained("--steps", 2, "--lr", 1e-30, "--sample-every", 1)
    first, last = (Path(f"run/samples/step_000000{i}.png").read_bytes() for i in (1, 2))
    assert first == last, "two sheets of a network that does not change differ"


def test_a_sheet_is_what_is_drawn_from_the_averaged_weights_of_its_checkpoint(trained):
    trained("--lr", 0.02, "--samples", 5, "--cfg", 2)
    drawn = {weights: data.grid(train.sample.draw(*train.sample.load("run/ckpt.pt", weights), torch.arange(5), range(5),
                                                  "cpu"), columns=8) for weights in ("ema", "raw")}
    sheet = Image.open("run/samples/step_0000002.png")
    assert ImageChops.difference(sheet, drawn["ema"]).getbbox() is None
    assert ImageChops.difference(sheet, drawn["raw"]).getbbox() is not None


def test_every_picture_of_a_sheet_has_its_own_noise_and_class_however_few_are_drawn_at_a_time(trained, monkeypatch):
    calls, draw = [], train.sample.draw
    monkeypatch.setattr(train.sample, "draw", lambda net, config, asked, ids, device: (
        calls.append((asked.tolist(), list(ids))) or draw(net, config, asked, ids, device)))
    trained("--steps", 1, "--batch", 2, "--samples", 5)
    assert calls == [([0, 1], [0, 1]), ([2, 3], [2, 3]), ([4], [4])]


def test_the_progress_shows_the_first_rows_of_twelve_sheets_from_the_first_to_the_last(tmp_path):
    for i in range(30):
        Image.new("RGB", (6, 12), (i, i, i)).save(tmp_path / f"step_{i:07d}.png")
    train.draw_progress(tmp_path, size=4)
    progress = np.asarray(Image.open(tmp_path / "progress.png"))
    assert progress.shape == (12 * 6, 6, 3)
    strips = progress[:, 0, 0].reshape(12, 6)
    assert (strips == strips[:, :1]).all() and (np.diff(strips[:, 0]) > 1).all()
    assert (strips[0, 0], strips[-1, 0]) == (0, 29)


def test_the_first_line_says_what_is_trained_and_how_the_paper_trained_it(trained, capsys):
    trained()
    first = capsys.readouterr().out.splitlines()[0]
    assert all(word in first for word in ("uvit", "200 pictures of shapes", "32x32")), first
    assert "torchrun --nproc_per_node=8 train.py --model uvit" in first


def test_a_dry_run_counts_exactly_and_needs_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", "train.py --model uvit --data cifar10 --dry-run".split())
    train.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["params"] == 44_255_328 and printed["gflops"] == pytest.approx(24.4, rel=0.01)
    assert {field.name for field in dataclasses.fields(train.Config)} < set(printed)
    assert not list(tmp_path.iterdir()), "it wrote something"


# ---- several processes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("accum", [1, 2])
def test_ascend_under_torchrun_has_the_losses_and_gradients_of_one_process(trained, datasets, photos, accum):
    setup = ["--data", photos, "--steps", 4]
    trained(*setup, model="ascend", out="one")
    command("train.py", *flags_of("ascend", datasets, "two"), *setup, "--accum", accum, cwd=".", processes=2)
    one, two = column("loss", "one"), column("loss", "two")
    assert two == pytest.approx(one, rel=1e-4), f"one process: {one}, two: {two}"
    assert column("grad_norm", "two") == pytest.approx(column("grad_norm", "one"), rel=1e-3)
    one, two = (np.asarray(Image.open(f"{out}/samples/step_0000004.png")).astype(int) for out in ("one", "two"))
    assert abs(one - two).max() <= 3, "pictures of a sheet have changed places"


KEEP_WEIGHTS_AND_SEEDS_OF_EVERY_RANK = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
nets, build, seeds, manual_seed = [], train.sample.build, [], torch.manual_seed
train.sample.build = lambda *args: nets.append(build(*args)) or nets[-1]
torch.manual_seed = lambda seed: seeds.append(seed) or manual_seed(seed)
train.main()
torch.save([nets[-1].state_dict(), seeds], "rank" + os.environ["RANK"] + ".pt")
"""


def test_all_ranks_hold_identical_weights_although_each_drops_out_its_own(datasets, photos, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(KEEP_WEIGHTS_AND_SEEDS_OF_EVERY_RANK)
    argv = [*flags_of("unet", datasets, "run", dropout=0.2), "--data", photos, "--steps", 3, "--accum", 2]
    command(driver, *argv, cwd=tmp_path, processes=2)
    (first, seeds), (second, others) = (torch.load(tmp_path / f"rank{i}.pt") for i in (0, 1))
    assert len({*seeds}) == len({*others}) == 1 + 3 * 2                         # that of the weights, and one a pass
    assert {*seeds} & {*others} == {0}, "two ranks drop out the same units"
    assert differences(first, second) == {}
    assert differences(first, data.read_dict(tmp_path / "run" / "ckpt.pt")["model"]) == {}


HANG_AT_STEP_2 = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import diffusion, train
draw_times, steps = diffusion.draw_times, []
def hanging(*args):
    steps.append(len(steps))
    if steps[-1] == 2 and os.environ["RANK"] == "1":
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(40)
        signal.pause()                      # until torchrun tells it to stop, or 40 seconds
    return draw_times(*args)
diffusion.draw_times = hanging
train.main()
"""


def test_a_process_that_hangs_ends_all_after_the_timeout_and_the_last_line_says_where(datasets, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(HANG_AT_STEP_2)
    argv = [*flags_of("uvit", datasets, "run"), "--steps", 5, "--save-every", 1, "--timeout", 10]
    printed = command(driver, *argv, cwd=tmp_path, processes=2, code=1)
    assert "rank 0 failed at step 2; the same command goes on from step 2" in printed
    assert data.read_dict(tmp_path / "run" / "ckpt.pt")["step"] == 2


def test_a_batch_that_does_not_divide_names_the_nearest_that_does(trained, monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(data.UserError, match="--batch 8 does not divide among 2 processes x 3.*: 6"):
        trained("--batch", 8, "--accum", 3)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(data.UserError, match="--batch 8 does not divide among 1 processes x 3.*: 9"):
        trained("--batch", 8, "--accum", 3, "--dry-run")
    assert not Path("run").exists()


def test_processes_that_cannot_find_each_other_are_one_message(trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(data.UserError, match="RANK '' of WORLD_SIZE '2' makes no sense"):
        trained()                                       # each would take itself for the first
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(data.UserError, match="a WORLD_SIZE of 2 without a MASTER_ADDR.*torchrun sets them"):
        trained()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "99999")
    with pytest.raises(data.UserError, match="valid MASTER_PORT .it is '99999'"):
        trained()


# ---- flags -----------------------------------------------------------------------------------------------

def config(*argv):
    return train.parse(list(map(str, argv)))[0]


@pytest.mark.parametrize("name", train.PRESETS)
def test_a_preset_overrides_the_defaults_and_the_command_line_both(name):
    row = train.PRESETS[name]
    defaults = dict(dataclasses.asdict(train.Config()), preset=name, out=f"runs/{name}")
    clip = "dynamic" if row.get("cond") == "text" and row["cfg"] > 2 else "static"
    assert dataclasses.asdict(config("--preset", name)) == {**defaults, "clip": clip, **row}
    assert config("--preset", name, "--lr", 7, "--batch", 24).lr == 7


PUBLISHED = {                           # steps, batch, lr, warmup, weight_decay, beta1, beta2
    "unet-cifar10": (800_000, 128, 2e-4, 5000, 0.0, 0.9, 0.999),                # of DDPM
    "uvit-cifar10": (500_000, 128, 2e-4, 2500, 0.03, 0.99, 0.999),              # of U-ViT, from here on
    "uvit-celeba64": (500_000, 128, 2e-4, 5000, 0.03, 0.99, 0.99),
    "uvit-imagenet64": (300_000, 1024, 3e-4, 5000, 0.03, 0.99, 0.99),
    "uvit-imagenet64-large": (300_000, 1024, 3e-4, 5000, 0.03, 0.99, 0.99),
    "iuvit-cifar10": (500_000, 128, 2e-4, 2500, 0.03, 0.99, 0.999)}             # assumed to be trained like it


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_is_trained_as_its_authors_did(name):
    run = config("--preset", name)
    found = run.steps, run.batch, run.lr, run.warmup, run.weight_decay, run.beta1, run.beta2
    assert found == PUBLISHED[name]


@pytest.mark.parametrize("argv, clip", [
    ("--cond text --cfg 3", "dynamic"), ("--cond text --cfg 2", "static"), ("--cond class --cfg 3", "static"),
    ("--cond text --cfg 3 --clip static", "static"), ("--preset unet-cc12m64 --clip none", "none"),
    ("--preset unet-cc12m64 --cfg 1.5", "static"), ("--preset unet-cc12m64 --cond none", "static")])
def test_strong_guidance_by_text_is_kept_in_range_dynamically_unless_told_otherwise(argv, clip):
    assert config(*argv.split()).clip == clip


def test_net_changes_the_arguments_it_names_and_keeps_the_others():
    row = train.PRESETS["unet-shapes"]["net"]
    assert config("--net", '{"dim": 96}').net == {**row, "dim": 96}


@pytest.mark.parametrize("net, says", [
    ('{"skips": "false"}', "skips 'false' is no bool"), ('{"skips": 0}', "skips 0 is no bool"),
    ('{"attn_sizes": ["16"]}', "attn_sizes ['16'] is no list of integers"), ('{"dim": "16"}', "dim '16' is no number"),
    ('{"dim": true}', "dim True is no number"), ('{"encoder": 1}', "encoder 1 is no str"), ('{"width": 1}', "width")])
def test_net_takes_values_of_the_kind_of_the_defaults(trained, net, says):
    with pytest.raises(data.UserError) as mistake:
        trained("--model", "ascend", "--net", net)
    assert says in str(mistake.value) and not os.listdir()


@pytest.mark.parametrize("argv, preset", [
    ("--cond text", "unet-shapes-text"), ("--data shapes --cond class", "unet-shapes"),
    ("", "unet-shapes"), ("--model uvit", "uvit-shapes"), ("--model ascend --data cifar10", "ascend-cifar10"),
    ("--data emoji64 --model iuvit", "iuvit-emoji64"), ("--data shapes64", "unet-emoji64"),
    ("--data imagenet64 --model iuvit", "iuvit-celeba64"), ("--data cub64 --model iuvit --cond text", "iuvit-cc12m64"),
    ("--data cc12m64 --model ascend --cond text", "ascend-celeba64")])
def test_without_preset_the_first_that_fits_or_that_of_the_nearest_size_is_taken(argv, preset):
    assert config(*argv.split()).preset == preset


@pytest.mark.parametrize("argv, out", [
    ("", "unet-shapes"), ("--cond class", "unet-shapes"), ("--cond none", "unet-shapes-none"),
    ("--cond text", "unet-shapes-text"), ("--model ascend --cond text", "ascend-shapes-text"),
    ("--data shapes64", "unet-shapes64"), ("--data shapes64 --cond text", "unet-shapes64-text"),
    ("--data emoji64", "unet-emoji64"), ("--data emoji64 --cond none", "unet-emoji64-none"),
    ("--data cifar10 --cond class", "unet-cifar10-class")])
def test_runs_under_other_conditions_lie_beside_each_other(argv, out):
    assert config(*argv.split()).out == f"runs/{out}"


def weights(out):
    return data.read_dict(f"{out}/ckpt.pt")["model"]


def average(out):
    return data.read_dict(f"{out}/ckpt.pt")["ema"]


def sheet(out):
    return Path(out, "samples", "step_0000002.png").read_bytes()


def rows(out):
    return column("step", out)


def sheets(out):
    return len(list(Path(out, "samples").iterdir()))


EFFECTS = dict(                         # another value of a field, and what it must change
    cond=("none", sheet), net=('{"depth": 1}', sheet), schedule=("cosine", weights), prediction=("eps", weights),
    clock=("uvit", weights),
    time_shift=(9, weights), time_spread=(9, weights), drop=(0.9, weights), steps=(1, rows), batch=(4, weights),
    lr=(0.1, weights), warmup=(9, weights), cooldown=(0.9, weights), weight_decay=(9, weights), beta1=(0.1, weights),
    beta2=(0.1, weights), ema=(0.01, average), grad_clip=(1e-4, weights), samples=(5, sheet), sampler=("em", sheet),
    sample_steps=(3, sheet), cfg=(9, sheet), clip=("none", sheet), seed=(5, weights), dtype=("bfloat16", weights),
    log_every=(2, rows), sample_every=(1, sheets))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Where the run lies that all effects are seen against."""
    return tmp_path_factory.mktemp("effects") / "plain"


@pytest.mark.parametrize("field", EFFECTS)
def test_a_flag_has_an_effect(trained, plain, field):
    value, look = EFFECTS[field]
    setup = [*"--schedule linear --prediction v --sampler dpm --clip static".split(),
             *"--lr 0.02 --cfg 50 --sample-steps 4".split()]                    # strong: there is something to clip
    if not plain.exists():
        trained(*setup, out=plain)                                              # the first field's serves all
    trained(*setup, "--" + field.replace("_", "-"), value, out="other")
    before, after = look(plain), look("other")
    same = not differences(before, after) if look in (weights, average) else before == after
    assert not same, f"--{field} {value} changes nothing in {look.__name__}"


def test_flip_says_whether_pictures_are_mirrored_and_is_the_runs_own(trained, photos):
    trained("--data", photos, "--steps", 1, out="as the set allows")
    trained("--data", photos, "--steps", 1, "--flip", out="mirrored")
    trained("--data", photos, "--steps", 1, "--no-flip", out="plain")
    assert not differences(weights("as the set allows"), weights("mirrored"))
    assert differences(weights("plain"), weights("mirrored"))
    with pytest.raises(data.UserError, match="flip: False there, True asked"):
        trained("--data", photos, "--steps", 2, out="plain")
    trained("--data", photos, "--steps", 2, "--flip", out="as the set allows")


def test_accum_divides_a_step_into_micro_batches(trained, monkeypatch):
    monkeypatch.setattr(diffusion, "loss", Calls(diffusion.loss))
    trained("--steps", 3, "--accum", 4)
    assert diffusion.loss.count == 12


def test_workers_read_the_batches_in_processes_of_their_own(trained, monkeypatch):
    here, read = [], data.Batches.__getitem__
    monkeypatch.setattr(data.Batches, "__getitem__", lambda self, step: here.append(step) or read(self, step))
    trained("--workers", 1, out="ahead")
    assert here == [], f"steps {here} were read by the process that trains"
    trained()
    assert here == [0, 1]


def test_compiling_in_bfloat16_on_a_cpu_is_refused_since_its_gradients_are_wrong(trained):
    with pytest.raises(data.UserError, match="gradients are wrong .*: add --dtype float32, or leave out --compile"):
        trained("--compile", "--dtype", "bfloat16")
    assert not Path("run").exists()


def test_too_little_shared_memory_for_workers_is_seen_before_they_hang(trained, monkeypatch):
    isdir = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm" or isdir(path))       # Macs have none
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9 * (folder != "/dev/shm")))
    with pytest.raises(data.UserError, match="0 bytes free and /dev/shm needs 98,304 more: .*--shm-size"):
        trained("--workers", 2)                                                 # two batches each, of 8 x 3 x 32 x 32
    trained()


@pytest.mark.parametrize("sizes, told", [([16], 0), ([7], 1), ([], 0)])
def test_a_network_that_loses_its_attention_to_the_size_of_the_pictures_is_told(trained, capsys, sizes, told):
    trained(model="unet", attn_sizes=sizes)
    assert capsys.readouterr().out.count("so only the middle has attention: name others") == told


def test_save_every_decides_how_often_the_checkpoint_is_written(trained, monkeypatch):
    monkeypatch.setattr(torch, "save", Calls(torch.save))
    trained("--steps", 5, "--save-every", 2)
    assert torch.save.count == 3                                                # after steps 2, 4 and the last


def test_keep_every_leaves_checkpoints_that_can_be_drawn_from(trained):
    trained("--steps", 5, "--save-every", 100, "--keep-every", 2, out="kept")
    files = sorted(path.name for path in Path("kept").glob("ckpt*"))
    assert files == ["ckpt.pt", "ckpt_0000002.pt", "ckpt_0000004.pt"]
    assert data.read_dict("kept/ckpt_0000002.pt")["step"] == 2
    train.sample.load("kept/ckpt_0000002.pt")
    assert train.stem("kept/ckpt_0000002.pt") == "kept-0000002" and train.stem("kept/ckpt.pt") == "kept"
    ends = [data.read_dict(f"kept/{file}")["model"] for file in files]
    Path("kept/ckpt.pt").write_bytes(Path("kept/ckpt_0000002.pt").read_bytes())
    Path("kept/ckpt_0000004.pt").write_bytes(b"")       # killed between the two of step 4: it is written again
    trained("--steps", 5, "--save-every", 100, "--keep-every", 2, out="kept")
    assert sorted(path.name for path in Path("kept").glob("ckpt*")) == files
    assert not any(differences(end, data.read_dict(f"kept/{file}")["model"]) for end, file in zip(ends, files))


@pytest.mark.parametrize("steps, sheets", [(2, [2]), (3, [2, 3])], ids=["finished", "continued"])
def test_a_sheet_whose_drawing_was_killed_is_drawn_by_the_next_start(trained, monkeypatch, steps, sheets):
    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as m:
        m.setattr(train, "draw_grid", killed)
        with pytest.raises(SystemExit):
            trained("--sample-every", 2)
    trained("--sample-every", 2, "--steps", steps)
    assert sorted(path.name for path in Path("run/samples").glob("step_*")) == [f"step_{n:07d}.png" for n in sheets]


@pytest.mark.parametrize("flags, modes", [([], []), (["--no-compile"], []), (["--compile"], ["reduce-overhead"]),
                                          (["--compile", "--accum", 2], ["default"]),
                                          (["--compile", "--grad-ckpt"], ["default"])], ids=str)
def test_compile_is_asked_for_on_a_cpu_and_only_single_passes_become_cuda_graphs(trained, monkeypatch, flags, modes):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda net, mode, dynamic: asked.append(mode) or net)
    trained(*flags)
    assert asked == modes


def test_device_names_where_to_train(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(train.sample, "pick_device", lambda name: asked.append(name) or torch.device("cpu"))
    trained("--device", "mps")
    assert asked == ["mps"]


def test_no_field_of_the_config_is_without_a_test_of_its_flag():
    elsewhere = {"preset", "model", "data", "encoder", "flip", "out", "data_dir", "accum", "workers", "save_every",
                 "keep_every", "compile", "device", "grad_ckpt", "timeout",
                 "init_from"}                                                   # this one in test_published.py
    assert elsewhere | set(EFFECTS) == {field.name for field in dataclasses.fields(train.Config)}


# ---- mistakes --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, says", [
    # names
    ("--stepz 5", "--stepz 5"), ("--step 5", "--step 5"), ("uvit", "uvit"), ("--steps", "expected one argument"),
    ("--preset unet-shapes --model uvit", "the preset unet-shapes is of unet: leave out --model uvit"),
    ("--preset none", "unet-shapes, uvit-shapes"), ("--model vit", "unet, uvit, iuvit, ascend"),
    ("--data nowhere", "shapes, shapes64, emoji64"), ("--data ../shapes", "cannot name a data set"),
    ("--cond caption", "none, class"), ("--data emoji64 --cond class", "--cond none"),
    ("--schedule square", "linear, cosine"), ("--prediction x0", "eps, v"), ("--sampler euler", "em, ddim, dpm"),
    ("--clip hard", "none, static, dynamic"), ("--device tpu", "auto, cpu, cuda, mps"),
    ("--dtype float16", "auto, float32, bfloat16"), ("--net 5", "JSON object"), ("--net {dim:64}", "JSON object"),
    # numbers
    ("--steps 1e4", "int"), ("--lr fast", "float"), ("--steps 0", "above 0"), ("--batch -8", "above 0"),
    ("--accum 0", "above 0"), ("--lr 0", "above 0"), ("--lr nan", "--lr must be a finite"),
    ("--grad-clip 0", "above 0"), ("--time-shift 0", "above 0"), ("--time-spread 0", "above 0"),
    ("--samples 0", "above 0"), ("--sample-steps 0", "above 0"), ("--timeout 0", "above 0"),
    ("--timeout 10000000000", "below 10^9"),
    ("--log-every 0", "above 0"), ("--sample-every 0", "above 0"), ("--save-every 0", "above 0"),
    ("--drop 1", "[0, 1)"), ("--drop -0.1", "[0, 1)"), ("--ema 1", "[0, 1)"), ("--beta1 1", "[0, 1)"),
    ("--beta2 2", "[0, 1)"), ("--warmup -1", "not be negative"), ("--workers -1", "not be negative"),
    ("--weight-decay -1", "not be negative"), ("--seed -1", "not be negative"),
    ("--cooldown 1", "[0, 1)"), ("--cooldown 300", "[0, 1)"), ("--cooldown nan", "--cooldown must be a finite"),
    ("--drop 0 --cfg 2", "--cfg 1"),
    ("--lr inf", "--lr must be a finite"), ("--weight-decay nan", "--weight-decay must be a finite"),
    ("--time-shift inf", "--time-shift must be a finite"), ("--time-spread nan", "--time-spread must be a finite"),
    ("--cfg nan", "--cfg must be a finite"), ("--seed 99999999999999999999", "--seed")])
def test_a_mistake_in_a_flag_is_answered_by_what_is_allowed(argv, says):
    with pytest.raises(data.UserError) as mistake:
        config(*argv.split())
    assert says in str(mistake.value).replace("'", ""), f"{argv!r} is answered: {mistake.value}"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("model, net", [
    ("uvit", dict(depth=4)), ("uvit", dict(patch_size=5)), ("uvit", dict(dim=33)), ("uvit", dict(heads=0)),
    ("uvit", dict(dim="wide")), ("uvit", dict(width=8)), ("unet", dict(dim=33)), ("unet", dict(dim_mults=[1] * 7)),
    ("unet", dict(dropout=2)), ("ascend", dict(window=3)),
    # these can be built, but not run
    ("unet", dict(channels=1)), ("unet", dict(num_blocks=-1)), ("unet", dict(dim=0)), ("uvit", dict(heads=-2)),
    ("iuvit", dict(heads=0.5))], ids=str)
def test_a_network_that_cannot_be_built_or_run_is_one_message(trained, model, net):
    with pytest.raises(data.UserError, match=f"{model} with --net .* on shapes, 32 pixels: "):
        trained(model=model, **net)
    assert not Path("run").exists()


def test_a_device_that_is_not_here_is_one_message(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(data.LocalError, match="no cuda on this machine.*there is cpu"):
        train.sample.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(data.LocalError, match="process 5 of this machine has no GPU of its own: there are 4"):
        train.sample.pick_device("cuda")


def test_out_of_memory_is_answered_by_what_takes_less(trained, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(diffusion, "loss", Calls(diffusion.loss, at=3, instead=full))
    with pytest.raises(torch.OutOfMemoryError) as e:
        trained("--accum", 2, "--save-every", 1)
    sys.excepthook(e.type, e.value, e.tb)
    printed = capsys.readouterr().err
    assert "\nout of memory with 4 pictures at a time: use a larger --accum (now 2), --grad-ckpt, or" in printed
    assert printed.endswith("rank 0 failed at step 1; the same command goes on from step 1\n")
    assert "Traceback" not in printed


@pytest.mark.parametrize("out", ["notes", "notes/run"])
def test_a_file_where_the_run_should_go_is_kept(trained, out):
    Path("notes").write_text("mine")
    with pytest.raises(data.UserError, match="notes"):
        trained(out=out)
    assert Path("notes").read_text() == "mine"


@pytest.mark.parametrize("argv", [["train.py", "--dry-run"], ["data.py", "prepare", "shapes", "--limit", "9"]])
def test_a_reader_that_has_had_enough_is_no_error(tmp_path, argv):
    """As in `python train.py --dry-run | head -0`."""
    run = subprocess.Popen([sys.executable, ROOT / argv[0], *argv[1:]], cwd=tmp_path, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert (run.wait(timeout=100), run.stderr.read()) == (0, "")
    run.stderr.close()
    assert argv[0] == "train.py" or len(data.open_set("shapes", tmp_path / "datasets")) == 9


def test_a_closed_terminal_is_no_error_and_leaving_out_checks_is_one(tmp_path):
    train_py = f"{shlex.quote(sys.executable)} %s {shlex.quote(str(ROOT / 'train.py'))} --dry-run"
    done = subprocess.run(train_py % "" + " >&- 2>&-", shell=True, cwd=tmp_path)
    assert done.returncode == 0
    for flag in ("-O", "-OO"):
        done = subprocess.run(train_py % flag, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: python -O leaves out checks")


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    printed = command("train.py", "--steps", "many", cwd=tmp_path, code=2)
    assert printed.startswith("error: ") and printed.count("\n") == 1 and "--steps" in printed, printed
    assert not list(tmp_path.iterdir()), "it wrote something"
