"""Pixels to scaled latents and back, with or without a cache of the VAE's posteriors.

The encoder is a large share of a training step (two fifths of the FLOP at 512 px) and its answer never
changes. That answer is a distribution; the cache keeps its mean and standard deviation, so that a cached run
still draws a new latent at every step, as an uncached one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from tqdm.auto import tqdm

from vislora.errors import InputError

Generators = torch.Generator | Sequence[torch.Generator]


def normal(shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal draws of `shape`, float32 on `device`; from one generator, or from one for each sample.

    With a sequence, sample i depends on generator i alone, whatever else is in the batch. Drawn on the
    generator's own device and moved, so that a CPU generator gives the same draws on every machine.
    InputError when the number of generators is not the number of samples.
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, device=generator.device).to(device)
    if len(generator) != shape[0]:
        raise InputError("generators", f"{len(generator)} for {shape[0]} samples", "give one for each")
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device).to(device) for g in generator]
    return torch.stack(rows)


@torch.no_grad()
def posterior(vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (b, c, h, w), float32 and unscaled, for pixels (b, 3, H, W) in [-1, 1]."""
    weight = next(vae.parameters())
    pixels = pixels.to(weight.device, weight.dtype, memory_format=torch.channels_last)
    found = vae.encode(pixels).latent_dist
    return found.mean.float(), found.std.float()


def encode(vae: torch.nn.Module, pixels: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Scaled latents (b, c, h, w), float32: a draw from the posteriors of pixels (b, 3, H, W) in [-1, 1]."""
    mean, std = posterior(vae, pixels)
    return (mean + std * normal(mean.shape, generator, mean.device) - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Pixels (b, 3, H, W), float32, about [-1, 1], of scaled latents (b, c, h, w)."""
    weight = next(vae.parameters())
    latents = latents / vae.config.scaling_factor + _shift(vae)
    return vae.decode(latents.to(weight.device, weight.dtype), return_dict=False)[0].float()


class LatentCache:
    """The posterior of every (image, variant); a variant is one of the crops and flips that training picks from.

    variants: how many each image has, or for each image the numbers of its own.
    `pixels(index, variant)` gives the image (3, H, W) in [-1, 1] and is called once for each pair. The cache
    lies on the CPU and holds on to neither the VAE nor the pixels: both can be freed. The pair is the key, so
    that no order of the data can mistake one image for another. InputError without images or variants.
    """

    def __init__(
        self,
        vae: torch.nn.Module,
        pixels: Callable[[int, int], torch.Tensor],
        images: int,
        variants: int | Sequence[Iterable[int]] = 1,
        batch_size: int = 4,
        progress: bool = False,
    ):
        if images < 1 or (isinstance(variants, int) and variants < 1):
            raise InputError("latent cache", f"{images} images, {variants} variants", "at least one of each")
        numbers = [range(variants)] * images if isinstance(variants, int) else variants
        self._scale, self._shift = vae.config.scaling_factor, _shift(vae)
        self._rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        keys = [(index, variant) for index in range(images) for variant in numbers[index]]
        with tqdm(total=len(keys), desc="caching latents", disable=not progress) as bar:
            for start in range(0, len(keys), batch_size):
                self._fill(vae, {key: pixels(*key) for key in keys[start : start + batch_size]})
                bar.update(min(batch_size, len(keys) - start))

    def _fill(self, vae: torch.nn.Module, chunk: dict[tuple[int, int], torch.Tensor]) -> None:
        """Encode a few pairs, those of equal size together."""
        for shape in dict.fromkeys(image.shape for image in chunk.values()):
            keys = [key for key, image in chunk.items() if image.shape == shape]
            mean, std = posterior(vae, torch.stack([chunk[key] for key in keys]))
            self._rows.update(zip(keys, zip(mean.cpu(), std.cpu(), strict=True), strict=True))

    def sample(self, indices: Sequence[int], variants: Sequence[int], generator: Generators) -> torch.Tensor:
        """Scaled latents (b, c, h, w), float32 on the CPU: one draw for each pair (indices[i], variants[i]).

        The same draw as `encode` makes of the same pixels with an equal generator. InputError for a pair that
        is not in the cache, or for pairs of different sizes.
        """
        rows = []
        for key in zip(map(int, indices), map(int, variants), strict=True):
            if key not in self._rows:
                wrong = f"image {key[0]}, variant {key[1]} is not in it"
                raise InputError("latent cache", wrong, f"it holds {len(self._rows)} pairs")
            rows.append(self._rows[key])
        sizes = {tuple(mean.shape) for mean, _ in rows}
        if len(sizes) != 1:
            raise InputError("latent cache", f"latents of sizes {sorted(sizes)} in one batch", "batch equal sizes only")
        mean, std = (torch.stack(part) for part in zip(*rows, strict=True))
        return (mean + std * normal(mean.shape, generator) - self._shift) * self._scale


def _shift(vae: torch.nn.Module) -> float:
    return vae.config.shift_factor or 0.0
