"""configs/sweeps/all.yaml: its sweeps are taken by their scripts, whole and quick, its claims by what they collect."""

import contextlib
import json
import resource
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pages
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from pages import ROOT

from vislora.errors import run_script
from vislora.sweep import cells, report

FILE = ROOT / "configs" / "sweeps" / "all.yaml"
PLANS = list(yaml.safe_load(FILE.read_text())["plans"])
SPECTRUM = {"d_sigma", "d_vectors", "condition", "condition_principal", "off_orthonormal", "ratio", "cosine"}


@pytest.fixture(scope="module")
def whole():
    return {quick: report.read(FILE, quick) for quick in (False, True)}


# The others are read whole in test_configs.py and tests/scripts/test_classification.py.
NEW = ["claim_sorsa", "claim_od_lora", "claim_lora_sb", "claims_vit", "preservation", "delta_llama",
       "claim_bound_llama"]  # fmt: skip


@pytest.mark.parametrize("name,quick", [*((name, False) for name in NEW), *((name, True) for name in PLANS)])
def test_every_setting_and_every_evaluation_is_one_of_its_script(whole, name, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan, seen = whole[quick].plans[name], set()
    for cell in [*plan.tuning_cells(), *plan.cells({})]:
        parts = {cell.method, cell.subject, *((k, str(v)) for k, v in cell.varied.items())}
        if parts <= seen:
            continue
        seen |= parts
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(dict(cell.settings)))
        options, _ = pages.script(plan.script).parse(["--config", str(tmp_path / "settings.yaml")])
        assert options.adapter == cell.settings["adapter"] and options.seed == cell.seed
    for command in plan.evaluate:
        pages.take(["python", *command.format(run="somewhere").split()])
    for where in plan.collect.values():
        if where.startswith("spectrum/"):
            assert where.removeprefix("spectrum/summary.json:it.") in SPECTRUM


def test_claims_rest_on_seeds_and_on_all_papers(whole):
    said = whole[False]
    assert {claim.name[0] for claim in said.claims} == set("12345678")  # five of the papers', and what nobody claims
    assert all(claim.paper and claim.comparisons for claim in said.claims)
    tested = {one.plan for claim in said.claims for one in claim.comparisons}
    assert tested == set(PLANS) - {"figure8", "delta_llama"}  # to look at, and to choose by
    for name in tested - {"figure7"}:
        assert len(said.plans[name].seeds) >= 3
    methods = said.plans["preservation"].methods.values()
    ways = {(m["adapter"], m.get("with_prior_preservation", False), m.get("prior_source")) for m in methods}
    assert len(ways) == 6


def test_quick_is_small(whole):
    cells = [cell for plan in whole[True].plans.values() for cell in [*plan.tuning_cells(), *plan.cells({})]]
    assert len({cell.folder for cell in cells}) <= 20 and all(c.settings["max_train_steps"] <= 2 for c in cells)


# What a method may set for itself in these sweeps; everything else, the budget first of all, is the sweep's.
OWN = {"adapter", "rank", "alpha", "p", "delta_ratio", "gamma", "init_rounds", "init_steps", "learning_rate",
       "with_prior_preservation", "prior_source"}  # fmt: skip


GIVEN = ("figure8", "figure9", "claim_bound_llama")  # they give rates, see there


@pytest.mark.parametrize("name", PLANS)
def test_methods_have_equal_budgets_and_rates_by_one_rule(whole, name):
    plan = whole[False].plans[name]
    tuned = {label for setting in plan.tune for label in (*(setting.methods or plan.methods), *setting.like)}
    for label, settings in plan.methods.items():
        assert settings.keys() <= OWN, label
        trains = settings["adapter"] != "none"
        assert (label in tuned) == (trains and name not in GIVEN), label
        assert not (label in tuned and "learning_rate" in settings)
    for setting in plan.tune:
        assert setting.name == "learning_rate" and not set(setting.seeds) & set(plan.seeds)


def test_the_test_of_a_bound_repeats_what_chose_it_on_other_seeds(whole):
    chose, tests = (whole[False].plans[name] for name in ("delta_llama", "claim_bound_llama"))
    assert not set(tests.seeds) & {*chose.seeds, *chose.tune[0].seeds}
    assert all(chose.methods[label] == settings for label, settings in tests.methods.items())
    given = {**tests.fixed, "learning_rate": float(tests.fixed["learning_rate"])}
    assert given == {**chose.fixed, **chose.subjects["word problems"], "learning_rate": 6e-3}
    assert tests.evaluate == chose.evaluate and tests.collect.items() <= chose.collect.items()


class Now:
    """In the place of a pool of threads: the scripts want the main one, for their signals."""

    def __init__(self, workers):
        assert workers == 1

    def submit(self, do, *given):
        done = Future()
        done.set_result(do(*given))
        return done

    def shutdown(self, **how):
        pass


def here(runner, command, log, environment):
    """A cell's command in this process, which spares it the imports; returns its exit status."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    state = torch.random.get_rng_state()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            run_script(pages.script(str(Path(command[1]).relative_to(ROOT))).main, command[2:])
    except SystemExit as ended:
        return ended.code
    finally:
        torch.random.set_rng_state(state)
    return 0


def is_whole(folder):
    said = json.loads((folder / "all" / "verdicts.json").read_text())
    judged = [one for claim in said for one in claim["comparisons"] if one["verdict"] != "not run"]
    assert {one["plan"] for one in judged} >= {"table3", "figure6", "claim_sorsa", "claim_od_lora", "claim_lora_sb"}
    assert (folder / "all" / "index.html").is_file()
    words = (folder / "all" / "report.md").read_text()
    assert "its verdicts mean nothing" in words and words.count(" 0 failed; seeds 0; by ") == len(PLANS)


def test_the_quick_report_runs_whole(tmp_path, monkeypatch):
    """Every cell and every evaluation of all.yaml's quick form, one after another."""
    monkeypatch.chdir(ROOT)
    sweep = pages.script("eval/sweep.py")
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", Now)
    monkeypatch.setattr(cells.Runner, "_child", here)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        sweep.main(["--config", str(FILE), "--quick", "--output_dir", str(tmp_path), "--workers", "1"])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    is_whole(tmp_path)


@pytest.mark.slow
def test_the_quick_command_takes_three_minutes_at_most(tmp_path):
    """Two cores' time, so that whatever else runs on them does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "eval/sweep.py", "--config", str(FILE), "--quick", "--output_dir", str(tmp_path)]
    done = subprocess.run([*command, "--workers", "2"], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    is_whole(tmp_path)
    seconds = sum(getattr(after, part) - getattr(before, part) for part in ("ru_utime", "ru_stime"))
    print(f"{seconds:.0f} s of CPU")
    assert seconds <= 2 * 180
