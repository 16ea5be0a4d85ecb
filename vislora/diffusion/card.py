"""The README.md of a run: a model card as the hub reads it, with the adapter's norm certificate in plain words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import yaml

from vislora.diffusion.family import FAMILIES
from vislora.diffusion.options import DreamBoothOptions

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SHOWN = (
    "optimizer", "learning_rate", "text_encoder_lr", "lr_scheduler", "train_batch_size", "gradient_accumulation_steps",
    "max_train_steps", "num_train_epochs", "snr_gamma", "prior_loss_weight", "mixed_precision", "seed",
    "export_rank",
)  # fmt: skip
_KINDS = {
    "lora": "A {} adapter of", "adapter": "A {} adapter of", "components": "A {} fine-tune of", "base": "The base",
}  # fmt: skip


@dataclass(frozen=True)
class Certificate:
    """What was measured of a bounded adapter. Norms: Schatten p-norms of the change of one adapted block."""

    method: str
    p: float  # 1 to inf
    delta: float | None  # the bound, or None where it is a share of each weight's norm,
    delta_ratio: float | None  # which is this
    largest_norm: float
    module: str  # where it is largest
    largest_share: float  # of the bound in use, at most 1


def run_card(
    folder: Path, options: DreamBoothOptions, certificate: Mapping, grid: Path | None, pipeline: str, form: str = "lora"
) -> str:
    """The card of the run in `folder` from its options and `vislora.measure.certificate`. form: see `model_card`."""
    shares = {name: m["norm"] / m["bound"] for name, m in certificate["modules"].items() if m["bound"]}
    bound = None
    if shares:
        module = max(shares, key=shares.get)
        own = certificate["options"]
        bound = Certificate(
            method=certificate["method"],
            p=float(certificate["modules"][module]["p"]),
            delta=own.get("delta"),
            delta_ratio=own.get("delta_ratio"),
            largest_norm=certificate["modules"][module]["norm"],
            module=module,
            largest_share=certificate["largest_share"],
        )
    shown = {**certificate["options"], **{k: getattr(options, k) for k in _SHOWN}}
    return model_card(
        name=folder.name,
        base_model=options.pretrained_model_name_or_path,
        method=certificate["method"],
        instance_prompt=options.instance_prompt or "captions of the photos",
        hyperparameters={key: value for key, value in shown.items() if value is not None},
        certificate=bound,
        grid=None if grid is None else str(grid.relative_to(folder)),
        class_prompt=options.class_prompt if options.with_prior_preservation else None,
        pipeline_class=pipeline,
        form=form,
        classes=certificate["base"]["classes"],
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
) -> str:
    """The card's text: YAML front matter, then Markdown.

    `name` is the run folder's, `grid` and `adapter_folder` are paths relative to it; `hyperparameters` become
    a table in their order; `example_prompt` (by default the instance prompt) goes into the code;
    `certificate` None says that there is no bound. `form`: what stock tools load, a "lora" file or whole
    "components" ({folder: class} in `classes`); "adapter": only vislora does; "base": nothing was trained.
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

    trained = f"Trained with DreamBooth on {_code(instance_prompt)}"
    if form == "base":
        trained = "Nothing was trained; the images are the base's"
    elif class_prompt:
        trained += f", its prior preserved on {_code(class_prompt)}"
    parts = [
        f"---\n{head}---",
        f"# {_plain(name)}",
        f"{_KINDS[form].format(_code(method))} {_code(base_model)}. {trained}.",
    ]
    if grid is not None:
        parts.append(f"![training photos, and samples before, during and after training]({quote(grid)})")
    prompt = example_prompt or instance_prompt
    ours = f"{name}/{adapter_folder}"
    parts.append(f"## Use\n\n{_usage(name, base_model, ours, pipeline_class, prompt, form, classes or {})}")
    if form != "base":
        parts.append(f"## Norm bound\n\n{_bound(certificate)}")
    rows = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in hyperparameters.items())
    parts.append(f"## Training\n\n| option | value |\n|---|---|\n{rows}")
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


def _bound(certificate: Certificate | None) -> str:
    if certificate is None:
        return "This adapter has no bound: nothing in its method limits the norm of its change of a weight."
    c = certificate
    norm = f"Schatten {c.p:g}-norm"
    if c.p in (1, 2, float("inf")):
        norm += f" ({ {1: 'nuclear', 2: 'Frobenius', float('inf'): 'spectral'}[c.p] } norm)"
    limit = f"delta = {c.delta:g}" if c.delta is not None else f"{c.delta_ratio:g} times the weight's own norm"
    return f"""| | |
|---|---|
| method | {_cell(c.method)} |
| norm | {norm}, p = {c.p:g} |
| bound for each adapted block | {limit} |
| largest norm measured | {c.largest_norm:.6g}, in {_code(c.module)} |
| largest share of a bound in use | {100 * c.largest_share:.2f} % |

Scaling the adapter at inference scales the bound: at a weight of 1.3 it is 1.3 times as large. Adapters added
together have at most the sum of their bounds. A bound on the weights is no bound on the output: images can
change more, or less, than these figures suggest."""


def _code(text: str) -> str:
    """`text` as inline code, fenced by more backticks than it holds."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _plain(text: str) -> str:
    """`text` on one line with Markdown's and HTML's own characters escaped."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _cell(value: object) -> str:
    return _plain(str(value))
