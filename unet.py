"""U-Net, the convolutional baseline of the paper (arXiv 2212.13771): DDPM's layout (Ho et al., arXiv 2006.11239) built
of ADM's blocks (Dhariwal & Nichol, arXiv 2105.05233).

    x (3, 32, 32) -> conv -> [Res Res down] -> [Res+Attn Res+Attn down] -> ... -> Res, Attn, Res       encoder, middle
                       |          |   |   |          |        |       |                  |
                       +---- every output of the encoder is a skip ---+     concatenated in reverse order
                       |          |   |   |          |        |       |                  v
    eps (3, 32, 32) <- conv <- GN, SiLU <- [Res Res Res] <- [Res+Attn x 3, up] <- ... <--+             decoder

Time (and class, as in ADM) enters every ResBlock as a scale and a shift of its second group norm. How text enters is
assumed: its mean in the same way, its tokens by cross-attention after each Attn.
A name that two backbone files share is the same code in both, so that each file can be read, and copied, alone.
Shape letters: B batch, C channels, H and W height and width, E width of the embedding (4 * dim), L tokens of a text,
N positions of a map, d channels of a head.
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


class LayerNorm(nn.LayerNorm):
    """Computed in float32 at least, also under autocast. CUDA does so by itself; a CPU would sum the gradients of its
    weights in bfloat16, where long sums stop growing: of a sum of 16,384 terms over half was lost."""

    def forward(self, x):                                               # (.., D)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        x = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return x.to(self.weight.dtype)


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


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v for q (B, heads, N, d), k and v (B, heads, M, d). mask (bool, broadcast to
    (B, heads, N, M)): which of the M keys are read.

    By PyTorch's kernels, except on a CPU in bfloat16 without a mask: there the formula, with its gradients, takes half
    the kernel's time for 257 tokens, and an eighth for 66. (For 1,025, and where no gradients are needed, the kernel is
    no slower.)"""
    if mask is None and q.is_cpu and q.dtype == torch.bfloat16:
        return ((q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


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


class UNet(nn.Module):
    """The U-Net. Defaults: DDPM's CIFAR-10 layout with ADM's blocks (42,855,427 parameters).

    Predicts eps (or v) from a noisy image. Raises AssertionError if an image does not halve evenly."""

    def __init__(self,
                 img_size=32,               # pixels per side
                 channels=3,                # image channels
                 dim=128,                   # base width
                 dim_mults=(1, 2, 2, 2),    # width of each level, in units of dim; each after the first halves the map
                 num_blocks=2,              # ResBlocks per level (the decoder has one more)
                 attn_sizes=(16,),          # map sizes that get attention, besides the middle; absent ones are ignored
                 head_dim=64,               # channels per attention head
                 resample="resblock",       # 'resblock' (ADM, BigGAN) or 'conv' (DDPM)
                 dropout=0.1,
                 num_classes=0,             # > 0: conditional on a class; index num_classes is the null class
                 text_dim=0):               # > 0: conditional on text, given as features of this width
        super().__init__()
        levels = len(dim_mults)
        assert levels > 0 and dim % 2 == 0, f"dim_mults {dim_mults} must not be empty, and dim {dim} be even"
        assert not (num_classes and text_dim), "the condition is a class or a text, not both"
        assert num_blocks >= 0, f"num_blocks {num_blocks} must not be negative"
        self.dim, self.unit = dim, 2 ** (levels - 1)    # images are halved levels - 1 times
        assert img_size % self.unit == 0, f"img_size {img_size} must be a multiple of {self.unit}"
        assert resample in ("resblock", "conv"), f"resample is 'resblock' or 'conv', not {resample!r}"
        E = 4 * dim

        def res(in_channels, out_channels, resample=None):
            return ResBlock(in_channels, out_channels, E, dropout, resample)

        def attention(channels):
            text = [TextAttention(channels, head_dim, E)] if text_dim else []
            return [SpatialAttention(channels, head_dim), *text]

        def attention_at(size, channels):               # a list, empty except at attn_sizes
            return attention(channels) if size in attn_sizes else []

        # embeddings
        self.class_embed = nn.Embedding(num_classes + 1, E) if num_classes else None
        self.text_embed = nn.Sequential(nn.Linear(text_dim, E), LayerNorm(E)) if text_dim else None     # norm assumed
        # reads time alone, or time and a vector of the text, as in iuvit.py (assumed here)
        self.time_embed = nn.Sequential(nn.Linear(dim + E if text_dim else dim, E), nn.SiLU(), nn.Linear(E, E))

        # encoder
        size, C = img_size, dim
        self.encoder = nn.ModuleList([Layer(nn.Conv2d(channels, dim, 3, padding=1))])
        for level, mult in enumerate(dim_mults):
            for _ in range(num_blocks):
                self.encoder.append(Layer(res(C, mult * dim), *attention_at(size, mult * dim)))
                C = mult * dim
            if level < levels - 1:
                self.encoder.append(Layer(res(C, C, "down") if resample == "resblock" else Downsample(C)))
                size //= 2

        # middle
        self.middle = Layer(res(C, C), *attention(C), res(C, C))

        # decoder: one layer for each layer of the encoder, whose output is its skip. So a level has one block more than
        # in the encoder; its last reads what the encoder's level started from: a down's output, or the first conv's
        widths = [layer.out_channels for layer in self.encoder]
        self.decoder = nn.ModuleList()
        for level, mult in reversed(list(enumerate(dim_mults))):
            for i in range(num_blocks + 1):
                layer = [res(C + widths.pop(), mult * dim), *attention_at(size, mult * dim)]
                C = mult * dim
                if level > 0 and i == num_blocks:
                    layer.append(res(C, C, "up") if resample == "resblock" else Upsample(C))
                    size *= 2
                self.decoder.append(Layer(*layer))

        # head: starts at zero, so the first prediction is 0 and the first loss is E|target|^2, 1 for eps
        self.norm = GroupNorm(C)
        self.head = zero_init(nn.Conv2d(C, channels, 3, padding=1))

    def forward(self, x, t, y=None, mask=None):
        """x (B, channels, H, W) float32 noisy image, t (B,) float32 in [0, 1] -> (B, channels, H, W). Images of other
        sizes than img_size work if they halve evenly; attention stays at the same levels.

        y: None, (B,) int64 class, or (B, L, text_dim) float32 features of a text. mask (B, L) bool is False
        at padding tokens, which may hold any numbers of usual size; without a mask there is no padding. Every text
        needs a real token: if it has none, a GPU's bfloat16 kernel reads the padding."""
        assert (y is None) == (self.class_embed is None and self.text_embed is None), \
            "y is given if and only if the model has a condition"
        assert not any(side % self.unit for side in x.shape[2:]), \
            f"{tuple(x.shape[2:])} pixels: each side must be a multiple of {self.unit}"
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
            h = layer(torch.cat([h, skips.pop()], dim=1), emb, text)    # back up, level by level; uses each skip once
        return self.head(F.silu(self.norm(h)))                          # (B, channels, H, W)


if __name__ == "__main__":
    net = UNet()
    for name, module in net.named_modules():
        if name == "middle" or name.count(".") == 1 and name.split(".")[0] in ("encoder", "decoder"):
            module.register_forward_hook(lambda m, i, o, name=name: print(
                f"{name:12} {str(tuple(o.shape)):18}", *(type(part).__name__ for part in m)))
    print("output      ", tuple(net(torch.randn(1, 3, 32, 32), torch.rand(1)).shape))
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
