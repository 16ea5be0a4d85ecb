"""The README.md of a run: a model card as the hub reads it, with the adapter's norm certificate in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import yaml

from vislora.diffusion.family import FAMILIES
from vislora.diffusion.options import DreamBoothOptions
from vislora.training.card import HUB_ID, Certificate, bound_text, certified, code, options_table, plain

_SHOWN = (
    "optimizer", "learning_rate", "text_encoder_lr", "lr_scheduler", "train_batch_size", "gradient_accumulation_steps",
    "max_train_steps", "num_train_epochs", "snr_gamma", "prior_loss_weight", "mixed_precision", "seed",
    "export_rank",
)  # fmt: skip
_KINDS = {
    "lora": "A {} adapter of", "adapter": "A {} adapter of", "components": "A {} fine-tune of", "base": "The base",
}  # fmt: skip
_CAUTION = """A bound on the weights is no bound on the output: images can
change more, or less, than these figures suggest."""


def run_card(
    folder: Path, options: DreamBoothOptions, certificate: Mapping, grid: Path | None, pipeline: str,
    form: str = "lora", note: str | None = None,
) -> str:  # fmt: skip
    """The card of the run in `folder` from its options and `vislora.measure.certificate`. form, note: see `model_card`.
    """
    shown = {**certificate["options"], **{k: getattr(options, k) for k in _SHOWN}}
    return model_card(
        name=folder.name,
        base_model=options.pretrained_model_name_or_path,
        method=certificate["method"],
        instance_prompt=options.instance_prompt or "captions of the photos",
        hyperparameters={key: value for key, value in shown.items() if value is not None},
        certificate=certified(certificate),
        grid=None if grid is None else str(grid.relative_to(folder)),
        class_prompt=options.class_prompt if options.with_prior_preservation else None,
        pipeline_class=pipeline,
        form=form,
        classes=certificate["base"]["classes"],
        note=note,
    )


def model_card(
    *,
    name: str,
    base_model: str,
    method: str,
    instance_prompt: str,
    hyperparameters: Mapping[str, object],
    certificate: Certificate | None = None,
    grid: str | None = None,
    class_prompt: str | None = None,
    example_prompt: str | None = None,
    adapter_folder: str = "adapter",
    pipeline_class: str = "StableDiffusionPipeline",
    license: str | None = None,
    form: str = "lora",
    classes: Mapping[str, str] | None = None,
    note: str | None = None,
) -> str:
    """The card's text: YAML front matter, then Markdown.

    `name` is the run folder's, `grid` and `adapter_folder` are paths relative to it; `hyperparameters` become
    a table in their order; `example_prompt` (by default the instance prompt) goes into the code;
    `certificate` None says that there is no bound. `form`: what stock tools load, a "lora" file or whole
    "components" ({folder: class} in `classes`); "adapter": only vislora does; "base": nothing was trained.
    `note`: a sentence of the run's own.
    """
    on_hub = HUB_ID.fullmatch(base_model) is not None and not Path(base_model).is_dir()
    front: dict[str, object] = {}
    if on_hub:  # the hub refuses a card whose base is no id
        front["base_model"] = base_model
    front["library_name"] = "diffusers"
    if license is not None:
        front["license"] = license
    front["instance_prompt"] = " ".join(instance_prompt.split())  # a line of "---" would end the front matter
    front["pipeline_tag"] = "text-to-image"
    front["tags"] = ["text-to-image", "diffusers", "diffusers-training", "dreambooth", "vislora"]
    front["tags"] += ["lora"] if form == "lora" else []
    family = FAMILIES.get(pipeline_class)
    front["tags"] += [*(family.tags if family else ()), f"vislora:{method}"]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000)

    trained = f"Trained with DreamBooth on {code(instance_prompt)}"
    if form == "base":
        trained = "Nothing was trained; the images are the base's"
    elif class_prompt:
        trained += f", its prior preserved on {code(class_prompt)}"
    parts = [
        f"---\n{head}---",
        f"# {plain(name)}",
        f"{_KINDS[form].format(code(method))} {code(base_model)}. {trained}.",
    ]
    if note is not None:
        parts.append(plain(note))
    if grid is not None:
        parts.append(f"![training photos, and samples before, during and after training]({quote(grid)})")
    prompt = example_prompt or instance_prompt
    ours = f"{name}/{adapter_folder}"
    parts.append(f"## Use\n\n{_usage(name, base_model, ours, pipeline_class, prompt, form, classes or {})}")
    if form != "base":
        parts.append(f"## Norm bound\n\n{bound_text(certificate, _CAUTION)}")
    parts.append(options_table(hyperparameters))
    return "\n\n".join(parts) + "\n"


def _usage(
    name: str, base: str, ours: str, pipeline: str, prompt: str, form: str, classes: Mapping[str, str]
) -> str:
    """How to load it, with diffusers alone and with vislora."""
    lines = [f"from diffusers import {pipeline}"]
    if form == "components":
        ours = {kind: kind.startswith("UNet") or "Transformer2D" in kind for kind in classes.values()}
        libraries = {kind: "diffusers" if own else "transformers" for kind, own in ours.items()}
        lines += [f"from {library} import {kind}" for kind, library in libraries.items()]
    lines += ["", f"pipe = {pipeline}.from_pretrained({base!r})"]
    if form == "lora":
        lines.append(f"pipe.load_lora_weights({name!r})  # this folder")
    elif form == "components":
        lines += [f"pipe.{part} = {kind}.from_pretrained({f'{name}/{part}'!r})" for part, kind in classes.items()]
    lines.append(f"image = pipe({prompt!r}).images[0]")
    stock = "With diffusers:\n\n```python\n" + "\n".join(lines) + "\n```"
    knows = ", which counts what it loads and knows the bound" if form == "lora" else ""
    own = f"""With vislora{knows}:

```python
import vislora

adapter = vislora.load(pipe, {ours!r}, weight=1.0)
```"""
    return {"base": stock, "adapter": own}.get(form, f"{stock}\n\n{own}")
