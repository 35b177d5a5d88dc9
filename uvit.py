"""U-ViT, a plain Vision Transformer with a U-Net's long skips (Bao et al., arXiv 2209.12152), as published (but padding
of texts is masked). It is the starting point of the paper's IU-ViT (arXiv 2212.13771): `diff uvit.py iuvit.py`.
sample.py reads the weights that U-ViT's authors published, except those for latents; their networks read 999 t where
ours read 1000 t.

    x (3, 32, 32) -> patches of 2x2, linear -> 256 tokens of D    every input is a token of one sequence:
                                              v                   [class or none, time, text .., patch, ..]
    6 blocks -------- each output is kept as a skip --------+
      v                                                     |
    1 block in the middle                                   |
      v                                                     |
    6 blocks <--- concat with the skip, linear 2D -> D <----+     last skip first
      v
    norm, linear D -> p*p*3, rearrange to the image ("linear first") -> (3, 32, 32) -> 3x3 conv -> eps (3, 32, 32)

Shape letters: B batch, C channels, H W image, p patch, N tokens (extras + patches), D width, L tokens of a text.
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


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v for q (B, heads, N, d), k and v (B, heads, M, d). mask (bool, broadcast to
    (B, heads, N, M)): which of the M keys are read.

    By PyTorch's kernels, except on a CPU in bfloat16 without a mask: there the formula, with its gradients, takes half
    the kernel's time for 257 tokens, and an eighth for 66. (For 1,025, and where no gradients are needed, the kernel is
    no slower.)"""
    if mask is None and q.is_cpu and q.dtype == torch.bfloat16:
        return ((q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class LayerNorm(nn.LayerNorm):
    """Computed in float32 at least, also under autocast. CUDA does so by itself; a CPU would sum the gradients of its
    weights in bfloat16, where long sums stop growing: of a sum of 16,384 terms over half was lost."""

    def forward(self, x):                                               # (.., D)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        x = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return x.to(self.weight.dtype)


class Attention(nn.Module):
    """Self-attention among all tokens. No bias on q, k, v, as published."""

    def __init__(self, dim, heads):
        super().__init__()
        assert dim % heads == 0, f"width {dim} does not divide into {heads} heads"
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, readable):                                     # x (B, N, D), readable None or (B, 1, 1, N)
        q, k, v = rearrange(self.qkv(x), "B N (qkv heads d) -> qkv B heads N d", qkv=3, heads=self.heads)
        x = attend(q, k, v, readable)
        return self.proj(rearrange(x, "B heads N d -> B N (heads d)"))


class MLP(nn.Module):
    """The Transformer's feed-forward network, applied to each token on its own."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):                                               # (B, N, D)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block. In the second half of the network it starts by merging in its skip."""

    def __init__(self, dim, heads, ffn, skip):
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = LayerNorm(dim)
        self.ffn = ffn

    def forward(self, x, readable, skip=None):                          # x, skip (B, N, D), readable as in Attention
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x), readable)
        return x + self.ffn(self.norm2(x))


class UViT(nn.Module):
    """U-ViT. Defaults: the published CIFAR-10 model, U-ViT-S/2 (44,255,328 parameters).

    Predicts eps (or v) from a noisy image. Raises AssertionError if sizes do not divide evenly."""

    def __init__(self,
                 img_size=32,               # pixels per side
                 channels=3,                # image channels
                 patch_size=2,              # pixels per side of a patch; img_size / 16 keeps U-ViT's 256 patches
                 dim=512,                   # width of a token
                 depth=13,                  # blocks, including the middle one: 6 + 1 + 6
                 heads=8,
                 text_len=77,               # positions for text in the sequence, as published; longer texts are cut
                 num_classes=0,             # > 0: conditional on a class; index num_classes is the null class
                 text_dim=0):               # > 0: conditional on text, given as features of this width
        super().__init__()
        assert img_size % patch_size == 0, f"img_size {img_size} does not divide into patches of {patch_size}"
        assert depth % 2 == 1 and depth > 0, f"depth {depth} counts the middle block, so it is odd"
        assert dim % 2 == 0, f"width {dim} is half cosines, half sines of time, so it is even"
        assert not (num_classes and text_dim), "the condition is a class or a text, not both"
        self.dim, self.patch_size, self.grid = dim, patch_size, img_size // patch_size

        # embeddings
        self.text_len = text_len if text_dim else 0
        self.extras = bool(num_classes) + 1 + self.text_len                 # tokens before the patches
        self.patch_embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.class_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.text_embed = nn.Linear(text_dim, dim) if text_dim else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.grid**2, dim))

        # blocks
        def block(skip):
            return Block(dim, heads, MLP(dim), skip)

        self.in_blocks = nn.ModuleList(block(skip=False) for _ in range(depth // 2))
        self.mid_block = block(skip=False)
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))

        # head
        self.norm = LayerNorm(dim)
        self.to_pixels = nn.Linear(dim, patch_size**2 * channels)
        self.head = nn.Conv2d(channels, channels, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        """nn.Linear          normal, std 0.02; bias 0
        pos_embed          normal, std 0.02   (trunc_normal_, as in U-ViT; its cut at 2 is a hundred std away)
        everything else    PyTorch's defaults, as in U-ViT"""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x, t, y=None, mask=None):
        """x (B, C, H, W) float32 noisy image, t (B,) float32 in [0, 1] -> (B, C, H, W).

        y: None, (B,) int64 class, or (B, L, text_dim) float32 features of a text. mask (B, L) bool is False
        at padding tokens, which may hold any numbers of usual size; without a mask there is no padding. Only the
        first text_len tokens are read: a longer text loses its end, and its end token."""
        assert (y is None) == (self.class_embed is None and self.text_embed is None), \
            "y is given if and only if the model has a condition"
        size = self.grid * self.patch_size
        assert x.shape[2:] == (size, size), f"pictures have {tuple(x.shape[2:])} pixels, and img_size is {size}"
        x = rearrange(self.patch_embed(x), "B D h w -> B (h w) D")          # (B, h*w, D)
        time = timestep_embedding(t, self.dim).to(self.pos_embed.dtype)     # (B, D)
        tokens = [] if self.class_embed is None else [self.class_embed(y)[:, None]]             # (B, 1, D)
        tokens.append(time[:, None])                                        # (B, 1, D)
        readable = None                                                     # None: all tokens are
        if self.text_embed is not None:
            mask = y.new_ones(y.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            pad = self.text_len - y.shape[1]                                # F.pad cuts if it is negative
            tokens.append(self.text_embed(F.pad(y, (0, 0, 0, pad))))        # (B, text_len, D)
            mask = F.pad(mask, (0, pad))                                    # (B, text_len); published: padding is read
            readable = F.pad(mask, (1, x.shape[1]), value=True)[:, None, None]  # plus time, patches: (B, 1, 1, N)
        x = torch.cat([*tokens, x], dim=1) + self.pos_embed                 # (B, N, D)

        skips = []
        for block in self.in_blocks:
            x = block(x, readable)                                          # (B, N, D)
            skips.append(x)
        x = self.mid_block(x, readable)                                     # (B, N, D)
        for block in self.out_blocks:
            x = block(x, readable, skips.pop())                             # (B, N, D)

        x = self.norm(x)[:, self.extras:]                                   # (B, h*w, D)
        x = self.to_pixels(x)                                               # (B, h*w, p*p*C)
        x = rearrange(x, "B (h w) (p q c) -> B c (h p) (w q)", h=self.grid, p=self.patch_size, q=self.patch_size)
        return self.head(x)                                                 # (B, C, H, W)


if __name__ == "__main__":
    net = UViT()
    for name, module in net.named_children():
        for m in module if isinstance(module, nn.ModuleList) else [module]:
            m.register_forward_hook(lambda m, i, o, name=name: print(f"{name:12} {tuple(o.shape)}"))
    net(torch.randn(1, 3, 32, 32), torch.rand(1))
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
