"""The README.md of a classification run: a model card as the hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from vislora.training.card import HUB_ID, bound_text, certified, code, options_table, plain
from vislora.training.run import RunFolder
from vislora.vision.options import ClassificationOptions

_SHOWN = (
    "optimizer", "learning_rate", "head_lr", "lr_scheduler", "warmup_ratio", "adam_weight_decay", "train_batch_size",
    "gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "train_val_split", "label_smoothing",
    "mixup_alpha", "cutmix_alpha", "auto_augment", "crop_scale", "hflip", "ema_decay", "mixed_precision", "seed",
)  # fmt: skip
_SCORES = {
    "target_accuracy": "top-1 on the target's test images", "target_top5": "top-5",
    "target_calibration_error": "expected calibration error", "source_accuracy_before": "source accuracy before",
    "source_accuracy": "source accuracy after, by the kept head", "geometric_mean": "geometric mean of both tasks",
    "source_knn20_accuracy_before": "source accuracy by 20 neighbours before",
    "source_knn20_accuracy": "source accuracy by 20 neighbours after",
    "geometric_mean_knn20": "geometric mean of both tasks, the source by 20 neighbours",
    "source_feature_cka": "linear CKA of the source's features, before with after",
}  # fmt: skip
_CAUTION = """A bound on the weights is no bound on
accuracy: what the source task lost is measured above, on its own images."""


def run_card(folder: RunFolder, o: ClassificationOptions, certificate: Mapping, figures: Mapping,
             classes: tuple[str, ...], exported: Path | None) -> str:  # fmt: skip
    """The card's text: YAML front matter, then Markdown. figures: what metrics.json holds."""
    method, base = certificate["method"], o.model_name_or_path
    front: dict[str, object] = {}
    if HUB_ID.fullmatch(base) and not Path(base).is_dir():  # the hub refuses a card whose base is no id
        front["base_model"] = base
    tags = ["image-classification", "vislora", f"vislora:{method}"]
    front |= {"library_name": "vislora", "pipeline_tag": "image-classification", "tags": tags}
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000)
    kind = {"none": "A linear probe", "full": "A full fine-tune"}.get(method, f"A {code(method)} adapter")
    old = f", and what it cost on {code(Path(o.source_dataset_name).name)}" if o.source_dataset_name else ""
    rows = "\n".join(f"| {name} | {figures[key]:.4f} |" for key, name in _SCORES.items() if key in figures)
    pictures = ["![accuracy against steps](curve.png)"] if (folder.path / "curve.png").exists() else []
    pictures.append("![confusion matrix](confusion.png)")
    parts = [
        f"---\n{head}---",
        f"# {plain(folder.path.name)}",
        f"{kind} of {code(base)} on {code(Path(o.dataset_name).name)} ({len(classes)} classes){old}.",
        f"| score | |\n|---|---|\n{rows}",
        f"Images are prepared as the model's own pipeline does it: {_prepared(figures['preprocess'])}.",
        "\n\n".join(pictures),
        f"## Use\n\n{_usage(folder, o, exported)}",
    ]
    if method != "none":
        parts.append(f"## Norm bound\n\n{bound_text(certified(certificate), _CAUTION)}")
    parts.append(options_table({**certificate["options"], **{k: getattr(o, k) for k in _SHOWN}}))
    return "\n\n".join(parts) + "\n"


def _prepared(p: Mapping) -> str:
    """The words of `evaluate.preprocess_words` in one sentence."""
    side = p["size"]
    fit = f"squashed to {side} x {side}" if p["squash"] else f"short side to {int(side / p['crop_pct'])}, middle {side}"
    return f"{fit} pixels, {p['interpolation']}, mean {tuple(p['mean'])}, std {tuple(p['std'])}"


def _usage(folder: RunFolder, o: ClassificationOptions, exported: Path | None) -> str:
    own, words = folder.path.name, {"library": o.library, "pretrained": o.pretrained}
    if o.pretrained == "random":
        words["seed"] = o.seed
    how = "".join(f", {name}={value!r}" for name, value in words.items() if value is not None)
    load = f"vislora.load(tower.model, {f'{own}/adapter'!r})\n" if folder.adapter.exists() else ""
    text = f"""```python
import vislora
from safetensors.torch import load_file
from vislora.vision import models

tower = models.load({o.model_name_or_path!r}{how})  # or the library's own model
{load}head = load_file({f'{own}/head.safetensors'!r})
logits = tower(images) @ head["weight"].T + head["bias"]
```"""
    if exported is not None:
        text += f"\n\n`{own}/peft` is the adapter alone as `peft.PeftModel.from_pretrained` reads it."
    return text
