"""The denoising loss of DreamBooth: how an error is measured, and its two kinds of prior preservation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from vislora.diffusion.conditioning import joined
from vislora.diffusion.family import Condition
from vislora.diffusion.noise import Noised, Process
from vislora.errors import InputError

Predict = Callable[[Tensor, Tensor, Condition], Tensor]  # (noisy, timesteps, condition)


@dataclass(frozen=True)
class ClassImages:
    """Prior preservation by class images (Ruiz et al. 2023, equation 2), the last `count` samples of the batch."""

    count: int
    weight: float = 1.0


@dataclass(frozen=True)
class BaseOutput:
    """Prior preservation by the base model's own prediction for the class prompt on the same noisy latents.

    `condition`: the class prompt's, for every sample. `disabled()`: a context in which the adapter is off.
    `base_condition`: the class prompt's from the base text encoders; needed when a text encoder trains too.
    """

    condition: Condition
    disabled: Callable[[], AbstractContextManager]
    base_condition: Condition | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Error:
    """How far a prediction is off, elementwise: `kind` l2 (squared), l1, huber or smooth_l1, as kohya's scripts.

    With d the difference and c the threshold: huber is the pseudo-Huber 2 c (sqrt(d^2 + c^2) - c), smooth_l1 the same
    without the factor c. c: `huber_c` for schedule "constant"; "exponential": from 1 at the first timestep down to
    huber_c at the last; "snr": (1 - huber_c) / (1 + 1 / sqrt(SNR))^2 + huber_c. All but "snr" times `huber_scale`.
    """

    kind: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0

    def of(self, prediction: Tensor, target: Tensor, batch: Noised, count: int) -> Tensor:
        """(count, c, h, w), float32, of the first `count` samples of `batch`."""
        difference = prediction.float() - target
        if self.kind == "l2":
            return difference.square()
        if self.kind == "l1":
            return difference.abs()
        c = self.threshold(batch)[:count, None, None, None]
        error = 2 * ((difference.square() + c.square()).sqrt() - c)
        return error * c if self.kind == "huber" else error

    def threshold(self, batch: Noised) -> Tensor:
        """c (b,), float32, of a batch's timesteps."""
        if self.huber_schedule == "constant":
            return torch.full_like(batch.snr, self.huber_c * self.huber_scale)
        if self.huber_schedule == "exponential":
            return torch.exp(math.log(self.huber_c) * batch.timesteps.float() / batch.span) * self.huber_scale
        return (1 - self.huber_c) / (1 + batch.snr.rsqrt()).square() + self.huber_c


def prior_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, a float32 scalar: the prior term, with equal weights at every timestep."""
    return (prediction.float() - target.float()).square().mean()


def denoising_loss(
    predict: Predict,
    process: Process,
    latents: Tensor,
    condition: Condition,
    generators: Sequence[torch.Generator],
    *,
    error: Error | None = None,
    mask: Tensor | None = None,
    prior: ClassImages | BaseOutput | None = None,
) -> dict[str, Tensor]:
    """The loss of a batch: float32 scalars `total` (to go backward from), `instance` and, with a prior, `prior`.

    total = instance + prior.weight * prior. latents (b, c, h, w) scaled; condition: of every sample; generators: one a
    sample, the only source of chance. `error` (None: squared), the process's weights and `mask` (instances, 1, h, w),
    by which errors are multiplied, act on the instance term alone. With `ClassImages` the two terms are means over
    their own samples. With `BaseOutput` each sample passes twice, with its own prompt and with the class's.
    """
    batch = process.add_noise(latents, generators)
    if isinstance(prior, ClassImages):
        if not 0 < prior.count < len(latents):
            wrong = f"{prior.count} class images in a batch of {len(latents)}"
            raise InputError("prior preservation", wrong, "a batch needs instance and class images")
        output = predict(batch.noisy, batch.timesteps, condition)
        instances = len(latents) - prior.count
        drift = prior_loss(output[instances:], batch.target[instances:])
    elif isinstance(prior, BaseOutput):
        detached = {name: tensor.detach() for name, tensor in prior.condition.items()}
        base = detached if prior.base_condition is None else prior.base_condition
        with torch.no_grad(), prior.disabled():
            expected = predict(batch.noisy, batch.timesteps, base)
        # One pass over both prompts: as many rows as class images would give, and one launch of every kernel.
        both = (torch.cat([part, part]) for part in (batch.noisy, batch.timesteps))
        output = predict(*both, joined(condition, prior.condition))
        instances = len(latents)
        drift = prior_loss(output[instances:], expected)
    else:
        output = predict(batch.noisy, batch.timesteps, condition)
        instances, drift = len(latents), None

    off = (error or Error()).of(output[:instances], batch.target[:instances], batch, instances)
    if mask is not None:
        off = off * mask
    off = off.flatten(1).mean(1)  # (instances,)
    weights = process.weights(batch)
    if weights is not None:
        off = off * weights[:instances]
    instance = off.mean()
    if drift is None:
        return {"total": instance, "instance": instance.detach()}
    return {"total": instance + prior.weight * drift, "instance": instance.detach(), "prior": drift.detach()}
