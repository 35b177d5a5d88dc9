"""Gaussian diffusion in continuous time: schedules, the loss, guidance, time grids, three samplers.

    forward    x_t = alpha(t) x_0 + sigma(t) eps,   eps ~ N(0, I),   alpha^2 + sigma^2 = 1     (from Eq. 1)
    learn      net(x_t, t, *cond) ~ eps   (or v = alpha eps - sigma x_0)                            (Eq. 4-5)
    sample     start at x ~ N(0, I), t = t_max; walk t down to 0 with denoise(x, t) ~ E[x_0 | x_t]  (Eq. 2-3)

Equation numbers are those of arXiv 2212.13771. Time t runs over [0, 1], as in U-ViT's code (assumed); the paper's
T = 1000 steps are t = 1/1000 .. 1. Nothing here depends on the network or its condition: any f(x, t, *cond) of the
right shape will do. cond is the tuple of what the network takes besides x and t: () for nothing, (y,) for classes,
(features, mask) for text.

Needs only torch. MIT licence, (c) 2026 the maintainers.
"""
import math

import torch


# ---- schedules ---------------------------------------------------------------------------------------

def math_of(t):
    return torch if torch.is_tensor(t) else math        # both have exp, expm1, log, sqrt, sin and cos


class Schedule:
    """Its subclasses give alpha(t) and sigma(t), with alpha^2 + sigma^2 = 1, from the picture at t = 0 to noise at
    t = 1; t_max, where alpha is not yet 0; and t_of_lam, the inverse of lam, for floats only. t is a Python float or a
    tensor of any shape. Samplers pass floats, which are float64 even on devices without float64 tensors."""

    def lam(self, t):
        """log(alpha / sigma), half the log signal-to-noise ratio."""
        return math_of(t).log(self.alpha(t) / self.sigma(t))


class Linear(Schedule):
    """DDPM's schedule, beta rising linearly from 0.1 to 20 per unit of t (1e-4 to 0.02 per step of T = 1000).

    alpha(t) = exp(-1/2 integral_0^t beta) (Song et al., arXiv 2011.13456, Eq. 29). The paper's choice for IU-ViT."""
    b0, b1 = 0.1, 20.0
    t_max = 1.0                                         # lam = -5.02, already as good as pure noise

    def integral(self, t):
        return self.b0 * t + (self.b1 - self.b0) * t * t / 2

    def alpha(self, t):
        return math_of(t).exp(-self.integral(t) / 2)

    def sigma(self, t):
        return math_of(t).sqrt(-math_of(t).expm1(-self.integral(t)))    # expm1: no cancellation near t = 0

    def t_of_lam(self, lam):
        L = math.log1p(math.exp(-2 * lam))              # = integral(t), solved for t below
        return 2 * L / (self.b0 + math.sqrt(self.b0**2 + 2 * (self.b1 - self.b0) * L))


class Cosine(Schedule):
    """Nichol & Dhariwal's schedule (arXiv 2102.09672, Eq. 17). The paper's choice for ASCEND.

    alpha(t) = cos(a) / cos(b), where a = (t + s) / (1 + s) * pi / 2, s = 0.008, and b is a at t = 0."""
    s = 0.008
    t_max = 0.99997                                     # alpha^2 = 2e-9; at t = 1 alpha is 0, and x_0 is lost for good

    def angle(self, t):
        return (t + self.s) / (1 + self.s) * math.pi / 2

    def alpha(self, t):
        return math_of(t).cos(self.angle(t)) / math.cos(self.angle(0))

    def sigma(self, t):                                 # cos^2 b - cos^2 a = sin(a - b) sin(a + b)
        b, d = self.angle(0), t / (1 + self.s) * math.pi / 2            # d = a - b: no cancellation near t = 0
        return math_of(t).sqrt(math_of(t).sin(d) * math_of(t).sin(2 * b + d)) / math.cos(b)

    def t_of_lam(self, lam):
        alpha = 1 / math.sqrt(1 + math.exp(-2 * lam))
        return math.acos(alpha * math.cos(self.angle(0))) * (1 + self.s) * 2 / math.pi - self.s


SCHEDULES = dict(linear=Linear(), cosine=Cosine())


# ---- learning ----------------------------------------------------------------------------------------

def draw_times(n, shift=1.0, spread=1.0, generator=None, device=None):
    """n times in [0, 1]. With shift 1 and spread 1 each is uniform (the paper).

    shift > 1 favours high noise (the time shift of Esser et al., arXiv 2403.03206, Eq. 23): shift / (1 + shift)
    becomes the median. spread < 1 gathers the times around it, as a logit-normal does (same paper, Eq. 19).
    The n times are not independent: they come from evenly spaced numbers with a random start (assumed, for the paper's
    runs too), because the loss varies so much with t that even coverage makes gradients less noisy (Kingma et al.,
    arXiv 2107.00630, App. I.1)."""
    u = (torch.rand(1, generator=generator, device=device) + torch.arange(n, device=device) / n) % 1
    return torch.sigmoid(math.log(shift) + spread * torch.logit(u))     # spread and shift act on log-odds


def per_picture(values, x):
    """values (B,) -> (B, 1, 1, 1), or as many dimensions as x has: a factor for each picture."""
    return values.view(-1, *[1] * (x.dim() - 1))


def loss(net, x0, t, eps, schedule, prediction="eps", cond=()):
    """Mean squared error of each image, (B,): the simple, unweighted loss of Eq. 4.

    x0, eps (B, C, H, W) or any other (B, ..), t (B,), cond: a tuple of tensors of B rows. prediction 'v' is Salimans &
    Ho's target (arXiv 2202.00512), the velocity of x_t along the circle (alpha, sigma). Unlike eps it also asks for x_0
    where x_t is all noise: for one guess of x_0 its loss is that of eps divided by alpha^2, so high noise, where the
    layout is decided, weighs more."""
    assert prediction in ("eps", "v"), f"prediction is 'eps' or 'v', not {prediction!r}"
    assert not torch.is_tensor(cond), "cond is a tuple of tensors: (y,) for classes"
    alpha, sigma = (per_picture(f(t), x0) for f in (schedule.alpha, schedule.sigma))
    target = eps if prediction == "eps" else alpha * eps - sigma * x0
    out = net(alpha * x0 + sigma * eps, t, *cond)
    return (out.float() - target).square().flatten(1).mean(dim=1)


# ---- from a network to a denoiser ---------------------------------------------------------------------

def clip_x0(x0, how):
    """'none'; 'static': to [-1, 1], where pictures live; 'dynamic': to [-s, s] and divided by s, the 99.5th percentile
    of |x0|, if s is above 1 (Imagen, arXiv 2205.11487, Sec. 2.3), which keeps strong guidance from saturating."""
    assert how in ("none", "static", "dynamic"), f"clip is 'none', 'static' or 'dynamic', not {how!r}"
    if how == "none":
        return x0
    if how == "static":
        return x0.clamp(-1, 1)
    s = per_picture(torch.quantile(x0.abs().flatten(1), 0.995, dim=1).clamp(min=1), x0)
    return x0.clamp(-s, s) / s


def denoiser(net, schedule, prediction="eps", cond=(), null=(), scale=1.0, clip="static", cond_fn=None, cond_scale=1.0):
    """denoise(x, t) -> x0 for the samplers below: x (B, C, H, W), t a float, x0 like x. net should be in eval mode.

    cond, null: the condition and the null condition of the batch (the null class, or features and mask of the empty
    text), as tuples of tensors, equal in number and shapes. scale: classifier-free guidance (ignored without a cond),
        out = out(null) + scale * (out(cond) - out(null))                                            (Eq. 6)
    so 1 is no guidance and U-ViT's published 0.4 is 1.4 here; both halves go through the net as one batch.
    clip: see clip_x0 (static: assumed, as in DDPM's code); 'none' for anything but pictures in [-1, 1], such as an
    autoencoder's latents. Without clipping, use em for eps on the cosine schedule: the first step of ddim and dpm
    multiplies an error of eps by hundreds, because x0 is divided by alpha, 4.7e-5 at t_max (em multiplies by it again).
    cond_fn(x, t) -> grad_x log p(c | x_t), t a float as for denoise: a classifier's or CLIP's gradient, run with
    gradients enabled (not within torch.inference_mode, which forbids them). cond_scale * sigma^2 / alpha * gradient is
    added to x0, which adds cond_scale * gradient to the score (as far as the clipping after it lets it). For notebooks:
    no command here has such a classifier."""
    assert prediction in ("eps", "v"), f"prediction is 'eps' or 'v', not {prediction!r}"
    assert not torch.is_tensor(cond), "cond is a tuple of tensors: (y,) for classes"
    guided = len(cond) > 0 and scale != 1
    assert not guided or len(cond) == len(null), "guidance needs a null condition of as many tensors as cond has"
    both = [torch.cat(pair) for pair in zip(cond, null)] if guided else []

    def predict(x, t):
        t = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        if not guided:
            return net(x, t, *cond).float()
        with_cond, without = net(torch.cat([x, x]), torch.cat([t, t]), *both).float().chunk(2)
        return without + scale * (with_cond - without)          # for eps, v or x0 alike: each is affine in the others

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        out = predict(x, t)
        x0 = (x - sigma * out) / alpha if prediction == "eps" else alpha * x - sigma * out
        if cond_fn is not None:
            with torch.enable_grad():
                gradient = cond_fn(x.detach().requires_grad_(), t)
            x0 = x0 + cond_scale * sigma**2 / alpha * gradient.detach()
        return clip_x0(x0, clip)

    return denoise


# ---- time grids: `steps` times, decreasing from t_max, then 0 -------------------------------------------

# The last time before 0. Noise is about one grey level there: sigma is 0.01, or 0.006 on the cosine schedule. U-ViT's
# value with em; with the other samplers it is assumed
T_MIN = 1e-3


def uniform_times(schedule, steps):
    """Evenly spaced in time, for the many small steps that Euler-Maruyama needs."""
    return [schedule.t_max + (T_MIN - schedule.t_max) * i / max(1, steps - 1) for i in range(steps)] + [0.0]


def logsnr_times(schedule, steps):
    """Evenly spaced in log-SNR, for few large steps: the exact solution is smooth in lam, not in t. The first step
    covers all that the cosine schedule has below lam = -5.1, a third of its range, and one even step more: below -5.1
    the picture is at most 0.6% of x, and hardly anything is decided. (The linear schedule begins at -5.02, so it is
    even throughout.)"""
    start, end = max(schedule.lam(schedule.t_max), -5.1), schedule.lam(T_MIN)
    inner = [schedule.t_of_lam(start + (end - start) * i / (steps - 1)) for i in range(1, steps)]
    return [schedule.t_max] + inner + [0.0]


# ---- samplers: denoise(x, t) -> x0, a start x ~ N(0, I), a grid of times that ends at 0 -------------------

def carry(x, x0, t, s, schedule):
    """Carry x from time t > 0 to s, keeping x0 and the noise that it implies fixed."""
    eps = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
    return schedule.alpha(s) * x0 + schedule.sigma(s) * eps


@torch.no_grad()
def em(denoise, x, times, schedule, noise):
    """Euler-Maruyama on the reverse SDE (Song et al., arXiv 2011.13456, Eq. 6); noise() -> N(0, I) like x. For small
    steps this is Eq. 2-3, except that the noise has variance beta here and the posterior's variance there, which is
    smaller near the picture.

    First order: its error falls only as 1 / steps. A step replaces a fraction beta of x's variance by fresh noise, with
    the score held fixed, so beta must be small: on the linear schedule at t = 0.5 it is 0.4 with 20 steps, and 0.01
    with the paper's 1000. With 20 steps the picture also stays grainy: there the last step but one adds noise of std
    0.18 (23 grey levels), of which the last evaluation expects, and removes, only 0.01. But fresh noise is useful, too:
    it corrects earlier mistakes of the network."""
    for t, s in zip(times[:-1], times[1:]):
        x0 = denoise(x, t)
        score = (schedule.alpha(t) * x0 - x) / schedule.sigma(t)**2
        # beta_t of Eq. 1, for the forward step from s to t: about beta(t) (t - s) if they are close, but below 1 even
        # where the cosine's rate goes to infinity. (There x, still all noise, gets a variance of up to 1.25, which the
        # next steps bring back to 1.)
        beta = 1 - (schedule.alpha(t) / schedule.alpha(s))**2
        x = x + beta * (x / 2 + score)
        if s > 0:                                               # no noise in the picture itself
            x = x + math.sqrt(beta) * noise()
    return x


@torch.no_grad()
def ddim(denoise, x, times, schedule, noise=None):
    """DDIM (Song et al., arXiv 2010.02502, Eq. 12 with eta = 0): no noise, first order. SAMPLERS puts it on the grid of
    DPM-Solver (assumed; its authors step evenly in time)."""
    for t, s in zip(times[:-1], times[1:]):
        x0 = denoise(x, t)
        x = carry(x, x0, t, s, schedule)
    return x


@torch.no_grad()
def dpm(denoise, x, times, schedule, noise=None):
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Alg. 2): DDIM's step, with x0 extrapolated in lam from the last
    two evaluations to the middle of the step. The part linear in x is solved exactly, and the error of the rest
    falls as 1 / steps^2 (second order): twenty steps are enough for a good network. Early mistakes stay, because no
    fresh noise corrects them."""
    x0_last = None
    for t, s in zip(times[:-1], times[1:]):
        x0 = target = denoise(x, t)
        if x0_last is not None and s > 0:                       # else DDIM: no x0_last yet, or lam(0) is infinite
            ratio = (schedule.lam(s) - schedule.lam(t)) / (schedule.lam(t) - schedule.lam(t_last))     # 1 / r in Alg. 2
            target = x0 + (x0 - x0_last) * ratio / 2
        x = carry(x, target, t, s, schedule)
        x0_last, t_last = x0, t
    return x


SAMPLERS = dict(em=(em, uniform_times), ddim=(ddim, logsnr_times), dpm=(dpm, logsnr_times))


class ImageNoise:
    """One CPU generator per image: noise() -> (B, C, H, W) on `device`, fresh noise with each call. Row i depends
    only on seeds[i], not on the batch it is in, the device or the number of processes. Make a new one for each run that
    should start from the same noise."""

    def __init__(self, seeds, shape, device="cpu"):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self):
        on_gpu = torch.device(self.device).type == "cuda"
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=on_gpu, device="cpu")
        for image, generator in zip(noise, self.generators):
            image.normal_(generator=generator)
        return noise.to(self.device, non_blocking=on_gpu)       # from pinned memory: no wait for the GPU


def sample(denoise, noise, schedule, sampler="dpm", steps=20):
    """Pictures (B, C, H, W), roughly in [-1, 1], from a denoiser and an ImageNoise."""
    walk, grid = SAMPLERS[sampler]
    return walk(denoise, noise(), grid(schedule, steps), schedule, noise)
