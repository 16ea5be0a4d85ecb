"""The papers' figures that are scripts of their own: NB-LoRA's 11 and OD-LoRA's 7."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from vislora.errors import EnvironmentFault, InputError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "eval"))

    def load(name: str):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return load


def lines(file: Path) -> list[dict]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_sets_are_those_that_the_bounds_say(load):
    reachable = load("reachable")
    inside, outside = [(0.0, 0.0), (-0.4, 0.5), (0.1, -0.8)], [(0.6, 0.6), (-1.2, 0.0)]  # of the ball of NB-LoRA
    grid = torch.diag_embed(torch.tensor(inside + outside, dtype=torch.float64))
    assert reachable.reached(reachable.nb_lora, grid, 120).tolist() == [True] * 3 + [False] * 2
    # DeLoRA at gamma = 1/2 fills the ball of radius 1/2 about -(1/4, 1/4)
    grid = torch.diag_embed(torch.tensor([(0.0, 0.0), (-0.4, -0.3), (0.2, 0.2), (-0.4, 0.5)], dtype=torch.float64))
    assert reachable.reached(reachable.delora(0.5, 0.5, False), grid, 120).tolist() == [True, True, False, False]
    # free up to 3/2 it covers all of NB-LoRA's
    grid = torch.diag_embed(torch.tensor([*inside, (0.5, 0.45), (1.0, 1.0)], dtype=torch.float64))
    assert reachable.reached(reachable.delora(0.5, 1.5, True), grid, 120).tolist() == [True] * 4 + [False]


def test_reachable_sets_are_drawn(load, tmp_path, capsys):
    load("reachable").main(["--points", "3", "--fit_steps", "20", "-o", str(tmp_path)])
    assert (tmp_path / "reachable.png").stat().st_size > 1000 and len(lines(tmp_path / "reachable.csv")) == 3 * 9
    assert capsys.readouterr().out.count("area") == 3
    with pytest.raises(InputError, match="--points: 1 is below 2"):
        load("reachable").main(["--points", "1"])


TRAINER = """
import json, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, n, t = pathlib.Path(words["--output_dir"]), int(words["--init_rounds"]), int(words["--init_steps"])
out.mkdir(parents=True)
if words["--fail"] == f"{n}{t}":
    (out / "config.yaml").write_text("{}")
    sys.exit(5)
losses = [9.0, 9.0, 10.0 * n + t, 10.0 * n + t + 1]
lines = [json.dumps({"step": i + 1, "loss": loss}) + "\\n" for i, loss in enumerate(losses)]
(out / "metrics.jsonl").write_text("".join(lines))
(out / "metrics.json").write_text("{}")
"""


def test_a_grid_of_runs_goes_on_where_it_failed(load, tmp_path):
    figure = load("od_lora_7")
    (tmp_path / "trainer.py").write_text(TRAINER)
    words = ["--rounds", "1", "2", "--steps", "3", "4", "--script", str(tmp_path / "trainer.py"),
             "-o", str(tmp_path / "out"), "--", "--fail"]  # fmt: skip
    with pytest.raises(EnvironmentFault, match="N = 2, T = 3 ended with status 5"):
        figure.main([*words, "23"])
    stamp = (tmp_path / "out/N1_T4/metrics.json").stat().st_mtime_ns
    figure.main([*words, "none"])
    assert (tmp_path / "out/N1_T4/metrics.json").stat().st_mtime_ns == stamp
    found = {(int(r["rounds"]), int(r["steps"])): float(r["late_loss"]) for r in lines(tmp_path / "out/od_lora_7.csv")}
    assert found == {(n, t): 10 * n + t + 0.5 for n in (1, 2) for t in (3, 4)}
    (tmp_path / "out/N1_T3/metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no losses"):
        figure.main([*words, "none"])
    with pytest.raises(InputError, match="--rounds: 0 is below 1"):
        figure.main(["--rounds", "0", *words[3:], "none"])
