"""From a run's options to its objective: what noise, which error, which weights, for the model's family."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vislora.diffusion.base import Facts
from vislora.diffusion.loss import Error
from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.noise import DDPM, FlowMatching, Process
from vislora.diffusion.options import DreamBoothOptions
from vislora.errors import InputError

_OF_FLOW = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs")
_OF_DDPM = ("snr_gamma", "debiased_estimation_loss", "noise_offset", "prediction_type", "rescale_betas_zero_snr")
_OF_T5 = ("max_sequence_length",)


def require_fit(options: DreamBoothOptions, facts: Facts) -> int:
    """The resolution of the run. InputError for an option that the model's family has not, or a size that it cannot
    take."""
    family = facts.family
    strange = {name: "flow matching" for name in _OF_FLOW if not family.flow}
    strange |= {name: "DDPM" for name in _OF_DDPM if family.flow}
    strange |= {name: "T5" for name in _OF_T5 if family.sequence is None}
    default = {item.name: item.default for item in fields(options)}
    for name, owner in strange.items():
        if getattr(options, name) != default[name]:
            wrong = f"is an option of {owner}, which a {family.pipeline.__name__} does not have"
            raise InputError(f"--{name}", wrong, "leave it out")
    resolution = options.resolution or facts.resolution
    sizes = {"resolution": resolution}
    if options.use_aspect_ratio_buckets:
        sizes["bucket_reso_steps"] = options.bucket_reso_steps
    for name, pixels in sizes.items():
        if pixels % facts.grain:
            wrong = f"{pixels} is no multiple of {facts.grain} pixels, which one latent covers"
            raise InputError(f"--{name}", wrong, f"take {max(1, round(pixels / facts.grain)) * facts.grain}")
    return resolution


def schedule_changes(options: DreamBoothOptions) -> dict[str, Any]:
    """What the options change of the noise schedule's configuration."""
    changes = {"prediction_type": options.prediction_type, "rescale_betas_zero_snr": options.rescale_betas_zero_snr}
    return {name: value for name, value in changes.items() if value}


def process_of(options: DreamBoothOptions, models: DiffusionModels) -> Process:
    """How noise is added and errors are weighed. InputError for a schedule that cannot be trained by."""
    o, family, scheduler = options, models.family, models.scheduler
    if family.flow:
        scheme = o.weighting_scheme or family.weighting_scheme
        return FlowMatching(scheduler, scheme, o.logit_mean, o.logit_std, o.mode_scale, o.precondition_outputs)
    return DDPM(scheduler, o.snr_gamma, o.debiased_estimation_loss, o.noise_offset)


def error_of(options: DreamBoothOptions) -> Error:
    """How far a prediction is off, by the options."""
    return Error(options.loss_type, options.huber_schedule, options.huber_c, options.huber_scale)
