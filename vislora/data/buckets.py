"""Aspect-ratio buckets: sizes of about equal area, each photo in the nearest, and batches of one size in an order that
is a function of the seed and the position alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from vislora.data.crops import Size
from vislora.errors import InputError
from vislora.training.random import epoch_order


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """Sizes with sides in multiples of `step`, from half to twice `resolution`, of at most resolution^2 pixels: for
    each width the largest height. The square of `resolution` is among them. InputError unless step divides resolution.
    """
    if resolution % step:
        wrong = f"{step} does not divide --resolution {resolution}"
        raise InputError("--bucket_reso_steps", wrong, "64 fits most models, 32 or 16 small ones")
    low, high = math.ceil(resolution / 2 / step) * step, 2 * resolution
    sizes = set()
    for width in range(low, high + 1, step):
        height = min(high, resolution**2 // width // step * step)
        if height >= low:
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def nearest(photo: Size, sizes: Sequence[Size]) -> int:
    """The index of the size whose aspect ratio is nearest to the photo's, by the logarithm of their quotient."""
    own = math.log(photo[0] / photo[1])
    return min(range(len(sizes)), key=lambda i: (abs(math.log(sizes[i][0] / sizes[i][1]) - own), i))


@lru_cache(maxsize=4)
def _batches(seed: int, epoch: int, groups: tuple[int, ...], count: int, stream: str) -> tuple[tuple[int, ...], ...]:
    """An epoch's batches of `count` indices, each of one group, in their order. A group's last batch is filled up from
    its own beginning."""
    batches = []
    for group in sorted(set(groups)):
        members = [i for i, own in enumerate(groups) if own == group]
        order = [members[k] for k in epoch_order(seed, epoch, len(members), f"{stream} of bucket {group}")]
        for start in range(0, len(order), count):
            batches.append(tuple(order[(start + k) % len(order)] for k in range(count)))
    return tuple(batches[k] for k in epoch_order(seed, epoch, len(batches), f"{stream} of batches"))


def epoch_length(groups: Sequence[int], count: int) -> int:
    """Positions in an epoch: whole batches of `count`, as many as the groups need."""
    return sum(math.ceil(list(groups).count(group) / count) for group in set(groups)) * count


def bucketed_indices(seed: int, position: int, count: int, groups: Sequence[int], stream: str) -> list[int]:
    """Sample indices at global positions position … position + count - 1, all of one group.

    groups[i]: the bucket of sample i. `position` is a multiple of `count`. Every epoch visits every sample.
    """
    epoch, place = divmod(position // count, epoch_length(groups, count) // count)
    return list(_batches(seed, epoch, tuple(groups), count, stream)[place])
