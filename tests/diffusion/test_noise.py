"""Noise, weights and errors by hand and against diffusers' own training functions."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from vislora.diffusion.loss import ClassImages, Error, denoising_loss
from vislora.diffusion.noise import DDPM, WEIGHTING_SCHEMES, FlowMatching, Noised, snr
from vislora.errors import InputError

LATENTS = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
NOTHING = {"text": torch.zeros(4, 1, 1)}


def draws(n: int = 4) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def schedule(kind: str = "epsilon", **more) -> DDPMScheduler:
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDPMScheduler(**usual, prediction_type=kind, **more)


def guess(noisy, timesteps, condition):
    return 0.3 * noisy


def squared(process, noised: Noised) -> torch.Tensor:
    return (0.3 * noised.noisy - noised.target).square().flatten(1).mean(1)


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_that_of_diffusers_scripts(scheme, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = FlowMatching(scheduler, scheme, 0.5, 0.8, 1.29)
    batch = process.add_noise(LATENTS, draws())
    sigmas, times, noise = [], [], []
    for g in draws():
        u = compute_density_for_timestep_sampling(scheme, 1, 0.5, 0.8, 1.29, generator=g)
        times.append(scheduler.timesteps[(u * 1000).long()])
        sigmas.append(scheduler.sigmas[(u * 1000).long()])
        noise.append(torch.randn(LATENTS.shape[1:], generator=g))
    sigma, noise = torch.cat(sigmas)[:, None, None, None], torch.stack(noise)
    torch.testing.assert_close(batch.noisy, (1 - sigma) * LATENTS + sigma * noise)
    torch.testing.assert_close(batch.target, noise - LATENTS)
    torch.testing.assert_close(batch.timesteps, torch.cat(times))
    weight = compute_loss_weighting_for_sd3(scheme, torch.cat(sigmas))
    loss = denoising_loss(guess, process, LATENTS, NOTHING, draws())
    torch.testing.assert_close(loss["total"], (weight * squared(process, batch)).mean(), rtol=1e-4, atol=0)
    # SD3's script: the error of the image that the prediction stands for
    other = FlowMatching(scheduler, scheme, 0.5, 0.8, 1.29, precondition=True)
    image = 0.3 * batch.noisy * -sigma + batch.noisy
    expected = (weight * (image - LATENTS).square().flatten(1).mean(1)).mean()
    loss = denoising_loss(guess, other, LATENTS, NOTHING, draws())
    torch.testing.assert_close(loss["total"], expected, rtol=1e-3, atol=0)


def test_a_place_stays_on_the_path_whatever_the_scheme():
    for scheme in WEIGHTING_SCHEMES:
        process = FlowMatching(FlowMatchEulerDiscreteScheduler(), scheme, 0.0, 1.0, 1.29)
        many = [torch.Generator().manual_seed(i) for i in range(300)]
        times = process.add_noise(torch.zeros(300, 1, 1, 1), many).timesteps
        assert 0 < times.min() < 250 and 750 < times.max() <= 1000, scheme


def test_noise_offset_adds_one_value_a_channel():
    plain, offset = (DDPM(schedule(), noise_offset=o).add_noise(LATENTS, draws()) for o in (0.0, 0.2))
    assert torch.equal(plain.timesteps, offset.timesteps)
    added = offset.target - plain.target
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), atol=1e-6, rtol=0)
    expected = []
    for g in draws():
        torch.randint(1000, (), generator=g)
        torch.randn(LATENTS.shape[1:], generator=g)
        expected.append(0.2 * torch.randn(4, generator=g))
    torch.testing.assert_close(added[:, :, 0, 0], torch.stack(expected), atol=1e-6, rtol=0)
    assert not torch.equal(plain.noisy, offset.noisy)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_debiased_estimation_weighs_by_the_snr(kind):
    process = DDPM(schedule(kind), debiased=True)
    batch = process.add_noise(LATENTS, draws())
    ratio = snr(process.scheduler, batch.timesteps).clamp(max=1000)
    weight = ratio.pow(-0.5) if kind == "epsilon" else 1 / (ratio + 1)
    loss = denoising_loss(guess, process, LATENTS, NOTHING, draws())
    torch.testing.assert_close(loss["total"], (weight * squared(process, batch)).mean())
    both = DDPM(schedule(kind), snr_gamma=5.0, debiased=True).weights(batch)
    torch.testing.assert_close(both, weight * DDPM(schedule(kind), snr_gamma=5.0).weights(batch))
    assert DDPM(schedule(kind)).weights(batch) is None


@pytest.mark.parametrize("scheduled", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_errors_by_hand(kind, scheduled):
    process = DDPM(schedule())
    batch = process.add_noise(LATENTS, draws())
    for i in range(4):
        signal = float(process.scheduler.alphas_cumprod[batch.timesteps[i]])
        c = {
            "constant": 0.1 * 2,
            "exponential": math.exp(math.log(0.1) * int(batch.timesteps[i]) / 1000) * 2,
            "snr": 0.9 / (1 + math.sqrt((1 - signal) / signal)) ** 2 + 0.1,
        }[scheduled]
        d = (0.3 * batch.noisy[i] - batch.target[i]).double()
        expected = 2 * ((d.square() + c**2).sqrt() - c) * (c if kind == "huber" else 1)
        error = Error(kind, scheduled, 0.1, 2.0).of(0.3 * batch.noisy, batch.target, batch, 4)[i]
        torch.testing.assert_close(error.double(), expected, rtol=1e-3, atol=1e-5)
    loss = denoising_loss(guess, process, LATENTS, NOTHING, draws(), error=Error(kind, scheduled, 0.1, 2.0))
    mean = Error(kind, scheduled, 0.1, 2.0).of(0.3 * batch.noisy, batch.target, batch, 4).mean()
    torch.testing.assert_close(loss["total"], mean)


def test_huber_is_squared_near_zero_and_goes_linearly_far_off():
    batch = Noised(torch.zeros(1), torch.tensor([10]), torch.zeros(1), torch.tensor([1.0]))
    near, far = torch.full((1, 1, 1, 1), 1e-3), torch.full((1, 1, 1, 1), 1e3)
    error = Error("huber", "constant", 0.1)
    torch.testing.assert_close(error.of(near, 0 * near, batch, 1), near.square(), rtol=1e-2, atol=0)
    torch.testing.assert_close(error.of(far, 0 * far, batch, 1), 2 * 0.1 * far, rtol=1e-2, atol=0)
    assert Error("l1").of(far, 0 * far, batch, 1).item() == 1e3


def test_a_mask_multiplies_the_instances_errors_alone():
    process, mask = DDPM(schedule()), torch.zeros(3, 1, 8, 8)
    mask[:, :, :4] = 1
    batch = process.add_noise(LATENTS, draws())
    error = (0.3 * batch.noisy - batch.target).square()
    loss = denoising_loss(guess, process, LATENTS, NOTHING, draws(), mask=mask, prior=ClassImages(1))
    torch.testing.assert_close(loss["instance"], error[:3, :, :4].sum() / error[:3].numel())
    torch.testing.assert_close(loss["prior"], error[3].mean())


def test_zero_terminal_snr_trains_v_and_never_epsilon():
    process = DDPM(schedule("v_prediction", rescale_betas_zero_snr=True), snr_gamma=5.0, debiased=True)
    last = torch.tensor([999])
    assert snr(process.scheduler, last).item() < 1e-6 < snr(schedule("v_prediction"), last).item()
    batch = process.add_noise(LATENTS, draws())
    assert process.weights(batch).isfinite().all() and batch.target.isfinite().all()
    with pytest.raises(InputError, match="--rescale_betas_zero_snr.*--prediction_type v_prediction"):
        DDPM(schedule("epsilon", rescale_betas_zero_snr=True))
    assert isinstance(DDIMScheduler.from_config(process.scheduler.config), DDIMScheduler)
