"""A run's loss as a function of where in its data a batch begins: everything between photos and a scalar."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from vislora.diffusion import conditioning, objective
from vislora.diffusion.dataset import ImageSet
from vislora.diffusion.family import Condition
from vislora.diffusion.loss import BaseOutput, ClassImages, denoising_loss
from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.options import DreamBoothOptions
from vislora.handle import Handle
from vislora.training.cores import use_compiler
from vislora.training.random import generator


def set_computation(options: DreamBoothOptions, models: DiffusionModels) -> None:
    """Activations computed again in the backward by --gradient_checkpointing, the denoiser's graphs by --compile."""
    if options.gradient_checkpointing:
        models.denoiser.enable_gradient_checkpointing()
        for name in models.family.clip if options.train_text_encoder else ():
            models.parts[name].gradient_checkpointing_enable()
    if options.compile:
        use_compiler(models.denoiser)


class Denoising:
    """The losses of one run.

    network, encoders: the denoiser and the text encoders that train, as prepared for distribution. classes: the class
    images, None without. embeddings: what the base's text encoders make of every prompt.
    """

    def __init__(
        self,
        options: DreamBoothOptions,
        models: DiffusionModels,
        adapter: Handle,
        photos: ImageSet,
        classes: ImageSet | None,
        embeddings: conditioning.EmbeddingCache,
        network: nn.Module,
        encoders: Mapping[str, nn.Module],
    ):
        self.options, self.models, self.adapter = options, models, adapter
        self.photos, self.classes, self.embeddings = photos, classes, embeddings
        self.network, self.encoders = network, dict(encoders)
        self.process = objective.process_of(options, models)
        self.error = objective.error_of(options)

    def losses(self, position: int) -> dict[str, torch.Tensor]:
        """The loss of the batch that begins at a global position: see `denoising_loss`."""
        o, count, device = self.options, self.options.train_batch_size, self.models.device
        batch, prior = self.photos.draw(position, count, device), None
        latents, prompts, time_ids = batch.latents, batch.prompts, batch.time_ids
        streams = [generator(o.seed, "noise", q) for q in range(position, position + count)]
        if self.classes is not None:
            more = self.classes.draw(position, count, device, batch.bucket)
            latents, prompts = torch.cat([latents, more.latents]), prompts + more.prompts
            time_ids = torch.cat([time_ids, more.time_ids])
            streams += [generator(o.seed, "class noise", q) for q in range(position, position + count)]
            prior = ClassImages(count, o.prior_loss_weight)
        elif o.with_prior_preservation:
            base = self.told(self.embeddings.lookup(batch.classes), time_ids)
            own = self.told(self.embed(batch.classes), time_ids)
            prior = BaseOutput(own, self.adapter.disabled, base, o.prior_loss_weight)
        condition = self.told(self.embed(prompts), time_ids)
        return denoising_loss(
            self.predict, self.process, latents, condition, streams, error=self.error, mask=batch.mask, prior=prior
        )

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.models.predict(self.network, noisy, timesteps, condition)

    def told(self, condition: Condition, time_ids: torch.Tensor) -> Condition:
        """What the denoiser is told, with the cuts' places where its family knows of them."""
        return {**condition, "time_ids": time_ids} if self.models.family.has_time_ids else condition

    def embed(self, prompts: list[str]) -> Condition:
        """From the cache, or through the text encoders where they train."""
        if not self.encoders:
            return self.embeddings.lookup(prompts)
        ids = conditioning.tokenize(self.models, prompts)
        return conditioning.encode(self.models, ids, True, self.encoders)
