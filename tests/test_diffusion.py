"""Schedules, loss, guidance and samplers, against data for which every answer is known in closed form.

Pictures are of one pixel here, (N, 1, 1, 1): the N rows are N draws of a number, and its distribution is the test."""
import math

import pytest
import torch

import data
import diffusion
from diffusion import SAMPLERS, SCHEDULES, ImageNoise, denoiser

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
TIMES = [diffusion.T_MIN, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]
MEAN, STD = 0.3, 0.5                                    # of the data, wherever they are Gaussian


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def normal_quantiles(n):
    """n numbers that are distributed as N(0, 1) as evenly as n numbers can be: no sampling error in the answer."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).view(n, 1, 1, 1)


def gaussian_x0(x, t, schedule, mean=MEAN, std=STD):
    """The exact E[x_0 | x_t] for x_0 ~ N(mean, std^2)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)


def gaussian_net(schedule, prediction):
    """The network that training on this Gaussian would end in."""
    def net(x, t):
        t = t[:, None, None, None].double()
        alpha, sigma, x0 = schedule.alpha(t), schedule.sigma(t), gaussian_x0(x, t, schedule)
        eps = (x - alpha * x0) / sigma
        return eps if prediction == "eps" else alpha * eps - sigma * x0
    return net


# ---- schedules ---------------------------------------------------------------------------------------

@each_schedule
def test_alpha_and_sigma_lie_on_the_unit_circle(schedule):
    for t in TIMES + [0.0, schedule.t_max]:
        assert schedule.alpha(t)**2 + schedule.sigma(t)**2 == pytest.approx(1, abs=1e-12), f"at t = {t}"


@each_schedule
def test_time_0_is_the_picture_and_t_max_is_noise(schedule):
    assert schedule.alpha(0.0) == 1 and schedule.sigma(0.0) == 0
    assert schedule.alpha(schedule.t_max) < 0.01 and math.isfinite(schedule.lam(schedule.t_max))


def test_schedules_end_where_their_comments_say():
    linear, cosine = SCHEDULES["linear"], SCHEDULES["cosine"]
    assert linear.lam(linear.t_max) == pytest.approx(-5.02, abs=0.01)
    assert cosine.alpha(cosine.t_max)**2 == pytest.approx(2e-9, rel=0.2)


def test_linear_schedule_is_ddpm_of_a_thousand_steps_in_the_limit():
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    ours = torch.tensor([SCHEDULES["linear"].alpha((i + 1) / 1000)**2 for i in range(1000)], dtype=torch.float64)
    assert (ours - abar).abs().max() < 5e-3


def test_cosine_schedule_is_the_formula_of_its_paper():
    f = [math.cos((t + 0.008) / 1.008 * math.pi / 2)**2 for t in (0, 0.25, 0.5, 0.75)]
    ours = [SCHEDULES["cosine"].alpha(t)**2 for t in (0.25, 0.5, 0.75)]
    assert ours == pytest.approx([f_t / f[0] for f_t in f[1:]])


@each_schedule
def test_log_snr_falls_and_t_of_lam_inverts_it(schedule):
    times = TIMES + [schedule.t_max]
    lams = [schedule.lam(t) for t in times]
    assert lams == sorted(lams, reverse=True) and len(set(lams)) == len(lams)
    assert lams == pytest.approx([math.log(schedule.alpha(t) / schedule.sigma(t)) for t in times])
    assert [schedule.t_of_lam(lam) for lam in lams] == pytest.approx(times, rel=1e-9)


@each_schedule
@pytest.mark.parametrize("what", ["alpha", "sigma", "lam"])
def test_tensors_and_floats_get_the_same_schedule(schedule, what):
    f = getattr(schedule, what)
    torch.testing.assert_close(f(torch.tensor(TIMES)), torch.tensor([f(t) for t in TIMES]), rtol=1e-4, atol=1e-4)


@each_schedule
def test_sigma_of_a_tensor_is_exact_near_the_picture(schedule):
    times = [1e-6, 1e-5]                                # a difference from 1 would be lost in float32
    sigma = torch.tensor([schedule.sigma(t) for t in times])
    torch.testing.assert_close(schedule.sigma(torch.tensor(times)), sigma, rtol=1e-3, atol=0)


# ---- learning ----------------------------------------------------------------------------------------

@each_schedule
def test_x_t_has_the_moments_of_the_forward_process(schedule):
    x0, t, seen = torch.full((len(TIMES), 3, 100, 100), 0.8), torch.tensor(TIMES), []
    diffusion.loss(lambda x, t: seen.append(x) or x, x0, t, torch.randn_like(x0), schedule)
    for t, x in zip(TIMES, seen[0]):
        mean, std, sigma = x.mean().item(), x.std().item(), schedule.sigma(t)
        assert mean == pytest.approx(0.8 * schedule.alpha(t), abs=5 * sigma / x.numel()**0.5), f"mean at t = {t}"
        assert std == pytest.approx(sigma, rel=5 / (2 * x.numel())**0.5), f"deviation at t = {t}"


@each_schedule
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_of_each_image_is_its_squared_distance_from_the_target(schedule, prediction):
    """Of a network that works the target out from the x_t and t that it is given, and adds y."""
    times, y, (x0, eps) = [0.01, 0.3, 0.6, 0.9], torch.arange(4), torch.randn(2, 4, 3, 8, 8)

    def net(x, t, y):
        alpha, sigma = (f(t)[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
        noise = (x - alpha * x0) / sigma
        return dict(eps=noise, v=alpha * noise - sigma * x0)[prediction] + y[:, None, None, None]

    losses = diffusion.loss(net, x0, torch.tensor(times), eps, schedule, prediction, (y,))
    torch.testing.assert_close(losses, torch.tensor([0.0, 1.0, 4.0, 9.0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (3, 20), (3, 5, 8, 8)], ids=["points", "sounds", "videos"])
def test_what_is_no_picture_is_learnt_and_clipped_as_one_with_as_many_numbers(shape):
    (x0, eps), t = torch.randn(2, 4, *shape), torch.tensor([0.01, 0.3, 0.6, 0.9])
    pictures = [x.reshape(4, 1, 1, -1) for x in (x0, eps)]
    losses = [diffusion.loss(lambda x, t: x, a, t, b, SCHEDULES["cosine"], "v") for a, b in ((x0, eps), pictures)]
    torch.testing.assert_close(*losses)
    clipped = diffusion.clip_x0(3 * x0, "dynamic")
    assert torch.equal(clipped, diffusion.clip_x0(3 * pictures[0], "dynamic").reshape(4, *shape))


def uniform_again(t, shift, spread):
    """The u of which the documented map, t / (1 - t) = shift (u / (1 - u))^spread, made t."""
    odds = (t.double() / (1 - t.double()) / shift)**(1 / spread)
    return odds / (1 + odds)


each_density = pytest.mark.parametrize("shift, spread", [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (1.0, 0.4), (1.6, 0.4)])


@each_density
def test_every_single_time_is_uniform_after_undoing_shift_and_spread(shift, spread):
    t = torch.stack([diffusion.draw_times(8, shift, spread)[3] for _ in range(4000)])
    assert 0 <= t.min() and t.max() < 1
    u = uniform_again(t, shift, spread).sort().values
    distance = (u - torch.linspace(0, 1, len(u))).abs().max().item()
    assert distance < 1.95 / len(u)**0.5, f"Kolmogorov-Smirnov distance {distance:.4f}: a chance in a thousand"


@each_density
def test_the_times_of_a_batch_are_evenly_spread(shift, spread):
    u = uniform_again(diffusion.draw_times(64, shift, spread), shift, spread).sort().values
    torch.testing.assert_close(u.diff().float(), torch.full((63,), 1 / 64), atol=1e-5, rtol=0)


# ---- from a network to a denoiser --------------------------------------------------------------------

@each_schedule
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_denoiser_of_an_exact_network_is_the_exact_denoiser(schedule, prediction):
    denoise = denoiser(gaussian_net(schedule, prediction), schedule, prediction, clip="none")
    x = torch.randn(50, 1, 1, 1)
    for t in [0.01, 0.3, 0.7, 0.9]:
        torch.testing.assert_close(denoise(x, t), gaussian_x0(x, t, schedule), rtol=1e-3, atol=1e-3)


class ClassNet:
    """Predicts v = class + 1 everywhere, and remembers how many rows it was given."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, y):
        self.rows.append(len(x))
        return torch.ones_like(x) * (y + 1.0)[:, None, None, None]


def guided(scale, y=(2, 5), null=(9, 9)):
    """x0 of two pictures under guidance, and the sizes of the batches that the network was called with."""
    net = ClassNet()
    denoise = denoiser(net, SCHEDULES["linear"], "v", (torch.tensor(y),), (torch.tensor(null),), scale, clip="none")
    return denoise(torch.zeros(2, 1, 1, 1), 0.5).flatten(), net.rows


def test_a_network_is_told_the_time_in_float32_whatever_the_pictures_are_in():
    seen, x = [], torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    denoiser(lambda x, t: seen.append(t) or x, SCHEDULES["linear"])(x, 0.3)
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == pytest.approx([0.3, 0.3])


def test_guidance_of_scale_1_is_the_condition_alone_and_calls_the_network_on_it_alone():
    x0, rows = guided(scale=1)
    assert torch.equal(x0, -SCHEDULES["linear"].sigma(0.5) * torch.tensor([3.0, 6.0])) and rows == [2]


def test_guidance_of_scale_0_is_unconditional():
    torch.testing.assert_close(guided(scale=0)[0], guided(scale=1, y=(9, 9))[0])


@pytest.mark.parametrize("scale", [-1, 0.5, 2, 7.5])
def test_guidance_is_linear_in_its_scale_and_one_call_of_twice_the_batch(scale):
    (zero, _), (one, _), (x0, rows) = guided(0), guided(1), guided(scale)
    torch.testing.assert_close(x0, zero + scale * (one - zero))
    assert rows == [4]


def test_guidance_is_computed_in_float32_whatever_the_network_returns():
    """In bfloat16 the difference of two answers near 1 has two digits, and guidance multiplies its error."""
    def net(x, t, y):
        return y.bfloat16()[:, None, None, None].expand_as(x)

    one, other, linear = 1.0, 0.8984375, SCHEDULES["linear"]                    # exact in bfloat16
    denoise = denoiser(net, linear, "v", (torch.tensor([one]),), (torch.tensor([other]),), scale=7.5, clip="none")
    guided = denoise(torch.zeros(1, 1, 1, 1), 0.5).item() / -linear.sigma(0.5)
    assert guided == pytest.approx(other + 7.5 * (one - other), rel=1e-6)


def test_a_forgotten_comma_is_told():
    """(y) is no tuple: its first row would be the class of all."""
    x, t, y = torch.zeros(2, 1, 2, 2), torch.rand(2), torch.tensor([3, 4])
    with pytest.raises(AssertionError, match=r"cond is a tuple of tensors: \(y,\)"):
        diffusion.loss(lambda *args: x, x, t, x, SCHEDULES["linear"], "eps", (y))
    with pytest.raises(AssertionError, match=r"cond is a tuple of tensors: \(y,\)"):
        denoiser(lambda *args: x, SCHEDULES["linear"], "eps", (y))


def test_guidance_needs_a_null_condition_of_as_many_tensors():
    """Features alone in null would leave the mask of the condition out as well."""
    features, mask = torch.zeros(2, 8, 4), torch.ones(2, 8, dtype=torch.bool)
    for null in ((), (features,)):
        with pytest.raises(AssertionError, match="as many tensors"):
            denoiser(None, SCHEDULES["cosine"], "v", (features, mask), null, scale=2.0)
    denoiser(None, SCHEDULES["cosine"], "v", (features, mask), scale=1.0)               # without guidance none is read


def test_what_is_predicted_is_eps_or_v_and_nothing_else():
    x, t = torch.zeros(1, 3, 4, 4), torch.tensor([0.5])
    for name in ("epsilon", "v_prediction"):
        with pytest.raises(AssertionError, match=f"not '{name}'"):
            diffusion.loss(None, x, t, x, SCHEDULES["cosine"], name)
        with pytest.raises(AssertionError, match=f"not '{name}'"):
            denoiser(None, SCHEDULES["cosine"], name)


def test_clip_is_none_or_static_or_dynamic_and_nothing_else():
    x0 = torch.tensor([-3.0, -1, 0.2, 1, 3]).view(1, 1, 1, 5)
    assert torch.equal(diffusion.clip_x0(x0, "none"), x0)
    assert diffusion.clip_x0(x0, "static").flatten().tolist() == pytest.approx([-1, -1, 0.2, 1, 1])
    with pytest.raises(AssertionError, match="not 'hard'"):
        diffusion.clip_x0(x0, "hard")


def test_dynamic_clip_scales_each_saturated_picture_by_its_own_percentile():
    calm, saturated, outlier = torch.full((3, 1, 50, 50), 0.5)
    saturated[:, ::2] = -2
    saturated[:, 1::2] = 1
    outlier[0, 0, 0] = 9                                # one pixel of 2,500, beyond the percentile: cut
    x0 = diffusion.clip_x0(torch.stack([calm, saturated, outlier]), "dynamic")
    assert torch.equal(x0[0], calm)
    assert torch.equal(x0[1], saturated / 2)
    assert x0[2].max() == 1 and x0[2].median() == 0.5
    ramp = torch.linspace(0, 10, 1001).view(1, 1, 1, -1)
    torch.testing.assert_close(diffusion.clip_x0(ramp, "dynamic"), ramp.clamp(max=9.95) / 9.95)


def test_clip_is_what_the_denoiser_returns():
    def x0(clip):
        far = denoiser(lambda x, t: -10 * torch.ones_like(x), SCHEDULES["linear"], "v", clip=clip)
        return far(torch.zeros(1, 1, 2, 2), 0.5).max().item()

    assert x0("none") > 9 and x0("static") == x0("dynamic") == 1


def test_pictures_are_clipped_statically_unless_told_otherwise_and_after_a_classifier_has_pushed():
    linear, x = SCHEDULES["linear"], torch.zeros(1, 1, 1, 2)
    x0 = denoiser(lambda x, t: torch.tensor([-10, -0.5]).expand_as(x), linear, "v")(x, 0.5)
    assert x0.flatten().tolist() == pytest.approx([1, 0.5 * linear.sigma(0.5)])
    pushed = denoiser(lambda x, t: torch.zeros_like(x), linear, cond_fn=lambda x, t: 100 * torch.ones_like(x))(x, 0.5)
    assert (pushed == 1).all()


# ---- guidance by a classifier ------------------------------------------------------------------------
# Two Gaussians, of which an unguided sampler draws the mixture. Bayes' rule gives the exact classifier of noisy
# numbers, and guidance by its gradient must turn the mixture into the one component asked for.

WEIGHTS, MEANS, STDS = torch.tensor([[0.3, 0.7], [-0.6, 0.5], [0.2, 0.3]], dtype=torch.float64).view(3, 2, 1, 1, 1, 1)


def log_posterior(x, t, schedule):
    """log p(component | x_t), (2, N, 1, 1, 1)."""
    alpha, std = schedule.alpha(t), (schedule.alpha(t)**2 * STDS**2 + schedule.sigma(t)**2).sqrt()
    return (WEIGHTS.log() - std.log() - ((x - alpha * MEANS) / std)**2 / 2).log_softmax(dim=0)


def mixture_x0(x, t, schedule):
    return (log_posterior(x, t, schedule).exp() * gaussian_x0(x, t, schedule, MEANS, STDS)).sum(dim=0)


def mixture_net(schedule):
    """Predicts eps exactly; t is the same in all rows."""
    def net(x, t):
        t = float(t[0])
        return (x - schedule.alpha(t) * mixture_x0(x, t, schedule)) / schedule.sigma(t)
    return net


def classifier(component, schedule):
    """cond_fn: the gradient of the log-probability of a component, by autograd as with any classifier."""
    return lambda x, t: torch.autograd.grad(log_posterior(x, t, schedule)[component].sum(), x)[0]


def draw_from_mixture(schedule, cond_fn=None):
    denoise = denoiser(mixture_net(schedule), schedule, clip="none", cond_fn=cond_fn)
    return diffusion.sample(denoise, lambda: normal_quantiles(1000), schedule, "dpm", steps=100)


@each_schedule
def test_without_a_classifier_both_components_are_drawn(schedule):
    x = draw_from_mixture(schedule)
    assert x.mean().item() == pytest.approx(0.3 * -0.6 + 0.7 * 0.5, abs=0.01)


@each_schedule
@pytest.mark.parametrize("component", [0, 1])
def test_an_exact_classifier_picks_out_its_component(schedule, component):
    x = draw_from_mixture(schedule, classifier(component, schedule))
    assert x.mean().item() == pytest.approx(MEANS[component].item(), rel=0.02)
    assert x.var().item() == pytest.approx(STDS[component].item()**2, rel=0.02)


def test_cond_scale_multiplies_the_push_of_the_classifier():
    schedule, x = SCHEDULES["linear"], torch.randn(5, 1, 1, 1)

    def x0(scale):
        push = dict(cond_fn=classifier(0, schedule), cond_scale=scale)
        return denoiser(mixture_net(schedule), schedule, clip="none", **push)(x, 0.5)

    unguided, once, thrice = x0(0), x0(1), x0(3)
    assert (once - unguided).abs().max() > 0.01
    torch.testing.assert_close(thrice - unguided, 3 * (once - unguided), rtol=1e-3, atol=1e-5)


# ---- grids and samplers ------------------------------------------------------------------------------

@each_schedule
@pytest.mark.parametrize("grid", [diffusion.uniform_times, diffusion.logsnr_times])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_grids_fall_from_t_max_to_0_in_as_many_steps_as_asked(schedule, grid, steps):
    times = grid(schedule, steps)
    assert len(times) == steps + 1 and times[0] == schedule.t_max and times[-1] == 0
    assert times == sorted(set(times), reverse=True)


@each_schedule
@pytest.mark.parametrize("grid, even", [("uniform_times", "time"), ("logsnr_times", "lam")])
def test_grids_are_even_in_what_their_names_say(schedule, grid, even):
    inner = getattr(diffusion, grid)(schedule, 20)[:-1]                 # without the last step, to 0 itself
    marks = inner if even == "time" else [schedule.lam(t) for t in inner]
    first, *gaps = [a - b for a, b in zip(marks, marks[1:])]
    assert gaps == pytest.approx([gaps[0]] * 18, rel=1e-6) and inner[-1] == pytest.approx(diffusion.T_MIN)
    long = even == "lam" and marks[0] < -6                              # the cosine's first step begins in pure noise
    assert abs(first) > 5 * abs(gaps[0]) if long else first == pytest.approx(gaps[0], rel=1e-6)


def test_the_numbers_in_the_comments_on_grids_are_theirs():
    sigmas = [schedule.sigma(diffusion.T_MIN) for schedule in SCHEDULES.values()]
    assert sigmas == pytest.approx([0.0105, 0.0064], rel=0.01)
    cosine = SCHEDULES["cosine"]
    second, third = (cosine.lam(t) for t in diffusion.logsnr_times(cosine, 20)[1:3])
    assert 2 * second - third == pytest.approx(-5.1), "the grid is even from here on"


@pytest.mark.parametrize("sampler, grid", [("em", "uniform_times"), ("ddim", "logsnr_times"), ("dpm", "logsnr_times")])
def test_a_sampler_steps_on_its_own_grid_and_keeps_no_graph(sampler, grid):
    seen, net, linear = [], torch.nn.Conv2d(1, 1, 1), SCHEDULES["linear"]
    denoise = denoiser(lambda x, t: seen.append(t[0].item()) or net(x), linear)
    x = diffusion.sample(denoise, ImageNoise([0], (1, 2, 2)), linear, sampler, steps=5)
    assert seen == pytest.approx(getattr(diffusion, grid)(linear, 5)[:-1]) and not x.requires_grad


def test_sampling_is_by_dpm_solver_in_20_steps_unless_told_otherwise():
    calls, linear = [], SCHEDULES["linear"]
    denoise = denoiser(lambda x, t: calls.append(t) or torch.zeros_like(x), linear)
    usual, dpm = (diffusion.sample(denoise, ImageNoise([0], (1, 2, 2)), linear, *more) for more in ((), ("dpm", 20)))
    assert len(calls) == 40 and torch.equal(usual, dpm)


def solver_error(sampler, schedule, steps):
    """How far the Gaussian's probability-flow ODE is missed at T_MIN; its exact solution keeps each row's quantile."""
    times = diffusion.logsnr_times(schedule, steps + 1)[:-1]            # the step from T_MIN to 0 has its own error

    def exact(t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * MEAN + math.sqrt(alpha**2 * STD**2 + sigma**2) * normal_quantiles(9)

    x = SAMPLERS[sampler][0](lambda x, t: gaussian_x0(x, t, schedule), exact(times[0]), times, schedule)
    return (x - exact(times[-1])).abs().max().item()


@each_schedule
@pytest.mark.parametrize("sampler, least, most", [("ddim", 0.85, 1.15), ("dpm", 1.7, 2.3)])
def test_solvers_have_the_order_they_claim(sampler, least, most, schedule):
    errors = [solver_error(sampler, schedule, steps) for steps in (40, 80, 160)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(least < order < most for order in orders), f"errors {errors}, orders {orders}"


@each_schedule
def test_dpm_reads_x0_in_the_middle_of_each_step_however_uneven(schedule):
    """Exactly so where x0 is linear in lam. The order alone would not show a wrong ratio of two steps."""
    times, x = [0.9, 0.7, 0.65, 0.3, 0.1], torch.ones(1, 1, 1, 1, dtype=torch.float64)
    expected = x
    for t, s in zip(times, times[1:]):
        middle = schedule.lam(t) if t == times[0] else (schedule.lam(t) + schedule.lam(s)) / 2
        expected = diffusion.ddim(lambda x, t: middle, expected, [t, s], schedule)
    ours = diffusion.dpm(lambda x, t: torch.full_like(x, schedule.lam(t)), x, times, schedule)
    torch.testing.assert_close(ours, expected)


@each_schedule
def test_euler_maruyama_draws_the_mean_and_deviation_of_the_data(schedule):
    n, denoise = 20_000, lambda x, t: gaussian_x0(x, t, schedule)
    x = diffusion.sample(denoise, lambda: torch.randn(n, 1, 1, 1), schedule, "em", steps=500)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


@each_schedule
@each_sampler
def test_all_samplers_land_on_the_only_picture_there_is(schedule, sampler):
    picture = torch.rand(3, 8, 8) * 2 - 1
    noise = ImageNoise(range(4), picture.shape)
    x = diffusion.sample(lambda x, t: picture.expand_as(x), noise, schedule, sampler, steps=20)
    assert (x - picture).abs().max() < 1e-3


@each_sampler
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("scale", [1, 3])
def test_a_network_may_overwrite_what_it_returned_last(sampler, prediction, scale):
    """As CUDA graphs do."""
    schedule, outputs = SCHEDULES["cosine"], {}
    exact = gaussian_net(schedule, prediction)

    def net(x, t, y):
        return exact(x, t).float() + y[:, None, None, None]

    def overwriting(*args):
        new = net(*args)
        return outputs.setdefault(new.shape, new).copy_(new)

    def draw(net):
        cond, null = torch.full((4,), 0.1), torch.zeros(4)
        denoise = denoiser(net, schedule, prediction, (cond,), (null,), scale, clip="none")
        return diffusion.sample(denoise, ImageNoise(range(4), (1, 2, 2)), schedule, sampler, steps=10)

    assert torch.equal(draw(net), draw(overwriting))


@each_sampler
def test_the_same_seed_draws_the_same_and_another_another(sampler):
    def draw(seed, schedule=SCHEDULES["cosine"]):
        noise = ImageNoise(data.image_seeds(seed, range(4)), (1, 1, 1))
        return diffusion.sample(lambda x, t: gaussian_x0(x, t, schedule), noise, schedule, sampler, steps=10)

    assert torch.equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).all()


# ---- noise -------------------------------------------------------------------------------------------

def test_noise_of_an_image_does_not_depend_on_its_batch():
    """Nor does the second call, which Euler-Maruyama makes."""
    together, alone = ImageNoise([5, 6, 7], (3, 4, 4)), ImageNoise([6], (3, 4, 4))
    for _ in range(2):
        assert torch.equal(together()[1], alone()[0])


def test_noise_differs_between_images_and_between_calls():
    noise = ImageNoise(data.image_seeds(0, range(50)), (3, 4, 4))
    rows = torch.cat([noise(), noise()]).flatten(1)
    assert len(rows.unique(dim=0)) == 100
    assert rows.mean().abs() < 0.1 and rows.std() == pytest.approx(1, abs=0.1)
