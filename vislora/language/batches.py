"""Which examples go into which batch, packed or not, as a function of the seed; and batches as tensors."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from vislora.language.encode import Example
from vislora.training.random import epoch_order

IGNORED = -100
_OPEN = 32  # bins that an example may still go into


class Plan:
    """Rows of batches by position: row q holds one example or, packed, several, up to `max_length` ids in all.

    Every epoch goes through all examples once in an order of its own. Positions count on from epoch to epoch, so that a
    batch may cross its end; nothing but the seed, the lengths and the position decides what a row holds.
    """

    def __init__(self, lengths: Sequence[int], seed: int, packing: bool = False, max_length: int = 0):
        self.lengths, self.seed, self.packing = lengths, seed, packing
        self.max_length = max(max_length, max(lengths))
        self._ends: list[int] = []  # of epochs, in rows
        self._epochs: dict[int, list[list[int]]] = {}  # the last few

    def rows(self, epochs: float) -> int:
        """How many rows `epochs` of the data make."""
        whole = math.floor(epochs)
        total = self._end(whole - 1) if whole else 0
        part = epochs - whole
        return total + math.ceil(part * (self._end(whole) - total)) if part else total

    def row(self, position: int) -> list[int]:
        """The examples of the row at `position`, from 0."""
        while not self._ends or position >= self._ends[-1]:
            self._end(len(self._ends))
        epoch = bisect_right(self._ends, position)
        return self._bins(epoch)[position - (self._ends[epoch - 1] if epoch else 0)]

    def _end(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            count = len(self._bins(len(self._ends))) if self.packing else len(self.lengths)
            self._ends.append((self._ends[-1] if self._ends else 0) + count)
        return self._ends[epoch]

    def _bins(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            order = epoch_order(self.seed, epoch, len(self.lengths))
            self._epochs[epoch] = self._packed(order) if self.packing else [[i] for i in order]
            for old in list(self._epochs)[:-2]:  # the first made; a start may look far ahead and come back
                del self._epochs[old]
        return self._epochs[epoch]

    def _packed(self, order: Sequence[int]) -> list[list[int]]:
        """First fit over the bins that are open, in the order given: the fullest are closed first."""
        closed: list[list[int]] = []
        bins: list[tuple[int, list[int]]] = []  # (room, examples)
        for index in order:
            need = self.lengths[index]
            place = next((i for i, (room, _) in enumerate(bins) if room >= need), None)
            if place is None:
                bins.append((self.max_length - need, [index]))
                if len(bins) > _OPEN:
                    closed.append(bins.pop(min(range(len(bins)), key=lambda i: bins[i][0]))[1])
            else:
                bins[place] = bins[place][0] - need, [*bins[place][1], index]
        return closed + [examples for _, examples in bins]


def collate(
    rows: Sequence[Sequence[Example]], pad: int, dtype: torch.dtype, device: torch.device, packing: bool = False
) -> dict[str, Tensor]:
    """A batch on `device`: input_ids (b, t), labels (b, t) and what the model needs to keep examples apart.

    labels[i, j] is the id that position j is to predict, or -100: nothing is predicted across examples, and padding is
    told by its place, not by its id. Padding is on the right. With packing, position_ids (b, t) begin anew with each
    example, and attention_mask (b, 1, t, t) in `dtype` is 0 inside an example's past and the smallest number outside;
    without, attention_mask (b, t) is 1 on the example.
    """
    longest = max(sum(map(len, row)) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    positions = torch.zeros((len(rows), longest), dtype=torch.long)
    owner = torch.zeros((len(rows), longest), dtype=torch.long)  # 0: padding
    for i, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row, 1):
            here = slice(at, at + len(example))
            own = example.ids.long()
            ids[i, here], owner[i, here] = own, number
            positions[i, here] = torch.arange(len(example))
            labels[i, at : at + len(example) - 1] = torch.where(example.learned[1:], own[1:], IGNORED)
            at += len(example)
    batch = {"input_ids": ids, "labels": labels}
    if packing:
        same = owner[:, :, None] == owner[:, None, :]
        past = torch.ones(longest, longest, dtype=torch.bool).tril()
        allowed = same & past  # padding sees padding: no row of the mask is empty
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
        batch |= {"position_ids": positions, "attention_mask": mask[:, None]}
    else:
        batch["attention_mask"] = (owner > 0).long()
    return {name: tensor.to(device) for name, tensor in batch.items()}
