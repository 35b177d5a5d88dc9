"""sample.py: pictures from a checkpoint alone, the same however they are computed."""
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import diffusion
import sample
from conftest import ROOT, TINY, command, tiny
from test_repo import readme_blocks


@pytest.fixture(scope="session")
def ckpt(datasets, tmp_path_factory):
    """The checkpoint of a tiny class-conditional run of a few large steps."""
    out = tmp_path_factory.mktemp("run")
    command("train.py", *tiny("uvit"), "--data-dir", datasets, "--out", out, "--steps", 2, "--lr", 0.02, "--samples", 4,
            *"--cond class --prediction v --sampler dpm --clip static --cfg 2".split())
    return out / "ckpt.pt"


@pytest.fixture
def drawn(ckpt, tmp_path, monkeypatch):
    """drawn("--cfg", 3) is `python sample.py --cfg 3` with that checkpoint, in this process, in an empty folder: six
    pictures, unless told otherwise. Returns pictures (N, S, S, 3) and classes (N,)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        argv = ["--ckpt", ckpt, "--n", 6, "--device", "cpu", "--dtype", "float32", "--npz", "drawn.npz", *flags]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
        sample.main()
        with np.load("drawn.npz") as npz:
            return npz["arr_0"], npz.get("arr_1")

    return run


@pytest.fixture
def altered(ckpt, tmp_path):
    """altered(model="unet") is the path of a copy of the checkpoint whose config says so."""
    def copy(**config):
        whole = data.read_dict(ckpt)
        whole["config"].update(config)
        torch.save(whole, tmp_path / "altered.pt")
        return tmp_path / "altered.pt"

    return copy


def grey_levels(a, b):
    """The largest difference of two stacks of pictures."""
    return int(abs(a.astype(int) - b).max())


def flat(level):
    """A network that predicts v exactly where all pictures are flat: of level(*cond), (B,). On the cosine schedule."""
    def net(x, t, *cond):
        alpha, sigma = (f(t)[:, None, None, None] for f in (cosine.alpha, cosine.sigma))
        return (alpha * x - level(*cond)[:, None, None, None]) / sigma

    cosine, module = diffusion.SCHEDULES["cosine"], torch.nn.Module()
    module.forward = net
    return module


# ---- what it writes --------------------------------------------------------------------------------------

def test_a_png_is_one_sheet_of_all_pictures(drawn):
    pictures, _ = drawn("--n", 7, "--out", "sheets/sheet.png")
    sheet = np.asarray(data.grid(pictures.transpose(0, 3, 1, 2), columns=3))
    assert np.array_equal(np.asarray(Image.open("sheets/sheet.png")), sheet)


def test_any_other_out_is_a_folder_of_single_pngs(drawn):
    pictures, _ = drawn("--out", "pictures")
    files = sorted(path.name for path in Path("pictures").glob("[!.]*"))
    assert files == [f"{i:06d}.png" for i in range(6)]
    assert np.array_equal(pictures, np.stack([Image.open(f"pictures/{file}") for file in files]))


def test_a_folder_with_something_in_it_is_left_alone(drawn):
    Path("mine").mkdir()
    Path("mine", "000000.png").write_bytes(b"mine")
    with pytest.raises(data.UserError, match="mine is not empty"):
        drawn("--out", "mine")
    assert Path("mine", "000000.png").read_bytes() == b"mine"


def test_the_same_command_goes_on_with_a_folder_and_draws_only_what_is_missing(drawn, monkeypatch):
    whole, _ = drawn("--batch", 2, "--out", "pictures")
    Path("pictures", "000002.png").unlink()                                     # killed while block 2 .. 3 was written
    Path("pictures", "000003.png").rename("pictures/000003.part")
    firsts, noise = [], diffusion.ImageNoise
    monkeypatch.setattr(diffusion, "ImageNoise", lambda seeds, *args: firsts.append(seeds) or noise(seeds, *args))
    again, _ = drawn("--batch", 2, "--out", "pictures")
    assert firsts == [data.image_seeds(0, range(2, 4))] and np.array_equal(whole, again)


def test_a_folder_takes_no_command_that_differs_in_anything(drawn, altered, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, **how: net)
    command = ["--ckpt", altered(), "--batch", 2, "--out", "pictures"]
    drawn(*command)
    for flags in ("--seed 1", "--cfg 3", "--steps 3", "--classes 1", "--sampler ddim", "--clip none", "--weights raw",
                  "--dtype bfloat16", "--n 7", "--batch 3", "--compile"):
        with pytest.raises(data.UserError, match="not of this very command"):
            drawn(*command, *flags.split())
            pytest.fail(f"it takes {flags}")
    whole = data.read_dict(command[1])
    next(iter(whole["ema"].values()))[0] += 1
    torch.save(whole, command[1])
    with pytest.raises(data.UserError, match="not of this very command"):
        drawn(*command)
    for config in (dict(schedule="linear"), dict(prediction="eps"), dict(clock="uvit"), dict(clip="none")):
        altered(**config)
        with pytest.raises(data.UserError, match="not of this very command"):
            drawn(*command)
            pytest.fail(f"it takes {config}")


def test_a_folder_is_of_the_weights_that_were_loaded_even_if_a_run_replaces_the_file(drawn, altered, monkeypatch):
    path, load = altered(), sample.load
    whole = data.read_dict(path)

    def slow(*args):
        return load(*args), torch.save(dict(whole, ema=whole["model"]), path)

    with monkeypatch.context() as m:
        m.setattr(sample, "load", lambda *args: slow(*args)[0])
        drawn("--ckpt", path, "--out", "pictures")
    with pytest.raises(data.UserError, match="not of this very command"):
        drawn("--ckpt", path, "--out", "pictures")


def test_a_folder_is_of_the_device_and_precision_that_auto_stands_for(drawn, monkeypatch):
    for chip in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(chip, "is_available", lambda: False)
    drawn("--out", "pictures")
    monkeypatch.setattr(sample, "fast_bfloat16", lambda device: False)
    drawn("--out", "pictures", "--device", "auto", "--dtype", "auto")
    monkeypatch.setattr(sample, "fast_bfloat16", lambda device: True)               # on another machine
    with pytest.raises(data.UserError, match="not of this very command"):
        drawn("--out", "pictures", "--device", "auto", "--dtype", "auto")


def test_a_folder_that_lacks_pictures_at_the_end_is_not_called_complete(drawn, monkeypatch):
    write = sample.write_picture                        # as on a node whose disk is another
    monkeypatch.setattr(sample, "write_picture", lambda path, picture: "3" in path.name or write(path, picture))
    with pytest.raises(data.UserError, match="pictures lacks 1 pictures, like 000003.png"):
        drawn("--out", "pictures")


def test_a_picture_that_cannot_be_written_is_named(drawn, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="cannot write pictures.00000[01].png: .*No space left on device"):
        drawn("--n", 2, "--out", "pictures")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no files")
def test_two_commands_at_once_in_one_folder_are_one_too_many(drawn):
    whole, _ = drawn("--out", "pictures")
    code = "import data; f = open('pictures/.asked.json', 'a'); data.lock(f); print(flush=True); input()"
    first = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()                             # it has the folder
    with pytest.raises(data.UserError, match="another command is drawing into pictures"):
        drawn("--out", "pictures")
    first.communicate(b"\n")
    assert np.array_equal(drawn("--out", "pictures")[0], whole)


def test_a_folder_in_which_nothing_was_drawn_takes_another_command(drawn, monkeypatch):
    def too_late(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(diffusion, "sample", too_late)
        drawn("--out", "pictures")
    assert len(drawn("--batch", 2, "--out", "pictures")[0]) == 6


def test_the_npz_holds_pictures_and_the_classes_asked_for(drawn):
    pictures, classes = drawn("--n", 27)
    assert pictures.shape == (27, 32, 32, 3) and pictures.dtype == np.uint8
    assert classes.tolist() == [*range(24), 0, 1, 2], "not class i mod 24"
    assert drawn("--classes", "3,5")[1].tolist() == [3, 5, 3, 5, 3, 5]


def test_each_picture_shows_its_class_and_guidance_leads_away_from_the_null_class(drawn, ckpt, monkeypatch):
    def level(y):                                       # classes are 3 grey levels apart at guidance 3
        return y / 120 - 0.1

    config = data.read_dict(ckpt)["config"]
    monkeypatch.setattr(sample, "load", lambda *args: (flat(level), config))
    pictures, classes = drawn("--n", 27, "--batch", 4, "--cfg", 3)
    wanted = data.to_uint8(3 * level(torch.from_numpy(classes)) - 2 * level(torch.tensor(24)))
    assert grey_levels(pictures, wanted.numpy()[:, None, None, None]) <= 1


def test_score_says_how_many_pictures_show_what_was_asked(drawn, capsys):
    pictures, classes = drawn("--score")
    score = data.score_shapes(pictures.transpose(0, 3, 1, 2), classes)
    assert f"of 6 pictures, {score['both']:.1f}% show the asked shape and colour" in capsys.readouterr().out


def test_each_scale_is_scored_by_its_own_pictures(ckpt, tmp_path, monkeypatch):
    scored, score = [], data.score_shapes
    monkeypatch.setattr(data, "score_shapes", lambda pictures, labels: scored.append(pictures) or score(pictures, labels))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(ckpt), "--out", str(tmp_path / "rows.png"),
                                      *"--cfg 1,4 --n 3 --score --device cpu".split()])
    sample.main()
    assert len(scored) == 2 and len(scored[0]) == len(scored[1]) == 3 and not np.array_equal(*scored)


@pytest.mark.parametrize("hip, mode", [(None, "reduce-overhead"), ("6.2", "default")])
def test_compile_is_asked_for_with_cuda_graphs_except_on_amd_and_what_is_compiled_draws(hip, mode, drawn, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "compile", lambda net, mode, dynamic: compiled.append((mode, dynamic)) or
                        (lambda *args: 0 * net(*args)))
    assert drawn()[0].any() and not compiled
    pictures, _ = drawn("--compile", "--clip", "none", "--sampler", "dpm", "--steps", 1)
    assert compiled == [(mode, False)]
    assert grey_levels(pictures, drawn("--clip", "none", "--steps", 1)[0]) > 2


def test_what_cannot_be_compiled_is_one_line(drawn, monkeypatch):
    class CompilerError(Exception):
        __module__ = "torch._inductor.exc"

    def fail(*args):
        raise CompilerError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda net, **how: fail)
    with pytest.raises(data.UserError, match="^torch.compile failed, so leave out --compile: no C.. compiler$"):
        drawn("--compile")


# ---- what a picture depends on ---------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_a_picture_is_the_same_in_another_batch(drawn, sampler):
    together, apart = (drawn("--sampler", sampler, "--steps", 8, "--batch", batch)[0] for batch in (6, 1))
    assert grey_levels(together, apart) <= 2, f"they differ by {grey_levels(together, apart)} grey levels"


def test_a_picture_is_the_same_to_the_last_bit_at_any_number_of_processes(drawn, ckpt, tmp_path):
    flags = ["--batch", 16, "--sampler", "em"]
    one, classes = drawn("--n", 64, *flags)
    command("sample.py", "--ckpt", ckpt, "--device", "cpu", "--dtype", "float32", *flags, "--npz", "two.npz",
            cwd=tmp_path, processes=2)
    with np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(two["arr_0"], one), f"they differ by {grey_levels(two['arr_0'], one)} grey levels"
        assert np.array_equal(two["arr_1"], classes)


@pytest.mark.parametrize("flags", [
    "--seed 1", "--classes 7", "--sampler em", "--sampler ddim", "--steps 3", "--cfg 1", "--cfg 9", "--clip none",
    "--clip dynamic", "--weights raw", "--dtype bfloat16"])
def test_a_flag_changes_the_pictures(drawn, flags):
    strong = ["--steps", 8, "--cfg", 50]                                        # so that there is something to clip
    plain, other = drawn(*strong)[0], drawn(*strong, *flags.split())[0]
    assert grey_levels(plain, other) > 0, f"{flags} changes nothing"


@pytest.mark.parametrize("config", [dict(schedule="linear"), dict(prediction="eps"), dict(clock="uvit")], ids=str)
def test_what_the_training_decided_changes_the_pictures(drawn, altered, config):
    strong = ["--steps", 8, "--cfg", 50]
    plain, other = drawn(*strong)[0], drawn(*strong, "--ckpt", altered(**config))[0]
    assert grey_levels(plain, other) > 0, f"{config} changes nothing"


def test_flags_that_are_not_given_are_those_of_the_training(drawn, ckpt):
    config = data.read_dict(ckpt)["config"]
    flags = [word for name, key in dict(sampler="sampler", steps="sample_steps", cfg="cfg", clip="clip").items()
             for word in ("--" + name, config[key])]
    assert grey_levels(drawn()[0], drawn(*flags)[0]) == 0, f"not {flags}"


# ---- checkpoints -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("weights, key", [("ema", "ema"), ("raw", "model")])
def test_load_gives_a_notebook_the_network_and_its_config(ckpt, weights, key):
    net, config = sample.load(ckpt, weights)
    whole = data.read_dict(ckpt)
    assert config == whole["config"] and not net.training
    assert all(torch.equal(value, whole[key][name]) for name, value in net.state_dict().items())
    assert net(torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([0, 24])).shape == (2, 3, 32, 32)


def test_the_newest_run_is_taken(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["newest", "older", "oldest"]):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "ckpt.pt").touch()
        os.utime(folder / "ckpt.pt", (1e9 - age, 1e9 - age))
    assert sample.newest_run() == Path("runs/newest/ckpt.pt")


def test_an_unconditional_model_takes_no_classes(drawn, altered):
    net = sample.UViT(img_size=32, **TINY["uvit"])
    path = altered(cond="none")
    torch.save(dict(data.read_dict(path), ema=net.state_dict()), path)
    assert drawn("--ckpt", path)[1] is None
    for flags in (["--classes", "1"], ["--cfg", 2], ["--score"]):
        with pytest.raises(data.UserError, match=flags[0]):
            drawn("--ckpt", path, *flags)


# ---- mistakes --------------------------------------------------------------------------------------------

def test_without_any_run_it_says_how_to_get_one(tmp_path):
    printed = command("sample.py", cwd=tmp_path, code=2)
    assert printed.startswith("error: ") and printed.count("\n") == 1 and "python train.py" in printed, printed
    assert not list(tmp_path.iterdir()), "it wrote something"


@pytest.mark.parametrize("flags, says", [
    ("--classes 24", "0..23"), ("--classes 3,-1", "0..23"), ("--classes red", "numbers, like 3,5"),
    ("--classes 3,,5", "numbers, like 3,5"), ("--n 0", "at least 1"), ("--batch 0", "at least 1"),
    ("--steps 0", "at least 1"), ("--seed -1", "not be negative"), ("--n many", "int"), ("--cfg much", "float"),
    ("--cfg nan", "--cfg"), ("--sampler euler", "em, ddim, dpm"), ("--clip hard", "none, static, dynamic"),
    ("--weights best", "ema, raw"), ("--device tpu", "auto, cpu, cuda, mps"),
    ("--dtype float16", "auto, float32, bfloat16"), ("--prompts cat", "--prompts cat"),
    ("--ckpt nowhere.pt", "nowhere.pt"), ("--npz samples.png", "ends in .npz")])
def test_a_mistake_in_a_flag_is_answered_by_what_is_allowed(drawn, flags, says):
    with pytest.raises(data.UserError) as mistake:
        drawn(*flags.split())
    assert says in str(mistake.value).replace("'", ""), f"{flags!r} is answered: {mistake.value}"
    assert not os.listdir(), "it wrote something"


def text(file, ckpt):
    file.write_text("not a checkpoint")


def nothing(file, ckpt):
    file.touch()


def truncated(file, ckpt):
    file.write_bytes(ckpt.read_bytes()[:ckpt.stat().st_size // 2])


def another_program(file, ckpt):
    torch.save(dict(state_dict={"weight": torch.zeros(3)}), file)


def with_another_config(file, ckpt):
    torch.save(dict(config=dict(lr=1), model={}, ema={}), file)


def a_list(file, ckpt):
    torch.save([1, 2], file)


def a_folder(file, ckpt):
    file.mkdir()


@pytest.mark.parametrize("write", [text, nothing, truncated, another_program, with_another_config, a_list, a_folder])
def test_a_file_that_is_no_checkpoint_is_one_message(drawn, ckpt, tmp_path, write):
    write(tmp_path / "wrong.pt", ckpt)
    with pytest.raises(data.UserError, match="wrong.pt") as mistake:
        drawn("--ckpt", "wrong.pt")
    assert not str(mistake.value).rstrip().endswith(":"), "it gives no reason"
    assert os.listdir() == ["wrong.pt"]


@pytest.mark.parametrize("config", [
    dict(model="unet"), dict(model="iuvit"), dict(model="vit"), dict(net=dict(TINY["uvit"], dim=64)),
    dict(net=dict(TINY["uvit"], width=64)), dict(cond="none"), dict(info=dict(size=64, classes=["a"], flip=False)),
    dict(sample_steps="many"), dict(drop=None)], ids=str)
def test_a_checkpoint_of_another_model_is_one_message(drawn, altered, config):
    with pytest.raises(data.UserError, match="altered.pt does not fit this code"):
        drawn("--ckpt", altered(**config))


def test_a_device_that_is_not_here_is_one_message(drawn, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(data.LocalError, match="no cuda on this machine.*there is cpu"):
        drawn("--device", "cuda")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(sample.pick_device("auto")) == "cuda:3" and chosen == ["cuda:3"]


def test_out_of_memory_is_one_message(drawn, monkeypatch):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sample, "draw", too_much)
    with pytest.raises(data.UserError, match=r"out of memory: use a smaller --batch \(now 64\)"):
        drawn()


def test_only_pictures_of_shapes_are_scored(drawn, altered):
    with pytest.raises(data.UserError, match="--score.*emoji64"):
        drawn("--ckpt", altered(data="emoji64"), "--score")


@pytest.mark.parametrize("flag", ["--out", "--npz"])
def test_a_place_that_cannot_be_written_to_is_one_message(drawn, tmp_path, flag):
    (tmp_path / "file").touch()
    with pytest.raises(data.UserError, match="file"):
        drawn(flag, "file/pictures.png" if flag == "--out" else "file/pictures.npz")


@pytest.mark.parametrize("flag", ["--out", "--npz"])
def test_a_folder_without_permission_is_known_before_anything_is_drawn(drawn, monkeypatch, flag):
    Path("closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")   # root may write anywhere
    monkeypatch.setattr(sample, "draw", lambda *args: pytest.fail("it draws"))
    with pytest.raises(data.UserError, match="no permission to write into closed"):
        drawn(flag, "closed/pictures" + (".png" if flag == "--out" else ".npz"))


def test_what_the_readme_says_of_notebooks_runs(ckpt):
    block, = [text for language, text in readme_blocks() if text.startswith("import torch, data, diffusion")]
    names = {}
    exec(block.replace("runs/unet-shapes/ckpt.pt", str(ckpt)), names)
    assert names["x"].shape == (4, 3, 32, 32) and names["x"].isfinite().all()


# ---- precision -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("amx, avx, vendor, fast", [
    (True, True, "GenuineIntel", True), (False, True, "GenuineIntel", False), (False, True, "AuthenticAMD", True),
    (False, False, "AuthenticAMD", False)])
def test_auto_is_bfloat16_on_cpus_that_multiply_it_fast(amx, avx, vendor, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    monkeypatch.setattr(sample.os.path, "exists", lambda path: True)
    monkeypatch.setattr(sample, "open", lambda path: io.StringIO(f"vendor_id : {vendor}"), raising=False)
    assert sample.fast_bfloat16(torch.device("cpu")) == fast
    assert not sample.fast_bfloat16(torch.device("mps"))


def test_a_precision_that_is_none_is_not_taken_for_bfloat16():
    for name in (torch.float32, "fp32", "float16"):
        with pytest.raises(AssertionError, match="'auto', 'float32' or 'bfloat16'"):
            sample.autocast(torch.device("cpu"), name)
