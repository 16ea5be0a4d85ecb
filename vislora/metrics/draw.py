"""Images to score, from prompts and fixed seeds, in batches; drawing goes on where it was cut off.

A file says, in a PNG text entry, what it is a function of (prompt, seed, sampler, model, adapter): one that says
otherwise is drawn again, one that says the same is not. Batches are a fixed division of all images, so that those of an
interrupted run are those of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.sample import render
from vislora.errors import EnvironmentFault
from vislora.training.random import generator

ENTRY = "vislora"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Job:
    """One image: the file's name, the prompt and the seed it is drawn from; `group`: the index of its prompt."""

    file: str
    prompt: str
    seed: int
    group: int


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. model, adapter: digests of the weights; scheduler: of `DiffusionModels.pipeline`; schedule:
    the digest of its configuration; guidance, and sequence, the tokens that T5 reads: the model's; side in pixels."""

    model: str
    adapter: str
    scheduler: str
    schedule: str
    steps: int
    guidance: float
    side: int
    sequence: int | None = None

    @classmethod
    def of(cls, models: DiffusionModels, scheduler: str, steps: int, side: int, adapter: str = "none") -> Sampling:
        """With all that is the model's own taken from it."""
        schedule = schedule_digest(models, scheduler)
        return cls(digest(models), adapter, scheduler, schedule, steps, models.guidance, side, models.sequence)


def jobs(prompts: Sequence[str], images: int, seed: int, stream: str = "score") -> list[Job]:
    """`images` of each prompt, as <prompt>_<number>.png; number k has the same noise for every prompt and model."""
    seeds = [generator(seed, stream, k).initial_seed() for k in range(images)]
    return [
        Job(f"{i:03d}_{k}.png", prompt, number, i) for i, prompt in enumerate(prompts) for k, number in enumerate(seeds)
    ]


def digest(models: DiffusionModels) -> str:
    """A short name of the base's weights: of the first 256 values of every tensor of every part, and its precision."""
    found = hashlib.sha256(str(models.dtype).encode())
    for name in models.family.models:
        for key, tensor in models.parts[name].state_dict().items() if models.parts[name] is not None else ():
            found.update(f"{name}.{key}".encode())
            if isinstance(tensor, torch.Tensor):
                found.update(tensor.flatten()[:256].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def schedule_digest(models: DiffusionModels, scheduler: str) -> str:
    """A short name of the noise schedule that images are drawn by: of the sampler's configuration, without the keys
    that diffusers keeps for itself, among them its version. InputError for an unknown sampler."""
    config = models.pipeline(scheduler).scheduler.config
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """A short name of an adapter's file, or of all safetensors files in its folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def draw(
    models: DiffusionModels, todo: Sequence[Job], folder: Path, sampling: Sampling, batch_size: int,
    part: tuple[int, int] = (0, 1), progress: str | None = None,
) -> int:
    """Draw what `folder` lacks of `todo`; returns how many images. part: (this process, processes), by batches.

    EnvironmentFault when the folder cannot be written.
    """  # fmt: skip
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    own = batches[part[0] :: part[1]]
    mine = [batch for batch in own if not all(_is_there(folder, job, sampling) for job in batch)]
    if not mine:
        return 0
    pipeline, count = models.pipeline(sampling.scheduler), 0
    with tqdm(total=sum(map(len, mine)), desc=progress, disable=progress is None) as bar:
        for batch in mine:
            images = render(
                pipeline, [job.prompt for job in batch], [job.seed for job in batch], sampling.steps,
                sampling.guidance, batch_size, sampling.side, sampling.side, more=models.drawing,
            )  # fmt: skip
            for job, image in zip(batch, images, strict=True):
                if not _is_there(folder, job, sampling):
                    _write(image, folder / job.file, _made_from(job, sampling))
                    count += 1
            bar.update(len(batch))
    return count


def write_manifest(folder: Path, todo: Sequence[Job], sampling: Sampling, about: dict) -> None:
    """Say in `folder`/manifest.json what its images are: `about`, the sampling, and {file: prompt, seed, group}."""
    images = {job.file: {"prompt": job.prompt, "seed": job.seed, "group": job.group} for job in todo}
    text = json.dumps({**about, "sampling": asdict(sampling), "images": images}, indent=1, ensure_ascii=False)
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(folder / MANIFEST)
    except OSError as error:
        raise EnvironmentFault(str(folder), f"cannot be written ({error.strerror})", "make room for images") from error


def _made_from(job: Job, sampling: Sampling) -> str:
    return json.dumps({"prompt": job.prompt, "seed": job.seed, **asdict(sampling)}, sort_keys=True)


def _is_there(folder: Path, job: Job, sampling: Sampling) -> bool:
    """Whether the file is a whole image made from just this."""
    try:
        with Image.open(folder / job.file, formats=("PNG",)) as image:
            image.load()
            return image.text.get(ENTRY) == _made_from(job, sampling)
    except (OSError, SyntaxError, ValueError):
        return False


def _write(image: Image.Image, file: Path, made_from: str) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_itxt(ENTRY, made_from)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, "PNG", pnginfo=about)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentFault(str(file), f"cannot be written ({error.strerror})", "make room for images") from error
