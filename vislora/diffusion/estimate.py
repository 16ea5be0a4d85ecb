"""What a run will take of memory, before a step of it: the largest of its phases, counted on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from vislora import optim
from vislora.diffusion import latents as coding
from vislora.diffusion.conditioning import EmbeddingCache
from vislora.diffusion.dataset import Batch, ImageSet
from vislora.diffusion.denoising import Denoising, set_computation
from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.noise import Noised
from vislora.diffusion.options import DreamBoothOptions
from vislora.handle import Handle
from vislora.training.memory import BEFORE, STEP, Estimate, held_by, optimizer_state, peak_of, peak_of_step


class _Stand:
    """Photos or class images in name alone: batches of the largest size, no numbers in them."""

    def __init__(self, models: DiffusionModels, side: int, prompt: str, class_prompt: str | None):
        self.models, self.side, self.prompt, self.class_prompt = models, side, prompt, class_prompt

    def draw(self, position: int, count: int, device: torch.device, bucket: int | None = None) -> Batch:
        latents = torch.empty(_latents(self.models, count, self.side), device=device)
        ids = torch.empty(count, 6, device=device)
        return Batch(latents, [self.prompt] * count, [self.class_prompt] * count, ids, None, 0)


@dataclass(frozen=True)
class _NoNoise:
    """A process that draws nothing, for no number is read."""

    def add_noise(self, latents: Tensor, generators) -> Noised:
        b = torch.zeros(len(latents), device=latents.device)
        return Noised(torch.empty_like(latents), b.long(), torch.empty_like(latents), b)

    def weights(self, batch: Noised) -> None:
        return None


def estimate(
    options: DreamBoothOptions, adapter: Handle, models: DiffusionModels, photos: ImageSet, accelerator: Accelerator
) -> Estimate:
    """Count a step of the run that the options describe, the encoding of its photos and the drawing of its images.

    The adapter must be attached and not yet trained; one that trains nothing has no step. Afterwards the denoiser is as
    prepared for a run: use it for none.
    """
    o, side = options, options.resolution or models.resolution
    trained = models.family.clip if o.train_text_encoder else ()
    parameters, state = list(adapter.parameters()), 0
    if parameters:
        optimizer = optim.from_options(o, adapter, dict.fromkeys(trained, o.text_encoder_lr))
        adapter.bind(optimizer, 1)
        state = optimizer_state(optimizer)
    size = sum(p.nbytes for p in parameters)
    state += size if o.use_ema else 0
    set_computation(replace(o, compile=False), models)
    network = accelerator.prepare(models.denoiser)
    encoders = {name: accelerator.prepare(models.parts[name]) for name in trained}

    longest = max(photos.texts(), key=len)
    of_class = (photos.classes[0] or longest) if o.with_prior_preservation else None
    stands = [_Stand(models, side, longest, of_class)] * (2 if o.class_images() else 1)

    def loss() -> Tensor:
        texts = [longest, *([of_class] if of_class else [])]
        cache = EmbeddingCache(models, texts)
        own = Denoising(o, models, adapter, stands[0], stands[1] if len(stands) > 1 else None, cache, network, encoders)
        own.process = _NoNoise()
        for module in (network, *encoders.values()):
            module.train()
        return own.losses(0)["total"] + (adapter.penalty() if adapter.method.has_penalty() else 0)

    def encode() -> None:
        pixels = torch.empty(o.sample_batch_size, 3, side, side)
        coding.posterior(models.vae, pixels)

    def draw() -> None:
        latents = torch.empty(_latents(models, o.sample_batch_size, side), device=models.device)
        coding.decode(models.vae, latents)

    phases = {BEFORE: peak_of(encode)}
    if parameters:
        phases[STEP] = peak_of_step(loss, parameters, o.gradient_accumulation_steps)
    if o.validation_prompt or o.class_images():
        phases["drawing images"] = peak_of(draw)
    for module in (network, *encoders.values()):
        module.eval()
    parts = [part for part in models.parts.values() if isinstance(part, torch.nn.Module)]
    return Estimate(held_by(parts) + adapter.base_copy, state, phases, adapter.base_copy)


def _latents(models: DiffusionModels, count: int, side: int) -> tuple[int, ...]:
    return count, models.vae.config.latent_channels, side // models.vae_factor, side // models.vae_factor
