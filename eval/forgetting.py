"""What a classification run gained and lost: target and source before, during and after; norms; tables and pictures.

    python eval/forgetting.py --run RUN
    python eval/forgetting.py --runs RUN RUN ... -o COMPARED

The first scores the model of RUN again on all images, by the kept head and by neighbours, and writes its
forgetting.json with source_per_class.csv and the pictures (with --best into RUN/best). The second compares runs that
have ended, such as a sweep's folder: adaptation against forgetting with the Pareto front, accuracy against steps, the
geometric mean over each option that differs, means over seeds with intervals.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

import vislora
from vislora import config
from vislora.errors import InputError, run_script
from vislora.options import option
from vislora.training.cores import use_cores
from vislora.training.run import RunFolder
from vislora.vision import augment, compare, forgetting, heads, metrics, models, plots, results, task
from vislora.vision.evaluate import Evaluator, SourceTask, preprocess_words
from vislora.vision.options import ClassificationOptions
from vislora.vision.whole import read_run


@dataclass(frozen=True)
class ForgettingOptions:
    """What eval/forgetting.py takes."""

    run: str | None = option(None, "the folder of a classification run that has ended")
    runs: tuple[str, ...] = option((), "several, or folders of runs, to compare")
    output: str | None = option(None, "folder for the comparison", aliases=("o",))
    score: Literal["head", "knn10", "knn20", "knn100", "knn200"] = option(
        "head", "what the comparison takes as source accuracy: the kept head's, or that of so many neighbours"
    )
    best: bool = option(False, "score the best on validation instead of the run's own result")
    source_dataset_name: str | None = option(None, "another source set than the run's; none: the run's")
    source_config_name: str | None = option(None, "as the script's, for that set; so the next four")
    source_train_split: str | None = option(None, "none: the run's, or train of another set")
    source_test_split: str | None = option(None, "none: the run's, or test of another set")
    source_image_column_name: str | None = option(None, "of a Hugging Face dataset")
    source_label_column_name: str | None = option(None, "the same")
    unlabelled: bool = option(
        False, "the source has no labels, or not the model's: measure the drift of features alone; the run's own too",
        aliases=("source_unlabelled",),
    )  # fmt: skip
    eval_batch_size: int | None = option(None, "images; none: the run's")
    cpu_threads: int | None = option(None, "threads to compute with; none: all cores")


def main(argv: list[str]) -> None:
    argv = ["--output" if word == "-o" else word for word in argv]
    o, _ = config.parse(ForgettingOptions, argv, prog="forgetting.py", description=__doc__.splitlines()[0])
    if (o.run is None) == (not o.runs):
        raise InputError("--run", "one run to score, or several --runs to compare, is needed", "give one of the two")
    if o.runs:
        if o.output is None:
            raise InputError("--output", "is needed by --runs", "name a folder for tables and pictures")
        found = compare.report([Path(run) for run in o.runs], Path(o.output), o.score)
        print(found)
        return
    use_cores(1, o.cpu_threads)
    print(json.dumps(score(Path(o.run), o), indent=1))


def with_source(options: ClassificationOptions, o: ForgettingOptions) -> ClassificationOptions:
    """The run's options with the source that `o` tells of; the rest is the run's, or usual for another set."""
    names = [f.name for f in fields(o) if f.name.startswith("source_")]
    given = {name: getattr(o, name) for name in names if getattr(o, name) is not None}
    other = o.source_dataset_name not in (None, options.source_dataset_name)
    usual = {name: getattr(ClassificationOptions, name) for name in names} if other else {}
    unlabelled = o.unlabelled or (options.source_unlabelled and not other)
    return replace(options, **(usual | given), source_unlabelled=unlabelled, knn=False)


def score(run: Path, o: ForgettingOptions) -> dict:
    """Write forgetting.json and what goes with it into the run, or its best/; returns what stands in it."""
    options, method = read_run(run)
    options = with_source(options, o)
    if options.source_dataset_name is None:
        raise InputError("--source_dataset_name", "neither the run nor you name source data", "give it")
    sets = task.load(options, offer_bank=True)
    tower = models.load(options.model_name_or_path, options.library, options.pretrained, options.seed)
    words = options.zero_shot_templates
    source = heads.source_head(tower, sets.source.classes, words)
    model = heads.Classifier(tower, len(sets.train.classes), source, options.seed, whole=False, frozen=True)
    place = run / "best" if o.best else run
    results.load_head(model.head, place)
    accelerator = Accelerator()
    model.to(accelerator.device)
    trained = (place / "adapter").is_dir()
    adapter = vislora.load(tower.model, place / "adapter") if trained else vislora.attach(tower.model, method)

    size = o.eval_batch_size or options.eval_batch_size
    evaluate = Evaluator(accelerator, model, augment.evaluation(tower.preprocess), size,
                         options.dataloader_num_workers, options.channels_last)  # fmt: skip
    old = SourceTask(evaluate, sets.source, sets.few, sets.bank)
    with adapter.disabled():
        before = old.full()
    after = old.full()
    out = evaluate(sets.test)
    target = metrics.scores(out.target, out.labels)
    norms = forgetting.update_norms(adapter)
    kinds = ("nuclear_ratio", "frobenius_ratio", "spectral_ratio")
    found = {
        **results.target_figures(target), **results.source_figures(before, after, target.top1),
        "neighbours": {"k": list(after.knn), "bank": len(sets.bank) if sets.bank and after.knn else 0},
        "largest": {kind: max((row[kind] for row in norms.values()), default=0.0) for kind in kinds},
        "preprocess": preprocess_words(tower.preprocess), "norms": norms,
    }  # fmt: skip
    (place / "forgetting.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    results.write_tables(place, sets.train.classes, target, sets.source.classes, before, after)
    lines = RunFolder(run).lines_file
    if lines.is_file():
        plots.over_steps(place / "curve.png", {adapter.method_name: results.curve(lines)})
    return {key: value for key, value in found.items() if key != "norms"}


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run_script(main)
