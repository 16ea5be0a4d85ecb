"""The denoising loss of DreamBooth, its min-SNR weights, and its two kinds of prior preservation.

The score is that of Ho et al. 2020 (equation 14) or, for v-prediction, of Salimans and Ho 2022 (section 4 and
appendix D): the mean squared error between the network's output on noisy latents and its target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from vislora.diffusion.latents import normal
from vislora.errors import InputError

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (noisy, timesteps, embeddings)


@dataclass(frozen=True)
class ClassImages:
    """Prior preservation by class images (Ruiz et al. 2023, equation 2), the last `count` samples of the batch."""

    count: int
    weight: float = 1.0


@dataclass(frozen=True)
class BaseOutput:
    """Prior preservation by the base model's own prediction for the class prompt on the same noisy latents.

    `embeddings` (b, tokens, width): the class prompt's, for every sample. `disabled()`: a context in which
    the adapter is off. `base_embeddings`: the class prompt's from the base text encoder; needed when the text
    encoder trains too.
    """

    embeddings: torch.Tensor
    disabled: Callable[[], AbstractContextManager]
    base_embeddings: torch.Tensor | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Noised:
    """A batch as the UNet sees it, float32: `noisy` and `target` (b, c, h, w), `timesteps` (b,) int64."""

    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor


def denoiser(unet: torch.nn.Module, dtype: torch.dtype) -> Predict:
    """The UNet, prepared for distribution or not, as a function (noisy, timesteps, embeddings) -> prediction.

    `dtype` is that of the base weights: `unet.dtype` would be misled by adapters in float32.
    """
    return lambda noisy, timesteps, embeddings: unet(
        noisy.to(dtype), timesteps, embeddings.to(dtype), return_dict=False
    )[0]


def snr(scheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio alpha_t^2 / sigma_t^2 (b,), float32, of timesteps (b,) under the scheduler's schedule."""
    signal = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    return signal / (1 - signal)


def min_snr_weight(ratio: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Weights (b,) of the squared errors at signal-to-noise ratios (b,): Hang et al. 2023, section 3.4.

    Min-SNR-gamma weighs the error of the clean latents by min(SNR, gamma). In terms of the error of the noise
    that is min(SNR, gamma) / SNR; of the velocity, min(SNR, gamma) / (SNR + 1). InputError when gamma is not
    positive or for another prediction type.
    """
    if not gamma > 0:
        raise InputError("--snr_gamma", f"{gamma} is not positive", "5.0 is usual; leave it out for equal weights")
    if prediction_type == "epsilon":
        return (gamma / ratio).clamp(max=1)  # this form is finite where the SNR is zero
    if prediction_type == "v_prediction":
        return ratio.clamp(max=gamma) / (ratio + 1)
    raise _unknown(prediction_type)


def add_noise(scheduler, latents: torch.Tensor, generators: Sequence[torch.Generator]) -> Noised:
    """Noise scaled latents (b, c, h, w). Sample i's timestep (uniform) and then noise are drawn from generators[i].

    InputError when the number of generators is not the number of samples, or for an unknown prediction type.
    """
    latents, steps = latents.float(), scheduler.config.num_train_timesteps
    if len(generators) != len(latents):
        raise InputError("generators", f"{len(generators)} for {len(latents)} samples", "give one for each")
    draws = [torch.randint(steps, (), generator=g, device=g.device).to(latents.device) for g in generators]
    timesteps = torch.stack(draws)
    noise = normal(latents.shape, generators, latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return Noised(noisy, timesteps, noise)
    if kind == "v_prediction":
        return Noised(noisy, timesteps, scheduler.get_velocity(latents, noise, timesteps))
    raise _unknown(kind)


def prior_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error, a float32 scalar: the prior term, with equal weights at every timestep."""
    return (prediction.float() - target.float()).square().mean()


def noise_prediction_loss(
    predict: Predict,
    scheduler,
    latents: torch.Tensor,
    embeddings: torch.Tensor,
    generators: Sequence[torch.Generator],
    *,
    snr_gamma: float | None = None,
    prior: ClassImages | BaseOutput | None = None,
) -> dict[str, torch.Tensor]:
    """The loss of a batch: float32 scalars `total` (to go backward from), `instance` and, with a prior, `prior`.

    total = instance + prior.weight * prior. latents (b, c, h, w) scaled; embeddings (b, tokens, width);
    generators: one a sample, the only source of chance. `snr_gamma` weighs the instance term alone. With
    `ClassImages` the two terms are means over their own samples. With `BaseOutput` each sample passes twice,
    with its own prompt and with the class's.
    """
    batch = add_noise(scheduler, latents, generators)
    if isinstance(prior, ClassImages):
        if not 0 < prior.count < len(latents):
            wrong = f"{prior.count} class images in a batch of {len(latents)}"
            raise InputError("prior preservation", wrong, "a batch needs instance and class images")
        output = predict(batch.noisy, batch.timesteps, embeddings)
        instances = len(latents) - prior.count
        drift = prior_loss(output[instances:], batch.target[instances:])
    elif isinstance(prior, BaseOutput):
        base = prior.embeddings.detach() if prior.base_embeddings is None else prior.base_embeddings
        with torch.no_grad(), prior.disabled():
            expected = predict(batch.noisy, batch.timesteps, base)
        # One pass over both prompts: as many rows as class images would give, and one launch of every kernel.
        both = (torch.cat([part, part]) for part in (batch.noisy, batch.timesteps))
        output = predict(*both, torch.cat([embeddings, prior.embeddings]))
        instances = len(latents)
        drift = prior_loss(output[instances:], expected)
    else:
        output = predict(batch.noisy, batch.timesteps, embeddings)
        instances, drift = len(latents), None

    error = (output[:instances].float() - batch.target[:instances]).square().flatten(1).mean(1)  # (instances,)
    if snr_gamma is not None:
        ratio = snr(scheduler, batch.timesteps[:instances])
        error = error * min_snr_weight(ratio, snr_gamma, scheduler.config.prediction_type)
    instance = error.mean()
    if drift is None:
        return {"total": instance, "instance": instance.detach()}
    return {"total": instance + prior.weight * drift, "instance": instance.detach(), "prior": drift.detach()}


def _unknown(kind: str) -> InputError:
    return InputError("scheduler", f"prediction_type {kind!r} is not supported", "epsilon or v_prediction")
