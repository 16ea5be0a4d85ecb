"""What a classification run leaves beside its tensors: scores, tables, pictures, metrics.json and a model card."""

from __future__ import annotations

import json
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from vislora import io, measure
from vislora.errors import InputError
from vislora.handle import Handle
from vislora.training.run import RunFolder
from vislora.vision import card, forgetting, metrics, plots
from vislora.vision.evaluate import Source
from vislora.vision.metrics import Scores
from vislora.vision.options import ClassificationOptions

HEAD = "head.safetensors"


def save_head(head: nn.Linear, classes: tuple[str, ...], folder: Path) -> Path:
    """Write folder/head.safetensors: weight (classes, width), bias, and the classes' names in the header."""
    tensors = {n: p.detach().cpu().contiguous() for n, p in head.state_dict().items()}
    return io.write(tensors, {"format": "pt", "classes": json.dumps(classes)}, folder / HEAD)


def load_head(head: nn.Linear, folder: Path) -> None:
    """Read it back. Raises InputError where it is missing or of another shape."""
    file = folder / HEAD
    if not file.is_file():
        raise InputError(str(file), "does not exist", "name the folder of a classification run that has ended")
    tensors = load_file(file)
    if any(tensors.get(n) is None or tensors[n].shape != p.shape for n, p in head.state_dict().items()):
        raise InputError(str(file), "does not fit the model and data of config.yaml", "restore the run's own")
    head.load_state_dict(tensors)


def source_figures(before: Source | None, after: Source | None, target: float) -> dict[str, Any]:
    """What the source lost and what the two tasks make together, as plain numbers for metrics.json."""
    if before is None or after is None:
        return {}
    found: dict[str, Any] = {"source_images": len(after.outputs.labels)}
    if after.head is not None:
        kept = after.head.top1
        found |= {
            "source_accuracy_before": before.head.top1, "source_accuracy": kept, "source_top5": after.head.top5,
            "forgetting": before.head.top1 - kept, "geometric_mean": forgetting.geometric_mean(kept, target),
            "arithmetic_mean": (kept + target) / 2,
        }  # fmt: skip
    for k, scores in after.knn.items():
        found[f"source_knn{k}_accuracy_before"] = before.knn[k].top1
        found[f"source_knn{k}_accuracy"] = scores.top1
        found[f"geometric_mean_knn{k}"] = forgetting.geometric_mean(scores.top1, target)
        found[f"arithmetic_mean_knn{k}"] = (scores.top1 + target) / 2
    found["source_feature_cka"] = forgetting.linear_cka(before.outputs.features, after.outputs.features)
    return found


def end_figures(name: str, target: Scores, source: Scores | None) -> dict[str, float]:
    """How the one of last and best that is not reported does on both tasks."""
    found = {f"{name}_target_accuracy": target.top1}
    return found | ({f"{name}_source_accuracy": source.top1} if source is not None else {})


def target_figures(scores: Scores) -> dict[str, float]:
    return {"target_accuracy": scores.top1, "target_top5": scores.top5, "target_loss": scores.loss,
            "target_calibration_error": scores.ece, "target_images": scores.n}  # fmt: skip


def peak_memory(device: torch.device) -> dict[str, float]:
    """MiB: of the process on a CPU, of torch's tensors on a GPU."""
    if device.type == "cuda":
        return {"peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20}
    return {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def write_tables(folder: Path, classes: tuple[str, ...], target: Scores, source_classes: tuple[str, ...],
                 before: Source | None, after: Source | None) -> None:  # fmt: skip
    """per_class.csv, confusion.csv and .png of the target; source_per_class.csv with what each class lost, by the kept
    head and by 20 neighbours (10 in a smaller bank), as far as there are scores by them."""
    metrics.write_per_class(folder / "per_class.csv", classes, {"accuracy": target.per_class}, target.confusion.sum(-1))
    metrics.write_confusion(folder / "confusion.csv", classes, target.confusion)
    plots.confusion(folder / "confusion.png", classes, target.confusion)
    if before is None or after is None:
        return
    pairs = {"": (before.head, after.head)} if after.head is not None else {}
    if after.knn:
        k = max(k for k in after.knn if k <= 20)
        pairs[f"knn{k}_"] = (before.knn[k], after.knn[k])
    columns = {}
    for by, (old, new) in pairs.items():
        columns |= {f"{by}before": old.per_class, f"{by}after": new.per_class}
        columns[f"{by}forgetting"] = old.per_class - new.per_class
        counts = new.confusion.sum(-1)
    if columns:
        metrics.write_per_class(folder / "source_per_class.csv", source_classes, columns, counts)


def curve(file: Path) -> dict[str, list[tuple[float, float]]]:
    """{name: [(step, value)]} of every number in a run's metrics.jsonl."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append((entry["step"], value))
    return found


def mean_curve(files: Sequence[Path]) -> dict[str, list[tuple[float, float]]]:
    """`curve` of several runs: of each name the mean at the steps that all of them have."""
    found, several = {}, [curve(file) for file in files]
    for name in several[0]:
        values = [dict(own.get(name, ())) for own in several]
        steps = [step for step in values[0] if all(step in own for own in values)]
        found[name] = [(step, statistics.fmean(own[step] for own in values)) for step in steps]
    return found


def export(adapter: Handle, folder: Path, rank: int | None) -> Path | None:
    """PEFT's folder for stock transformers; None, and one line, where that layout cannot hold the adapter."""
    try:
        return adapter.export(folder / "peft", "peft", rank)
    except InputError as error:
        if rank is not None:
            raise
        print(f"vislora: no export for stock tools: {error.wrong}; vislora.load reads adapter/", file=sys.stderr)
        return None


def conclude(folder: RunFolder, options: ClassificationOptions, adapter: Handle, figures: Mapping[str, Any],
             classes: tuple[str, ...], exported: Path | None) -> None:  # fmt: skip
    """Write metrics.json, the curve and the card, and say in a few lines what came out."""
    certificate = measure.certificate(adapter)
    figures = {**figures, "largest_norm": certificate["largest_norm"], "largest_share": certificate["largest_share"]}
    folder.write_metrics(figures)
    if folder.lines_file.exists():
        plots.over_steps(folder.path / "curve.png", {adapter.method_name: curve(folder.lines_file)})
    text = card.run_card(folder, options, certificate, figures, classes, exported)
    folder.readme.write_text(text, encoding="utf-8")
    print(f"\ntarget     {figures['target_accuracy']:.1%} of {figures['target_images']} test images")
    if "source_accuracy" in figures:
        print(f"source     {figures['source_accuracy']:.1%}, before {figures['source_accuracy_before']:.1%}: "
              f"geometric mean with the target {figures['geometric_mean']:.1%}")  # fmt: skip
    elif "source_knn20_accuracy" in figures:
        print(f"source     {figures['source_knn20_accuracy']:.1%} by 20 neighbours, before "
              f"{figures['source_knn20_accuracy_before']:.1%}")  # fmt: skip
    elif "source_feature_cka" in figures:
        print(f"source     features before and after have a linear CKA of {figures['source_feature_cka']:.3f}")
    if certificate["largest_share"] is not None:
        print(f"bound      at most {certificate['largest_share']:.1%} of any layer's bound is in use")
    print(f"look at    {folder.path}/curve.png, {folder.path}/README.md")
