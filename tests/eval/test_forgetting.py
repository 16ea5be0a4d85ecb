"""eval/forgetting.py on runs of the classification script: the same scores again, comparisons over seeds."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from script_runs import opened
from tiny_vit import coloured, image_folder, parquet_folder, save_timm

from vislora.errors import InputError
from vislora.vision import compare, results


def module(path: str):
    return opened(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of an adapter at two ratios, and a linear probe."""
    place = tmp_path_factory.mktemp("runs")
    save_timm(place / "vit")
    image_folder(place / "target", 3, train=8, test=4, seed=5)
    parquet_folder(place / "source", train=4, test=3)
    script = module("train_scripts/classification.py")
    usual = ["--model_name_or_path", str(place / "vit"), "--dataset_name", str(place / "target"),
             "--source_dataset_name", str(place / "source"), "--max_train_steps", "2", "--train_batch_size", "4",
             "--train_val_split", "0.25", "--logging_steps", "1", "--report_to", "none"]  # fmt: skip
    both = [(ratio, seed) for ratio in (0.1, 0.8) for seed in (0, 1)]
    flags_of = {f"nb{r}-{s}": ["--rank", "2", "--delta_ratio", str(r), "--seed", str(s)] for r, s in both}
    for name, flags in {**flags_of, "probe-0": ["--adapter", "none"]}.items():
        AcceleratorState._reset_state()
        PartialState._reset_state()
        script.main([*usual, *flags, "--output_dir", str(place / "sweep" / name)])
    return place / "sweep"


def test_a_run_is_scored_again_to_the_same_figures(runs):
    run = runs / "nb0.8-0"
    module("eval/forgetting.py").main(["--run", str(run)])
    found, said = json.loads((run / "forgetting.json").read_text()), json.loads((run / "metrics.json").read_text())
    for name in ("target_accuracy", "source_accuracy", "source_accuracy_before", "geometric_mean", "target_loss"):
        assert found[name] == pytest.approx(said[name], abs=1e-6), name
    assert found["source_feature_cka"] == pytest.approx(said["source_feature_cka"], abs=1e-6)
    assert found["largest"]["nuclear_ratio"] == pytest.approx(said["nuclear_ratio"], rel=1e-4)
    assert set(found["norms"]) == {f"blocks.{i}.attn.qkv[{b}]" for i in range(2) for b in "qv"}
    assert found["neighbours"] == {"k": [10], "bank": 16} and found["source_knn10_accuracy"] > 1 / 4
    files = ("forgetting.json", "per_class.csv", "confusion.csv", "confusion.png", "source_per_class.csv")
    own = [(run / file).read_bytes() for file in files]
    module("eval/forgetting.py").main(["--run", str(run), "--unlabelled", "--best"])
    assert [(run / file).read_bytes() for file in files] == own  # the run's own figures stay
    found = json.loads((run / "best" / "forgetting.json").read_text())
    assert "source_accuracy" not in found and 0 < found["source_feature_cka"] <= 1 + 1e-9
    assert found["target_accuracy"] == said.get("best_target_accuracy", said["target_accuracy"])


def test_a_run_from_random_weights_is_scored_again_to_the_same_figures(runs, tmp_path):
    script, run = module("train_scripts/classification.py"), tmp_path / "run"
    AcceleratorState._reset_state()
    PartialState._reset_state()
    script.main(["--model_name_or_path", "test_vit", "--pretrained", "random", "--dataset_name",
                 str(runs.parent / "target"), "--max_train_steps", "2", "--train_batch_size", "4", "--seed", "5",
                 "--report_to", "none", "--adapter", "none", "--output_dir", str(run)])  # fmt: skip
    torch.rand(3)
    module("eval/forgetting.py").main(["--run", str(run), "--source_dataset_name", str(runs.parent / "source"),
                                       "--unlabelled"])  # fmt: skip
    found, said = json.loads((run / "forgetting.json").read_text()), json.loads((run / "metrics.json").read_text())
    assert found["target_loss"] == pytest.approx(said["target_loss"], rel=1e-5)


def test_other_sources_than_the_runs_own(runs, tmp_path, capsys):
    run, script = runs / "nb0.8-1", module("eval/forgetting.py")
    (tmp_path / "photos").mkdir()
    for i in range(6):
        coloured(i % 3, i).save(tmp_path / "photos" / f"{i}.png")
    script.main(["--run", str(run), "--source_dataset_name", str(tmp_path / "photos"), "--unlabelled"])
    found = json.loads((run / "forgetting.json").read_text())
    assert found["source_images"] == 6 and 0 < found["source_feature_cka"] < 1
    image_folder(tmp_path / "tested", train=1, test=2)
    shutil.rmtree(tmp_path / "tested" / "train")
    script.main(["--run", str(run), "--source_dataset_name", str(tmp_path / "tested")])
    found = json.loads((run / "forgetting.json").read_text())
    assert found["neighbours"] == {"k": [], "bank": 0} and "source_accuracy" in found
    assert "no scores by neighbours" in capsys.readouterr().err
    script.main(["--run", str(run), "--source_dataset_name", str(runs.parent / "target"), "--unlabelled",
                 "--source_test_split", "train"])  # fmt: skip
    assert json.loads((run / "forgetting.json").read_text())["source_images"] == 24


def test_runs_are_compared_by_neighbours(runs, tmp_path):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    shutil.copy(runs / "nb0.1-0" / "config.yaml", run)
    found = {"target_accuracy": 0.5, "source_knn20_accuracy": 0.32, "geometric_mean_knn20": 0.4, "nuclear_ratio": 0.1}
    (run / "metrics.json").write_text(json.dumps(found))
    shutil.copy(runs / "nb0.1-0" / "metrics.jsonl", run)
    argv = ["--runs", str(run), "-o", str(tmp_path / "out")]
    module("eval/forgetting.py").main([*argv, "--score", "knn20"])
    with open(tmp_path / "out" / "compared.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["source_knn20_accuracy"]) == 0.32 and float(row["geometric_mean_knn20"]) == 0.4
    with pytest.raises(InputError, match="has no source_accuracy.*another --score"):
        module("eval/forgetting.py").main(argv)


def test_runs_are_compared_over_seeds(runs, tmp_path):
    module("eval/forgetting.py").main(["--runs", str(runs), "-o", str(tmp_path / "out")])
    with open(tmp_path / "out" / "compared.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["delta_ratio"], r["seeds"]) for r in rows] == [
        ("nb_lora", "0.1", "2"), ("nb_lora", "0.8", "2"), ("none", "", "1"),
    ]  # fmt: skip
    for name in ("trade_off.png", "steps.png", "over_delta_ratio.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    values = [json.loads((runs / f"nb0.1-{s}/metrics.json").read_text())["target_accuracy"] for s in (0, 1)]
    assert float(rows[0]["target_accuracy"]) == pytest.approx(np.mean(values), abs=1e-5)
    assert results.curve(runs / "probe-0" / "metrics.jsonl")["source_accuracy"]


def test_a_comparison_draws_means_over_seeds_and_leaves_out_what_only_tuned(runs, tmp_path, monkeypatch):
    files = [runs / f"nb0.1-{s}" / "metrics.jsonl" for s in (0, 1)]
    mean, (one, two) = results.mean_curve(files), map(results.curve, files)
    for (step, value), a, b in zip(mean["loss"], one["loss"], two["loss"], strict=True):
        assert step == a[0] and value == pytest.approx((a[1] + b[1]) / 2)
    drawn = []
    monkeypatch.setattr(compare.plots, "over_steps", lambda file, curves: drawn.append(curves))
    monkeypatch.setattr(compare, "_MOST", 2)
    assert "steps.png has the 2 settings" in compare.report([runs], tmp_path / "out")
    best = sorted(compare.settings(compare.find([runs])), key=lambda s: -s.mean("geometric_mean")[0])[:2]
    assert set(drawn[0]) == {s.label for s in best}
    for i, name in enumerate(("nb0.1-0", "nb0.8-0")):
        shutil.copytree(runs / name, tmp_path / "sweep" / "cells" / name / "run")
        state = {"ok": True, "seconds": 1.0, **({"tuning": "delta_ratio"} if i else {})}
        (tmp_path / "sweep" / "cells" / name / compare.STATE).write_text(json.dumps(state))
    assert [run.parent.name for run in compare.find([tmp_path / "sweep"])] == ["nb0.1-0"]


def test_intervals_are_students():
    stats = pytest.importorskip("scipy.stats")

    values = [0.4, 0.5, 0.7, 0.65]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    mean, half = compare.interval(values)
    assert mean - half == pytest.approx(low, abs=1e-3) and mean + half == pytest.approx(high, abs=1e-3)
    assert np.isnan(compare.interval([0.5])[1])


def test_refusals(tmp_path):
    script = module("eval/forgetting.py")
    for argv, words in ([], "one run to score"), (["--run", str(tmp_path)], "no config.yaml"), (
        ["--runs", str(tmp_path), "-o", str(tmp_path)], "hold no run that has ended"
    ):
        with pytest.raises(InputError, match=words):
            script.main(argv)
