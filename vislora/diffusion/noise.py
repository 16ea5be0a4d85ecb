"""How noise is added, what the network is to predict of it, and how its error is weighed: DDPM and flow matching.

DDPM: Ho et al. 2020 (equation 14) or, for v-prediction, Salimans and Ho 2022 (section 4 and appendix D). Flow matching:
the rectified flow of Esser et al. 2024 (section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vislora.diffusion.latents import normal
from vislora.errors import InputError

WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")


@dataclass(frozen=True)
class Noised:
    """A batch as the denoiser sees it, float32: `noisy` and `target` (b, c, h, w); (b,) each: `timesteps` as the
    denoiser counts them, from 0 to `span`, and `snr`, the signal-to-noise ratio."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    snr: Tensor
    span: int = 1000


class Process(Protocol):
    """What `vislora.diffusion.loss` asks of DDPM and of flow matching."""

    def add_noise(self, latents: Tensor, generators: Sequence[torch.Generator]) -> Noised:
        """Noise scaled latents (b, c, h, w); what sample i draws comes from generators[i], its timestep first.

        InputError when the number of generators is not the number of samples.
        """

    def weights(self, batch: Noised) -> Tensor | None:
        """Weights (b,) of the samples' errors; None for equal ones."""


@dataclass(frozen=True)
class DDPM:
    """Uniform timesteps of a diffusers schedule.

    snr_gamma: min-SNR weights. debiased: the weights of Yu et al. 2023 (arXiv 2310.08442), 1 / sqrt(SNR) of the noise's
    error, and as kohya's scripts have it 1 / (SNR + 1) of the velocity's, for SNR up to 1000. noise_offset: this much
    of one more normal draw a channel is added to the noise, so that a whole image's brightness is learned too.
    InputError for an unknown prediction type, and for epsilon where the last step has no signal.
    """

    scheduler: object
    snr_gamma: float | None = None
    debiased: bool = False
    noise_offset: float = 0.0

    def __post_init__(self):
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            wrong = f"prediction_type {kind!r} is not supported"
            raise InputError("scheduler", wrong, "epsilon or v_prediction")
        if kind == "epsilon" and self.scheduler.config.rescale_betas_zero_snr:
            wrong = "leaves the last step without signal, where the noise says nothing of the image"
            raise InputError("--rescale_betas_zero_snr", wrong, "add --prediction_type v_prediction")

    def add_noise(self, latents: Tensor, generators: Sequence[torch.Generator]) -> Noised:
        latents, steps = latents.float(), self.scheduler.config.num_train_timesteps
        _require_one_each(generators, latents)
        draws = [torch.randint(steps, (), generator=g, device=g.device).to(latents.device) for g in generators]
        timesteps = torch.stack(draws)
        noise = normal(latents.shape, generators, latents.device)
        if self.noise_offset:
            noise = noise + self.noise_offset * normal((*latents.shape[:2], 1, 1), generators, latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        return Noised(noisy, timesteps, target, snr(self.scheduler, timesteps), steps)

    def weights(self, batch: Noised) -> Tensor | None:
        kind, found = self.scheduler.config.prediction_type, None
        if self.snr_gamma is not None:
            found = min_snr_weight(batch.snr, self.snr_gamma, kind)
        if self.debiased:
            ratio = batch.snr.clamp(max=1000)
            own = 1 / (ratio + 1) if kind == "v_prediction" else ratio.rsqrt()
            found = own if found is None else found * own
        return found


@dataclass(frozen=True)
class FlowMatching:
    """Straight paths from image to noise: noisy = (1 - sigma) image + sigma noise, target noise - image.

    scheduler: diffusers' FlowMatchEulerDiscreteScheduler; its shift moves the sigmas that a place in [0, 1) stands for.
    weighting_scheme, as in diffusers' scripts: how places are drawn (logit_normal, mode; else uniformly) and how errors
    are weighed (sigma_sqrt: 1 / sigma^2; cosmap; else equally), Esser et al. 2024, section 3.1. precondition: the error
    is that of the image which the prediction stands for, sigma^2 times that of the target.
    """

    scheduler: object
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    precondition: bool = False

    def place(self, generator: torch.Generator) -> Tensor:
        """A draw of the path's density, about [0, 1), where 0 is the noise; of the same draws whatever the scheme."""
        kept = {"generator": generator, "device": generator.device}
        if self.weighting_scheme == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * torch.randn((), **kept))
        u = torch.rand((), **kept)
        if self.weighting_scheme == "mode":
            u = 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return u

    def add_noise(self, latents: Tensor, generators: Sequence[torch.Generator]) -> Noised:
        latents, steps = latents.float(), self.scheduler.config.num_train_timesteps
        _require_one_each(generators, latents)
        places = torch.stack([self.place(g).to("cpu") for g in generators])
        rows = (places * steps).long().clamp(0, steps - 1)
        sigmas = self.scheduler.sigmas.cpu()[rows].to(latents.device, torch.float32)
        timesteps = self.scheduler.timesteps.cpu()[rows].to(latents.device, torch.float32)
        noise = normal(latents.shape, generators, latents.device)
        share = sigmas[:, None, None, None]
        noisy = (1 - share) * latents + share * noise
        return Noised(noisy, timesteps, noise - latents, ((1 - sigmas) / sigmas).square(), steps)

    def weights(self, batch: Noised) -> Tensor | None:
        sigmas = 1 / (1 + batch.snr.sqrt())
        found = sigmas.square() if self.precondition else None
        own = None
        if self.weighting_scheme == "sigma_sqrt":
            own = sigmas.square().reciprocal()
        elif self.weighting_scheme == "cosmap":
            own = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))
        if own is None or found is None:
            return found if own is None else own
        return found * own


def snr(scheduler, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha_t^2 / sigma_t^2 (b,), float32, of timesteps (b,) under the scheduler's schedule."""
    signal = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    return signal / (1 - signal)


def min_snr_weight(ratio: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weights (b,) of the squared errors at signal-to-noise ratios (b,): Hang et al. 2023, section 3.4.

    Min-SNR-gamma weighs the error of the clean latents by min(SNR, gamma). In terms of the error of the noise
    that is min(SNR, gamma) / SNR; of the velocity, min(SNR, gamma) / (SNR + 1). InputError when gamma is not positive.
    """
    if not gamma > 0:
        raise InputError("--snr_gamma", f"{gamma} is not positive", "5.0 is usual; leave it out for equal weights")
    if prediction_type == "epsilon":
        return (gamma / ratio).clamp(max=1)  # this form is finite where the SNR is zero
    return ratio.clamp(max=gamma) / (ratio + 1)


def _require_one_each(generators: Sequence[torch.Generator], latents: Tensor) -> None:
    if len(generators) != len(latents):
        raise InputError("generators", f"{len(generators)} for {len(latents)} samples", "give one for each")
