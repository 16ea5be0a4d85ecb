"""eval/spectrum.py over whole runs, over files, cut short, and over what is broken."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from vislora.errors import InputError
from vislora.io import read
from vislora.spectrum import source, table
from vislora.training import telemetry
from vislora.training.run import RunFolder

REPOSITORY = Path(__file__).resolve().parents[2]
METHODS = {"lora": {"rank": 3}, "sorsa": {"rank": 3}, "nb_lora": {"rank": 3, "delta": 1.5}, "od_lora": {"rank": 3}}


@pytest.fixture
def spectrum(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "eval"))
    monkeypatch.delitem(sys.modules, "spectrum", raising=False)
    import spectrum

    return spectrum


def lines(file: Path) -> list[dict]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_runs_side_by_side(spectrum, runs, tmp_path, capsys):
    folders = [runs(name, **options) for name, options in METHODS.items()]
    out = tmp_path / "out"
    spectrum.main(["--run", *map(str, folders), "-o", str(out), "--bins", "5"])
    found = lines(out / "layers.csv")
    assert {row["run"] for row in found} == METHODS.keys() and {row["step"] for row in found} == {"0", "2", "4"}
    base = read(runs.base / "model.safetensors")[0]
    for row in found:
        weight = base[f"{row['layer']}.weight"].double()
        delta = torch.zeros_like(weight)
        if row["step"] != "0":
            delta = runs.deltas[row["run"], int(row["step"])][row["layer"]].double()
        assert float(row["frobenius"]) == pytest.approx(delta.norm().item(), rel=1e-4, abs=1e-9)
        assert float(row["condition"]) == pytest.approx(torch.linalg.cond(weight + delta).item(), rel=1e-3)
        assert (row["share"] != "") == (row["run"] == "nb_lora" and row["step"] != "0")
        if row["share"]:
            assert float(row["share"]) == pytest.approx(torch.linalg.svdvals(delta).sum().item() / 1.5, rel=1e-4)
        keeps = row["run"] in ("sorsa", "nb_lora", "od_lora") and row["step"] != "0"
        assert (row["off_orthonormal"] != "") == keeps
        if keeps and row["run"] != "sorsa":
            assert float(row["off_orthonormal"]) < 1e-5
    pictures = {file.stem for file in out.glob("*.png")}
    assert pictures == {"change", "change_by_layer", "condition", "orthonormality", "update_norms", "weight_norms",
                        "bound", "singular_values"}  # fmt: skip
    for name in pictures:
        assert matplotlib.image.imread(out / f"{name}.png").shape[0] > 200 and lines(out / f"{name}.csv")
    bars = lines(out / "singular_values.csv")
    assert sum(int(bar["count"]) for bar in bars if bar["run"] == "sorsa") == 2 * 2 * 3  # layers, its 2 r factors
    last = json.loads((out / "summary.json").read_text())
    assert last["lora"]["step"] == 4 and last["nb_lora"]["share"] <= 1
    assert all(name in capsys.readouterr().out for name in ["sorsa"])


def test_sorsa_s_principal_part_is_what_it_trains(runs, tmp_path):
    run = runs("sorsa", rank=3)
    found = table.rows(source.of_run(run), table.Cache(tmp_path / "rows"))
    for row in found:
        if row["step"] == 4:
            tensors = read(run / "adapter/adapter.safetensors")[0]
            A, B, S = (tensors[f"{row['layer']}.{key}"] for key in "ABS")
            values = torch.linalg.svdvals(B @ torch.diag(S) @ A)[:3]
            assert row["condition_principal"] == pytest.approx((values[0] / values[2]).item(), rel=1e-4)


def test_full_fine_tuning_is_compared_too(spectrum, runs, tmp_path):
    run = runs("full")
    spectrum.main(["--run", str(run), "-o", str(tmp_path / "out")])
    for row in lines(tmp_path / "out/layers.csv"):
        delta = runs.deltas["full", int(row["step"])][row["layer"]] if row["step"] != "0" else torch.zeros(1)
        assert float(row["spectral"]) == pytest.approx(torch.linalg.norm(delta.double(), 2).item()
                                                       if delta.dim() > 1 else 0, rel=1e-4)  # fmt: skip
    assert {row["kind"] for row in lines(tmp_path / "out/singular_values.csv")} == {"query", "value"}


def test_a_cut_analysis_goes_on(runs, tmp_path, monkeypatch):
    series, file = source.of_run(runs("lora", rank=3)), tmp_path / "rows.jsonl"
    asked = []
    measure = table.measure

    def cut(*args):
        asked.append(args)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(table, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        table.rows(series, table.Cache(file))
    with file.open("a") as opened:
        opened.write('{"key": "half a li')
    whole = table.rows(series, table.Cache(file))
    assert len(asked) == 2 + 1 + 2  # four rows in all, two of which were kept; the third began anew
    assert table.rows(series, table.Cache(file)) == whole and len(asked) == 5
    assert table.rows(series, table.Cache(tmp_path / "other")) == whole


def test_other_weights_are_measured_anew(runs, tmp_path):
    run, cache = runs("lora", rank=3), table.Cache(tmp_path / "rows")
    before = table.rows(source.of_run(run), cache)
    run = runs("lora", "again", rank=2)
    after = table.rows(source.of_run(run), cache)
    assert len(before) == len(after) and all(len(row["values"]) == 2 for row in after if row["step"])


def test_files_in_a_row(spectrum, runs, tmp_path, capsys):
    run = runs("lora", rank=3)
    names = [run.parent / f"style-{step:06d}.safetensors" for step in (2, 4)]
    for name in names:
        name.write_bytes((run / "adapter/adapter.safetensors").read_bytes())
    words = ["--adapter", *map(str, names), "-o", str(tmp_path / "out")]
    spectrum.main(words)
    assert "left out" in capsys.readouterr().out
    found = lines(tmp_path / "out/layers.csv")
    assert {row["step"] for row in found} == {"2", "4"} and all(row["condition"] == "" for row in found)
    spectrum.main([*words, "--base", str(runs.base), "--layers", "query", "--steps", "4"])
    found = lines(tmp_path / "out/layers.csv")
    assert {(row["layer"], row["step"]) for row in found} == {("query", "0"), ("query", "4")}
    assert all(row["condition"] for row in found)


def test_the_probe_s_log_is_drawn(spectrum, runs, tmp_path):
    run = runs("lora", rank=3)
    with telemetry.Log(RunFolder(run), "none") as log:
        for step in range(20):
            log.write(step, {"loss": 1.0}, {"query": {"norm": 1.0}})
            log.write(step, *telemetry.alignment({"query": 0.01 * step, "value": 0.5}))
    spectrum.main(["--run", str(run), "-o", str(tmp_path / "out")])
    found = lines(tmp_path / "out/cosine.csv")
    assert [float(row["mean_cosine"]) for row in found] == pytest.approx([0.005 * s + 0.25 for s in range(20)])
    assert float(found[-1]["rolling_mean"]) == pytest.approx(0.005 * 17 + 0.25)
    assert (tmp_path / "out/cosine.png").is_file()


# ---- what cannot be analysed


def test_a_damaged_checkpoint_ends_in_one_line(spectrum, runs, tmp_path):
    run = runs("lora", rank=3)
    file = run / "checkpoints/checkpoint-4/adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="checkpoint-4: adapter.safetensors is not the file that was saved.*-> "):
        spectrum.main(["--run", str(run), "-o", str(tmp_path / "out")])
    (run / "checkpoints/checkpoint-4/manifest.json").unlink()
    with pytest.raises(InputError, match="checkpoint-4: no manifest.json.*-> delete it"):
        spectrum.main(["--run", str(run), "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_missing_things_end_in_one_line(spectrum, runs, tmp_path):
    run = runs("lora", rank=3)

    def refuse(*words: str, match: str):
        with pytest.raises(InputError, match=match):
            spectrum.main([*words, "-o", str(tmp_path / "out")])

    refuse("--run", str(tmp_path / "nothing"), match="nothing: is no folder -> ")
    (tmp_path / "empty").mkdir()
    refuse("--run", str(tmp_path / "empty"), match="config.yaml: cannot be read")
    refuse("--run", str(run), "--steps", "3", match="no step 3 -> it has 2, 4")
    refuse("--run", str(run), "--layers", "key", match="'key' matches no layer of lora -> its first is query")
    refuse("--run", str(run), "--layers", "(", match="is no regular expression")
    refuse("--run", str(run), "--bins", "0", match="--bins: 0 is below 1")
    refuse("--run", str(run), "--labels", "a", "b", match="2 for 1 curves")
    refuse("--run", str(run), str(run), match="two curves have one name")
    refuse("--adapter", str(tmp_path / "none.safetensors"), match="does not exist")
    refuse("--adapter", str(run / "adapter"), "--gradients", "1", match="says nothing of its data")
    (run / "config.yaml").write_text((run / "config.yaml").read_text())
    refuse("--run", str(run), "--gradients", "1", match="another script than dreambooth.py")


@pytest.mark.parametrize("adapter", ["nb_lora", "full"])
@pytest.mark.parametrize("script", ["classification", "sequence_classification"])
def test_runs_that_train_a_head_too(spectrum, tmp_path, monkeypatch, script, adapter):
    """Their checkpoints keep the head beside the adapter; the last one is what the adapter's own folder holds."""
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPOSITORY / "train_scripts"))
    monkeypatch.delitem(sys.modules, script, raising=False)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    every = {"classification": ["--checkpointing_steps", "1", "--eval_steps", "2", "--max_eval_samples", "8",
                                "--max_source_samples", "8"],
             "sequence_classification": ["--save_steps", "1", "--lr_scheduler_type", "constant"]}[script]  # fmt: skip
    small = ["--max_train_steps", "2", "--output_dir", "run", "--report_to", "none", "--learning_rate", "1e-3"]
    importlib.import_module(script).main(["--adapter", adapter, *small, *every])
    spectrum.main(["--run", "run", "-o", "out"])
    layers = lines(Path("out/layers.csv"))
    moved = {step: [float(row["spectral"]) for row in layers if row["step"] == step] for step in ("0", "1", "2")}
    assert not any(moved["0"]) and all(moved["1"]) and all(moved["2"]) and moved["1"] != moved["2"]
    assert not any("head" in row["layer"] or "score" in row["layer"] for row in layers)
    shutil.rmtree("run/checkpoints")
    spectrum.main(["--run", "run", "-o", "after"])
    last = [float(row["spectral"]) for row in lines(Path("after/layers.csv")) if row["step"] == "2"]
    assert last == pytest.approx(moved["2"], rel=1e-5)
