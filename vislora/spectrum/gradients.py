"""The gradient probe at checkpoints of a finished DreamBooth run: its model, photos and loss, put together again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import vislora

from .. import adapters, config, probe
from ..adapter import Adapter
from ..diffusion import models, objective
from ..diffusion.base import facts_of
from ..diffusion.conditioning import EmbeddingCache
from ..diffusion.dataset import instance_set
from ..diffusion.denoising import Denoising
from ..diffusion.options import DreamBoothOptions
from ..errors import InputError
from ..training.run import RunFolder
from .source import Point, own_tensors


class Task:
    """One run's model and data. Every point sees the same photos, timesteps and noise, so that points compare."""

    def __init__(self, run: RunFolder, batches: int):
        """Raises InputError for a run of another script, or whose model or photos are gone."""
        settings = run.read_config()
        name = str(settings.get("adapter"))
        if "instance_data_dir" not in settings or name not in vislora.methods():
            wrong = f"is a run of {name} by another script than dreambooth.py, or of no adapter"
            raise InputError(f"--gradients: {run.path}", wrong, "train it with --probe_steps instead")
        self.options, self.method = config.parse(
            DreamBoothOptions, ["--config", str(run.config_file)], prog="spectrum.py", description="",
            methods={word: adapters.get(word) for word in vislora.methods()},
        )  # fmt: skip
        self.batches, self.adapter, self.denoising = batches, None, None
        o = self.options
        self.models = models.load(
            o.pretrained_model_name_or_path, o.revision, o.variant, guidance=o.guidance_scale,
            sequence=o.max_sequence_length, noise=objective.schedule_changes(o), quantization=o.base_quantization,
        )  # fmt: skip
        facts = facts_of(o.pretrained_model_name_or_path, o.revision)
        self.photos = instance_set(o, objective.require_fit(o, facts))
        self.photos.use(self.models, False)

    def cosines(self, point: Point) -> dict[str, float]:
        """{site: cosine} of the mean gradient over the batches, the adapter as it was after the point's step."""
        if self.adapter is None:
            self.adapter = self._attach()
        self.adapter.load_tensors(own_tensors(point))
        self.models.denoiser.train()
        try:
            return probe.cosines(self.adapter, self._backward, self.batches)
        finally:
            self.models.denoiser.eval()

    def _attach(self) -> Adapter:
        """The adapter on what the run trained, and the run's loss, of its photos alone."""
        o, family = replace(self.options, with_prior_preservation=False), self.models.family
        embeddings = EmbeddingCache(self.models, self.photos.texts())
        trained = family.clip if o.train_text_encoder else ()
        targets = {family.denoiser: o.target_words(), **dict.fromkeys(trained)}
        parts = {name: self.models.parts[name] for name in targets}
        adapter = vislora.attach(parts, self.method, targets=targets, seed=o.seed)
        encoders = {name: self.models.parts[name] for name in trained}
        self.denoising = Denoising(
            o, self.models, adapter, self.photos, None, embeddings, self.models.denoiser, encoders
        )
        return adapter

    def _backward(self) -> None:
        for batch in range(self.batches):
            total = self.denoising.losses(batch * self.options.train_batch_size)["total"]
            (total / self.batches).backward()


def computer(run: RunFolder | None, batches: int) -> Callable[[Point], dict[str, float]]:
    """A call that makes a point's cosines; the model is loaded at the first. Raises InputError for adapter files."""
    if run is None:
        raise InputError("--gradients", "an adapter's file says nothing of its data", "name a run by --run")
    task: list[Task] = []

    def compute(point: Point) -> dict[str, float]:
        if not task:
            task.append(Task(run, batches))
        return task[0].cosines(point)

    return compute
