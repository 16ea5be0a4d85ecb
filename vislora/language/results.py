"""What a language run leaves: the adapter, PEFT's form of it, the merged model, metrics.json, a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from vislora import config, measure
from vislora.adapter import Adapter
from vislora.baselines.full import FullHandle
from vislora.distributed import class_name
from vislora.errors import InputError
from vislora.export import check_exportable as check_layout
from vislora.handle import Dense, Handle, require_no_rank
from vislora.io import PEFT_CONFIG, PEFT_FILE, read
from vislora.language import models
from vislora.language.options import TrainOptions
from vislora.training.run import RunFolder


def check_exportable(adapter: Handle, options: TrainOptions) -> None:
    """Raise InputError, before a step is made, if `conclude` could not write what it is to write."""
    if isinstance(adapter, Adapter):
        check_layout(adapter, "peft")
    elif options.export_rank is not None:
        require_no_rank(adapter, options.export_rank)
    if options.merge and isinstance(adapter, Dense) and not isinstance(adapter, FullHandle) and not adapter.measurable:
        wrong = "what PEFT's method amounts to is not known as matrices"
        raise InputError("--merge", wrong, "leave it out")


def conclude(
    folder: RunFolder, options: TrainOptions, adapter: Handle, model: nn.Module, tokenizer, auto: Any, steps: int,
    values: Mapping[str, float], device: torch.device, main: bool = True,
) -> None:  # fmt: skip
    """Write everything, and say where it is. model: the module that was trained; auto: its Auto class.

    values: what was measured last. main: whether this process's files stay and it speaks; the others of a model in
    shards only help to gather it.
    """
    written: dict[str, Path] = {}
    trains = steps and next(adapter.parameters(), None) is not None
    if trains:
        adapter.save(folder.adapter)
        written["adapter"] = folder.adapter
    whole = isinstance(adapter, FullHandle)
    if trains and not whole:
        exported = adapter.export(folder.path / "export" / "peft", "peft", options.export_rank)
        if exported:
            add_head(exported, model)
            written["peft"] = exported
    if trains and options.merge and not main:
        for _ in models.changes(adapter):
            pass
    elif trains and (whole or options.merge):
        place = folder.path / "model"
        more = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
        if hasattr(model.config, "num_labels") and models.heads(model):
            more["num_labels"] = model.config.num_labels
        written["model"] = models.write_merged(
            adapter, model, tokenizer, place, auto, options.model_name_or_path, **more
        )
    certificate = measure.certificate(adapter)
    trained = sum(p.numel() for p in adapter.parameters())
    folder.write_metrics({
        "steps": steps, "trainable_parameters": trained, **values,
        "largest_norm": certificate["largest_norm"], "largest_share": certificate["largest_share"],
        "memory_mib": models.memory_mib(device),
    })  # fmt: skip
    folder.readme.write_text(_card(folder, options, adapter, certificate, written, values), encoding="utf-8")
    if not main:
        return
    print()
    for name, place in written.items():
        print(f"{name:<10} {place}")
    if certificate["largest_share"] is not None:
        print(f"bound      at most {certificate['largest_share']:.1%} of any layer's bound is in use")
    print(f"look at    {folder.path}")


def add_head(folder: Path, model: nn.Module) -> None:
    """Put a classifier's head into a folder of PEFT's, as one of its `modules_to_save`; nothing for other models."""
    heads = models.heads(model)
    if not heads:
        return
    tensors, about = read(folder / PEFT_FILE)
    for path, module in heads:
        for name, tensor in module.named_parameters():
            tensors[f"base_model.model.{path}.{name}"] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / PEFT_FILE, about)
    place = folder / PEFT_CONFIG
    config = json.loads(place.read_text(encoding="utf-8"))
    config |= {"modules_to_save": [path for path, _ in heads], "task_type": "SEQ_CLS"}
    place.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _card(
    folder: RunFolder, options: TrainOptions, adapter: Handle, certificate: Mapping, written: Mapping[str, Path],
    values: Mapping[str, float],
) -> str:  # fmt: skip
    """The README.md of a run: what it is, how to load it, what it measured, and its settings."""
    base = options.model_name_or_path
    front: dict[str, Any] = {} if Path(base).exists() else {"base_model": base}  # the hub refuses a path
    front |= {"library_name": "peft" if "peft" in written else "transformers", "tags": ["vislora"]}
    front["tags"].append(f"vislora:{adapter.method_name}")
    lines = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {folder.path.name}",
             f"`{adapter.method_name}` on `{base}`.", "## Use"]  # fmt: skip
    root = next(iter(adapter.roots.values()))
    own, classifies = class_name(root), bool(models.heads(root))
    labels = f", num_labels={root.config.num_labels}" if classifies else ""
    load = f'from transformers import {own}\n\nmodel = {own}.from_pretrained("{base}"{labels})\n'
    if "adapter" in written:
        place = f'"{folder.path.name}/adapter"'
        first = "from vislora.language.classification import load_head\n" if classifies else ""
        last = f"\nload_head(model, {place})" if classifies else ""
        lines.append(f"```python\nimport vislora\n{first}{load}vislora.load(model, {place}){last}\n```")
    if "peft" in written:
        more = f'PeftModel.from_pretrained(model, "{folder.path.name}/export/peft")'
        lines.append(f"```python\nfrom peft import PeftModel\n{load}model = {more}\n```")
    if "model" in written:
        lines.append(f"`{folder.path.name}/model` is the whole model, for `{own}.from_pretrained`.")
    share = certificate["largest_share"]
    bound = "Nothing in its method limits the norm of its change of a weight." if share is None else (
        f"At most {100 * share:.2f} % of any layer's bound is in use; the largest norm is "
        f"{certificate['largest_norm']:.6g}. Strength scales the bound."
    )  # fmt: skip
    lines.append(f"## Norm bound\n\n{bound}")
    if values:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in values.items())
        lines.append(f"## Measured at the end\n\n| | |\n|---|---|\n{rows}")
    shown = {**config.to_dict(options), **adapter.method.options()}
    rows = "\n".join(f"| {k} | {str(v).replace('|', chr(92) + '|')} |" for k, v in shown.items() if v not in (None, []))
    lines.append(f"## Settings\n\n| option | value |\n|---|---|\n{rows}")
    return "\n\n".join(lines) + "\n"
