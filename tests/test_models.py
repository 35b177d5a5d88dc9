"""The four backbones: what they count, what they read, and that their parts do what their names say."""
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import diffusion
from ascend import ASCEND, SwinBlock, WindowAttention
from conftest import TINY
from iuvit import IUViT
from unet import SpatialAttention, UNet, group_norm, timestep_embedding
from uvit import Attention, UViT

MODELS = dict(unet=UNet, uvit=UViT, iuvit=IUViT, ascend=ASCEND)
each_model = pytest.mark.parametrize("model", MODELS)
each_condition = pytest.mark.parametrize("classes", [0, 3], ids=["unconditional", "class"])


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def count(net):
    return sum(p.numel() for p in net.parameters())


def awake(model, classes=0, **net):
    """A tiny network with every parameter moved off its start: an output that begins at zero proves nothing."""
    net = MODELS[model](num_classes=classes, **{**TINY[model], "img_size": 16, **net}).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net


def inputs(classes=0, B=4, size=16):
    """x, t, y of a batch; among the classes is the null one."""
    return torch.randn(B, 3, size, size), torch.rand(B), torch.arange(B) % (classes + 1) if classes else None


def difference(a, b):
    """The largest difference of two tensors, in units of the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- size and shape ----------------------------------------------------------------------------------

@pytest.mark.parametrize("model, parameters, net", [
    ("unet", 42_855_427, {}), ("unet", 38_307_203, dict(resample="conv")),
    ("uvit", 44_255_328, {}), ("iuvit", 45_150_595, {}), ("ascend", 48_038_075, {})])
def test_parameter_count_is_exact_and_the_docstring_knows_it(model, parameters, net):
    with torch.device("meta"):
        assert count(MODELS[model](**net)) == parameters
    if not net:
        assert f"{parameters:,}" in MODELS[model].__doc__


@each_model
def test_classes_cost_one_embedding_each_and_one_for_the_null_class(model):
    with torch.device("meta"):
        three, four = (count(MODELS[model](num_classes=n)) for n in (3, 4))
        width = MODELS[model](num_classes=3).class_embed.weight.shape
    assert width[0] == 3 + 1 and four - three == width[1]


@each_model
@each_condition
def test_output_is_a_float32_picture_like_the_input(model, classes):
    x, t, y = inputs(classes)
    out = awake(model, classes)(x, t, y)
    assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("model, img_size, net", [
    ("unet", 6, {}), ("unet", 24, {}), ("unet", 50, {}),
    ("uvit", 8, {}), ("uvit", 40, {}),
    ("iuvit", 8, {}), ("iuvit", 40, {}),
    ("ascend", 2, {}), ("ascend", 48, {}), ("ascend", 12, dict(window=3)), ("ascend", 20, dict(window=5))])
def test_any_square_size_that_divides_is_accepted(model, img_size, net):
    x, t, _ = inputs(size=img_size)
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
    ("ascend", dict(img_size=40), "a 20x20 map does not divide into windows of 8"),
    ("ascend", dict(head_dim=48), "128 channels do not divide into heads of 48")])
def test_sizes_that_do_not_divide_say_so(model, net, message):
    with torch.device("meta"), pytest.raises(AssertionError) as error:
        MODELS[model](**net)
    assert message in str(error.value)


# ---- before and after the first step -----------------------------------------------------------------

@pytest.mark.parametrize("model", ["unet", "iuvit", "ascend"])
def test_first_loss_is_one_because_the_output_starts_at_zero(model):
    x, t, _ = inputs(B=16)
    eps = torch.randn_like(x)
    net = MODELS[model](**TINY[model], img_size=16)
    first = diffusion.loss(net, x, t, eps, diffusion.SCHEDULES["linear"]).mean().item()
    assert first == pytest.approx(1, abs=5 * math.sqrt(2 / eps.numel()))        # 5 standard errors of a mean of squares
    assert first == pytest.approx(eps.square().mean().item())


def test_first_loss_of_uvit_is_a_little_above_one_as_published():
    x, t, _ = inputs(size=32)
    with torch.no_grad():
        first = diffusion.loss(UViT(), x, t, torch.randn_like(x), diffusion.SCHEDULES["linear"]).mean()
    assert 1.0 < first < 1.2, f"the first loss is {first:.3f}"


@each_model
@each_condition
def test_every_parameter_gets_a_gradient(model, classes):
    net = awake(model, classes)
    net(*inputs(classes)).square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle, f"no gradient reaches {idle}"


# ---- what the output depends on ----------------------------------------------------------------------

@each_model
def test_nothing_leaks_across_the_batch(model):
    net, (x, t, y) = awake(model, 3), inputs(3)
    alone, together = net(x[:1], t[:1], y[:1]), net(x, t, y)[:1]
    assert difference(together, alone) < 1e-4


@each_model
@pytest.mark.parametrize("changed", ["x", "t", "y"])
def test_output_depends_on_each_input(model, changed):
    net, batch = awake(model, 3), dict(zip("xty", inputs(3)))
    other = {**batch, changed: batch[changed].roll(1, dims=0)}
    assert difference(net(**other), net(**batch)) > 1e-3


@each_model
@each_condition
def test_a_class_is_given_if_and_only_if_the_model_has_classes(model, classes):
    x, t, _ = inputs()
    with pytest.raises(AssertionError, match="if and only if"):
        awake(model, classes)(x, t, None if classes else torch.zeros(4, dtype=torch.int64))


@each_model
def test_bfloat16_autocast_changes_little(model):
    net, batch = awake(model, 3), inputs(3)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(*batch)
    assert rough.dtype == torch.bfloat16
    assert difference(rough.float(), net(*batch)) < 0.1


@pytest.mark.parametrize("model, net", [
    ("unet", {}), ("uvit", dict(depth=5)), ("iuvit", dict(depth=5)), ("ascend", {})])
def test_every_output_of_the_encoder_is_a_skip_and_every_skip_matters(model, net):
    net, (x, t, _) = awake(model, **net), inputs(B=2)
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


def without(skip, x, other):
    """A decoder block's arguments with the skip blanked: beside x in the ViTs, part of it in the hierarchical ones."""
    if other.shape == skip.shape:
        assert torch.equal(other, skip)
        return x, torch.zeros_like(skip)
    h, end = x.split([x.shape[1] - skip.shape[1], skip.shape[1]], dim=1)
    assert torch.equal(end, skip)
    return torch.cat([h, torch.zeros_like(skip)], dim=1), other


# ---- parts -------------------------------------------------------------------------------------------

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
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize("model", ["uvit", "iuvit"])
def test_patches_go_back_where_they_came_from(model):
    """With blocks that add nothing and identities for embedding and head, the network is the identity."""
    net = MODELS[model](img_size=12, dim=12, depth=1, heads=1)          # 12 = 2 * 2 * 3: a patch is a token
    for p in net.parameters():
        nn.init.zeros_(p)
    net.patch_embed.weight.data = rearrange(torch.eye(12), "D (p q C) -> D C p q", p=2, q=2)
    net.norm = net.to_pixels = nn.Identity()
    nn.init.dirac_(net.head.weight)
    x, t, _ = inputs(size=12)
    torch.testing.assert_close(net(x, t), x)


def softmax_attention(q, k, v):
    """(B, heads, N, d) each: the definition, written out."""
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def test_attention_is_a_softmax_written_out():
    attn, x = Attention(12, heads=3), torch.randn(2, 5, 12)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in attn.qkv(x).split(12, dim=2))
    out = softmax_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(attn(x), attn.proj(out))


def test_spatial_attention_is_a_softmax_over_all_positions():
    attn, x = SpatialAttention(64, head_dim=32), torch.randn(2, 64, 3, 3)
    nn.init.normal_(attn.proj.weight)
    q, k, v = (part.reshape(2, 2, 32, 9).transpose(2, 3) for part in attn.qkv(attn.norm(x)).split(64, dim=1))
    out = softmax_attention(q, k, v).transpose(2, 3).reshape(2, 64, 3, 3)
    torch.testing.assert_close(attn(x), x + attn.proj(out))


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
