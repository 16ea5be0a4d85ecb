"""Load a latent diffusion model, frozen and ready to adapt, after checking what can be checked before it is large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from safetensors import SafetensorError

from vislora.adapters import Method
from vislora.baselines import Baseline
from vislora.diffusion.base import absent, check_folder, download, local_folder, vae_factor
from vislora.diffusion.family import Condition, Family
from vislora.diffusion.hub import brief
from vislora.diffusion.quantize import quantize
from vislora.errors import InputError, near
from vislora.pretrained import require_weights

SAMPLERS = {
    False: {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler},
    True: {"euler": FlowMatchEulerDiscreteScheduler},  # of flow matching
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class DiffusionModels:
    """The frozen parts of a diffusion model. `scheduler` is the noise schedule of training, DDPM's or flow matching's.

    Each part is an attribute by its folder's name too: `models.unet`, `models.text_encoder_2`.
    """

    path: str
    family: Family
    dtype: torch.dtype  # of the base weights; the VAE's own may be float32
    parts: dict[str, Any]  # models and tokenizers by name; None for an encoder that is left out
    scheduler: SchedulerMixin
    guidance: float  # of images, and what a guidance-distilled denoiser is told in training
    sequence: int | None  # tokens that T5 reads

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}") from None

    @property
    def denoiser(self) -> torch.nn.Module:
        """The UNet or the transformer."""
        return self.parts[self.family.denoiser]

    @property
    def encoders(self) -> dict[str, torch.nn.Module | None]:
        return {name: self.parts[name] for name in self.family.encoders}

    @property
    def pipeline_class(self) -> str:
        """Name of the diffusers class that loads this model."""
        return self.family.pipeline.__name__

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def drawing(self) -> dict[str, Any]:
        """What the pipeline's call needs to draw with, to see of a prompt what training sees."""
        return {} if self.sequence is None else {"max_sequence_length": self.sequence}

    @property
    def vae_factor(self) -> int:
        """Pixels a side that one latent covers."""
        return vae_factor(self.vae.config)

    @property
    def grain(self) -> int:
        """Pixels that both sides of an image are a multiple of."""
        return self.vae_factor * self.family.patch

    @property
    def resolution(self) -> int:
        """Side in pixels of the square images that the model was trained on."""
        configs = {name: self.parts[name].config for name in (self.family.denoiser, "vae")}
        return self.family.latent_side(configs) * self.vae_factor

    def predict(self, network: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition):
        """The prediction (b, c, h, w) of the denoiser, which may be `network`, prepared for distribution.

        Inputs are cast to the base weights' type: the network's own would be misled by adapters in float32.
        """
        cast = {name: tensor.to(self.dtype) for name, tensor in condition.items()}
        return self.family.call(self, network, noisy.to(self.dtype), timesteps, cast)

    def pipeline(self, scheduler: str | None = None):
        """A pipeline for sampling over these very modules (no copies), with a sampler of its own: "ddim" (the default)
        or "dpm", of flow matching "euler".

        InputError for another sampler.
        """
        samplers = SAMPLERS[self.family.flow]
        scheduler = scheduler or next(iter(samplers))
        if scheduler not in samplers:
            known = ", ".join(samplers)
            raise InputError("scheduler", f"{scheduler!r} is unknown{near(scheduler, samplers)}", f"one of {known}")
        changes = {}
        if getattr(self.scheduler.config, "rescale_betas_zero_snr", False) and scheduler == "ddim":
            changes["timestep_spacing"] = "trailing"  # so that the first step is the one without signal
        sampler = samplers[scheduler].from_config(self.scheduler.config, **changes)
        pipe = self.family.pipeline(
            **self.parts, **dict.fromkeys(self.family.left_out), **self.family.words, scheduler=sampler
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def weight_dtype(precision: str, method: Method | Baseline) -> torch.dtype:
    """The weights' type under accelerate's --mixed_precision: its own, but float32 where the base itself trains."""
    if isinstance(method, Baseline) and method.trains_base:
        return torch.float32
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def load(
    path: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    guidance: float | None = None,
    sequence: int | None = None,
    noise: Mapping[str, Any] | None = None,
    quantization: str = "none",
) -> DiffusionModels:
    """Load the model in the folder `path`, or the hub's model of that id, frozen, in eval mode, on `device`.

    The parts with convolutions are kept in channels_last, on a CPU ten times as fast and more. With dtype
    float16 the VAE stays in float32: its activations overflow half precision, and the images turn black.
    guidance, sequence: as in `DiffusionModels`, None for the family's. noise: changes of the noise schedule's
    configuration, such as another prediction_type. quantization: "nf4" or "int8" for the denoiser's linears and T5's.

    InputError when the folder lacks a part, a file of it is broken, or the family is unknown;
    EnvironmentFault when the hub cannot be reached. Both before any weights are read. InputError too where a file lacks
    weights.
    """
    if dtype not in DTYPES:
        raise InputError("dtype", f"{dtype} is no precision to load in", f"one of {', '.join(map(str, DTYPES))}")
    path = str(path)
    folder = local_folder(path)
    if folder is None:
        folder = download(path, revision, variant)
    family = check_folder(folder, variant)

    diffusers.utils.logging.disable_progress_bar()  # bars of loading would bury the run's own
    transformers.utils.logging.disable_progress_bar()
    precision = {"default": dtype, "vae": torch.float32 if dtype == torch.float16 else dtype}
    try:
        pipe = family.pipeline.from_pretrained(
            folder, variant=variant, dtype=precision, local_files_only=True, **family.words,
            **dict.fromkeys([*family.left_out, *absent(folder, family)]),
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(path, f"cannot be loaded ({brief(error)})", "save or download it again") from error

    parts = {name: getattr(pipe, name) for name in (*family.models, *family.tokenizers)}
    for name in (name for name in family.models if parts[name] is not None):
        part = parts[name].requires_grad_(False).eval()
        require_weights(part, Path(folder) / name)
        if quantization != "none" and (name == family.denoiser or "T5" in type(part).__name__):
            quantize(part, quantization, torch.device(device))
        part.to(device)
        if name in family.convolutional:
            part.to(memory_format=torch.channels_last)
    if family.flow:
        schedule = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    else:  # latents are not confined to [-1, 1] as pixels are, so no schedule may clip its estimate of them
        schedule = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **(noise or {}))
    guidance = family.guidance if guidance is None else guidance
    return DiffusionModels(path, family, dtype, parts, schedule, guidance, sequence or family.sequence)
