"""ASCEND, the paper's ASymmetriC ENcoder Decoder (arXiv 2212.13771): hierarchical like a U-Net, with an encoder of Swin
Transformer blocks (Liu et al., arXiv 2103.14030) and a decoder of ADM's convolutional blocks.

    x (3, 32, 32) -> conv -> [Swin Swin down] -> [Swin+Attn Swin+Attn down] -> ... -> Res, Attn, Res     encoder, middle
                       |          |   |   |           |          |       |                 |
                       +---- every output of the encoder is a skip ------+    concatenated, last first
                       |          |   |   |           |          |       |                 v
    eps (3, 32, 32) <- conv <- GN, SiLU <- [Res Res Res] <- [Res+Attn x 3, up] <- ... <-----+              decoder

Swin: two layers, the first with attention in windows, the second in shifted windows. Res: two convolutions.
Attn: global self-attention.
Time (and class, and the mean of a text) enters as scale and shift of both norms of every Swin layer, and of the second
norm of every ResBlock. The tokens of a text are read by cross-attention after each Attn. (All assumed, but time and
class in a ResBlock are ADM's.)
Compared with unet.py, Swin blocks replace the encoder's ResBlocks, convolutions change the resolution, and by default
there is global attention at 8 pixels too. Four arguments span what is known of the paper's ablation, and more:

    encoder, decoder   "swin" or "conv", each (that "conv" is the paper's "residual" encoder is assumed)
    resample           "conv", or "merge": Swin's patch merging and expanding
    skips              False cuts all of them (assumed: it is not known which connections the paper cut)

A name that two backbone files share is the same code in both, so that each file can be read, and copied, alone.
ResBlock, for one, is unet.py's, although nothing here resamples inside it.
Shape letters: B batch, C channels, H and W height and width, E width of the embedding (4 * dim), w window,
L tokens of a text, N positions of a map, d channels of a head.
Needs only torch and einops. MIT licence, (c) 2026 the maintainers.
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def timestep_embedding(t, dim):
    """t (B,) float32 in [0, 1] -> (B, dim): cosines, then sines, of 1000 t at dim/2 geometric frequencies.

    The factor 1000 puts continuous time on the scale of the T = 1000 discrete steps for which the
    frequencies 1 .. 1e-4 (exclusive) were chosen. It is applied here and nowhere else."""
    assert t.dtype in (torch.float32, torch.float64), f"t is in [0, 1], as float32 (no step number), not {t.dtype}"
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = 1000 * t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_init(module):
    """Start the last layer of a branch at zero, so that a residual block starts as its shortcut and an output as 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def masked_mean(tokens, mask):
    """The mean of the real tokens, 0 if there are none: (B, L, D), (B, L) bool -> (B, D)."""
    weight = mask[:, :, None].to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def relative_index(w):
    """(w*w, w*w) int64: for each query and key of a window, which of the (2w-1)^2 relative positions they have."""
    y, x = torch.arange(w * w) // w, torch.arange(w * w) % w            # row and column of a position
    dy, dx = y[:, None] - y + w - 1, x[:, None] - x + w - 1             # query minus key, shifted to 0 .. 2w - 2
    return dy * (2 * w - 1) + dx


def shift_mask(size, w, shift):
    """(number of windows, w*w, w*w) float: 0 where two positions of a shifted window come from one connected part of
    the map, -60,000 where the cyclic shift has brought them together from opposite sides (Swin, Fig. 4)."""
    # Along one axis, rolling by -shift brings the start of the map to its end: only the last window holds both.
    wrapped = torch.arange(size) >= size - shift
    part = rearrange(2 * wrapped[:, None] + wrapped, "(a i) (b j) -> (a b) (i j)", i=w, j=w)
    same = part[:, :, None] == part[:, None, :]
    return torch.zeros(same.shape).masked_fill(~same, -6e4)             # -inf would be NaN once buffers are averaged


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v for q (B, heads, N, d), k and v (B, heads, M, d). mask (bool, broadcast to
    (B, heads, N, M)): which of the M keys are read.

    By PyTorch's kernels, except on a CPU in bfloat16 without a mask: there the formula, with its gradients, takes half
    the kernel's time for 257 tokens, and an eighth for 66. (For 1,025, and where no gradients are needed, the kernel is
    no slower.)"""
    if mask is None and q.is_cpu and q.dtype == torch.bfloat16:
        return ((q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_biased(q, k, v, bias):
    """attend, with a bias (heads, N, M) added to the scores. On a CPU a bias with gradients has no fused kernel, and in
    bfloat16 the formula is faster; without gradients it has one, if it has four dimensions: bias[None]."""
    if bias.is_cpu and (torch.is_grad_enabled() or q.dtype == torch.bfloat16):
        return ((q * q.shape[-1]**-0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


class LayerNorm(nn.LayerNorm):
    """Computed in float32 at least, also under autocast. CUDA does so by itself; a CPU would sum the gradients of its
    weights in bfloat16, where long sums stop growing: of a sum of 16,384 terms over half was lost."""

    def forward(self, x):                                               # (.., D)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        x = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return x.to(self.weight.dtype)


class WindowAttention(nn.Module):
    """Self-attention within windows of w x w positions, with a learned bias for each relative position.

    With a shift, the windows lie w/2 further right and down, so that information crosses the borders of the unshifted
    ones. The windows of a picture share an axis with the heads, (windows * heads), so that one attention call with
    one bias handles them all."""

    def __init__(self, dim, head_dim, size, window, shift):
        super().__init__()
        self.heads, self.w, self.shift = dim // head_dim, window, shift
        self.side = size // window                                      # windows along one side
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.zeros((2 * window - 1)**2, self.heads), std=0.02))
        self.register_buffer("index", relative_index(window), persistent=False)
        self.register_buffer("shift_mask", shift_mask(size, window, shift) if shift else None, persistent=False)

    def forward(self, x):                                               # (B, H, W, C)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        # a, b: row and column of a window among the windows; i, j: of a position in its window
        q, k, v = rearrange(self.qkv(x), "B (a i) (b j) (qkv heads d) -> qkv B (a b heads) (i j) d",
                            qkv=3, i=self.w, j=self.w, heads=self.heads)
        bias = self.bias[self.index].permute(2, 0, 1)[None]             # (1, heads, w*w, w*w)
        bias = bias.expand(self.side**2, -1, -1, -1) if self.shift_mask is None else bias + self.shift_mask[:, None]
        x = attend_biased(q, k, v, bias.flatten(0, 1).to(q.dtype))      # bias (windows * heads, w*w, w*w)
        x = rearrange(x, "B (a b heads) (i j) d -> B (a i) (b j) (heads d)",
                      a=self.side, b=self.side, i=self.w, heads=self.heads)
        x = self.proj(x)
        return x.roll((self.shift, self.shift), dims=(1, 2)) if self.shift else x


class GroupNorm(nn.GroupNorm):
    """At most 32 groups, as in ADM, of at least 4 channels each: a group of one channel would erase its mean. It is
    computed in the dtype of its weights: in float32 even under autocast. CUDA does so by itself; on a CPU, the bfloat16
    kernel takes three times as long."""

    def __init__(self, channels):
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels >= 4 * g or g == 1))
        super().__init__(groups, channels)

    def forward(self, x):                                               # (B, C, H, W)
        if x.is_cuda and torch.compiler.is_compiling():
            return self.by_hand(x)
        return super().forward(x.to(self.weight.dtype))

    def by_hand(self, x):
        """forward in simple operations, for torch.compile on a GPU. There, PyTorch's own group norm copies maps from
        channels_last to channels first, and the next convolution copies them back; together this took a fifth of a
        step. Sums over H and W need no copies."""
        x = x.to(torch.promote_types(self.weight.dtype, torch.float32))             # sums need it, whatever the weights
        channel_var, channel_mean = (m.unflatten(1, (self.num_groups, -1))          # (B, groups, C/groups)
                                     for m in torch.var_mean(x, dim=(2, 3), correction=0))
        mean = channel_mean.mean(dim=2, keepdim=True)                               # (B, groups, 1)
        var = (channel_var + (channel_mean - mean)**2).mean(dim=2, keepdim=True)    # within channels, between channels
        # (x - mean) / std * weight + bias, as one scale and one shift of each channel
        scale = self.weight * torch.rsqrt(var + self.eps).expand_as(channel_mean).flatten(1)            # (B, C)
        shift = self.bias - scale * mean.expand_as(channel_mean).flatten(1)                             # (B, C)
        return (x * scale[:, :, None, None] + shift[:, :, None, None]).to(self.weight.dtype)


class Timed(nn.Module):
    """A module that also reads the embedding of time (and class, and the mean of a text): forward(x, emb)."""


class SwinLayer(Timed):
    """Pre-norm Transformer layer on a map, with attention in windows. Time enters as scale and shift of both norms
    (adaptive layer norm; assumed, the paper does not say how). Both branches start from PyTorch's default weights, and
    not from zero (assumed; Swin starts from weights of std 0.02)."""

    def __init__(self, dim, head_dim, size, window, shift, emb_dim, dropout):
        super().__init__()
        self.scale_shift = nn.Linear(emb_dim, 4 * dim)
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, head_dim, size, window, shift)
        self.norm2 = LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x, emb):                                          # x (B, H, W, C), emb (B, E)
        scale1, shift1, scale2, shift2 = self.scale_shift(F.silu(emb))[:, None, None].chunk(4, dim=-1)
        x = x + self.attn(self.norm1(x) * (1 + scale1) + shift1)
        h = F.gelu(self.fc1(self.norm2(x) * (1 + scale2) + shift2))
        return x + self.fc2(self.dropout(h))


class SwinBlock(Timed):
    """Two Swin layers, the second with shifted windows (as in the paper; the order is Swin's), unless one window covers
    the whole map. If the width changes, a 1x1 convolution comes first."""

    def __init__(self, in_channels, out_channels, head_dim, size, window, emb_dim, dropout):
        super().__init__()
        w = min(window, size)
        assert size % w == 0, f"a {size}x{size} map does not divide into windows of {w}: change window or img_size"
        assert out_channels % head_dim == 0, f"{out_channels} channels do not divide into heads of {head_dim}"
        self.out_channels = out_channels
        self.fit_width = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.plain = SwinLayer(out_channels, head_dim, size, w, 0, emb_dim, dropout)
        self.shifted = SwinLayer(out_channels, head_dim, size, w, w // 2 if w < size else 0, emb_dim, dropout)

    def forward(self, x, emb):                                          # x (B, C, H, W), emb (B, E)
        x = rearrange(self.fit_width(x), "B C H W -> B H W C")
        x = self.shifted(self.plain(x, emb), emb)
        return rearrange(x, "B H W C -> B C H W")


class ResBlock(Timed):
    """ADM's residual block: two convolutions; time enters as scale and shift between them.

    resample: None, 'down' (average pool) or 'up' (nearest) inside the block, both between norm and first
    convolution and on the shortcut (BigGAN's way of changing resolution)."""

    def __init__(self, in_channels, out_channels, emb_dim, dropout=0.0, resample=None):
        super().__init__()
        self.out_channels = out_channels
        self.norm1 = GroupNorm(in_channels)
        self.resize = {None: nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}[resample]
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(emb_dim, 2 * out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, emb):                                          # x (B, C, H, W), emb (B, E)
        h = self.conv1(self.resize(F.silu(self.norm1(x))))
        scale, shift = self.scale_shift(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return self.shortcut(self.resize(x)) + h


class SpatialAttention(nn.Module):
    """Global self-attention between all positions of a feature map, in heads of `head_dim` channels."""

    def __init__(self, channels, head_dim):
        super().__init__()
        assert channels % head_dim == 0, f"{channels} channels do not divide into heads of {head_dim}"
        self.out_channels = channels
        self.head_dim = head_dim
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):                                               # (B, C, H, W)
        qkv = rearrange(self.qkv(self.norm(x)), "B C H W -> B (H W) C").chunk(3, dim=-1)
        q, k, v = (rearrange(part, "B N (heads d) -> B heads N d", d=self.head_dim) for part in qkv)
        h = rearrange(attend(q, k, v), "B heads (H W) d -> B H W (heads d)", H=x.shape[2])
        return x + self.proj(rearrange(h, "B H W C -> B C H W"))        # a second step, so that maps stay channels_last


class CrossAttention(nn.Module):
    """Attention from N tokens or positions of width D to the L tokens of a text, of width T (after the network's
    text_embed). Padding gets no weight. No bias on q, k, v (assumed; as in U-ViT)."""

    def __init__(self, dim, heads, text_width):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(text_width, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, text, mask):                                   # x (B, N, D), text (B, L, T), mask (B, L)
        q = rearrange(self.q(x), "B N (heads d) -> B heads N d", heads=self.heads)
        k, v = rearrange(self.kv(text), "B L (kv heads d) -> kv B heads L d", kv=2, heads=self.heads)
        x = attend(q, k, v, mask[:, None, None])
        return self.proj(rearrange(x, "B heads N d -> B N (heads d)"))


class TextAttention(nn.Module):
    """Cross-attention from all positions of a feature map to the tokens of a text."""

    def __init__(self, channels, head_dim, text_width):
        super().__init__()
        self.out_channels = channels
        self.norm = GroupNorm(channels)
        self.attn = CrossAttention(channels, channels // head_dim, text_width)
        zero_init(self.attn.proj)

    def forward(self, x, text, mask):                                   # x (B, C, H, W), text (B, L, E), mask (B, L)
        h = self.attn(rearrange(self.norm(x), "B C H W -> B (H W) C"), text, mask)
        return x + rearrange(h, "B (H W) C -> B C H W", H=x.shape[2])


class Downsample(nn.Conv2d):
    """DDPM's down-sampling, a 3x3 convolution of stride 2, padded as in ADM's code."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """DDPM's up-sampling: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.out_channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):                                               # (B, C, H, W) -> (B, C, 2 H, 2 W)
        return self.conv(F.interpolate(x, scale_factor=2.0))


class PatchMerge(nn.Module):
    """Swin's down-sampling: concatenate the four pixels of every 2x2 patch, norm, linear 4C -> C. (Swin's own goes to
    2C; here, as in the other networks, the next block changes the width.)"""

    def __init__(self, channels):
        super().__init__()
        self.out_channels = channels
        self.norm = LayerNorm(4 * channels)
        self.linear = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x):                                               # (B, C, H, W) -> (B, C, H/2, W/2)
        x = self.linear(self.norm(rearrange(x, "B C (H p) (W q) -> B H W (q p C)", p=2, q=2)))
        return rearrange(x, "B H W C -> B C H W")


class PatchExpand(nn.Module):
    """The counterpart (Swin-Unet, arXiv 2105.05537): linear C -> 4C, rearrange to a 2x2 patch of C, norm. (Swin-Unet's
    own goes to C/2. It takes a patch by rows, Swin's merging by columns: their authors' orders.)"""

    def __init__(self, channels):
        super().__init__()
        self.out_channels = channels
        self.linear = nn.Linear(channels, 4 * channels, bias=False)
        self.norm = LayerNorm(channels)

    def forward(self, x):                                               # (B, C, H, W) -> (B, C, 2H, 2W)
        x = self.linear(rearrange(x, "B C H W -> B H W C"))
        x = self.norm(rearrange(x, "B H W (p q C) -> B (H p) (W q) C", p=2, q=2))
        return rearrange(x, "B H W C -> B C H W")


class Layer(nn.Sequential):
    """A few modules in sequence. Timed ones also read the embedding, and TextAttention also reads the text."""

    def forward(self, x, emb, text):                                    # emb (B, E), text (tokens, mask) or ()
        for module in self:
            if isinstance(module, Timed):
                x = module(x, emb)
            elif isinstance(module, TextAttention):
                x = module(x, *text)
            else:
                x = module(x)
        return x

    @property
    def out_channels(self):
        return self[-1].out_channels


class ASCEND(nn.Module):
    """ASCEND. Defaults: a CIFAR-10 model the size of the paper's others (48,038,075 parameters). Widths, depth,
    places of global attention and dropout are assumed, because the values in the paper's table of settings are not
    available to us. Also assumed: window, first convolution at full size, convolutional middle, what a layer is that
    gives a skip (a block, or a change of resolution).

    Predicts eps (or v) from a noisy image. Raises AssertionError if the image does not halve evenly, or a map does
    not divide into windows. (The tables of its windows are buffers that are in no state_dict: do not build it on
    the meta device to fill it by load_state_dict, and average its parameters only.)"""

    def __init__(self,
                 img_size=32,               # pixels per side
                 channels=3,                # image channels
                 dim=128,                   # base width
                 dim_mults=(1, 2, 2, 2),    # width of each level, in units of dim; each after the first halves the map
                 num_blocks=2,              # blocks per level (the decoder has one more)
                 attn_sizes=(16, 8),        # map sizes with global attention, besides the middle; absent ones ignored
                 head_dim=64,               # channels per attention head
                 window=8,                  # side of a window; smaller maps are one window
                 encoder="swin",            # blocks of the encoder: 'swin', or 'conv' for a U-Net's ResBlocks
                 decoder="conv",            # blocks of the decoder: 'conv' or 'swin'
                 skips=True,                # False: the decoder sees only the last map
                 resample="conv",           # 'conv', or 'merge': Swin's patch merging, and expanding (default assumed)
                 dropout=0.1,
                 num_classes=0,             # > 0: conditional on a class; index num_classes is the null class
                 text_dim=0):               # > 0: conditional on text, given as features of this width
        super().__init__()
        levels = len(dim_mults)
        assert levels > 0 and dim % 2 == 0, f"dim_mults {dim_mults} must not be empty, and dim {dim} be even"
        assert not (num_classes and text_dim), "the condition is a class or a text, not both"
        assert num_blocks >= 0, f"num_blocks {num_blocks} must not be negative"
        assert img_size % 2 ** (levels - 1) == 0, \
            f"img_size {img_size} does not halve {levels - 1} times: it must be a multiple of {2 ** (levels - 1)}"
        assert {encoder, decoder} <= {"swin", "conv"}, \
            f"encoder and decoder are 'swin' or 'conv', not {encoder!r} and {decoder!r}"
        assert resample in ("conv", "merge"), f"resample is 'conv' or 'merge', not {resample!r}"
        E = 4 * dim
        down, up = (Downsample, Upsample) if resample == "conv" else (PatchMerge, PatchExpand)

        def block(kind, in_channels, out_channels, size):
            if kind == "swin":
                return SwinBlock(in_channels, out_channels, head_dim, size, window, E, dropout)
            return ResBlock(in_channels, out_channels, E, dropout)

        def attention(channels):
            text = [TextAttention(channels, head_dim, E)] if text_dim else []
            return [SpatialAttention(channels, head_dim), *text]

        def attention_at(size, channels):               # a list, empty except at attn_sizes
            return attention(channels) if size in attn_sizes else []

        # embeddings
        self.dim, self.img_size = dim, img_size
        self.class_embed = nn.Embedding(num_classes + 1, E) if num_classes else None
        self.text_embed = nn.Sequential(nn.Linear(text_dim, E), LayerNorm(E)) if text_dim else None     # norm assumed
        # reads time alone, or time and a vector of the text, as in iuvit.py (assumed here)
        self.time_embed = nn.Sequential(nn.Linear(dim + E if text_dim else dim, E), nn.SiLU(), nn.Linear(E, E))

        # encoder
        size, C = img_size, dim
        self.encoder = nn.ModuleList([Layer(nn.Conv2d(channels, dim, 3, padding=1))])
        for level, mult in enumerate(dim_mults):
            for _ in range(num_blocks):
                self.encoder.append(Layer(block(encoder, C, mult * dim, size), *attention_at(size, mult * dim)))
                C = mult * dim
            if level < levels - 1:
                self.encoder.append(Layer(down(C)))
                size //= 2

        # middle
        self.middle = Layer(ResBlock(C, C, E, dropout), *attention(C), ResBlock(C, C, E, dropout))

        # decoder: one layer for each layer of the encoder, whose output is its skip
        self.use_skips = skips
        widths = [layer.out_channels if skips else 0 for layer in self.encoder]
        self.decoder = nn.ModuleList()
        for level, mult in reversed(list(enumerate(dim_mults))):
            for i in range(num_blocks + 1):
                layer = [block(decoder, C + widths.pop(), mult * dim, size), *attention_at(size, mult * dim)]
                C = mult * dim
                if level > 0 and i == num_blocks:
                    layer.append(up(C))
                    size *= 2
                self.decoder.append(Layer(*layer))

        # head: starts at zero (as in ADM), so the first prediction is 0 and the first loss is E|target|^2, 1 for eps
        self.norm = GroupNorm(C)
        self.head = zero_init(nn.Conv2d(C, channels, 3, padding=1))

    def forward(self, x, t, y=None, mask=None):
        """x (B, channels, H, W) float32 noisy image, t (B,) float32 in [0, 1] -> (B, channels, H, W).

        y: None, (B,) int64 class, or (B, L, text_dim) float32 features of a text. mask (B, L) bool is False
        at padding tokens, which may hold any numbers of usual size; without a mask there is no padding. Every text
        needs a real token: if it has none, a GPU's bfloat16 kernel reads the padding."""
        assert (y is None) == (self.class_embed is None and self.text_embed is None), \
            "y is given if and only if the model has a condition"
        assert x.shape[2:] == (self.img_size,) * 2, \
            f"pictures have {tuple(x.shape[2:])} pixels, and img_size is {self.img_size}"
        time = timestep_embedding(t, self.dim).to(x.dtype)              # (B, dim)
        text = ()
        if self.text_embed is not None:
            mask = y.new_ones(y.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            text = self.text_embed(y), mask                             # (B, L, E), (B, L)
            vector = F.layer_norm(masked_mean(*text), (4 * self.dim,))  # (B, E)
            time = torch.cat([time, vector], dim=1)                     # (B, dim + E)
        emb = self.time_embed(time)                                     # (B, E)
        if self.class_embed is not None:
            emb = emb + self.class_embed(y)                             # (B, E)

        h, skips = x, []                                                # (B, channels, H, W)
        for layer in self.encoder:
            h = layer(h, emb, text)                                     # (B, C, H / 2^level, W / 2^level), C by layer
            skips.append(h)
        h = self.middle(h, emb, text)                                   # (B, C, H / 2^(levels-1), ...)
        for layer in self.decoder:
            skip = skips.pop()                                          # each belongs to one layer: last to first
            h = layer(torch.cat([h, skip], dim=1) if self.use_skips else h, emb, text)  # back up, level by level
        return self.head(F.silu(self.norm(h)))                          # (B, channels, H, W)


if __name__ == "__main__":
    net = ASCEND()
    for name, module in net.named_modules():
        if name == "middle" or name.count(".") == 1 and name.split(".")[0] in ("encoder", "decoder"):
            module.register_forward_hook(lambda m, i, o, name=name: print(
                f"{name:12} {str(tuple(o.shape)):18}", *(type(part).__name__ for part in m)))
    print("output      ", tuple(net(torch.randn(1, 3, 32, 32), torch.rand(1)).shape))
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
