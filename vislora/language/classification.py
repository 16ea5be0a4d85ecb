"""Texts with labels: GLUE's tasks by name and any csv or json, encoded in pairs, and the head that learns beside."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vislora import optim
from vislora.errors import InputError, near
from vislora.handle import Handle
from vislora.language.models import heads
from vislora.language.options import _DATA, _EVAL, TrainOptions
from vislora.language.rows import holdout, read_rows
from vislora.options import option

log = logging.getLogger("vislora")

# name: (columns of text, the labels' words in GLUE's order (none: a number is to be predicted), metrics, the first of
# which chooses the best epoch)
GLUE: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": (("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": (("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}


@dataclass(frozen=True)
class ClassificationOptions(TrainOptions):
    """Everything that a run of train_scripts/sequence_classification.py is a function of, beside the adapter's own."""

    task_name: str | None = option(None, "of GLUE: columns, labels and metrics; none: told from the data", group=_DATA)
    train_file: str | None = option(
        None, "json, jsonl, csv or parquet file, a folder of them or of save_to_disk, or a hub id; none: GLUE's own",
        group=_DATA, aliases=("dataset_name", "data"),
    )  # fmt: skip
    validation_file: str | None = option(None, "held-out rows; none: the training source's own split", group=_DATA)
    train_split: str = option("train", 'and slices: "train[:1000]"', group=_DATA)
    validation_split: str | None = option(
        None, "of a folder or a hub data set; none: validation, of GLUE's own MNLI validation_matched", group=_DATA
    )
    validation_split_percentage: float = option(
        0.0, "hold out the last so many percent of the training rows instead", group=_DATA
    )
    text_columns: tuple[str, ...] = option((), "one or two; none: the task's, or all that hold text", group=_DATA)
    label_column: str = option("label", "words or whole numbers are classes, other numbers a scale", group=_DATA)
    max_length: int = option(128, "tokens of an example; more are cut off", group=_DATA, aliases=("max_seq_length",))
    max_train_samples: int | None = option(None, "use the first so many rows", group=_DATA)
    max_eval_samples: int | None = option(None, "use the first so many held-out rows", group=_DATA)
    head_learning_rate: float | None = option(None, "of the head; none: learning_rate", group="training")
    per_device_eval_batch_size: int = option(32, "rows at a time", group=_EVAL)
    eval_steps: int | None = option(None, "evaluate every so many steps; none: after every epoch", group=_EVAL)

    def __post_init__(self):
        super().__post_init__()
        self._least(1, "per_device_eval_batch_size", "eval_steps", "max_train_samples", "max_eval_samples")
        self._least(4, "max_length")
        if self.task_name is not None and self.task_name not in GLUE:
            wrong = f"{self.task_name!r} is no task of GLUE{near(self.task_name, GLUE)}"
            raise InputError("--task_name", wrong, f"take one of {', '.join(GLUE)}")
        if len(self.text_columns) > 2:
            raise InputError("--text_columns", f"{len(self.text_columns)} columns", "name one or two")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise InputError("--head_learning_rate", f"{self.head_learning_rate} is not positive", "give such as 1e-3")


@dataclass(frozen=True)
class Labelled:
    """ids of every training and held-out example; labels as class numbers or floats; the classes' names, or none.

    metrics: names in `vislora.language.metrics.METRICS`, the first of which is the one to judge by.
    """

    train: list[list[int]]
    train_labels: list[float]
    held: list[list[int]]
    held_labels: list[float]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    cut: int

    @classmethod
    def read(cls, options: ClassificationOptions, tokenizer) -> Labelled:
        """What the options name. Raises InputError for columns that are missing and labels that do not fit together."""
        o = options
        train, held = _rows(o)
        columns, names, metrics = GLUE.get(o.task_name or "", ((), None, ()))
        columns = o.text_columns or columns or _text_columns(train[0], o.label_column)
        missing = [name for name in (*columns, o.label_column) if name not in train[0] or name not in held[0]]
        if missing:
            wrong = f"no column {', '.join(missing)}; the data has {', '.join(train[0])}"
            raise InputError("--text_columns", wrong, "name them by --text_columns and --label_column")
        raw = [[row[o.label_column] for row in part] for part in (train, held)]
        classes, labels = _labels(raw, names)
        if "f1" in metrics and set(classes) not in ({"0", "1"}, set(names)):
            log.warning("%s: the F1 of %s is of label %r, the second of %s by length and alphabet; GLUE has %s",
                        o.label_column, o.task_name, classes[1], classes, names)  # fmt: skip
        metrics = metrics or (("accuracy",) if classes else ("pearson", "spearman"))
        encoded = [_encode([[str(row[c]) for c in columns] for row in part], tokenizer, o.max_length)
                   for part in (train, held)]  # fmt: skip
        return cls(encoded[0][0], labels[0], encoded[1][0], labels[1], classes, metrics, encoded[0][1])


def _rows(o: ClassificationOptions) -> tuple[list[dict], list[dict]]:
    source, config = (o.train_file, None) if o.train_file else ("nyu-mll/glue", o.task_name)
    train = read_rows(source, o.train_split, config, "--train_file")
    if o.validation_file or not o.validation_split_percentage:
        flag = "--validation_file"
        if o.validation_file is None and Path(source).is_file():
            wrong = "nothing is held out of a single file"
            raise InputError(flag, wrong, "name one, or give --validation_split_percentage")
        matched = o.task_name == "mnli" and not o.train_file and not o.validation_file
        split = o.validation_split or ("validation_matched" if matched else "validation")
        held = read_rows(o.validation_file or source, split, config, flag)
    else:
        train, held = holdout(train, o.validation_split_percentage)
    return train[: o.max_train_samples], held[: o.max_eval_samples]


def _text_columns(row: dict[str, Any], label: str) -> tuple[str, ...]:
    found = tuple(name for name, value in row.items() if isinstance(value, str) and name not in (label, "idx", "id"))
    if not 1 <= len(found) <= 2:
        wrong = f"{len(found)} columns hold text: {', '.join(found) or 'none'}"
        raise InputError("--text_columns", wrong, "name one or two")
    return found


def _labels(
    raw: Sequence[Sequence[Any]], names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[list[float]]]:
    """(classes, the labels of both parts): numbers with a fraction, or a task without names, are a scale.

    names: of the task's classes in their order, which words of the data that are these have too."""
    values, count = [value for part in raw for value in part], None if names is None else len(names)
    if count == 0 or (count is None and all(_fraction(value) for value in values)):
        try:
            return (), [[float(value) for value in part] for part in raw]
        except (TypeError, ValueError) as error:
            raise InputError("--label_column", f"a label is no number ({error})", "check the column") from None
    words = sorted({_word(value) for value in values}, key=lambda w: (not w.lstrip("-").isdigit(), len(w), w))
    if any(word.startswith("-") for word in words):
        wrong = f"labels below zero ({words[0]})"
        raise InputError("--label_column", wrong, "GLUE's test rows are unlabelled: leave them out")
    if count is not None:
        words = words if not all(w.isdigit() for w in words) else [str(i) for i in range(count)]
        words = list(names) if set(words) <= set(names) else words
    unknown = {_word(value) for value in values} - set(words)
    if unknown or len(words) < 2 or (count is not None and len(words) != count):
        wrong = f"the labels are {', '.join(sorted({_word(v) for v in values})[:6])}"
        raise InputError("--label_column", wrong, f"there should be {count or 'two or more'} of them")
    number = {word: i for i, word in enumerate(words)}
    return tuple(words), [[float(number[_word(value)]) for value in part] for part in raw]


def _fraction(value: Any) -> bool:
    try:
        return isinstance(value, float | str) and "." in str(value) and math.isfinite(float(value))
    except ValueError:
        return False


def _word(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _encode(texts: list[list[str]], tokenizer, max_length: int) -> tuple[list[list[int]], int]:
    """(ids with the tokenizer's own marks, of one text or of two; how many were cut, the longer text first)."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    whole = tokenizer(*columns, truncation=False)["input_ids"]
    ids = tokenizer(*columns, truncation=True, max_length=max_length)["input_ids"]
    return ids, sum(len(a) > len(b) for a, b in zip(whole, ids, strict=True))


def collate(ids: Sequence[Sequence[int]], tokenizer, device: torch.device) -> dict[str, Tensor]:
    """A batch padded on the right, token types told from the ids where the model has them."""
    longest = max(map(len, ids))
    padded = [[*own, *[tokenizer.pad_token_id] * (longest - len(own))] for own in ids]
    batch = {"input_ids": padded, "attention_mask": [[1] * len(own) + [0] * (longest - len(own)) for own in ids]}
    if "token_type_ids" in tokenizer.model_input_names:
        batch["token_type_ids"] = [_types(own, tokenizer, longest) for own in ids]
    return {name: torch.tensor(value, device=device) for name, value in batch.items()}


def _types(ids: Sequence[int], tokenizer, longest: int) -> list[int]:
    """BERT's: 1 after the first separator, padding 0."""
    first = list(ids).index(tokenizer.sep_token_id) + 1 if tokenizer.sep_token_id in ids else len(ids)
    return [0] * first + [1] * (len(ids) - first) + [0] * (longest - len(ids))


def encoder_targets(model: nn.Module) -> str:
    """A pattern of every linear but those of the head, which trains whole."""
    names = "|".join(re.escape(name) for name, _ in heads(model)) or r"\b\B"
    return rf"(?!(?:{names})(?:\.|$)).*(?<!\])"


class WithHead:
    """A handle and the head that trains beside it, as checkpoints see them: one set of named tensors.

    The head's own rate makes a group of its own in `param_groups`.
    """

    def __init__(self, adapter: Handle, model: nn.Module):
        self.adapter = adapter
        self.head = {f"head.{path}.{name}": p for path, module in heads(model) for name, p in module.named_parameters()}
        if isinstance(next(iter(self.head.values()), None), nn.Parameter):
            for parameter in self.head.values():
                parameter.requires_grad_(True)
        own = {id(p) for p in adapter.parameters()}
        self.head = {name: p for name, p in self.head.items() if id(p) not in own}  # full has it already

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    @property
    def step(self) -> int:
        return self.adapter.step

    @step.setter
    def step(self, value: int) -> None:
        self.adapter.step = value

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.adapter.named_tensors()
        yield from self.head.items()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.adapter.named_parameters()
        yield from self.head.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite both from one set. Raises InputError if either part does not fit."""
        missing = self.head.keys() - tensors.keys()
        if missing:
            raise InputError("head", f"the checkpoint lacks {min(missing)}", "resume with the run's own settings")
        self.adapter.load_tensors({name: t for name, t in tensors.items() if name not in self.head})
        for name, parameter in self.head.items():
            parameter.copy_(tensors[name])

    def save(self, folder: Path) -> Path:
        """The adapter's file, and the head's tensors under their names in the model in head.safetensors beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        if next(self.adapter.parameters(), None) is not None:
            self.adapter.save(folder)
        if self.head:
            file = folder / "head.safetensors"
            save_file({n.removeprefix("head."): t.detach().cpu().contiguous() for n, t in self.head.items()}, file)
        return folder


def optimizer_of(options: ClassificationOptions, adapter: WithHead, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of adapter and head, a group "head" at its own rate; of the head alone where all else is fixed."""
    o, head = options, list(adapter.head.values())
    rate = o.head_learning_rate or o.learning_rate
    if next(adapter.adapter.parameters(), None) is None:  # the linear probe
        return torch.optim.AdamW(head, lr=rate, weight_decay=o.adam_weight_decay, betas=(o.adam_beta1, o.adam_beta2),
                                 eps=o.adam_epsilon, fused=fused)  # fmt: skip
    optimizer = optim.from_options(o, adapter.adapter, fused=fused)
    if head:
        optimizer.add_param_group({"params": head, "lr": rate, "name": "head"})
    return optimizer


def losses(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Tensor:
    """The batch's mean loss: cross-entropy over classes, the squared error of the one output where there are none.

    logits (b, classes or 1) in float32, labels (b,).
    """
    return F.cross_entropy(logits, labels.long()) if classes else F.mse_loss(logits[:, 0], labels)


@torch.no_grad()
def load_head(model: nn.Module, folder: str | Path) -> None:
    """Put a run's head back: RUN/adapter/head.safetensors into a classifier of the same kind."""
    from vislora.io import read

    file = Path(folder) / "head.safetensors"
    tensors, own = read(file)[0], dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise InputError(str(file), f"{name} does not fit the model", "load it into the classifier it was made of")
        own[name].copy_(tensor)
