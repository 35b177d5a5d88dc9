"""Weights that others have published: U-ViT's files for pixels and ADM's, of reduced width and depth and of formula.

The reference numbers below were computed once by the authors' own code (U-ViT at commit ce55170, guided-diffusion at
22e0df8, Swin-Transformer at f82860b; PyTorch 2.13, one thread): their networks, with the arguments named here, loaded
by load_state_dict what `formula` makes of their state_dict's names and shapes, and were given the x, timestep numbers
and classes of `inputs`. With random weights the two also agreed to 1e-6 of the largest output for all four U-ViT files
at full size, and to 8e-6 for ADM's. No real file was at hand."""
import csv
import json
import math
import pickle
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
import diffusion
import sample
import train
from ascend import SwinLayer
from conftest import TINY, command
from test_sets import imagenet
from unet import UNet
from uvit import UViT


# ---- files of formula ------------------------------------------------------------------------------------

def hashed(name, shape):
    """Numbers in [-1, 1) that follow from a name and their index alone: 32-bit integers, the same everywhere."""
    h = np.arange(math.prod(shape), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):          # the rounds of Wellons' lowbias32
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    return torch.from_numpy((h ^ h >> np.uint32(16)).astype(np.float32) / 2**31 - 1).reshape(shape)


def formula(shapes):
    """{name: shape} -> {name: tensor}: gains around 1, biases around 0, matrices that keep the size of their input."""
    def values(name, shape):
        u = hashed(name, shape)
        if len(shape) == 1:
            return 0.3 * u + name.endswith("weight")
        return u if name in ("pos_embed", "label_emb.weight") else u * (3 / math.prod(shape[1:])) ** 0.5
    return {name: values(name, shape) for name, shape in shapes.items()}


def uvit_file(img_size=32, patch=2, dim=128, depth=2, classes=0, channels=3):
    """Names and shapes in a file of U-ViT's authors; depth as they count it, without the middle block."""
    tokens = (img_size // patch) ** 2 + (2 if classes else 1)
    shapes = {"pos_embed": (1, tokens, dim), "patch_embed.proj.weight": (dim, channels, patch, patch)}
    linear = {"norm": (dim,), "decoder_pred": (patch * patch * channels, dim),
              "final_layer": (channels, channels, 3, 3)}
    for side, n in (("in_blocks.", depth // 2), ("mid_block", 1), ("out_blocks.", depth // 2)):
        for i in range(n):
            block = side + str(i) if side.endswith(".") else side
            linear |= {f"{block}.norm1": (dim,), f"{block}.norm2": (dim,), f"{block}.attn.proj": (dim, dim),
                       f"{block}.mlp.fc1": (4 * dim, dim), f"{block}.mlp.fc2": (dim, 4 * dim)}
            linear |= {f"{block}.skip_linear": (dim, 2 * dim)} if side == "out_blocks." else {}
            shapes[f"{block}.attn.qkv.weight"] = (3 * dim, dim)
    shapes |= {"label_emb.weight": (classes, dim)} if classes else {}
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linear.items()} | {"patch_embed.proj.bias": (dim,)}


def adm_file(img_size=64, dim=128, blocks=1, mults=(1, 2, 3, 4), classes=0, channels=3):
    """Names and shapes in a file of ADM's authors, attention at 32, 16 and 8 pixels."""
    E, shapes = 4 * dim, {}

    def put(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def res(name, i, o):
        put(f"{name}.in_layers.0", i), put(f"{name}.in_layers.2", o, i, 3, 3), put(f"{name}.emb_layers.1", 2 * o, E)
        put(f"{name}.out_layers.0", o), put(f"{name}.out_layers.3", o, o, 3, 3)
        i == o or put(f"{name}.skip_connection", o, i, 1, 1)

    def attention(name, c):
        put(f"{name}.norm", c), put(f"{name}.qkv", 3 * c, c, 1), put(f"{name}.proj_out", c, c, 1)

    put("time_embed.0", E, dim), put("time_embed.2", E, E), put("input_blocks.0.0", dim, channels, 3, 3)
    shapes |= {"label_emb.weight": (classes, E)} if classes else {}
    c, size, skips = dim, img_size, [dim]
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            res(f"input_blocks.{len(skips)}.0", c, c := mult * dim)
            size in (32, 16, 8) and attention(f"input_blocks.{len(skips)}.1", c)
            skips.append(c)
        if level < len(mults) - 1:
            res(f"input_blocks.{len(skips)}.0", c, c)
            skips.append(c)
            size //= 2
    res("middle_block.0", c, c), attention("middle_block.1", c), res("middle_block.2", c, c)
    n = 0
    for level, mult in reversed(list(enumerate(mults))):
        for i in range(blocks + 1):
            res(f"output_blocks.{n}.0", c + skips.pop(), c := mult * dim)
            with_attention = size in (32, 16, 8)
            with_attention and attention(f"output_blocks.{n}.1", c)
            if level and i == blocks:
                res(f"output_blocks.{n}.{1 + with_attention}", c, c)
                size *= 2
            n += 1
    put("out.0", c), put("out.2", 6, c, 3, 3)
    return shapes


LSUN = dict(img_size=256, mults=(1, 1, 2, 2, 4, 4))
FILES = dict(                           # name: (who published it, the arguments of its reduced copy)
    cifar10_uvit_small=(uvit_file, dict(img_size=32, patch=2, dim=128, depth=4)),
    celeba64_uvit_small=(uvit_file, dict(img_size=64, patch=4, dim=192, depth=2)),
    imagenet64_uvit_mid=(uvit_file, dict(img_size=64, patch=4, dim=128, depth=2, classes=10)),
    adm_64x64_diffusion=(adm_file, dict(img_size=64, mults=(1, 2, 3, 4), classes=10)),
    adm_lsun_bedroom=(adm_file, LSUN))
each_file = pytest.mark.parametrize("name", FILES)


@pytest.fixture(scope="module")
def weights():
    """weights(name) is the content of one of FILES, made once."""
    made = {}

    def of(name):
        make, arguments = FILES[name]
        if name not in made:
            made[name] = formula(make(**arguments))
        return dict(made[name])

    return of


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    """file(name) is the path of one of FILES, written once and removed in the end: some are of 300 MB."""
    folder = tmp_path_factory.mktemp("published")

    def of(name):
        if not (folder / f"{name}.pth").exists():
            torch.save(weights(name), folder / f"{name}.pth")
        return folder / f"{name}.pth"

    yield of
    for path in folder.glob("*.pth"):
        path.unlink()


def inputs(size, classes):
    """x, timestep numbers and classes of two pictures; 64 pixels are enough for ADM's 256, whose layers convolve."""
    x = hashed("x", (2, 3, *[min(size, 64)] * 2)) * 3**0.5
    return x, torch.tensor([10.0, 700.0]), torch.tensor([3, 7]) if classes else None


def shown(out):
    """The numbers kept of pictures: one pixel a third of the way down the diagonal and the upper right corner, (2, 3)
    each, then the mean and the largest magnitude of all."""
    a = out.shape[2] // 3
    return [*out[:, :, a, a].flatten().tolist(), *out[:, :, 0, -1].flatten().tolist(), out.abs().mean().item(),
            out.abs().max().item()]


REFERENCE = dict(
    cifar10_uvit_small=[0.428299, -2.068731, -0.317064, 1.212576, -0.146379, -0.023182,
                        0.994538, -0.227228, -0.077597, -0.269647, 0.052188, -0.140041, 0.753134, 3.654977],
    celeba64_uvit_small=[0.8085, -1.554789, 1.22519, 1.128599, -1.050556, 0.336842,
                         -0.376624, 0.567535, 0.814109, 0.252683, -0.154333, 0.702795, 0.740996, 4.080764],
    imagenet64_uvit_mid=[-0.393186, 0.743023, -0.979054, -0.851725, -1.058859, -1.159971,
                         0.392001, -0.271431, 0.192794, 0.399727, -0.226092, 0.635324, 0.779726, 3.941045],
    adm_64x64_diffusion=[0.06005, 0.503084, 0.067459, 0.400651, 0.816407, 0.390126,
                         -0.272301, 0.251937, -0.058468, -0.063335, 0.161934, 0.381737, 0.435396, 1.993874],
    adm_lsun_bedroom=[0.051929, 0.554981, 0.746981, -1.050229, 0.613174, -0.267005,
                      -0.103831, 0.512598, -0.081756, -0.237644, 0.545231, 0.481853, 0.429995, 2.306519])


def close(name, numbers):
    """The largest difference from the reference, in units of the largest output."""
    return max(abs(a - b) for a, b in zip(numbers, REFERENCE[name], strict=True)) / REFERENCE[name][-1]


# ---- the same numbers as the authors' code ---------------------------------------------------------------

@each_file
def test_a_published_file_gives_the_numbers_of_its_authors_code(file, name):
    """The network at the authors' timestep numbers, and called with our t of the same noise: it sets its clock."""
    net, config = sample.load(file(name))
    x, number, y = inputs(config["info"]["size"], len(config["info"]["classes"]))
    ours = number / 999 if "uvit" in name else (number + 1) / 1000
    for call, t in ((net.forward, number / 1000), (net, ours)):
        worst = close(name, shown(call(x, t, *([] if y is None else [y]))))
        assert worst < 1e-4, f"they differ by {worst:.1e} of the largest"


@pytest.mark.parametrize("name", ["adm_64x64_diffusion", "adm_lsun_bedroom"])
def test_attention_in_the_other_order_would_load_and_be_wrong(file, monkeypatch, name):
    mults = FILES[name][1]["mults"]
    monkeypatch.setitem(sample.ADM_FILES[mults], "legacy", not sample.ADM_FILES[mults]["legacy"])
    net, config = sample.load(file(name))
    x, number, y = inputs(config["info"]["size"], len(config["info"]["classes"]))
    assert close(name, shown(net.forward(x, number / 1000, *([] if y is None else [y])))) > 0.01


@pytest.mark.parametrize("shift, reference", [
    (0, [0.456318, 0.605146, -0.875651, 0.87594, 0.005045, -0.928034, 0.900043]),
    (2, [0.114833, -0.983613, 0.111055, 1.224534, -0.510258, -1.365096, 0.928662])])
def test_a_swin_layer_gives_the_numbers_of_the_published_block(shift, reference):
    """SwinTransformerBlock(32, (8, 8), 2, window_size=4, shift_size=shift): they mask by -100, we by -inf."""
    layer = SwinLayer(32, head_dim=16, size=8, window=4, shift=shift, emb_dim=1, dropout=0.0)
    ours = {"attn.relative_position_bias_table": "attn.bias", "mlp.fc1.": "fc1.", "mlp.fc2.": "fc2."}
    theirs = {name: name for name in layer.state_dict()}
    for old, new in ours.items():
        theirs = {name: there.replace(new, old) for name, there in theirs.items()}
    made = formula({theirs[name]: tuple(p.shape) for name, p in layer.state_dict().items()})
    layer.load_state_dict({name: made[theirs[name]] for name in theirs})
    with torch.no_grad():
        nn.init.zeros_(layer.scale_shift.weight), nn.init.zeros_(layer.scale_shift.bias)      # Swin knows no time
        layer.attn.bias.copy_(3 * hashed("table", (49, 2)))
        out = layer(hashed("x", (1, 8, 8, 32)), torch.zeros(1, 1))
    numbers = [*out[0, 0, 0, :3].tolist(), *out[0, 5, 7, :3].tolist(), out.abs().mean().item()]
    assert numbers == pytest.approx(reference, rel=1e-4, abs=1e-5)


# ---- sizes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, arguments, theirs, ours", [
    (uvit_file, dict(img_size=32, patch=2, dim=512, depth=12), 44_255_328, 44_255_328),
    (uvit_file, dict(img_size=64, patch=4, dim=512, depth=12), 44_292_228, 44_292_228),
    (uvit_file, dict(img_size=64, patch=4, dim=768, depth=16, classes=1000), 130_940_292, 130_941_060),
    (uvit_file, dict(img_size=64, patch=4, dim=1024, depth=20, classes=1000), 286_827_652, 286_828_676),
    (adm_file, dict(dim=192, blocks=3, classes=1000), 295_904_454, 295_900_035),
    (adm_file, dict(LSUN, dim=256, blocks=2), 552_814_086, 552_807_171),
    (adm_file, dict(LSUN, dim=256, blocks=2, classes=1000), 553_838_086, 553_832_195)])
def test_every_published_size_is_recognised_and_counts_exactly(make, arguments, theirs, ours):
    """Ours have a null class more, and the three channels less that predict ADM's variance."""
    with torch.device("meta"):
        whole = {name: torch.empty(shape) for name, shape in make(**arguments).items()}
        assert sum(p.numel() for p in whole.values()) == theirs
        model, reader = (UViT, sample.read_uvit) if make is uvit_file else (UNet, sample.read_adm)
        found, state, _ = reader(whole)
        model(**found).load_state_dict(state, assign=True)
    assert sum(p.numel() for p in state.values()) == ours


# ---- time ------------------------------------------------------------------------------------------------

class Recorder(nn.Module):
    def forward(self, x, t, *cond):
        self.number = 1000 * t                          # what timestep_embedding makes of it
        return x


@pytest.mark.parametrize("clock, times, numbers", [
    ("plain", [0.001, 0.5, 1.0], [1, 500, 1000]),
    # U-ViT: continuous t in [0, 1], nnet(xt, t * 999); its Euler-Maruyama ends at t = 1e-3
    ("uvit", [0.0, 0.001, 0.25, 0.5, 1.0], [0, 0.999, 249.75, 499.5, 999]),
    # ADM: step i of 0 .. 999 has seen i + 1 of the thousand betas, so it is our t = (i + 1) / 1000
    ("adm", [0.0, 0.0005, 0.001, 0.002, 0.5, 1.0], [0, 0, 0, 1, 499, 999])])
def test_a_clock_gives_the_network_the_numbers_of_the_original_scripts(clock, times, numbers):
    net = sample.on_clock(Recorder(), clock)
    net(torch.zeros(len(times), 1), torch.tensor(times), torch.zeros(len(times)))
    torch.testing.assert_close(net.number, torch.tensor(numbers, dtype=torch.float32), rtol=1e-6, atol=1e-4)


def test_a_network_with_a_clock_is_pickled_and_takes_t_by_name():
    net = pickle.loads(pickle.dumps(sample.on_clock(Recorder(), "uvit")))
    net(torch.zeros(1, 1), t=torch.ones(1))
    assert net.number == 999


def adm_betas(schedule):
    """The thousand betas of guided-diffusion, float64."""
    if schedule == "linear":
        return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in zip(abar, abar[1:])], dtype=torch.float64)


@pytest.mark.parametrize("schedule, limit", [("linear", 1e-3), ("cosine", 1e-8)])
def test_the_noise_of_adm_in_step_i_is_ours_at_t_of_i_plus_one(schedule, limit):
    abar = torch.cumprod(1 - adm_betas(schedule), 0)

    def off(shift):                                     # in alpha^2, if step i were our t = (i + 1 + shift) / 1000
        times = [min(1, (i + 1 + shift) / 1000) for i in range(1000)]
        ours = [diffusion.SCHEDULES[schedule].alpha(t) ** 2 for t in times]
        return (torch.tensor(ours, dtype=torch.float64) - abar).abs().max().item()

    assert off(0) < limit < 1.5e-3 < min(off(-1), off(1)), [off(-1), off(0), off(1)]


# ---- from a file to pictures, and on -----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["cifar10_uvit_small", "imagenet64_uvit_mid"])
def test_a_published_file_is_drawn_from_by_its_name_alone(file, tmp_path, name):
    printed = command("sample.py", "--ckpt", file(name), *"--n 2 --steps 3 --npz drawn.npz".split(), cwd=tmp_path)
    with np.load(tmp_path / "drawn.npz") as npz:
        size = 32 if "cifar" in name else 64
        assert npz["arr_0"].shape == (2, size, size, 3) and npz["arr_0"].std() > 1, printed
        assert ("arr_1" in npz) == ("imagenet" in name)


@each_file
def test_pictures_of_every_format_go_through_sampling(file, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(file(name)), *"--n 1 --steps 1 --device cpu".split(),
                                      *"--dtype float32 --npz drawn.npz --clip none".split()])
    sample.main()
    with np.load("drawn.npz") as npz:
        assert npz["arr_0"].shape == (1, *[FILES[name][1]["img_size"]] * 2, 3) and npz["arr_0"].std() > 1
        assert ("arr_1" in npz) == ("classes" in FILES[name][1])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A --data-dir of drawn shapes, of 32 and of 64 pixels."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    for name in ("shapes", "shapes64"):
        data.prepare(name, folder, limit=48)
    return folder


@pytest.fixture
def tuned(sets, tmp_path, monkeypatch):
    """tuned(file, "--lr", 1) is `python train.py --init-from FILE --lr 1`, in this process, in an empty folder: one
    step of two pictures into run/, unless told otherwise. Returns the checkpoint."""
    monkeypatch.chdir(tmp_path)

    def run(path, *flags):
        argv = ["--init-from", path, "--data-dir", sets, "--out", "run", "--steps", 1, "--batch", 2, "--samples", 2,
                "--sample-steps", 1, "--log-every", 1, "--device", "cpu", "--dtype", "float32", *flags]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        train.main()
        return data.read_dict("run/ckpt.pt")

    return run


def logged():
    with open("run/log.csv") as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


@pytest.mark.parametrize("name, pictures", [
    ("cifar10_uvit_small", "shapes"), ("celeba64_uvit_small", "shapes64"), ("imagenet64_uvit_mid", "shapes64")])
def test_training_goes_on_from_a_file_and_needs_it_no_more(file, tuned, tmp_path, name, pictures):
    mine = tmp_path / "mine.pth"
    mine.write_bytes(file(name).read_bytes())
    ckpt = tuned(mine, "--data", pictures, "--lr", 1e-30)               # a rate that moves nothing
    config, (_, whole, _) = ckpt["config"], sample.read_uvit(torch.load(mine))
    anew = {"class_embed.weight"} if "imagenet" in name else set()      # 10 classes there, 24 here
    moved = {key for key, p in ckpt["ema"].items() if p.shape != whole[key].shape or not torch.allclose(p, whole[key])}
    assert moved == anew
    assert (config["schedule"], config["prediction"], config["clock"]) == ("linear", "eps", "uvit")
    mine.unlink()
    assert tuned(mine, "--data", pictures, "--lr", 1e-30, "--steps", 2)["step"] == 2
    net, config = sample.load("run/ckpt.pt")
    assert config["clock"] == "uvit" and net._forward_pre_hooks


def test_numbered_classes_are_those_of_a_set_of_as_many(tuned, tmp_path):
    torch.save(formula(uvit_file(img_size=64, patch=4, classes=24)), tmp_path / "mine.pth")
    rows = tuned(tmp_path / "mine.pth", "--data", "shapes64", "--lr", 1e-30)["ema"]["class_embed.weight"]
    torch.testing.assert_close(rows, sample.read(tmp_path / "mine.pth")[1]["class_embed.weight"])


@pytest.mark.parametrize("listed", [True, False])
def test_classes_of_imagenet_are_those_of_a_file_only_if_their_order_is_known(tuned, tmp_path, capsys, listed):
    torch.save(formula(uvit_file(img_size=64, patch=4, classes=1000)), tmp_path / "mine.pth")
    (tmp_path / "src").mkdir()
    imagenet(tmp_path / "src")
    if listed:
        (tmp_path / "src" / "map_clsloc.txt").write_text("".join(f"n{i:08} {i} thing\n" for i in range(1, 1001)))
    data.prepare("imagenet64", tmp_path, src=tmp_path / "src")
    rows = tuned(tmp_path / "mine.pth", "--data", "imagenet64", "--data-dir", tmp_path, "--lr", 1e-30)["ema"]
    published = sample.read(tmp_path / "mine.pth")[1]
    assert torch.allclose(rows["class_embed.weight"], published["class_embed.weight"]) == listed
    assert ("the embedding of the 1000 classes starts anew" in capsys.readouterr().out) == (not listed)


@pytest.mark.parametrize("name", ["adm_64x64_diffusion", "adm_lsun_bedroom"])
def test_adm_goes_on_at_another_size_with_attention_at_the_same_levels(file, tuned, monkeypatch, capsys, name):
    path, save = file(name), torch.save                                 # its checkpoint would be of a gigabyte
    monkeypatch.setattr(torch, "save", lambda whole, f: save(dict(config=whole["config"]), f))
    config = tuned(path, "--data", "shapes", "--cond", "class")["config"]
    assert config["net"]["attn_sizes"] == ([16, 8, 4] if "64x64" in name else [4, 2, 1])
    assert len(logged()) == 1 and math.isfinite(logged()[0])
    assert "the embedding of the 24 classes starts anew" in capsys.readouterr().out


def test_the_first_loss_is_that_of_the_network_in_the_file(file, tuned, sets):
    """With the file's schedule and clock, the latter seen by calling the network's forward itself."""
    tuned(file("cifar10_uvit_small"))
    g = torch.Generator().manual_seed(data.seed32(0, 0))
    t, eps = diffusion.draw_times(2, generator=g), torch.randn(2, 3, 32, 32, generator=g)
    x0 = data.Batches(data.open_set("shapes", sets), 2, range(2), 0, False)[0][0].float() / 127.5 - 1
    net, _ = sample.load(file("cifar10_uvit_small"))

    def loss(clock):
        linear = diffusion.SCHEDULES["linear"]
        return diffusion.loss(lambda x, t: net.forward(x, clock(t)), x0, t, eps, linear).mean().item()

    assert logged()[0] == pytest.approx(loss(lambda t: 0.999 * t), rel=1e-5)
    assert logged()[0] != pytest.approx(loss(lambda t: t), rel=1e-5), "the clock changes nothing here"


def test_guidance_waits_for_a_null_class(file, tuned, monkeypatch):
    def draw(path):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(path), *"--cfg 2 --n 1 --steps 1".split()])
        sample.main()

    path = file("imagenet64_uvit_mid")
    assert not sample.read_uvit(torch.load(path))[1]["class_embed.weight"][10].any()
    with pytest.raises(data.UserError, match="--cfg needs a model .*train.py --init-from` trains it so"):
        draw(path)
    tuned(path, "--data", "shapes64", "--cfg", 1, "--drop", 0)
    with pytest.raises(data.UserError, match="--cfg needs a model"):
        draw("run/ckpt.pt")
    tuned(path, "--data", "shapes64", "--fresh")                                # --drop 0.1
    draw("run/ckpt.pt")


def test_weights_that_do_not_fit_are_refused_before_there_is_a_folder(file, tuned):
    with pytest.raises(data.UserError, match="pos_embed .1, 257, 128., not .1, 258, 128."):
        tuned(file("cifar10_uvit_small"), "--cond", "class")                    # a token more
    assert not Path("run").exists()


def test_our_own_checkpoint_is_a_start_with_all_its_classes(sets, tuned, monkeypatch):
    argv = ["train.py", *"--model unet --steps 1 --batch 2 --samples 2 --sample-steps 1 --device cpu --out old".split(),
            "--data-dir", sets, "--net", json.dumps(dict(TINY["unet"], attn_sizes=[]))]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    old, new = data.read_dict("old/ckpt.pt"), tuned("old/ckpt.pt", "--lr", 1e-30, "--drop", 0.5)
    assert all(torch.allclose(p, old["ema"][name]) for name, p in new["ema"].items())
    for field in ("model", "net", "schedule", "prediction", "clock", "cond"):
        assert new["config"][field] == old["config"][field]
    assert new["step"] == 1 and new["config"]["drop"] == 0.5 and new["config"]["lr"] == 1e-30
    Path("run").rename("same-size")
    assert tuned("old/ckpt.pt", "--data", "shapes64")["config"]["info"]["size"] == 64


# ---- refusals --------------------------------------------------------------------------------------------

def change(whole, **entries):
    """A copy of a file with some entries replaced, or left out where None; __ in a name is a dot."""
    whole = {**whole, **{name.replace("__", "."): value for name, value in entries.items()}}
    return {name: p for name, p in whole.items() if p is not None}


@pytest.mark.parametrize("name", ["celeba64_uvit_small", "adm_lsun_bedroom"])
def test_a_file_must_hold_exactly_the_weights_of_its_network(weights, name, monkeypatch):
    whole = weights(name)
    part = next(key for key in whole if key.endswith("norm2.weight" if "uvit" in name else "norm.weight"))
    for bad, says in ((change(whole, surprise=torch.zeros(3)), r"surprise \(3,\), not expected"),
                      ({k: p for k, p in whole.items() if k != part}, "is missing, not"),
                      ({**whole, part: torch.zeros(7)}, r"\(7,\), not \(")):
        monkeypatch.setattr(data, "read_dict", lambda path: bad)
        with pytest.raises(data.UserError, match="1 do not fit: .*" + says):
            sample.load(f"{name}.pth")


def meta(make, **arguments):
    return {name: torch.empty(*map(int, shape), device="meta") for name, shape in make(**arguments).items()}


FOUR = dict(img_size=64, patch=4, dim=128, channels=4)
REFUSED = {
    "a text-to-image U-ViT": lambda: {**meta(uvit_file, **FOUR), "context_embed.weight": torch.zeros(128, 768)},
    "4 channels are latents": lambda: meta(uvit_file, dim=1024, classes=1001, channels=4),
    "with an MLP for time": lambda: {**meta(uvit_file), "time_embed.0.weight": torch.zeros(512, 128)},
    "U-ViT for 128x128, 3 channels, patches of 8, 0 classes, width 128": lambda: meta(uvit_file, img_size=128, patch=8),
    "a U-ViT for 32x32, 3 channels, patches of 2, 0 classes, width 100": lambda: meta(uvit_file, dim=100),
    "a U-ViT for 32x32, 3 channels, patches of 2, 10 classes": lambda: meta(uvit_file, classes=10),
    "mid_block.ffn.fc1.bias is missing": lambda: change(meta(uvit_file), mid_block__mlp__fc1__bias=None),
    "128x128_diffusion, whose heads": lambda: meta(adm_file, img_size=128, dim=256, blocks=2, mults=(1, 1, 2, 3, 4)),
    "512x512_diffusion": lambda: meta(adm_file, img_size=512, dim=256, blocks=2, mults=(0.5, 1, 1, 2, 2, 4, 4)),
    "none of ADM's published files": lambda: meta(adm_file, img_size=64, mults=(1, 2, 2, 2)),
    "a super-resolution network of ADM": lambda: meta(adm_file, dim=192, channels=6),
    "a classifier of ADM": lambda: {k: p for k, p in meta(adm_file).items() if not k.startswith("output_blocks")},
    "improved-diffusion's do": lambda: {**meta(adm_file), "input_blocks.2.0.op.weight": torch.zeros(128, 128, 3, 3)},
    "width 64 does not divide into heads of 64 and 32 group norms": lambda: meta(adm_file, dim=64),
    "it holds a DiT": lambda: {"x_embedder.proj.weight": torch.zeros(3), "pos_embed": torch.zeros(3)},
    "it holds entries like module.pos_embed": lambda: {f"module.{name}": p for name, p in meta(uvit_file).items()},
    "it holds another program's checkpoint": lambda: dict(state_dict=meta(uvit_file), epoch=3),
    "it is damaged": lambda: change(meta(uvit_file), pos_embed=3),
    "it is damaged: TypeError": lambda: change(meta(uvit_file), label_emb__weight=3)}


@pytest.mark.parametrize("says", REFUSED)
def test_another_network_is_refused_by_a_line_that_says_what_it_is(tmp_path, says):
    torch.save(REFUSED[says](), tmp_path / "other.pth")
    with pytest.raises(data.UserError) as refusal:
        sample.load(tmp_path / "other.pth")
    assert says in str(refusal.value) and "\n" not in str(refusal.value), refusal.value


def test_a_published_file_has_one_set_of_weights(file):
    with pytest.raises(data.UserError, match="leave out --weights raw"):
        sample.load(file("cifar10_uvit_small"), "raw")


class Mischief:
    def __reduce__(self):
        return print, ("this ran",)


def pickled(protocol):
    return lambda what, path: path.write_bytes(pickle.dumps(what, protocol=protocol))


@pytest.mark.parametrize("write", [torch.save, pickled(2), pickled(4)])
def test_a_file_that_would_run_code_is_refused_without_running_it(tmp_path, capsys, recwarn, write):
    write(dict(trap=Mischief()), tmp_path / "trap.pth")
    with pytest.raises(data.UserError, match="trap.pth: (it holds [a-z.]*print, |torch.save did not write)") as error:
        sample.load(tmp_path / "trap.pth")
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert "this ran" not in capsys.readouterr().out and not recwarn


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    torch.save(dict(trap=Mischief()), tmp_path / "trap.pth")
    printed = command("sample.py", "--ckpt", "trap.pth", cwd=tmp_path, code=2)
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed


@pytest.mark.parametrize("flags, says", [
    ("--model unet", "--model 'unet' asked, 'uvit' there"), ("--schedule cosine", "--schedule 'cosine' asked"),
    ("--prediction v", "--prediction 'v' asked, 'eps' there"), ("--clock plain", "--clock 'plain' asked, 'uvit' there"),
    ('--net {"dim":64}', "--net dim 64 asked, 128 there"), ('--net {"width":64}', "--net width 64 asked, None there"),
    ("--preset unet-shapes", "--model 'unet' asked, 'uvit' there"),
    ("--data shapes64", "is of 32x32 pictures and shapes64 of 64x64: a uvit keeps its size")])
def test_what_the_weights_decide_cannot_be_asked_otherwise(file, tuned, flags, says):
    with pytest.raises(data.UserError) as refusal:
        tuned(file("cifar10_uvit_small"), *flags.split())
    assert says in str(refusal.value) and not Path("run").exists(), refusal.value


def test_a_preset_gives_the_training_and_the_file_the_network(file):
    argv = ["--init-from", str(file("cifar10_uvit_small")), "--preset", "uvit-shapes"]
    config = train.parse(argv)[0]
    row = train.PRESETS["uvit-shapes"]
    assert (config.lr, config.batch) == (row["lr"], row["batch"])
    assert config.net["dim"] == 128 and config.schedule == "linear" and config.cond == "none"
    assert config.out == "runs/shapes-from-cifar10_uvit_small"
    assert train.parse(argv[:2])[0].lr == train.FINE_TUNE["lr"]
