"""The gradient probe at checkpoints of a finished DreamBooth run: its model, photos and loss, put together again."""

from __future__ import annotations

from collections.abc import Callable

import vislora

from .. import adapters, config, io, probe
from ..adapter import Adapter
from ..diffusion import conditioning, loss, models
from ..diffusion.dataset import instance_set
from ..diffusion.options import DreamBoothOptions
from ..errors import InputError
from ..training.random import generator
from ..training.run import RunFolder
from .source import Point


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
        self.batches, self.adapter = batches, None
        self.models = models.load(self.options.pretrained_model_name_or_path, self.options.revision,
                                  self.options.variant)  # fmt: skip
        resolution = self.options.resolution or self.models.resolution
        self.photos = instance_set(self.options, resolution)
        self.photos.use(self.models, False)
        self.predict = loss.denoiser(self.models.unet, self.models.dtype)

    def cosines(self, point: Point) -> dict[str, float]:
        """{site: cosine} of the mean gradient over the batches, the adapter as it was after the point's step."""
        if self.adapter is None:
            self.adapter = self._attach()
        self.adapter.load_tensors(io.read(point.file)[0])
        self.models.unet.train()
        try:
            return probe.cosines(self.adapter, self._backward, self.batches)
        finally:
            self.models.unet.eval()

    def _attach(self) -> Adapter:
        o, parts = self.options, {"unet": self.models.unet}
        targets = {"unet": o.target_words()}
        if o.train_text_encoder:
            parts["text_encoder"], targets["text_encoder"] = self.models.text_encoder, None
        return vislora.attach(parts, self.method, targets=targets, seed=o.seed)

    def _backward(self) -> None:
        o = self.options
        for batch in range(self.batches):
            positions = range(batch * o.train_batch_size, (batch + 1) * o.train_batch_size)
            latents, prompts = self.photos.draw(positions.start, len(positions), self.models.device)
            ids = conditioning.tokenize(self.models, prompts)
            embeddings = conditioning.encode(self.models, ids, grad=o.train_text_encoder)
            streams = [generator(o.seed, "probe noise", q) for q in positions]
            terms = loss.noise_prediction_loss(
                self.predict, self.models.scheduler, latents, embeddings, streams, snr_gamma=o.snr_gamma
            )
            (terms["total"] / self.batches).backward()


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
