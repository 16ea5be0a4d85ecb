"""eval/sweep.py over a script of a few lines: what it runs, skips, chooses, and writes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from script_runs import opened

from vislora.errors import InputError
from vislora.sweep import table
from vislora.sweep.plan import Setting, read

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """\
import json, sys, time
from pathlib import Path
import yaml
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
given, out = yaml.safe_load(open(args["--config"])), Path(args["--output_dir"])
out.mkdir(parents=True, exist_ok=True)
with open(given["journal"], "a") as journal:
    journal.write(json.dumps({**given, "resumed": "--resume_from_checkpoint" in args}) + "\\n")
if given.get("wait"):
    (out / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    if "--resume_from_checkpoint" not in args:
        print("waiting", flush=True)
        time.sleep(60)
if given.get("broken"):
    sys.exit("no such photo")
score = given["rate"] * 10 + given["seed"] + (given.get("offset") or 0)
(out / "metrics.json").write_text(json.dumps({"score": score, "deep": [{"rate": given["rate"]}]}))
"""
AFTER = "import sys, json, pathlib\n(pathlib.Path(sys.argv[2]) / 'after.json').write_text(json.dumps({'x': 4}))\n"


def load_script():
    return opened("eval/sweep.py")


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sweep(tmp_path, capsys):
    """run(body, *flags) -> (exit status, output); also the journal of the script's runs, and the folder of results."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "after.py").write_text(AFTER)

    class Sweep:
        out, file, journal = tmp_path / "out", tmp_path / "plan.yaml", tmp_path / "journal"

        def write(self, **body):
            base = {"script": str(tmp_path / "script.py"), "fixed": {"rate": 1, "journal": str(self.journal)},
                    "methods": {"lora": {"adapter": "lora"}}, "collect": {"score": "metrics.json:score"}}  # fmt: skip
            base["fixed"] |= body.pop("fixed", {})
            self.file.write_text(yaml.safe_dump(base | body, sort_keys=False))

        def start(self, *flags):
            command = [sys.executable, str(ROOT / "eval/sweep.py"), "--config", str(self.file)]
            return subprocess.Popen([*command, "--output_dir", str(self.out), *flags], stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                    start_new_session=True)  # fmt: skip

        def run(self, *flags):
            """In this process, which is quicker: what it said, and its exit status."""
            code, before = 0, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            try:
                load_script().main(["--config", str(self.file), "--output_dir", str(self.out), *flags])
            except SystemExit as ended:
                code = ended.code
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
                signal.signal(number, handler)
            return "".join(capsys.readouterr()), code

        def runs(self):
            return [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

        def table(self):
            return {(r["method"], *r["settings"].values()): r["values"] for r in self.means()}

        def means(self):
            return json.loads((self.out / "table.json").read_text())["rows"]

    return Sweep()


def test_a_grid_runs_once_and_a_changed_one_only_what_changed(sweep):
    sweep.write(seeds=[0, 2], grid={"rate": [1, 3]}, evaluate=["%s --run {run}" % (sweep.file.parent / "after.py")],
                collect={"score": "metrics.json:score", "rate": "metrics.json:deep.0.rate", "x": "after.json:x"})
    said, code = sweep.run("--workers", "2")
    assert code == 0, said
    assert sorted((r["rate"], r["seed"]) for r in sweep.runs()) == [(1, 0), (1, 2), (3, 0), (3, 2)]
    row = sweep.table()["lora", 3]
    # Scores 30 and 32: mean 31, and t(0.975, 1) = 12.706 times the standard error 1.
    assert row["score"]["mean"] == 31 and row["score"]["half"] == pytest.approx(12.7062, abs=1e-3)
    assert row["rate"]["mean"] == 3 and row["x"] == {"mean": 4.0, "half": 0.0, "seeds": 2}
    assert sweep.run()[1] == 0 and len(sweep.runs()) == 4
    sweep.write(seeds=[0, 2], grid={"rate": [1, 5]}, evaluate=["%s --run {run}" % (sweep.file.parent / "after.py")])
    assert sweep.run()[1] == 0
    assert [(r["rate"], r["seed"]) for r in sweep.runs()[4:]] == [(5, 0), (5, 2)]
    cells = rows_of(sweep.out / "cells.csv")
    assert [(c["rate"], c["seed"], float(c["score"])) for c in cells][-1] == ("5", "2", 52.0)


def test_a_failed_cell_is_named_stops_nothing_and_is_tried_again(sweep):
    sweep.write(methods={"good": {}, "bad": {"broken": True}})
    said, code = sweep.run()
    assert code == 1 and "bad, seed=0: FAILED: exit 1: no such photo" in said and "1 cells failed" in said
    assert "bad (1 failed)" in (sweep.out / "table.md").read_text()
    assert sweep.table()["good",]["score"]["mean"] == 10 and sweep.table()["bad",]["score"] is None
    sweep.run()
    assert [bool(r.get("broken")) for r in sweep.runs()] == [False, True, True]


def test_an_interrupted_sweep_goes_on_from_the_checkpoint(sweep):
    sweep.write(methods={"first": {}, "second": {"wait": True}})
    child = sweep.start()
    end = time.monotonic() + 60
    while len(sweep.runs()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "goes on from here" in said
    assert sweep.run()[1] == 0
    assert [(bool(r.get("wait")), r["resumed"]) for r in sweep.runs()] == [(False, False), (True, False), (True, True)]
    assert set(sweep.table()) == {("first",), ("second",)}


def test_a_cell_that_was_cut_while_it_was_scored_is_not_trained_again(sweep, tmp_path):
    after = tmp_path / "after.py"
    after.write_text("import sys; sys.exit('no network')")
    sweep.write(evaluate=[f"{after} --run {{run}}"], collect={"x": "after.json:x"})
    said, code = sweep.run()
    assert code == 1 and "no network" in said
    after.write_text(AFTER)
    assert sweep.run()[1] == 0 and len(sweep.runs()) == 1
    assert [row["x"] for row in rows_of(sweep.out / "cells.csv")] == ["4.0"]
    (cell,) = (sweep.out / "cells").iterdir()
    shutil.rmtree(cell / "run")
    (cell / "cell.json").unlink()
    assert sweep.run()[1] == 0 and len(sweep.runs()) == 2


def test_the_tuned_rate_is_chosen_for_each_method_on_other_seeds(sweep):
    tune = {"rate": {"values": [1, 4, 2], "by": "score", "goal": "max", "seeds": [7]}}
    sweep.write(methods={"up": {}, "down": {"offset": 1}}, tune=tune, seeds=[0, 1])
    said, code = sweep.run()
    assert code == 0 and "up: rate = 4, by score" in said
    runs = sweep.runs()
    assert [r["rate"] for r in runs if r["seed"] == 7] == [1, 4, 2] * 2
    assert {r["rate"] for r in runs if r["seed"] != 7} == {4}
    assert json.loads((sweep.out / "table.json").read_text())["chosen"] == {"up": {"rate": 4}, "down": {"rate": 4}}
    # The whole tuning grid stays among the cells, and out of the table's means.
    assert sum(c["tuning"] == "rate" for c in rows_of(sweep.out / "cells.csv")) == 6
    assert sweep.table()["up",]["score"]["mean"] == 40.5


def test_what_only_asks_for_has_its_methods_tuning(sweep):
    tune = {"rate": {"values": [1, 4], "by": "score", "seeds": [7]}}
    sweep.write(methods={"up": {}, "down": {"offset": 1}}, tune=tune, seeds=[0, 1])
    assert sweep.run("--only", "method=up,seed=1")[1] == 0
    assert [(r["rate"], r["seed"]) for r in sweep.runs()] == [(1, 7), (4, 7), (4, 1)]


def test_a_method_may_take_what_is_chosen_for_another(sweep):
    values = {"up": [1, 4, 2], "same": "up", "down": [1, 2]}
    tune = {"rate": {"values": values, "by": "score", "seeds": [7]}}
    sweep.write(methods={"same": {"offset": 2}, "up": {}, "down": {"offset": 1}}, tune=tune)
    assert sweep.run("--only", "method=same")[1] == 0
    assert [(r["rate"], r["seed"], r.get("offset")) for r in sweep.runs()] == [
        (1, 7, None), (4, 7, None), (2, 7, None), (4, 0, 2)
    ]  # fmt: skip
    said, code = sweep.run()
    assert code == 0 and "down: rate = 2, by score (at the end of its list)" in said and "same: rate" not in said
    chosen = {"up": {"rate": 4}, "same": {"rate": 4}, "down": {"rate": 2}}
    assert json.loads((sweep.out / "table.json").read_text())["chosen"] == chosen
    assert len(sweep.runs()) == 5 + 3


def test_dry_run_and_only(sweep):
    sweep.write(seeds=[0, 1], grid={"rate": [1, 2]})
    said, _ = sweep.run("--only", "rate=2,seed=1")
    assert [(r["rate"], r["seed"]) for r in sweep.runs()] == [(2, 1)] and "lora, rate=2, seed=1" in said
    said, _ = sweep.run("--dry_run")
    assert said.count("to run lora") == 3 and said.count("done   lora") == 1 and "4 cells, 3 to run: about" in said
    said, _ = sweep.run("--dry_run", "--only", "rate=1")
    assert said.count("to run lora") == 2 and "2 cells, 2 to run" in said
    assert len(sweep.runs()) == 1


def test_one_factor_at_a_time_shares_the_run_of_the_centre(sweep):
    sweep.write(factors={"rate": [1, 2], "offset": {"values": [0, 5], "methods": ["lora"]}}, fixed={"offset": 0})
    assert sweep.run()[1] == 0
    assert sorted((r["rate"], r["offset"]) for r in sweep.runs()) == [(1, 0), (1, 5), (2, 0)]
    assert "3 of 3 runs done, 0 failed; seeds 0; by " in (sweep.out / "index.html").read_text()
    rows = [(r["settings"], r["values"]["score"]["mean"]) for r in sweep.means()]
    assert rows == [({}, 10), ({"rate": 1}, 10), ({"rate": 2}, 20), ({"offset": 0}, 10), ({"offset": 5}, 15)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"grd": {}}, "grd: is no part of a sweep (did you mean grid?)"),
        ({"methods": {}}, "has no methods"),
        ({"methods": ["lora"]}, "methods: is list"),
        ({"seeds": 3}, "seeds: is 3"),
        ({"grid": {"rate": 3}}, "grid, rate: is 3"),
        ({"grid": {"rate": {"values": [1], "methods": ["lara"]}}}, "no method 'lara' (did you mean lora?)"),
        ({"collect": {"score": "metrics.json"}}, "is no file:path"),
        ({"tune": {"rate": {"values": [1], "by": "loss", "seeds": [9]}}}, "by='loss'"),
        ({"tune": {"rate": {"values": {"lora": "lore"}, "by": "score", "seeds": [9]}}}, "'lora' is as 'lore'"),
        ({"tune": {"rate": {"values": [1], "by": "score", "seeds": [0]}}}, "seeds [0] choose the value and are"),
    ],
)
def test_a_file_that_means_nothing_is_refused_in_one_line(sweep, body, said):
    sweep.write(**body)
    with pytest.raises(InputError) as caught:
        read(sweep.file)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_choice_compares_what_all_values_finished(sweep):
    """The second value has one good seed and no other: the first wins on the seed that both have."""
    sweep.write(tune={"rate": {"values": [1, 2], "by": "score", "seeds": [5, 6]}})
    plan = read(sweep.file)
    cells = {(c.varied["rate"], c.seed): c for c in plan.tuning_cells()}
    scores = {(1, 5): 3.0, (1, 6): 0.0, (2, 5): 2.0}
    found = [table.Row(cells[key], {"score": value}, 1.0, "") for key, value in scores.items()]
    setting = plan.tune[0]
    assert table.choose(setting, found, "lora") == 1
    assert table.choose(Setting("rate", [1, 2], by="score", goal="min"), found, "lora") == 2
    assert table.choose(setting, found, "nobody") is None


def test_equal_values_have_no_interval():
    """The mean of three times 0.1 is not 0.1 in floating point, and its error is no spread."""
    from vislora.sweep.table import Mean, interval

    assert interval([0.1, 0.1, 0.1]) == Mean(0.1, 0.0, 3)
    assert interval([1.0, 3.0]).half == pytest.approx(12.7062, abs=1e-3)


def test_each_subject_has_its_row_beside_the_mean_over_them(sweep):
    sweep.write(subjects={"cat": {"offset": 0}, "dog": {"offset": 4}}, seeds=[0, 2])
    assert sweep.run()[1] == 0
    assert sweep.table()["lora",]["score"]["mean"] == 13  # scores 10, 12 and 14, 16
    rows = rows_of(sweep.out / "subjects.csv")
    assert [(r["method"], r["subject"], float(r["score"]), r["seeds"]) for r in rows] == [
        ("lora", "cat", 11.0, "2"), ("lora", "dog", 15.0, "2")]  # fmt: skip
    page = (sweep.out / "index.html").read_text()
    assert "<td>lora</td><td>cat</td><td>11 <small>" in page and "<td>lora</td><td>dog</td><td>15 <small>" in page


def test_a_cell_says_of_which_commit_it_is(tmp_path):
    """The commit of the root itself, with a word where tracked files differ; the version where there is none."""
    from vislora.sweep.cells import made_by

    def git(*words):
        person = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *person, *words], cwd=root, check=True, capture_output=True, text=True).stdout

    root = tmp_path / "outer"
    root.mkdir()
    git("init", "-q")
    (root / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")[:12]
    assert made_by(root).startswith(f"{commit}, torch ")
    (root / "other").write_text("untracked")
    assert made_by(root).startswith(f"{commit}, torch ")
    (root / "file").write_text("2")
    assert made_by(root).startswith(f"{commit}-dirty, torch ")
    (root / "inner").mkdir()
    assert made_by(root / "inner").startswith("vislora ")  # no repository of its own
