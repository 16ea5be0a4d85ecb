"""A run as a model of its own: the adapter merged, the new head where the library's classifier was.

    python -m vislora.vision.whole --run RUN -o FOLDER

writes timm's or transformers' own folder, which a next run starts from (--model_name_or_path FOLDER): its new task is
then the source whose forgetting is measured.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import vislora
from vislora import adapters, config
from vislora.baselines import BASELINES
from vislora.errors import InputError, run_script
from vislora.options import option
from vislora.training.run import RunFolder
from vislora.vision import models, results
from vislora.vision.options import ClassificationOptions


@dataclass(frozen=True)
class WholeOptions:
    """What `python -m vislora.vision.whole` takes."""

    run: str | None = option(None, "the folder of a classification run that has ended")
    output: str | None = option(None, "the folder to write", aliases=("o",))


def main(argv: list[str]) -> None:
    argv = ["--output" if word == "-o" else word for word in argv]
    o, _ = config.parse(WholeOptions, argv, prog="whole.py", description=__doc__.splitlines()[0])
    for name in ("run", "output"):
        if getattr(o, name) is None:
            raise InputError(f"--{name}", "is not given", "name the run and the folder to write")
    print(f"written to {write(Path(o.run), Path(o.output))}")


def read_run(run: Path) -> tuple[ClassificationOptions, object]:
    """The options and the method in a run's config.yaml."""
    methods = {name: adapters.get(name) for name in vislora.methods()} | BASELINES
    file = RunFolder(run).config_file
    if not file.is_file():
        raise InputError(f"--run {run}", "holds no config.yaml", "name the folder of a classification run")
    return config.parse(ClassificationOptions, ["--config", str(file)], prog="whole.py", methods=methods)


def write(run: Path, folder: Path) -> Path:
    """The run's model with its head, in float32. Raises InputError for open_clip, whose towers have no classifier."""
    options, _ = read_run(run)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--output {folder}", "is not empty", "name a new folder")
    tower = models.load(options.model_name_or_path, options.library, options.pretrained, options.seed)
    if tower.library == "open_clip":
        wrong = "is a tower of open_clip, which has no classifier"
        raise InputError(f"--run {run}", wrong, "load its adapter/ and head.safetensors, as its README.md says")
    file = run / results.HEAD
    if not file.is_file():
        raise InputError(str(file), "does not exist", "name the folder of a classification run that has ended")
    with safe_open(file, "pt") as stored:
        classes = json.loads(stored.metadata()["classes"])
    head = nn.Linear(tower.width, len(classes))
    results.load_head(head, run)
    if (run / "adapter").is_dir():
        vislora.load(tower.model, run / "adapter").detach(merge=True)
    folder.mkdir(parents=True, exist_ok=True)
    (_timm if tower.library == "timm" else _transformers)(tower, head, classes, folder, options.model_name_or_path)
    return folder


def _timm(tower: models.Tower, head: nn.Linear, classes: list[str], folder: Path, base: str) -> None:
    from timm.models._hub import save_config_for_hf

    model, arguments = tower.model, None
    model.reset_classifier(len(classes))
    setattr(model, model.pretrained_cfg["classifier"], head)
    own = Path(base) / "config.json"
    if own.is_file():
        arguments = json.loads(own.read_text(encoding="utf-8")).get("model_args")
    if arguments:
        arguments = {**arguments, "num_classes": len(classes)}
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": len(classes), "label_names": classes}
    save_config_for_hf(model, folder / "config.json", model_args=arguments)
    tensors = {n: t.detach().contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _transformers(tower: models.Tower, head: nn.Linear, classes: list[str], folder: Path, base: str) -> None:
    model = tower.model
    model.classifier = head
    model.num_labels = model.config.num_labels = len(classes)
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: i for i, name in enumerate(classes)}
    model.save_pretrained(folder)
    preprocessor = Path(base) / "preprocessor_config.json"
    if preprocessor.is_file():
        (folder / preprocessor.name).write_bytes(preprocessor.read_bytes())


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run_script(main, sys.argv[1:])
