"""What a model forgot: prompts that have nothing to do with the subject, and the denoiser held against its base."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import torch

from vislora import world
from vislora.diffusion import conditioning
from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.noise import DDPM, FlowMatching
from vislora.diffusion.sample import evaluating
from vislora.handle import Handle
from vislora.training.random import generator

UNRELATED = (
    "a lighthouse on a rocky coast in a storm",
    "two glasses of orange juice on a picnic table",
    "an old steam locomotive crossing a stone bridge",
    "a portrait of an elderly fisherman, oil on canvas",
    "a narrow alley with laundry between the houses",
    "a bowl of ramen with an egg, seen from above",
    "a field of lavender under a cloudy sky",
    "an astronaut riding a bicycle",
    "a red sports car in front of a garage",
    "a library with tall wooden shelves",
)
_SMALL = {"a", "an", "the", "of", "in", "on", "with", "and"}  # words of a noun that name nothing


def unrelated_prompts(of_world: bool, noun: str) -> tuple[str, ...]:
    """Ten prompts less those that hold a word of `noun` ("sports car": a red sports car, and any other car), compared
    as whole words; for the embedded world ten of its own objects, on a background each."""
    words = _words(noun) - _SMALL
    if not of_world:
        return tuple(prompt for prompt in UNRELATED if not words & _words(prompt))
    told = json.loads((world.ROOT / "assets" / "world" / "world.json").read_text(encoding="utf-8"))
    objects = [name for name in told["objects"] if not words & _words(name)][::5][:10]
    places = [words[0] for words in told["backgrounds"].values()]
    return tuple(
        f"a{'n' if name[0] in 'aeiou' else ''} {name} {places[i % len(places)]}" for i, name in enumerate(objects)
    )


def _words(text: str) -> set[str]:
    return {*re.findall(r"\w+", text.lower())}


def class_prompts(noun: str, templates: Sequence[str]) -> tuple[str, ...]:
    """The class alone, and in the places of up to four of the subject's prompts, evenly chosen."""
    step = max(1, len(templates) // 4)
    return (f"a photo of a {noun}", *(template.format(noun) for template in templates[::step][:4]))


class DenoisingDrift:
    """How far the adapted denoiser is from the base's on fixed noisy latents: cheap enough to log while training.

    The latents are the base model's own images of `prompts`, drawn once with few sampler steps, `repeats` times each
    noised by draws that are a function of `seed` alone. `measure` needs as many forwards of the denoiser as there are
    noisy latents, in batches of `batch_size`. side: of the images in pixels, None for the model's own. Make it where
    the adapter is attached; what it trains is not touched.

    A run's log (--drift_steps) and eval/subject_driven.py differ: each takes its own --seed, hence other latents and
    noise, and training leaves prompts out by the last word of the class prompt, scoring by every word of the noun.
    """

    def __init__(
        self, models: DiffusionModels, adapter: Handle, prompts: Sequence[str], seed: int = 0, repeats: int = 4,
        steps: int = 10, batch_size: int = 8, side: int | None = None,
    ):  # fmt: skip
        self.models, self.batch_size, self.side = models, batch_size, side or models.resolution
        process = (FlowMatching if models.family.flow else DDPM)(models.scheduler)
        self.prompts = [prompt for prompt in prompts for _ in range(repeats)]
        with adapter.disabled():
            latents = self._latents(prompts, seed, steps).repeat_interleave(repeats, 0)
            streams = [generator(seed, "drift", i) for i in range(len(latents))]
            self.noised = process.add_noise(latents, streams)
            self.base = self._predictions()

    def measure(self) -> dict[str, float]:
        """{"drift_denoising": the mean of `values`}, as a line of the log."""
        found = self.values()
        return {"drift_denoising": sum(ratio for _, ratio in found) / len(found)}

    def values(self) -> list[tuple[str, float]]:
        """(prompt, |adapted - base|^2 / |base|^2) of the prediction at every noisy latent: 0 for the base itself."""
        off = (self._predictions() - self.base).flatten(1).square().sum(1)
        ratios = (off / self.base.flatten(1).square().sum(1)).tolist()
        return list(zip(self.prompts, ratios, strict=True))

    def _latents(self, prompts: Sequence[str], seed: int, steps: int) -> torch.Tensor:
        """(prompts, c, h, w), float32: images that the base draws, as latents."""
        models, parts = self.models, []
        pipeline = models.pipeline()
        networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        with evaluating(*networks):
            for start in range(0, len(prompts), self.batch_size):
                chunk = list(prompts[start : start + self.batch_size])
                streams = [generator(seed, "drift image", start + i) for i in range(len(chunk))]
                found = pipeline(
                    prompt=chunk, generator=streams, num_inference_steps=steps, guidance_scale=models.guidance,
                    output_type="latent", height=self.side, width=self.side, **models.drawing,
                ).images  # fmt: skip
                if found.ndim == 3:  # Flux's, packed two by two
                    found = pipeline._unpack_latents(found, self.side, self.side, pipeline.vae_scale_factor)
                parts.append(found.float())
        return torch.cat(parts)

    @torch.no_grad()
    def _predictions(self) -> torch.Tensor:
        """(n, c, h, w), float32, on the CPU: of the model as it is now, its text encoders included."""
        models, parts = self.models, []
        encoders = [encoder for encoder in models.encoders.values() if encoder is not None]
        with evaluating(models.denoiser, *encoders):
            for start in range(0, len(self.prompts), self.batch_size):
                chosen = slice(start, start + self.batch_size)
                ids = conditioning.tokenize(models, self.prompts[chosen])
                condition = conditioning.encode(models, ids)
                if models.family.has_time_ids:
                    side = float(self.side)
                    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=models.device)
                    condition = {**condition, "time_ids": sizes.expand(len(self.prompts[chosen]), -1)}
                noisy, times = self.noised.noisy[chosen], self.noised.timesteps[chosen]
                parts.append(models.predict(models.denoiser, noisy, times, condition).float().cpu())
        return torch.cat(parts)
