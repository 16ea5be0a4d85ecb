"""Scoring: one pass over images gives features and both heads' logits, shared among the processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vislora.vision import forgetting
from vislora.vision.augment import Plain, batches
from vislora.vision.data import ImageSet
from vislora.vision.heads import Classifier
from vislora.vision.metrics import Scores, scores
from vislora.vision.models import Preprocess


@dataclass(frozen=True)
class Outputs:
    """Of n images: features (n, width), the new head's logits, the source head's logits or None, classes (n,)."""

    features: Tensor
    target: Tensor
    source: Tensor | None
    labels: Tensor


class Evaluator:
    """Runs a classifier over image sets in float32, every process over its share; all get everything."""

    def __init__(self, accelerator: Accelerator, model: Classifier, transform, batch: int, workers: int,
                 channels_last: bool):  # fmt: skip
        self.accelerator, self.model, self.transform = accelerator, model, transform
        self.batch, self.workers, self.channels_last = batch, workers, channels_last

    @torch.no_grad()
    def __call__(self, images: ImageSet) -> Outputs:
        """One pass; the model is in eval mode meanwhile. Raises ValueError for an empty set."""
        n, rank, world = len(images), self.accelerator.process_index, self.accelerator.num_processes
        if not n:
            raise ValueError(f"{images.name}: no images to score")
        each = -(-n // world)
        mine = [min(i, n - 1) for i in range(rank * each, (rank + 1) * each)]  # the last one again, to equal lengths
        places = [mine[at : at + self.batch] for at in range(0, len(mine), self.batch)]
        training = self.model.training
        self.model.eval()
        found = []
        with torch.autocast(self.accelerator.device.type, enabled=False):
            for pixels, labels in batches(Plain(images, self.transform), places, self.workers, self.accelerator.device):
                if self.channels_last:
                    pixels = pixels.contiguous(memory_format=torch.channels_last)
                features, target, source = self.model.all(pixels)
                found.append((features.float(), target.float(), None if source is None else source.float(), labels))
        self.model.train(training)
        features, target, source, labels = (self._whole(column, n) for column in zip(*found, strict=True))
        return Outputs(features, target, source, labels)

    def target(self, images: ImageSet) -> Scores:
        """By the head of the task that is trained."""
        out = self(images)
        return scores(out.target, out.labels)

    def _whole(self, column: Sequence[Tensor | None], n: int) -> Tensor | None:
        if column[0] is None:
            return None
        # in the order of the set: shares are contiguous, and each but the last's end is full
        return self.accelerator.gather(torch.cat(list(column)))[:n]


@dataclass(frozen=True)
class Source:
    """The source task at one time: outputs, scores by the kept head (None without one), by neighbours for each k."""

    outputs: Outputs
    head: Scores | None
    knn: dict[int, Scores]


class SourceTask:
    """The task that the model could do before, and what is left of it."""

    def __init__(self, evaluator: Evaluator, test: ImageSet, few: ImageSet, bank: ImageSet | None = None,
                 few_bank: ImageSet | None = None):  # fmt: skip
        """test: scored before and after; few: a fixed part of it for scores on the way; bank: where neighbours are
        sought, None for not at all; few_bank: the same on the way."""
        self.evaluator, self.test, self.few, self.bank, self.few_bank = evaluator, test, few, bank, few_bank
        self.classes = len(test.classes)
        self._at_first: Tensor | None = None

    def head(self) -> Scores | None:
        """By the kept head; None where there is none."""
        out = self.evaluator(self.test)
        return None if out.source is None else scores(out.source, out.labels)

    def before(self) -> Source:
        """`full` of the model as it came, whose features are kept: what `on_the_way` compares with."""
        self._at_first = self.evaluator(self.few).features
        return self.full()

    def full(self) -> Source:
        """All of it."""
        return self._scored(self.test, self.bank)

    def on_the_way(self) -> dict[str, float]:
        """The figures of the fixed parts, by the names of metrics.json: by the kept head where there is one, by at most
        20 neighbours where there is a bank, and how much the features still are what they were at `before`."""
        found = self._scored(self.few, self.few_bank, most=20)
        values = {} if found.head is None else {"source_accuracy": found.head.top1}
        values |= {f"source_knn{k}_accuracy": score.top1 for k, score in found.knn.items()}
        if self._at_first is not None:
            values["source_feature_cka"] = forgetting.linear_cka(self._at_first, found.outputs.features)
        return values

    def _scored(self, images: ImageSet, known: ImageSet | None, most: int = max(forgetting.KNN_K)) -> Source:
        out = self.evaluator(images)
        head = None if out.source is None else scores(out.source, out.labels)
        knn = {}
        if known is not None:
            bank = self.evaluator(known)
            for k in forgetting.KNN_K:
                if k <= min(most, len(known)):
                    votes = forgetting.knn_logits(bank.features, bank.labels, out.features, self.classes, k)
                    knn[k] = scores(votes, out.labels)
        return Source(out, head, knn)


def preprocess_words(p: Preprocess) -> dict:
    """What the scores depend on of the pipeline, for the record."""
    return {"size": p.size, "mean": list(p.mean), "std": list(p.std), "interpolation": p.interpolation,
            "crop_pct": p.crop_pct, "squash": p.squash}  # fmt: skip
