"""Every parametrisation and table with the network that is exact for N(0, s^2): the denoiser is z s^2 / (s^2 + sigma^2)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from recon.errors import InputError
from recon.priors.checkpoints.base import CheckpointPrior, Request, make_card
from recon.priors.checkpoints.edm import EdmConfig, edm_noise, iddpm_sigmas
from recon.priors.checkpoints.schedulers import scheduler_noise
from recon.priors.checkpoints.score_sde import ScoreSdeConfig, score_noise
from recon.priors.checkpoints.tables import TableClock, betas, vp_sigmas, zero_terminal
from recon.space import Space

S = 0.7  # standard deviation of the data


def ddpm(schedule, prediction, **more):
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": schedule,
        "prediction_type": prediction,
        **more,
    }


def table(schedule):
    """abar in float64, from the definitions."""
    if schedule == "linear":
        beta = np.linspace(0.00085, 0.012, 1000)
    elif schedule == "scaled_linear":
        beta = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    else:
        f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
        beta = np.array([min(1 - f[t + 1] / f[t], 0.999) for t in range(1000)])
    return np.cumprod(1 - beta)


class Exact(nn.Module):
    """``E[target | x_t]`` in closed form: ``level(label) -> (alpha, sigma_t)`` of ``x_t = alpha x_0 + sigma_t n``."""

    def __init__(self, level, target):
        super().__init__()
        self.level, self.target = level, target
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, label):
        a, b = (v.reshape(-1, 1, 1, 1) for v in self.level(label))
        total = a**2 * S**2 + b**2
        x0, n = a * S**2 / total * x, b / total * x
        return self.target(x0, n, a, b)


TARGETS = {
    "epsilon": lambda x0, n, a, b: n,
    "sample": lambda x0, n, a, b: x0,
    "v_prediction": lambda x0, n, a, b: a * n - b * x0,
    "velocity": lambda x0, n, a, b: n - x0,
    "score": lambda x0, n, a, b: -n / b,
    "scaled_score": lambda x0, n, a, b: -n,
}


def checked(noise, level, target, sigmas):
    space = Space(("y", "x"), (3, 5))
    request = Request(Path("exact.pt"), space, 0.0, 1.0, {})
    prior = CheckpointPrior(request, Exact(level, target), noise, make_card(request, noise, "exact", {}))
    z = torch.randn(len(sigmas), 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sigma = torch.as_tensor(np.array(sigmas), dtype=torch.float64)
    z = z * (S**2 + sigma**2).sqrt()[:, None, None]
    expected = z * (S**2 / (S**2 + sigma**2))[:, None, None]
    figure = ((prior.denoise(z, sigma) - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))).max()
    # D = c_skip z + c_out F loses sigma^2 / s^2 digits where noise drowns the data, and nothing else
    assert figure < 1e-14 * (10 + (max(sigmas) / S) ** 2)
    return prior


def abar_at(abar):
    """Levels at the labels of a table and halfway between them, where log sigma is interpolated."""
    logs = torch.as_tensor(np.log((1 - abar) / abar) / 2)

    def level(label):
        low = label.floor().long().clamp(0, len(abar) - 2)
        log = logs[low] + (label - low) * (logs[low + 1] - logs[low])
        a = (1 + (2 * log).exp()).rsqrt()
        return a, a * log.exp()

    return level


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_vp_tables(schedule, prediction):
    noise = scheduler_noise(ddpm(schedule, prediction), "test")
    abar = table(schedule)
    sigma = np.sqrt((1 - abar) / abar)
    assert noise.schedule.sigma_min == pytest.approx(sigma[0], rel=1e-9)  # 1 - abar cancels in the test, not in recon
    assert noise.schedule.sigma_max == pytest.approx(sigma[-1], rel=1e-9)
    between = np.sqrt(sigma[:-1] * sigma[1:])
    checked(noise, abar_at(abar), TARGETS[prediction], [sigma[3], sigma[500], between[3], between[500], sigma[900]])
    picked = torch.as_tensor(np.array([between[7], sigma[7], sigma[999] * 2, sigma[0] / 2]))
    assert torch.allclose(noise.clock(picked), torch.tensor([7.5, 7.0, 999.0, 0.0], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow(shift):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    noise = scheduler_noise(config, "test")
    t = shift * np.array([0.001, 0.999]) / (1 + (shift - 1) * np.array([0.001, 0.999]))
    assert noise.schedule.sigma_min == pytest.approx(t[0] / (1 - t[0]))
    assert noise.schedule.sigma_max == pytest.approx(t[1] / (1 - t[1]))
    checked(noise, lambda label: (1 - label / 1000, label / 1000), TARGETS["velocity"], [0.01, 0.3, 1.0, 25.0])
    dpm = scheduler_noise(ddpm("linear", "flow_prediction", flow_shift=shift), "test")
    assert dpm.schedule == noise.schedule and dpm.form == noise.form


@pytest.mark.parametrize("sign", [1, -1])
def test_edm_scheduler(sign):
    prediction = "epsilon" if sign > 0 else "v_prediction"
    config = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    noise = scheduler_noise({**config, "prediction_type": prediction}, "test")

    def level(label):
        sigma = (4 * label).exp()
        return 1 / (sigma**2 + 0.25).sqrt(), sigma / (sigma**2 + 0.25).sqrt()

    def target(x0, n, a, b):  # F of Karras et al., eq. 8: (x0 - c_skip (x0 + sigma n)) / c_out
        sigma = b / a
        return sign * (x0 - 0.25 * a**2 * (x0 + sigma * n)) / (0.5 * b)

    checked(noise, level, target, [0.002, 0.1, 1.0, 30.0])


@pytest.mark.parametrize("precondition", ["vp", "ve", "iddpm"])
def test_edm_baselines(precondition):
    noise = edm_noise(EdmConfig(precondition=precondition))

    def level(label):
        if precondition == "ve":
            return torch.ones_like(label), 2 * label.exp()
        if precondition == "vp":
            t = label / 999
            a = (-(t**2) * 19.9 / 4 - t * 0.1 / 2).exp()
            return a, (1 - a**2).sqrt()
        u = torch.as_tensor(np.log(iddpm_sigmas(1000)))
        low = label.floor().long().clamp(0, 998)
        sigma = (u[low] + (label - low) * (u[low + 1] - u[low])).exp()
        return (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()

    target = TARGETS["scaled_score"] if precondition == "ve" else TARGETS["epsilon"]
    checked(noise, level, target, [0.05, 0.3, 2.0, 20.0])


def test_the_iddpm_table_is_that_of_nichol_and_dhariwal():
    """Without its two clips it is the closed form sqrt(1 / abar - 1); label 0 is the least noise."""
    u = iddpm_sigmas(1000)
    abar = np.sin(np.pi / 2 * np.arange(999, 0, -1) / 1000 / 1.008) ** 2 / np.sin(np.pi / 2 / 1.008) ** 2
    closed = np.sqrt(1 / abar - 1)
    assert len(u) == 1000 and u[0] > 0
    assert np.allclose(u[:900], closed[:900], rtol=1e-6)


def sde(name, continuous, **model):
    base = {
        "name": "ncsnpp", "nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "resamp_with_conv": True,
        "conditional": True, "scale_by_sigma": False, "nonlinearity": "swish", "num_scales": 1000, "sigma_min": 0.01,
        "sigma_max": 50.0, "beta_min": 0.1, "beta_max": 20.0, "fir": True, "fir_kernel": (1, 3, 3, 1), "skip_rescale": True,
        "resblock_type": "biggan", "progressive": "none", "progressive_input": "residual", "progressive_combine": "sum",
        "embedding_type": "positional",
    }  # fmt: skip
    return ScoreSdeConfig.model_validate(
        {
            "training": {"sde": name, "continuous": continuous},
            "data": {"image_size": 8, "num_channels": 3, "centered": True},
            "model": base | model,
        }
    )


def test_continuous_vp_and_subvp():
    def alpha(label):
        t = label / 999
        return (-(t**2) * 19.9 / 4 - t * 0.1 / 2).exp()

    vp = score_noise(sde("vpsde", True))
    checked(vp, lambda t: (alpha(t), (1 - alpha(t) ** 2).sqrt()), TARGETS["epsilon"], [0.01, 0.4, 5.0])
    sub = score_noise(sde("subvpsde", True))
    checked(sub, lambda t: (alpha(t), 1 - alpha(t) ** 2), TARGETS["epsilon"], [0.01, 0.4, 5.0])
    assert sub.schedule.sigma_max == pytest.approx((1 - math.exp(-10.05)) / math.exp(-10.05 / 2), rel=1e-9)


def test_discrete_vp_has_the_table_of_ddpm():
    noise = score_noise(sde("vpsde", False))
    abar = np.cumprod(1 - np.linspace(0.1 / 1000, 20 / 1000, 1000))
    sigma = np.sqrt((1 - abar) / abar)
    checked(noise, abar_at(abar), TARGETS["epsilon"], [sigma[10], math.sqrt(sigma[40] * sigma[41]), sigma[700]])


@pytest.mark.parametrize("scaled", [True, False])
def test_ve(scaled):
    target = TARGETS["scaled_score" if scaled else "score"]
    noise = score_noise(sde("vesde", True, scale_by_sigma=scaled, embedding_type="fourier"))
    checked(noise, lambda label: (torch.ones_like(label), label), target, [0.01, 0.4, 50.0])
    falling = score_noise(sde("vesde", False, scale_by_sigma=scaled))

    def level(label):
        return torch.ones_like(label), 50 * (0.01 / 50) ** (label / 999)

    checked(falling, level, target, [0.01, 0.4, 50.0])
    diffusers = scheduler_noise(
        {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 50.0}, "", "fourier"
    )
    checked(diffusers, lambda label: (torch.ones_like(label), label), TARGETS["score"], [0.01, 0.4, 50.0])


def test_continuous_time_of_euler():
    noise = scheduler_noise(
        ddpm(
            "linear", "v_prediction", _class_name="EulerDiscreteScheduler", timestep_type="continuous", sigma_max=700.0
        ),
        "",
    )
    assert noise.schedule.sigma_max == 700.0

    def level(label):
        a = (1 + (8 * label).exp()).rsqrt()
        return a, a * (4 * label).exp()

    checked(noise, level, TARGETS["v_prediction"], [0.05, 0.4, 30.0])


def test_whole_labels_take_the_nearer_entry():
    noise = scheduler_noise(ddpm("linear", "epsilon"), "test", "learned")
    sigma = vp_sigmas(betas("linear", 1000, 0.00085, 0.012))
    near = [sigma[5] * (sigma[6] / sigma[5]) ** part for part in (0.0, 0.49, 0.51, 1.0)]
    assert noise.clock(torch.tensor(near, dtype=torch.float64)).tolist() == [5.0, 5.0, 6.0, 6.0]
    assert "nearest" in noise.clock.lookup


def test_small_levels_lose_no_digits():
    """sigma of the first entry is sqrt(beta / (1 - beta)); 1 - cumprod has only 5 digits of it for beta = 1e-12."""
    sigma = vp_sigmas(np.array([1e-12, 1e-3]))
    assert sigma[0] == pytest.approx(math.sqrt(1e-12 / (1 - 1e-12)), rel=1e-15)


def test_zero_terminal_table():
    """The rescaled table keeps its beginning and ends without signal; the infinite level is left out."""
    values = betas("scaled_linear", 1000, 0.00085, 0.012)
    sigma = zero_terminal(values)
    assert len(sigma) == 999
    assert sigma[0] == pytest.approx(math.sqrt(0.00085 / (1 - 0.00085)), rel=1e-12)
    root = np.sqrt(np.cumprod(1 - values))
    late = (root[998] - root[999]) * root[0] / (root[0] - root[999])
    assert sigma[-1] == pytest.approx(math.sqrt(1 / late**2 - 1), rel=1e-9)
    assert (
        scheduler_noise(ddpm("scaled_linear", "v_prediction", rescale_betas_zero_snr=True), "").schedule.sigma_max < 1e5
    )


@pytest.mark.parametrize(
    ("config", "embedding", "text"),
    [
        ({"_class_name": "CMStochasticIterativeScheduler"}, "positional", "no rule for the scheduler CMStochastic"),
        ({"_class_name": "DDPMScheduler"}, "positional", "num_train_timesteps: Field required"),
        (ddpm("laplace", "epsilon"), "positional", "tables known by name are linear.*got 'laplace'"),
        (ddpm("linear", "x0"), "positional", "prediction_type"),
        (ddpm("linear", "epsilon", trained_betas=[0.1, 1.5]), "positional", "between 0 and 1"),
        (ddpm("linear", "epsilon"), "fourier", "fourier embedding .* not trained with a DDPMScheduler"),
        (
            {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.1, "sigma_max": 1},
            "positional",
            "positional embedding",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 9},
            "learned",
            "learned labels takes those of a table",
        ),
    ],
)
def test_refuses_schedulers_it_cannot_read(config, embedding, text):
    with pytest.raises(InputError, match=text):
        scheduler_noise(config, "scheduler_config.json", embedding)


@pytest.mark.parametrize("levels", [[1.0], [1.0, 1.0], [0.0, 1.0], [2.0, 1.0], [1.0, math.inf]])
def test_refuses_tables_that_do_not_rise(levels):
    with pytest.raises(InputError, match="strictly rising"):
        TableClock(np.array(levels), np.arange(len(levels)))
