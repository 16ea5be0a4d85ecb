"""What sets the families of diffusion models apart, and nothing else does: their parts, how a prompt becomes what the
denoiser attends to, how the denoiser is called, and how noise is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

# What a batch is told beside the noisy latents, each tensor led by the batch: "text" (b, tokens, width), "pooled"
# (b, width), SDXL's "time_ids" (b, 6): height and width of the photo, top and left of the cut, its height and width.
Condition = dict[str, Tensor]
Encoders = Mapping[str, nn.Module | None]


@dataclass(frozen=True)
class Family:
    """Models that share a pipeline.

    encode(models, encoders, ids): the Condition of token ids (n, tokens), one tensor for each encoder by its name.
    call(models, denoiser, noisy, timesteps, condition): its prediction, all in the base weights' precision.
    latent_side(configs): latents a side of the square images that the model was trained on, by {part: its config}.
    """

    pipeline: type  # the diffusers class, named by model_index.json's _class_name
    denoiser: str  # sub-folder, and the pipeline's word
    encoders: tuple[str, ...]  # text encoders, by the number of their tokenizer
    clip: tuple[str, ...]  # those of them that --train_text_encoder trains
    tokenizers: tuple[str, ...]
    left_out: tuple[str, ...]  # optional parts that training and sampling do without
    encode: Callable[[Any, Encoders, Mapping[str, Tensor]], Condition]
    call: Callable[[Any, nn.Module, Tensor, Tensor, Condition], Tensor]
    latent_side: Callable[[Mapping[str, Mapping]], int]
    guidance: float = 7.5  # of images, where no --guidance_scale is given
    flow: bool = False  # flow matching, not DDPM
    weighting_scheme: str | None = None  # of flow matching's timesteps and losses
    patch: int = 1  # latents a side that the denoiser takes together
    sequence: int | None = None  # tokens that T5 reads, where no --max_sequence_length is given
    has_time_ids: bool = False
    optional: tuple[str, ...] = ()  # parts that a model may lack
    words: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # of the pipeline's constructor
    tags: tuple[str, ...] = ()  # on the hub

    @property
    def models(self) -> tuple[str, ...]:
        """The sub-folders with weights."""
        return (*self.encoders, "vae", self.denoiser)

    @property
    def convolutional(self) -> tuple[str, ...]:
        """The parts that are kept in channels_last."""
        return ("vae", "unet") if self.denoiser == "unet" else ("vae",)


def _sd_encode(models, encoders, ids) -> Condition:
    return {"text": encoders["text_encoder"](ids["text_encoder"], return_dict=False)[0]}


def _penultimate(encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(the last hidden state but one, the pooled and projected output) of a CLIP text encoder."""
    out = encoder(ids, output_hidden_states=True)
    return out.hidden_states[-2], out[0]


def _sdxl_encode(models, encoders, ids) -> Condition:
    first, _ = _penultimate(encoders["text_encoder"], ids["text_encoder"])
    second, pooled = _penultimate(encoders["text_encoder_2"], ids["text_encoder_2"])
    return {"text": torch.cat([first, second], -1), "pooled": pooled}


def _sd3_encode(models, encoders, ids) -> Condition:
    """Both CLIPs side by side, padded to T5's width and followed by T5's tokens, or by zeros where it is left out."""
    (first, pooled), (second, pooled_2) = (_penultimate(encoders[name], ids[name]) for name in _CLIP_PAIR)
    clip = torch.cat([first, second], -1)
    t5 = encoders["text_encoder_3"]
    if t5 is None:
        width = models.denoiser.config.joint_attention_dim
        long = clip.new_zeros(len(clip), models.sequence, width)
    else:
        long = t5(ids["text_encoder_3"])[0]
    clip = nn.functional.pad(clip, (0, long.shape[-1] - clip.shape[-1]))
    return {"text": torch.cat([clip, long], -2), "pooled": torch.cat([pooled, pooled_2], -1)}


def _flux_encode(models, encoders, ids) -> Condition:
    pooled = encoders["text_encoder"](ids["text_encoder"]).pooler_output
    return {"text": encoders["text_encoder_2"](ids["text_encoder_2"])[0], "pooled": pooled}


def _unet_call(models, denoiser, noisy, timesteps, condition) -> Tensor:
    added = {}
    if "time_ids" in condition:
        added["added_cond_kwargs"] = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
    return denoiser(noisy, timesteps, condition["text"], return_dict=False, **added)[0]


def _sd3_call(models, denoiser, noisy, timesteps, condition) -> Tensor:
    return denoiser(
        hidden_states=noisy, timestep=timesteps, encoder_hidden_states=condition["text"],
        pooled_projections=condition["pooled"], return_dict=False,
    )[0]  # fmt: skip


def _flux_call(models, denoiser, noisy, timesteps, condition) -> Tensor:
    """Latents packed two by two, with the place of each; a distilled model is told its guidance."""
    count, channels, height, width = noisy.shape
    packed = FluxPipeline._pack_latents(noisy, count, channels, height, width)
    places = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype)
    guidance = None
    if models.denoiser.config.guidance_embeds:
        guidance = torch.full((count,), models.guidance, device=noisy.device, dtype=torch.float32)
    predicted = denoiser(
        hidden_states=packed, timestep=timesteps / 1000, guidance=guidance, pooled_projections=condition["pooled"],
        encoder_hidden_states=condition["text"], txt_ids=places.new_zeros(condition["text"].shape[1], 3),
        img_ids=places, return_dict=False,
    )[0]  # fmt: skip
    return FluxPipeline._unpack_latents(predicted, height, width, 1)


def _sample_size(configs: Mapping[str, Mapping], part: str) -> int:
    size = configs[part]["sample_size"]
    return size if isinstance(size, int) else max(size)


def _vae_latents(configs: Mapping[str, Mapping]) -> int:
    """Flux's transformer knows no size; its VAE does, in pixels."""
    return _sample_size(configs, "vae") // 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


_CLIP_PAIR, _TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2", "tokenizer_3")

FAMILIES = {
    family.pipeline.__name__: family
    for family in (
        Family(
            pipeline=StableDiffusionPipeline,
            denoiser="unet", encoders=_CLIP_PAIR[:1], clip=_CLIP_PAIR[:1], tokenizers=_TOKENIZERS[:1],
            left_out=("safety_checker", "feature_extractor", "image_encoder"),
            encode=_sd_encode, call=_unet_call, latent_side=lambda configs: _sample_size(configs, "unet"),
            words={"requires_safety_checker": False}, tags=("stable-diffusion", "stable-diffusion-diffusers"),
        ),
        Family(
            pipeline=StableDiffusionXLPipeline,
            denoiser="unet", encoders=_CLIP_PAIR, clip=_CLIP_PAIR, tokenizers=_TOKENIZERS[:2],
            left_out=("feature_extractor", "image_encoder"),
            encode=_sdxl_encode, call=_unet_call, latent_side=lambda configs: _sample_size(configs, "unet"),
            guidance=5.0, has_time_ids=True, words={"add_watermarker": False},
            tags=("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
        ),
        Family(
            pipeline=StableDiffusion3Pipeline,
            denoiser="transformer", encoders=(*_CLIP_PAIR, "text_encoder_3"), clip=_CLIP_PAIR, tokenizers=_TOKENIZERS,
            left_out=("feature_extractor", "image_encoder"), optional=("text_encoder_3", "tokenizer_3"),
            encode=_sd3_encode, call=_sd3_call, latent_side=lambda configs: _sample_size(configs, "transformer"),
            guidance=7.0, flow=True, weighting_scheme="logit_normal", patch=2, sequence=256,
            tags=("sd3", "sd3-diffusers"),
        ),
        Family(
            pipeline=FluxPipeline,
            denoiser="transformer", encoders=_CLIP_PAIR, clip=_CLIP_PAIR[:1], tokenizers=_TOKENIZERS[:2],
            left_out=("feature_extractor", "image_encoder"),
            encode=_flux_encode, call=_flux_call, latent_side=_vae_latents,
            guidance=3.5, flow=True, weighting_scheme="none", patch=2, sequence=512,
            tags=("flux", "flux-diffusers"),
        ),
    )
}  # fmt: skip
