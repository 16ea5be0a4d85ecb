"""A DreamBooth run's images as latents: photos with captions and class images, drawn by global position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vislora.data import captions as captioning
from vislora.data.buckets import bucket_sizes, bucketed_indices, epoch_length, nearest
from vislora.data.concepts import Concept, read_concepts
from vislora.data.crops import Cut, Size, cut, plan
from vislora.data.images import Photo, read, scan, verify
from vislora.data.masks import Mask, find_masks
from vislora.diffusion import latents as coding
from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.options import DreamBoothOptions
from vislora.diffusion.prior import ensure_class_images
from vislora.errors import InputError
from vislora.training.random import batch_indices, generator


@dataclass(frozen=True)
class Batch:
    """latents (b, c, h, w) scaled; prompts and class prompts of each; `time_ids` (b, 6): height and width of the photo,
    top and left of the cut, its height and width, in pixels; mask (b, 1, h, w) in [0, 1]; bucket: of the sizes."""

    latents: Tensor
    prompts: list[str]
    classes: list[str | None]
    time_ids: Tensor
    mask: Tensor | None
    bucket: int


class ImageSet:
    """Photos and their captions. What position q of the run draws is a function of the seed, the stream and q alone.

    Each photo has variants: its crops and flips, of one bucket after the other.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        captions: Sequence[str],
        options: DreamBoothOptions,
        stream: str,
        classes: Sequence[str | None] | None = None,
        masks: Sequence[Mask] | None = None,
        dropout: float = 0.0,
    ):
        self.photos, self.captions, self.options, self.stream = list(photos), list(captions), options, stream
        self.classes = list(classes) if classes else [None] * len(self.photos)
        self.masks, self.dropout = masks, dropout
        drawn = options.random_flip or not options.center_crop
        self.crops = options.crop_variants if drawn else 1
        self._cache: coding.LatentCache | None = None

    def __len__(self) -> int:
        return len(self.photos)

    def hashes(self) -> list[str]:
        """What a resumed run compares: the sha256 of every file."""
        return [photo.sha256 for photo in self.photos] + [mask.sha256 for mask in self.masks or ()]

    def require_same(self, hashes: Sequence[str]) -> None:
        """InputError unless these are the photos that a run with `hashes` began with."""
        if list(hashes) != self.hashes():
            where = self.options.instance_data_dir or self.options.concepts_list
            raise InputError(where, "holds other photos than the run began with", "restore them, or start a new run")

    def texts(self) -> list[str]:
        """Every prompt that a batch can have."""
        return [*self.captions, *([""] if self.dropout else [])]

    def place(self, index: int, variant: int) -> Cut:
        """Where image `index` is cut in its variant."""
        o, (width, height) = self.options, self.photos[index].size
        drawing = generator(o.seed, f"{self.stream} crop", index, variant)
        return plan((height, width), self.sizes[variant // self.crops], o.center_crop, o.random_flip, drawing)

    def pixels(self, index: int, variant: int) -> Tensor:
        """Image `index` in its variant: (3, H, W) in [-1, 1]. DataChanged if the file is not the one scanned."""
        verify(self.photos[index])
        return cut(read(self.photos[index].path), self.place(index, variant))

    def use(self, models: DiffusionModels, progress: bool, beside: ImageSet | None = None) -> None:
        """Take the model that images are encoded by; encode them all now if latents are cached.

        beside: the set whose batches these images join, each of whose sizes they must be drawn in.
        """
        o, side = self.options, self.options.resolution or models.resolution
        self._vae, self._factor = models.vae, models.vae_factor
        self.sizes: list[Size] = [(side, side)]
        self.buckets = [0] * len(self)
        if beside is not None:
            self.sizes = beside.sizes
        elif o.use_aspect_ratio_buckets:
            sizes = bucket_sizes(side, o.bucket_reso_steps)
            found = [nearest(photo.size[::-1], sizes) for photo in self.photos]
            used = sorted(set(found))
            self.sizes, self.buckets = [sizes[i] for i in used], [used.index(i) for i in found]
        every = range(len(self.sizes) * self.crops)
        own = [every if beside else range(b * self.crops, (b + 1) * self.crops) for b in self.buckets]
        if o.cache_latents:
            self._cache = coding.LatentCache(models.vae, self.pixels, len(self), own, o.sample_batch_size, progress)
        self._masks = {(i, v): self._mask(i, v) for i, numbers in enumerate(own) for v in numbers if self.masks}

    def _mask(self, index: int, variant: int) -> Tensor:
        """(1, h, w) in [0, 1]: the mean of the mask, cut as its photo is, over each latent's pixels."""
        pixels = cut(self.masks[index].read(), self.place(index, variant))[:1] / 2 + 0.5
        return torch.nn.functional.avg_pool2d(pixels, self._factor)

    def steps(self, processes: int) -> int:
        """Optimizer steps of a run on so many processes: max_train_steps, or the epochs'."""
        o, batch = self.options, self.options.train_batch_size
        epoch = epoch_length(self.buckets, batch) if o.use_aspect_ratio_buckets else len(self)
        a_step = batch * o.gradient_accumulation_steps * processes
        return o.max_train_steps or o.num_train_epochs * math.ceil(epoch / a_step)

    def draw(self, position: int, count: int, device: torch.device, bucket: int | None = None) -> Batch:
        """The batch at global positions position, position + 1, …; of the size `bucket`, None for the photos' own."""
        seed, positions = self.options.seed, range(position, position + count)
        if self.options.use_aspect_ratio_buckets and bucket is None:
            indices = bucketed_indices(seed, position, count, self.buckets, f"{self.stream} order")
            bucket = self.buckets[indices[0]]
        else:
            indices, bucket = batch_indices(seed, position, count, len(self), f"{self.stream} order"), bucket or 0
        pick = (generator(seed, f"{self.stream} variant", q) for q in positions)
        variants = [bucket * self.crops + int(torch.randint(self.crops, (), generator=g)) for g in pick]
        draws = [generator(seed, f"{self.stream} latent", q) for q in positions]
        keys = list(zip(indices, variants, strict=True))
        if self._cache is not None:
            latents = self._cache.sample(indices, variants, draws)
        else:
            latents = coding.encode(self._vae, torch.stack([self.pixels(*key) for key in keys]), draws)
        mask = torch.stack([self._masks[key] for key in keys]).to(device) if self.masks else None
        prompts = ["" if self._drops(q) else self.captions[i] for q, i in zip(positions, indices, strict=True)]
        ids = [(*self.photos[i].size[::-1], *self.place(i, v).corner(), *self.sizes[bucket]) for i, v in keys]
        time_ids = torch.tensor(ids, dtype=torch.float32, device=device)
        return Batch(latents.to(device), prompts, [self.classes[i] for i in indices], time_ids, mask, bucket)

    def _drops(self, position: int) -> bool:
        """Whether the caption at a global position gives way to the empty prompt."""
        if not self.dropout:
            return False
        draw = generator(self.options.seed, f"{self.stream} caption", position)
        return float(torch.rand((), generator=draw)) < self.dropout


def concepts_of(options: DreamBoothOptions) -> list[Concept]:
    """The subjects of a run: those of --concepts_list, or the one that the options name."""
    if options.concepts_list is not None:
        return read_concepts(options.concepts_list)
    o = options
    return [Concept(o.instance_data_dir, o.instance_prompt, o.class_prompt, o.class_data_dir)]


def instance_set(options: DreamBoothOptions, resolution: int) -> ImageSet:
    """The subjects' photos, every one decoded and every caption read. InputError naming what cannot be used."""
    photos, texts, classes = [], [], []
    for concept in concepts_of(options):
        found = scan(concept.instance_data_dir, resolution)
        photos += found
        own = concept.instance_prompt, options.caption_column
        said = captioning.captions(found, concept.instance_data_dir, *own)
        captioning.warn_of_token(said, concept.instance_prompt, concept.class_prompt, concept.instance_data_dir)
        texts += said
        classes += [concept.class_prompt] * len(found)
    masks = find_masks(photos, options.conditioning_data_dir) if options.masked_loss else None
    return ImageSet(photos, texts, options, "instance", classes, masks, options.caption_dropout)


def class_set(options: DreamBoothOptions, models: DiffusionModels, run: Path, progress: bool) -> ImageSet:
    """The class images, the missing ones generated by the base model (attach no adapter before)."""
    resolution, photos, texts = options.resolution or models.resolution, [], []
    wanted = {c.class_prompt: c.class_data_dir for c in concepts_of(options)}  # two subjects may be of one class
    for number, (prompt, named) in enumerate(wanted.items()):
        folder = Path(named) if named else run / ("class_images" if not number else f"class_images_{number + 1}")
        files = ensure_class_images(
            models, folder, prompt, options.num_class_images, options.seed, options.sample_batch_size,
            options.validation_inference_steps, models.guidance, resolution, resolution, progress,
        )  # fmt: skip
        chosen = {file.name for file in files}
        found = [photo for photo in scan(folder, resolution) if photo.path.name in chosen]
        photos, texts = photos + found, texts + [prompt] * len(found)
    return ImageSet(photos, texts, options, "class")
