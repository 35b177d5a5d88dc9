"""The four backbones: what they count, what they read, and that their parts do what their names say."""
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import ascend
import data
import diffusion
import train
import unet
from ascend import ASCEND, PatchExpand, PatchMerge, SwinBlock, SwinLayer, WindowAttention, attend, attend_biased
from conftest import TINY
from iuvit import CrossAttention, DWConvFFN, IUBlock, IUViT, MLP
from unet import GroupNorm, ResBlock, SpatialAttention, UNet, timestep_embedding
from uvit import Attention, Block, UViT

MODELS = dict(unet=UNet, uvit=UViT, iuvit=IUViT, ascend=ASCEND)
CLASS, TEXT = dict(num_classes=3), dict(text_dim=8)
each_model = pytest.mark.parametrize("model", MODELS)
each_condition = pytest.mark.parametrize("condition", [{}, CLASS, TEXT], ids=["unconditional", "class", "text"])

# the choices that are not the default: (model, arguments, parameters of the CIFAR-10 model, which parts change)
CHOICES = [
    ("unet", dict(resample="conv"), 38_307_203, "encoder decoder"),
    ("iuvit", dict(head="linear"), 45_153_376, "to_pixels head"),
    ("iuvit", dict(ffn="mlp"), 44_777_859, "ffn"),
    ("iuvit", dict(head="linear", ffn="mlp"), 44_780_640, "to_pixels head ffn"),
    ("ascend", dict(encoder="conv"), 39_625_603, "encoder"),
    ("ascend", dict(decoder="swin"), 54_605_327, "decoder"),
    ("ascend", dict(encoder="conv", decoder="swin"), 46_192_855, "encoder decoder"),
    ("ascend", dict(skips=False), 41_345_723, "decoder"),
    ("ascend", dict(resample="merge"), 46_323_003, "encoder decoder"),
    ("iuvit", dict(text_dim=1024, text_attn="concat"), 52_754_307, "attn cross norm_text")]


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def count(net):
    return sum(p.numel() for p in net.parameters())


def awake(model, **net):
    """A tiny network with every parameter moved off its start: an output that begins at zero proves nothing."""
    net = MODELS[model](**{**TINY[model], "img_size": 16, **net}).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net


def inputs(B=4, size=16, num_classes=0, text_dim=0, **_):
    """x, t and the condition of a batch; among the classes is the null one, texts have 1 to 5 tokens and a padding."""
    x, t = torch.randn(B, 3, size, size), torch.rand(B)
    if num_classes:
        return x, t, torch.arange(B) % (num_classes + 1)
    if text_dim:
        return x, t, torch.randn(B, 6, text_dim), torch.arange(6) < (torch.arange(B) % 5 + 1)[:, None]
    return x, t


def difference(a, b):
    """The largest difference of two tensors, in units of the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- size and shape ----------------------------------------------------------------------------------

@pytest.mark.parametrize("model, parameters", [
    ("unet", 42_855_427), ("uvit", 44_255_328), ("iuvit", 45_150_595), ("ascend", 48_038_075)])
def test_parameter_count_is_exact_and_the_docstring_knows_it(model, parameters):
    with torch.device("meta"):
        assert count(MODELS[model]()) == parameters
    assert f"{parameters:,}" in MODELS[model].__doc__


@each_model
def test_heads_and_dropout_which_no_count_can_see_are_those_of_the_papers_unless_told_otherwise(model):
    with torch.device("meta"):
        net = MODELS[model]()
    if model in ("uvit", "iuvit"):
        assert net.mid_block.attn.heads == 8
    else:
        assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.1}


@pytest.mark.parametrize("model, choice, parameters, parts", CHOICES)
def test_a_choice_changes_the_parts_it_names_and_nothing_else(model, choice, parameters, parts):
    with torch.device("meta"):
        usual = MODELS[model](text_dim=choice.get("text_dim", 0))
        other = MODELS[model](**choice)
    assert count(other) == parameters
    shapes = [{(name, p.shape) for name, p in net.named_parameters()} for net in (usual, other)]
    changed = {name for name, _ in shapes[0] ^ shapes[1]}
    assert all(set(name.split(".")) & set(parts.split()) for name in changed)
    assert all(any(part in name.split(".") for name in changed) for part in parts.split())


def test_with_the_old_head_and_ffn_iuvit_is_uvit_with_an_mlp_for_time():
    net, old = dict(dim=32, depth=5, heads=2, num_classes=3), UViT(dim=32, depth=5, heads=2, num_classes=3)
    new = IUViT(**net, head="linear", ffn="mlp")
    assert count(new) - count(old) == 2 * (32 * 32 + 32)
    new.time_embed = nn.Identity()
    new.load_state_dict(old.state_dict())
    x, t, y = inputs(size=32, **CLASS)
    torch.testing.assert_close(new(x, t, y), old(x, t, y))


@each_model
def test_classes_cost_one_embedding_each_and_one_for_the_null_class(model):
    with torch.device("meta"):
        three, four = (count(MODELS[model](num_classes=n)) for n in (3, 4))
        width = MODELS[model](num_classes=3).class_embed.weight.shape
    assert width[0] == 3 + 1 and four - three == width[1]


@each_model
@each_condition
def test_output_is_a_float32_picture_like_the_input(model, condition):
    x, *rest = inputs(**condition)
    out = awake(model, **condition)(x, *rest)
    assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all()


@each_model
@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_may_have_other_channels_than_three(model, channels):
    x, t = torch.randn(2, channels, 16, 16), torch.rand(2)
    assert awake(model, channels=channels)(x, t).shape == x.shape


@each_model
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float16], ids=str)
def test_times_that_are_step_numbers_or_rounded_are_refused(model, dtype):
    with pytest.raises(AssertionError, match=r"t is in \[0, 1\], as float32"):
        awake(model)(torch.randn(2, 3, 16, 16), torch.ones(2).to(dtype))


@each_model
@each_condition
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_a_network_may_be_turned_into_another_precision(model, condition, dtype, tolerance):
    """As people do who copy one file: net.bfloat16(), with pictures and text of that type, and times in float32."""
    net, batch = awake(model, **condition), inputs(**condition)
    whole = net(*batch)
    x, t, *rest = batch
    other = [part.to(dtype) if part.is_floating_point() else part for part in rest]
    assert difference(net.to(dtype)(x.to(dtype), t, *other).float(), whole) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_layer_norm_lose_no_terms_of_a_long_sum(dtype):
    """As many as a batch of 16 has positions, in bfloat16, by weights of float32 (autocast) and of bfloat16."""
    norm = ascend.LayerNorm(8).to(dtype)
    norm(torch.randn(16, 1024, 8).bfloat16()).float().sum().backward()
    torch.testing.assert_close(norm.bias.grad.float(), torch.full((8,), 16384.0))


@pytest.mark.parametrize("model, size, message", [
    ("uvit", (8, 32), r"pictures have \(8, 32\) pixels, and img_size is 16"),
    ("iuvit", (17, 17), r"pictures have \(17, 17\) pixels, and img_size is 16"),
    ("ascend", (32, 32), r"pictures have \(32, 32\) pixels, and img_size is 16"),
    ("unet", (16, 17), "each side must be a multiple of"), ("unet", (17, 16), "each side must be a multiple of")])
def test_a_picture_of_another_size_is_refused(model, size, message):
    with pytest.raises(AssertionError, match=message):
        awake(model)(torch.randn(2, 3, *size), torch.rand(2))


@pytest.mark.parametrize("model, img_size, net", [
    ("unet", 16, dict(attn_sizes=[])), ("ascend", 16, dict(attn_sizes=[])),
    ("unet", 6, {}), ("unet", 24, {}), ("unet", 50, {}),
    ("uvit", 8, {}), ("uvit", 40, {}),
    ("iuvit", 8, {}), ("iuvit", 40, {}),
    ("ascend", 2, {}), ("ascend", 48, {}), ("ascend", 12, dict(window=3)), ("ascend", 20, dict(window=5))])
def test_any_square_size_that_divides_is_accepted(model, img_size, net):
    x, t = inputs(size=img_size)
    out = awake(model, img_size=img_size, **net)(x, t)
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("model, net, message", [
    ("unet", dict(img_size=36), "must be a multiple of 8"),
    ("unet", dict(head_dim=48), "256 channels do not divide into heads of 48"),
    ("unet", dict(resample="stride"), "not 'stride'"),
    ("unet", dict(dim_mults=[]), "dim_mults [] must not be empty"),
    ("unet", dict(dim=33), "dim 33 be even"),
    ("uvit", dict(img_size=33), "img_size 33 does not divide into patches of 2"),
    ("uvit", dict(depth=12), "depth 12"),
    ("uvit", dict(depth=-1), "depth -1"),
    ("uvit", dict(dim=63, heads=7), "width 63 is half cosines"),
    ("uvit", dict(heads=7), "width 512 does not divide into 7 heads"),
    ("iuvit", dict(img_size=33), "img_size 33 does not divide into patches of 2"),
    ("iuvit", dict(depth=12), "depth 12"),
    ("iuvit", dict(depth=-1), "depth -1"),
    ("iuvit", dict(img_size=36, patch_size=3), "to divide by patch_size^2 = 9"),
    ("ascend", dict(img_size=36), "must be a multiple of 8"),
    ("ascend", dict(dim_mults=[]), "dim_mults [] must not be empty"),
    ("ascend", dict(num_blocks=-1), "num_blocks -1 must not be negative"),
    ("unet", dict(num_blocks=-1), "num_blocks -1 must not be negative"),
    ("ascend", dict(img_size=40), "a 20x20 map does not divide into windows of 8"),
    ("ascend", dict(head_dim=48), "128 channels do not divide into heads of 48")])
def test_sizes_that_do_not_divide_say_so(model, net, message):
    with torch.device("meta"), pytest.raises(AssertionError) as error:
        MODELS[model](**net)
    assert message in str(error.value)


# ---- before and after the first step -----------------------------------------------------------------

@pytest.mark.parametrize("model", ["unet", "iuvit", "ascend"])
def test_first_loss_is_one_because_the_output_starts_at_zero(model):
    x, t = inputs(B=16)
    eps = torch.randn_like(x)
    net = MODELS[model](**TINY[model], img_size=16)
    first = diffusion.loss(net, x, t, eps, diffusion.SCHEDULES["linear"]).mean().item()
    assert first == pytest.approx(1, abs=5 * math.sqrt(2 / eps.numel()))        # 5 standard errors of a mean of squares
    assert first == pytest.approx(eps.square().mean().item())


def test_first_loss_of_uvit_is_a_little_above_one_as_published():
    x, t = inputs(size=32)
    with torch.no_grad():
        first = diffusion.loss(UViT(), x, t, torch.randn_like(x), diffusion.SCHEDULES["linear"]).mean()
    assert 1.0 < first < 1.2, f"the first loss is {first:.3f}"


@pytest.mark.parametrize("file", [unet, ascend])
def test_branches_start_at_zero_so_that_a_new_block_returns_its_input(file):
    x, emb, text, mask = torch.randn(2, 32, 4, 4), torch.randn(2, 8), torch.randn(2, 5, 8), torch.ones(2, 5) > 0
    assert torch.equal(file.ResBlock(32, 32, emb_dim=8)(x, emb), x)
    assert torch.equal(file.SpatialAttention(32, head_dim=16)(x), x)
    assert torch.equal(file.TextAttention(32, head_dim=16, text_width=8)(x, text, mask), x)


@pytest.mark.parametrize("model, choice", [("uvit", {}), ("iuvit", {}), ("iuvit", dict(head="linear", ffn="mlp"))])
def test_linear_layers_and_places_of_the_transformers_start_small_as_published(model, choice):
    net = MODELS[model](dim=128, depth=3, heads=2, text_dim=64, **choice)       # 10% are 5 standard errors, or more
    linear = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    for name, p in {**{name: m.weight for name, m in linear.items()}, "pos_embed": net.pos_embed}.items():
        assert p.std().item() == pytest.approx(0.02, rel=0.1) and abs(p.mean().item()) < 0.005, name
    assert not any(m.bias.any() for m in linear.values() if m.bias is not None)


@pytest.mark.parametrize("model, choice, random", [
    ("uvit", {}, True), ("iuvit", dict(head="linear"), True), ("iuvit", {}, False)])
def test_classes_start_at_unit_scale_and_a_head_behind_a_linear_layer_not_at_zero(model, choice, random):
    net = MODELS[model](dim=128, depth=3, heads=2, num_classes=99, **choice)
    assert bool(net.head.weight.any()) == random
    assert net.class_embed.weight.std().item() == pytest.approx(1, rel=0.1)


def assert_every_parameter_gets_a_gradient(model, net):
    batch, net = inputs(**net), awake(model, **net)
    net(*batch).square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle, f"no gradient reaches {idle}"


@each_model
@each_condition
def test_every_parameter_gets_a_gradient(model, condition):
    assert_every_parameter_gets_a_gradient(model, condition)


@pytest.mark.parametrize("model, choice", [(model, choice) for model, choice, *_ in CHOICES])
def test_every_parameter_gets_a_gradient_whatever_is_chosen(model, choice):
    assert_every_parameter_gets_a_gradient(model, choice)


# ---- what the output depends on ----------------------------------------------------------------------

@each_model
def test_torch_func_has_the_same_gradient_with_respect_to_the_picture(model):
    """By which people guide samples with functions of their own."""
    net, (x, t) = awake(model), inputs(2)
    want, = torch.autograd.grad(net(x.requires_grad_(), t).square().sum(), x)
    assert difference(torch.func.grad(lambda x: net(x, t).square().sum())(x.detach()), want) < 1e-4


@each_model
def test_an_average_that_includes_the_buffers_is_the_same_network(model):
    """Some libraries average them as well: -inf in one would become NaN."""
    net, (x, t) = awake(model), inputs(2)
    average = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    for _ in range(3):
        average.update_parameters(net)
    with torch.no_grad():
        assert difference(average(x, t), net(x, t)) < 1e-5


@each_model
@each_condition
def test_nothing_leaks_across_the_batch(model, condition):
    net, batch = awake(model, **condition), inputs(**condition)
    alone, together = net(*(rows[:1] for rows in batch)), net(*batch)[:1]
    assert difference(together, alone) < 1e-4


@each_model
@pytest.mark.parametrize("condition, changed", [
    (CLASS, "x"), (CLASS, "t"), (CLASS, "y"), (TEXT, "t"), (TEXT, "y"), (TEXT, "mask")])
def test_output_depends_on_each_input(model, condition, changed):
    net, batch = awake(model, **condition), dict(zip(["x", "t", "y", "mask"], inputs(**condition)))
    other = {**batch, changed: batch[changed].roll(1, dims=0)}
    assert difference(net(**other), net(**batch)) > 1e-3


@each_model
@each_condition
def test_one_corner_of_a_picture_is_seen_at_the_other(model, condition):
    net, (x, *rest) = awake(model, **condition), inputs(**condition)
    moved = x.clone()
    moved[:, :, :8, :8] += 1
    assert difference(net(moved, *rest)[..., -4:, -4:], net(x, *rest)[..., -4:, -4:]) > 1e-4


@pytest.mark.parametrize("model", ["unet", "iuvit", "ascend"])
def test_time_passes_through_all_of_its_mlp_which_reads_the_mean_of_the_text_as_well(model):
    net, (x, t, y, mask), called, read = awake(model, **TEXT), inputs(**TEXT), [], []
    for part in net.time_embed:
        part.register_forward_hook(lambda part, args, out: called.append(type(part)) or read.append(args[0]))
    net(x, t, y, mask)
    assert called == [nn.Linear, nn.SiLU, nn.Linear]
    mean = torch.stack([net.text_embed(tokens[real]).mean(dim=0) for tokens, real in zip(y, mask)])
    both = torch.cat([timestep_embedding(t, net.dim), F.layer_norm(mean, mean.shape[1:])], dim=1)
    torch.testing.assert_close(read[0], both, atol=1e-4, rtol=1e-4)


@each_model
@each_condition
def test_a_condition_is_given_if_and_only_if_the_model_has_one(model, condition):
    x, t = inputs()
    with pytest.raises(AssertionError, match="if and only if"):
        awake(model, **condition)(x, t, None if condition else torch.zeros(4, dtype=torch.int64))
    with pytest.raises(AssertionError, match="a class or a text, not both"):
        awake(model, **CLASS, **TEXT)


TEXT_CHOICES = [("unet", {}), ("uvit", {}), ("iuvit", {}), ("iuvit", dict(text_attn="concat")), ("ascend", {})]


@pytest.mark.parametrize("model, choice", TEXT_CHOICES)
def test_padding_of_a_text_changes_nothing(model, choice):
    net, (x, t, y, mask) = awake(model, **TEXT, **choice), inputs(**TEXT)
    whole = net(x, t, y, mask)
    longer = F.pad(y.masked_fill(~mask[:, :, None], 100.0), (0, 0, 0, 3), value=-100.0)
    assert difference(net(x, t, longer, F.pad(mask, (0, 3))), whole) < 1e-4
    torch.testing.assert_close(net(x, t, y, mask.float()), whole)                           # as tokenizers have it
    bare = torch.cat([net(x[i:i + 1], t[i:i + 1], y[i:i + 1, :mask[i].sum()]) for i in range(4)])      # no mask at all
    assert difference(bare, whole) < 1e-4


@pytest.mark.parametrize("model, choice", TEXT_CHOICES)
def test_a_text_without_a_single_token_is_no_softmax_over_nothing(model, choice):
    net, (x, t, y, mask) = awake(model, **TEXT, **choice), inputs(**TEXT)
    out = net(x, t, y, mask & False)
    out.square().mean().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_uvit_cuts_texts_that_are_longer_than_their_places():
    net, (x, t, y, mask) = awake("uvit", text_len=2, **TEXT), inputs(**TEXT)
    torch.testing.assert_close(net(x, t, y, mask), net(x, t, y[:, :2], mask[:, :2]))


@each_model
@each_condition
def test_bfloat16_autocast_changes_little(model, condition):
    net, batch = awake(model, **condition), inputs(**condition)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(*batch)
    assert rough.dtype == torch.bfloat16
    assert difference(rough.float(), net(*batch)) < 0.1


@each_model
def test_in_bfloat16_on_a_cpu_the_gradient_of_every_parameter_is_that_of_float32(model):
    """At full size: PyTorch's own layer norm sums the gradients of its bias over 16,384 positions to a third."""
    net = MODELS[model](num_classes=24, **train.PRESETS[f"{model}-shapes"]["net"]).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * torch.randn_like(p)
    pictures, labels = map(torch.from_numpy, data.draw_shapes(range(16), 32))
    batch = pictures / 127.5 - 1, diffusion.draw_times(16, 1.6, 0.4), torch.randn(16, 3, 32, 32)
    gradients = []
    for precision in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        net.zero_grad()
        with precision:
            loss = diffusion.loss(net, *batch, diffusion.Cosine(), "v", (labels,)).mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
    exact, rough = gradients
    errors = {name: ((rough[name] - g).norm() / g.norm()).item() for name, g in exact.items()}
    assert max(errors.values()) < 0.15, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("model, net", [
    ("unet", {}), ("uvit", dict(depth=5)), ("iuvit", dict(depth=5)), ("ascend", {})])
def test_every_output_of_the_encoder_is_a_skip_and_every_skip_matters(model, net):
    net, (x, t) = awake(model, **net), inputs(B=2)
    encoder, decoder = (net.encoder, net.decoder) if hasattr(net, "encoder") else (net.in_blocks, net.out_blocks)
    assert len(encoder) == len(decoder)
    kept = []
    for block in encoder:
        block.register_forward_hook(lambda block, args, out: kept.append(out))
    whole = net(x, t)
    for block, skip in zip(decoder, kept[::-1]):                # the last encoder output is read first
        handle = block.register_forward_pre_hook(lambda block, args, skip=skip: without(skip, *args))
        assert difference(net(x, t), whole) > 1e-3
        handle.remove()


def without(skip, x, cond, other):
    """A decoder block's arguments with the skip blanked: beside x in the ViTs, part of it in the hierarchical ones."""
    if skip.dim() == 3:                                         # tokens (B, N, D)
        assert torch.equal(other, skip)
        return x, cond, torch.zeros_like(skip)
    h, end = x.split([x.shape[1] - skip.shape[1], skip.shape[1]], dim=1)
    assert torch.equal(end, skip)
    return torch.cat([h, torch.zeros_like(skip)], dim=1), cond, other


def test_without_skips_the_decoder_of_ascend_sees_the_last_map_alone():
    net, seen = awake("ascend", skips=False), []
    for layer in net.decoder:
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))
    net(*inputs())
    assert seen == [net.middle.out_channels, *(layer.out_channels for layer in net.decoder[:-1])]


@pytest.mark.parametrize("model", ["unet", "ascend"])
def test_every_block_that_has_dropout_uses_it_in_training_and_only_there(model):
    net, seen = awake(model, dropout=0.5), []
    for block in net.modules():
        if hasattr(block, "dropout"):
            block.register_forward_pre_hook(lambda block, args: seen.append((block, args)))
    net(*inputs())
    for block, args in list(seen):
        assert not torch.equal(block.train()(*args), block(*args)), f"none in {block}"
        assert torch.equal(block.eval()(*args), block(*args))
    assert {type(block).__name__ for block, _ in seen} == {"ResBlock", *(["SwinLayer"] if model == "ascend" else [])}


# ---- parts -------------------------------------------------------------------------------------------

def block_inputs(kind):
    """An input of a block of 8 channels: what it reads besides."""
    tokens, emb = torch.randn(2, 16, 8), torch.randn(2, 8)
    text = torch.randn(2, 3, 8), torch.ones(2, 3) > 0
    return dict(map=(torch.randn(2, 8, 4, 4), emb), rows=(torch.randn(2, 4, 4, 8), emb),
                tokens=(tokens, None, tokens), read=(tokens, text, tokens))[kind]


@pytest.mark.parametrize("make, kind, order", [
    (lambda: ResBlock(8, 16, 8), "map", "norm1 resize conv1 scale_shift norm2 dropout conv2 resize shortcut"),
    (lambda: SwinBlock(8, 16, 4, 4, 2, 8, 0.0), "map", "fit_width plain shifted"),
    (lambda: SwinLayer(8, 4, 4, 2, 0, 8, 0.5), "rows", "scale_shift norm1 attn norm2 fc1 dropout fc2"),
    (lambda: Block(8, 2, MLP(8), skip=True), "tokens", "skip_linear norm1 attn norm2 ffn"),
    (lambda: IUBlock(8, 2, MLP(8), True, "concat"), "read", "skip_linear norm1 attn norm2 ffn"),
    (lambda: IUBlock(8, 2, MLP(8), True, "separate"), "read", "skip_linear norm1 attn norm_text cross norm2 ffn")])
def test_the_parts_of_a_block_are_called_in_this_order(make, kind, order):
    block, called = make(), []
    for name, part in block.named_children():
        part.register_forward_hook(lambda part, args, out, name=name: called.append(name))
    block(*block_inputs(kind))
    assert called == order.split()


@pytest.mark.parametrize("make, kind", [
    (lambda: Block(8, 2, MLP(8), False), "tokens"), (lambda: IUBlock(8, 2, MLP(8), False, "concat"), "read"),
    (lambda: IUBlock(8, 2, MLP(8), False, "separate"), "read"), (lambda: SwinLayer(8, 4, 4, 2, 1, 8, 0.0), "rows")])
def test_a_block_adds_to_its_input(make, kind):
    block, (x, other, *_) = make(), block_inputs(kind)
    for name, p in block.named_parameters():
        if "proj" in name or "fc2" in name:                             # the last layers of its branches
            nn.init.zeros_(p)
    assert torch.equal(block(x, other), x)


@pytest.mark.parametrize("model", ["unet", "ascend"])
def test_the_middle_looks_at_itself_before_it_reads_the_text_and_the_head_sees_what_silu_leaves(model):
    net, seen = awake(model, **TEXT), []
    assert [type(m).__name__ for m in net.middle] == ["ResBlock", "SpatialAttention", "TextAttention", "ResBlock"]
    net.norm.register_forward_hook(lambda m, args, out: seen.append(F.silu(out)))
    net.head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net(*inputs(**TEXT))
    assert torch.equal(*seen)


def test_the_improved_ffn_is_its_layers_written_out():
    ffn, x = DWConvFFN(8, grid=3, extras=2), torch.randn(2, 11, 8)
    h = ffn.norm1(F.gelu(ffn.fc1(x)))
    conv = ffn.dwconv(h[:, 2:].transpose(1, 2).reshape(2, 32, 3, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ffn(x), ffn.fc2(ffn.norm2(F.gelu(torch.cat([h[:, :2], conv], dim=1)))))


def test_a_swin_layer_is_its_layers_written_out_with_time_in_both_norms():
    layer, x, emb = SwinLayer(8, 4, 4, 2, 1, 8, 0.0), torch.randn(2, 4, 4, 8), torch.randn(2, 8)
    scale1, shift1, scale2, shift2 = layer.scale_shift(F.silu(emb))[:, None, None].chunk(4, dim=-1)
    h = x + layer.attn(layer.norm1(x) * (1 + scale1) + shift1)
    mlp = layer.fc2(F.gelu(layer.fc1(layer.norm2(h) * (1 + scale2) + shift2)))
    torch.testing.assert_close(layer(x, emb), h + mlp)


@pytest.mark.parametrize("precision", [nullcontext(), torch.autocast("cpu", torch.bfloat16)], ids=["plain", "autocast"])
def test_timestep_embedding_is_what_a_pocket_calculator_says(precision):
    with precision:
        out = timestep_embedding(torch.tensor([0.0, 0.001, 0.5]), 4)    # frequencies 1 and 0.01, times 1000 t
    assert out.dtype == torch.float32
    expected = torch.tensor([[1, 1, 0, 0],
                             [0.540302, 0.999950, 0.841471, 0.010000],                  # of 1 and 0.01
                             [-0.883863, 0.283662, -0.467772, -0.958924]])              # of 500 and 5
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels, groups", [
    (256, 32), (128, 32), (96, 16), (64, 16), (40, 8), (32, 8), (6, 1), (3, 1)])
def test_group_norm_has_32_groups_or_fewer_of_at_least_four_channels(channels, groups):
    assert GroupNorm(channels).num_groups == groups


def test_group_norm_under_autocast_is_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        assert GroupNorm(8)(torch.randn(2, 8, 4, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_group_norm_by_hand_is_pytorchs_and_keeps_the_order_in_memory(dtype, tolerance):
    norm, found = GroupNorm(24).to(dtype), []
    for p in norm.parameters():
        nn.init.normal_(p)
    x = (3 * torch.randn(3, 24, 5, 5) + 5).to(dtype, memory_format=torch.channels_last).requires_grad_()
    g = torch.randn_like(x)
    for f in norm, norm.by_hand:
        out = f(x)
        found.append((out, *torch.autograd.grad(out, [x, *norm.parameters()], g)))
        assert out.stride() == found[-1][1].stride() == x.stride()
    for theirs, ours in zip(*found):
        assert ours.dtype == theirs.dtype == dtype
        assert (ours - theirs).float().norm() < tolerance * theirs.float().norm()


@pytest.mark.parametrize("model", ["uvit", "iuvit"])
def test_patches_go_back_where_they_came_from(model):
    """With blocks that add nothing and identities for embedding and head, the network is the identity."""
    net = MODELS[model](img_size=12, dim=12, depth=1, heads=1)          # 12 = 2 * 2 * 3: a patch is a token
    for p in net.parameters():
        nn.init.zeros_(p)
    net.patch_embed.weight.data = rearrange(torch.eye(12), "D (p q C) -> D C p q", p=2, q=2)
    net.norm = net.to_pixels = nn.Identity()
    nn.init.dirac_(net.head.weight)
    x, t = inputs(size=12)
    torch.testing.assert_close(net(x, t), x)


def test_the_convolution_of_the_ffn_reads_the_neighbours_of_a_patch_and_no_other_token():
    ffn, x = DWConvFFN(8, grid=5, extras=2), torch.randn(1, 27, 8)
    changed = (ffn(x + torch.eye(27)[:, :, None]) - ffn(x)).abs().amax(-1) > 1e-6       # (token moved, token changed)
    row, column = torch.arange(25) // 5, torch.arange(25) % 5
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    assert torch.equal(changed, torch.block_diag(torch.eye(2), near.float()) > 0)


@pytest.mark.parametrize("file", [unet, ascend])
def test_convolutions_resample_as_in_ddpm(file):
    up, down, x = file.Upsample(4), file.Downsample(4), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(up(x), up.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)))
    torch.testing.assert_close(down(x), F.conv2d(x, down.weight, down.bias, padding=1)[:, :, ::2, ::2])


def softmax_attention(q, k, v):
    """(B, heads, N, d) each: the definition, written out."""
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def test_attention_is_a_softmax_written_out():
    attn, x = Attention(12, heads=3), torch.randn(2, 5, 12)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in attn.qkv(x).split(12, dim=2))
    out = softmax_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(attn(x, None), attn.proj(out))


@pytest.mark.parametrize("dtype, biased, tolerance", [(torch.float32, True, 1e-6), (torch.bfloat16, False, 0.02),
                                                      (torch.bfloat16, True, 0.02)])
def test_attention_on_cpus_is_pytorchs_with_its_gradient_in_training_and_in_sampling(dtype, biased, tolerance):
    inputs = [torch.randn(2, 3, 10, 16, requires_grad=True) for _ in range(3)]
    inputs += [torch.randn(3, 10, 10, requires_grad=True)] if biased else []
    function = attend_biased if biased else attend
    ours, theirs = function(*(x.to(dtype) for x in inputs)), F.scaled_dot_product_attention(*inputs)
    with torch.no_grad():
        for out in (ours, function(*(x.detach().to(dtype) for x in inputs))):               # in training, in sampling
            assert (out - theirs).abs().max() < tolerance
    wanted = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, wanted.to(dtype)), torch.autograd.grad(theirs, inputs, wanted)):
        assert (a - b).norm() < tolerance * b.norm()


def test_cross_attention_is_a_softmax_over_the_real_tokens_of_the_text():
    attn, x, text = CrossAttention(12, 3, text_width=8), torch.randn(2, 5, 12), torch.randn(2, 4, 8)
    mask = torch.ones(2, 4) > 0
    mask[1, 2:] = False
    for i, real in enumerate([4, 2]):
        q, (k, v) = attn.q(x[i]), attn.kv(text[i, :real]).split(12, dim=1)
        q, k, v = (part.view(1, -1, 3, 4).transpose(1, 2) for part in (q, k, v))
        out = softmax_attention(q, k, v).transpose(1, 2).reshape(5, 12)
        torch.testing.assert_close(attn(x, text, mask)[i], attn.proj(out))


def test_spatial_attention_is_a_softmax_over_all_positions():
    attn, x = SpatialAttention(64, head_dim=32), torch.randn(2, 64, 3, 4)
    nn.init.normal_(attn.proj.weight)
    q, k, v = (part.reshape(2, 2, 32, 12).transpose(2, 3) for part in attn.qkv(attn.norm(x)).split(64, dim=1))
    out = softmax_attention(q, k, v).transpose(2, 3).reshape(2, 64, 3, 4)
    torch.testing.assert_close(attn(x), x + attn.proj(out))


@pytest.mark.parametrize("file", [unet, ascend])
def test_text_attention_writes_to_the_position_that_asked(file):
    attn, x = file.TextAttention(64, head_dim=16, text_width=8), torch.randn(2, 64, 2, 3)
    nn.init.normal_(attn.attn.proj.weight)
    text, mask = torch.randn(2, 5, 8), torch.ones(2, 5) > 0
    out = attn.attn(attn.norm(x).flatten(2).transpose(1, 2), text, mask)
    torch.testing.assert_close(attn(x, text, mask), x + out.transpose(1, 2).reshape(x.shape))
    assert attn.attn.heads == 4


@pytest.mark.parametrize("size, window, shift", [
    (8, 4, 0), (8, 4, 2), (8, 8, 0), (12, 3, 1), (12, 4, 2), (15, 5, 2), (24, 8, 4)])
def test_window_attention_is_dense_attention_with_a_mask(size, window, shift):
    attn = WindowAttention(8, head_dim=4, size=size, window=window, shift=shift).double()
    nn.init.normal_(attn.bias)
    x = torch.randn(2, size, size, 8, dtype=torch.float64)
    q, k, v = (part.view(2, size**2, 2, 4).transpose(1, 2) for part in attn.qkv(x).split(8, dim=3))
    scores = q @ k.transpose(2, 3) / 2 + dense_bias(attn.bias, size, window, shift)
    out = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attn(x), attn.proj(out))


def dense_bias(table, size, window, shift):
    """(heads, N, N) for all pairs of the N = size^2 positions: the bias of their relative position where both lie in
    one window of a tiling of the plane that is moved by `shift`, -inf elsewhere. Windows do not reach around the edge.
    """
    y, x = torch.arange(size**2) // size, torch.arange(size**2) % size
    row, column = (y - shift) // window, (x - shift) // window          # floor: -1 before the first whole window
    together = (row[:, None] == row) & (column[:, None] == column)
    dy, dx = (y[:, None] - y)[together], (x[:, None] - x)[together]     # query minus key
    bias = torch.full((size**2, size**2, table.shape[1]), -math.inf, dtype=table.dtype)
    bias[together] = table.view(2 * window - 1, 2 * window - 1, -1)[dy + window - 1, dx + window - 1]
    return bias.permute(2, 0, 1)


@pytest.mark.parametrize("size, window, shift", [(32, 8, 4), (8, 8, 0), (4, 4, 0)])
def test_swin_block_shifts_its_second_layer_unless_one_window_covers_the_map(size, window, shift):
    block = SwinBlock(8, 8, head_dim=4, size=size, window=8, emb_dim=8, dropout=0.0)
    assert (block.plain.attn.w, block.plain.attn.shift) == (window, 0)
    assert (block.shifted.attn.w, block.shifted.attn.shift) == (window, shift)


def test_a_window_of_odd_size_shifts_by_the_smaller_half_and_its_biases_start_small():
    block = SwinBlock(64, 64, head_dim=1, size=20, window=5, emb_dim=8, dropout=0.0)
    assert block.shifted.attn.shift == 2
    assert block.plain.attn.bias.std().item() == pytest.approx(0.02, rel=0.1)   # of 81 x 64 numbers


def test_patch_merging_reads_the_four_pixels_in_the_published_order():
    merge, x = PatchMerge(3), torch.randn(2, 3, 4, 6)
    y = x.permute(0, 2, 3, 1)
    four = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], dim=-1)
    torch.testing.assert_close(merge(x), merge.linear(merge.norm(four)).permute(0, 3, 1, 2))


def test_patch_expanding_makes_a_position_a_patch():
    expand, x = PatchExpand(3), torch.randn(2, 3, 4, 6)
    parts = expand.linear(x[:, :, 1, 2]).view(2, 2, 2, 3)                               # of position (1, 2)
    torch.testing.assert_close(expand(x)[:, :, 2:4, 4:6], expand.norm(parts).permute(0, 3, 1, 2))
