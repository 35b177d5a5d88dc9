"""IU-ViT, the paper's improved U-ViT (arXiv 2212.13771): a plain Vision Transformer with long skips.
`diff uvit.py iuvit.py` lists the improvements. They are the paper's, except for details marked (assumed):

    1  a rearrange-first head                       head="linear" undoes it
       (that it starts at 0 is assumed)
    2  a depth-wise convolution in the FFN          ffn="mlp" undoes it
    3  text has its own cross-attention,            text_attn="concat" is GLIDE's joint attention, which the
       instead of being in the sequence             paper compares with
    4  time passes through an MLP (assumed: the paper does not say so, but with it there are the paper's 442M parameters
       at 128 pixels, and without it 438M). With text, it reads a vector of the text as well, concatenated with the
       time embedding (paper); that this vector is the normalised mean of the normalised tokens is assumed

A text may have any length. Its tokens have no learnt position embedding, but a norm after the text embedding (assumed).

    x (3, 32, 32) -> patches of 2x2, linear -> 256 tokens of D    every input is a token of one sequence:
                                              v                   [class or none, time, patch, patch, ..];
    6 blocks -------- each output is kept as a skip --------+     every block also reads the text
      v                                                     |
    1 block in the middle                                   |
      v                                                     |
    6 blocks <--- concat with the skip, linear 2D -> D <----+     last skip first
      v
    norm, rearrange the tokens themselves ("rearrange first") -> (D/p^2, 32, 32) -> 3x3 conv -> eps (3, 32, 32)

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


def masked_mean(tokens, mask):
    """The mean of the real tokens, 0 if there are none: (B, L, D), (B, L) bool -> (B, D)."""
    weight = mask[:, :, None].to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


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


class SelfAttention(nn.Module):
    """Self-attention among all tokens, which do not include text. No bias on q, k, v, as in U-ViT."""

    def __init__(self, dim, heads):
        super().__init__()
        assert dim % heads == 0, f"width {dim} does not divide into {heads} heads"
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                               # (B, N, D)
        q, k, v = rearrange(self.qkv(x), "B N (qkv heads d) -> qkv B heads N d", qkv=3, heads=self.heads)
        x = attend(q, k, v)
        return self.proj(rearrange(x, "B heads N d -> B N (heads d)"))


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


class JointAttention(SelfAttention):
    """The alternative to separate attention (GLIDE, Nichol et al., arXiv 2112.10741): keys and values of the text are
    concatenated with those of the tokens, and all compete in one softmax. (GLIDE learns an embedding for padding and
    reads it; here it is masked.)"""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)

    def forward(self, x, text, mask):                                   # x (B, N, D), text (B, L, D), mask (B, L)
        q, k, v = rearrange(self.qkv(x), "B N (qkv heads d) -> qkv B heads N d", qkv=3, heads=self.heads)
        text_k, text_v = rearrange(self.kv(text), "B L (kv heads d) -> kv B heads L d", kv=2, heads=self.heads)
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        mask = F.pad(mask, (0, x.shape[1]), value=True)[:, None, None]  # (B, 1, 1, L + N)
        h = attend(q, k, v, mask)
        return self.proj(rearrange(h, "B heads N d -> B N (heads d)"))


class MLP(nn.Module):
    """The Transformer's feed-forward network, applied to each token on its own."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):                                               # (B, N, D)
        return self.fc2(F.gelu(self.fc1(x)))


class DWConvFFN(nn.Module):
    """Feed-forward part with a 3x3 depth-wise convolution over the grid of patches (paper, appendix, Fig. 8):
    linear (the paper's 1x1 conv), GELU, LN, depth-wise conv, GELU, LN, linear. It restores locality. The convolution
    adds 40 D parameters to a block of 12 D^2 or more: 0.6% to the CIFAR-10 model.

    Time and class tokens have no place in the grid: they skip the convolution, and nothing else (assumed)."""

    def __init__(self, dim, grid, extras):
        super().__init__()
        self.grid, self.extras = grid, extras
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.norm1 = LayerNorm(4 * dim)
        self.dwconv = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)
        self.norm2 = LayerNorm(4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):                                               # (B, N, D)
        x = F.gelu(self.fc1(x))                                         # (B, N, 4D)
        # norm1 after the split, not before: the numbers are the same, and the convolution gets contiguous patches
        extras, patches = self.norm1(x[:, :self.extras]), self.norm1(x[:, self.extras:])
        patches = self.dwconv(rearrange(patches, "B (h w) f -> B f h w", h=self.grid))
        x = torch.cat([extras, rearrange(patches, "B f h w -> B (h w) f")], dim=1)          # (B, N, f), f = 4D
        return self.fc2(self.norm2(F.gelu(x)))


class IUBlock(nn.Module):
    """Pre-norm Transformer block. In the second half of the network it starts by merging in its skip. Text is read
    between attention and FFN (paper, appendix, Fig. 8 right; a norm before each of the three is assumed, although the
    figure seems to draw two). text_attn: see IUViT; None without text."""

    def __init__(self, dim, heads, ffn, skip, text_attn):
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = LayerNorm(dim)
        self.attn = JointAttention(dim, heads) if text_attn == "concat" else SelfAttention(dim, heads)
        self.norm_text = LayerNorm(dim) if text_attn == "separate" else None
        self.cross = CrossAttention(dim, heads, dim) if text_attn == "separate" else None
        self.norm2 = LayerNorm(dim)
        self.ffn = ffn

    def forward(self, x, text, skip=None):                              # x, skip (B, N, D), text (tokens, mask) or ()
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        if self.cross is None:                                          # no text, or one softmax for all
            x = x + self.attn(self.norm1(x), *text)
        else:
            x = x + self.attn(self.norm1(x))
            x = x + self.cross(self.norm_text(x), *text)
        return x + self.ffn(self.norm2(x))


class IUViT(nn.Module):
    """IU-ViT. Defaults: the paper's CIFAR-10 model: 45,150,595 parameters, "45M" in the paper, which also gives the
    depth; patch, width and heads are derived.

    Predicts eps (or v) from a noisy image. Raises AssertionError if sizes do not divide evenly."""

    def __init__(self,
                 img_size=32,               # pixels per side
                 channels=3,                # image channels
                 patch_size=2,              # pixels per side of a patch; img_size / 16 keeps U-ViT's 256 patches
                 dim=512,                   # width of a token
                 depth=13,                  # blocks, including the middle one: 6 + 1 + 6
                 heads=8,
                 head="rearrange",          # 'rearrange' first, or U-ViT's 'linear' first
                 ffn="dwconv",              # 'dwconv', or U-ViT's 'mlp'
                 text_attn="separate",      # 'separate' self- and cross-attention, or 'concat': GLIDE's joint attention
                 num_classes=0,             # > 0: conditional on a class; index num_classes is the null class
                 text_dim=0):               # > 0: conditional on text, given as features of this width
        super().__init__()
        assert img_size % patch_size == 0, f"img_size {img_size} does not divide into patches of {patch_size}"
        assert depth % 2 == 1 and depth > 0, f"depth {depth} counts the middle block, so it is odd"
        assert dim % 2 == 0, f"width {dim} is half cosines, half sines of time, so it is even"
        assert not (num_classes and text_dim), "the condition is a class or a text, not both"
        assert head in ("rearrange", "linear"), f"head is 'rearrange' or 'linear', not {head!r}"
        assert ffn in ("dwconv", "mlp"), f"ffn is 'dwconv' or 'mlp', not {ffn!r}"
        assert text_attn in ("separate", "concat"), f"text_attn is 'separate' or 'concat', not {text_attn!r}"
        assert dim % patch_size**2 == 0 or head == "linear", \
            f"rearrange-first needs width {dim} to divide by patch_size^2 = {patch_size**2}"
        self.dim, self.patch_size, self.grid = dim, patch_size, img_size // patch_size

        # embeddings
        self.extras = bool(num_classes) + 1                                 # tokens before the patches
        self.patch_embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.class_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.text_embed = nn.Sequential(nn.Linear(text_dim, dim), LayerNorm(dim)) if text_dim else None
        # reads time alone, or time and a vector of the text
        self.time_embed = nn.Sequential(nn.Linear(2 * dim if text_dim else dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.grid**2, dim))

        # blocks
        def block(skip):
            return IUBlock(dim, heads, DWConvFFN(dim, self.grid, self.extras) if ffn == "dwconv" else MLP(dim), skip,
                           text_attn if text_dim else None)

        self.in_blocks = nn.ModuleList(block(skip=False) for _ in range(depth // 2))
        self.mid_block = block(skip=False)
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))

        # head
        self.norm = LayerNorm(dim)
        self.to_pixels = nn.Linear(dim, patch_size**2 * channels) if head == "linear" else nn.Identity()
        self.head = nn.Conv2d(channels if head == "linear" else dim // patch_size**2, channels, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        """nn.Linear          normal, std 0.02; bias 0
        pos_embed          normal, std 0.02   (trunc_normal_, as in U-ViT; its cut at 2 is a hundred std away)
        head               0, so the first prediction is 0 and the first loss is E|target|^2, 1 for eps (assumed);
                           linear-first: as in U-ViT, since two layers in a row that start near zero both learn slowly
        everything else    PyTorch's defaults, as in U-ViT (assumed for what U-ViT does not have)"""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if isinstance(self.to_pixels, nn.Identity):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x, t, y=None, mask=None):
        """x (B, C, H, W) float32 noisy image, t (B,) float32 in [0, 1] -> (B, C, H, W).

        y: None, (B,) int64 class, or (B, L, text_dim) float32 features of a text. mask (B, L) bool is False
        at padding tokens, which may hold any numbers of usual size; without a mask there is no padding. Every text
        needs a real token: if it has none, a GPU's bfloat16 kernel reads the padding."""
        assert (y is None) == (self.class_embed is None and self.text_embed is None), \
            "y is given if and only if the model has a condition"
        size = self.grid * self.patch_size
        assert x.shape[2:] == (size, size), f"pictures have {tuple(x.shape[2:])} pixels, and img_size is {size}"
        x = rearrange(self.patch_embed(x), "B D h w -> B (h w) D")          # (B, h*w, D)
        time = timestep_embedding(t, self.dim).to(self.pos_embed.dtype)     # (B, D)
        text = ()
        if self.text_embed is not None:
            mask = y.new_ones(y.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            text = self.text_embed(y), mask                                 # (B, L, D), (B, L)
            vector = F.layer_norm(masked_mean(*text), (self.dim,))          # (B, D)
            time = torch.cat([time, vector], dim=1)                         # (B, 2 D)
        time = self.time_embed(time)                                        # (B, D)
        tokens = [] if self.class_embed is None else [self.class_embed(y)[:, None]]             # (B, 1, D)
        tokens.append(time[:, None])                                        # (B, 1, D)
        x = torch.cat([*tokens, x], dim=1) + self.pos_embed                 # (B, N, D)

        skips = []
        for block in self.in_blocks:
            x = block(x, text)                                              # (B, N, D)
            skips.append(x)
        x = self.mid_block(x, text)                                         # (B, N, D)
        for block in self.out_blocks:
            x = block(x, text, skips.pop())                                 # (B, N, D)

        x = self.norm(x)[:, self.extras:]                                   # (B, h*w, D)
        # On CIFAR-10, linear-first lets p*p*C = 12 combinations of a token's D = 512 numbers through before neighbours
        # mix. Rearrange-first hands all 512 to the convolution, as D/p^2 = 128 channels of p*p pixels. The picture can
        # depend on (p+2)^2 C = 48 combinations of them: C at every pixel of the patch and of the ring around it.
        x = self.to_pixels(x)                                               # (B, h*w, D); linear-first (B, h*w, p*p*C)
        x = rearrange(x, "B (h w) (p q c) -> B c (h p) (w q)", h=self.grid, p=self.patch_size, q=self.patch_size)
        return self.head(x)                                                 # (B, C, H, W)


if __name__ == "__main__":
    net = IUViT()
    for name, module in net.named_children():
        for m in module if isinstance(module, nn.ModuleList) else [module]:
            m.register_forward_hook(lambda m, i, o, name=name: print(f"{name:12} {tuple(o.shape)}"))
    net(torch.randn(1, 3, 32, 32), torch.rand(1))
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
