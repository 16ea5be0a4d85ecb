"""configs/sweeps/all.yaml: its sweeps are taken by their scripts, whole and quick, its claims by what they collect."""

import json
import subprocess
import sys
import time

import pages
import pytest
import yaml
from pages import ROOT

from vislora.sweep import report

FILE = ROOT / "configs" / "sweeps" / "all.yaml"
PLANS = list(yaml.safe_load(FILE.read_text())["plans"])
SPECTRUM = {"d_sigma", "d_vectors", "condition", "condition_principal", "off_orthonormal", "ratio", "cosine"}


@pytest.fixture(scope="module")
def whole():
    return {quick: report.read(FILE, quick) for quick in (False, True)}


# The others are read whole in test_configs.py and tests/scripts/test_classification.py.
NEW = ["claim_sorsa", "claim_od_lora", "claim_lora_sb", "claims_vit", "preservation"]


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
    assert {claim.name[0] for claim in said.claims} == set("123456")  # five of the papers', and what nobody claims
    assert all(claim.paper and claim.comparisons for claim in said.claims)
    tested = {one.plan for claim in said.claims for one in claim.comparisons}
    assert tested == set(PLANS) - {"figure8", "preservation"}  # those are to look at
    for name in tested - {"figure7"}:
        assert len(said.plans[name].seeds) >= 3
    methods = said.plans["preservation"].methods.values()
    ways = {(m["adapter"], m.get("with_prior_preservation", False), m.get("prior_source")) for m in methods}
    assert len(ways) == 6


def test_quick_is_small(whole):
    cells = [cell for plan in whole[True].plans.values() for cell in [*plan.tuning_cells(), *plan.cells({})]]
    assert len({cell.folder for cell in cells}) <= 18 and all(c.settings["max_train_steps"] <= 2 for c in cells)


@pytest.mark.slow
def test_the_quick_report_runs_whole(tmp_path):
    began = time.monotonic()
    command = [sys.executable, "eval/sweep.py", "--config", str(FILE), "--quick", "--output_dir", str(tmp_path)]
    done = subprocess.run([*command, "--workers", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads((tmp_path / "all" / "verdicts.json").read_text())
    judged = [one for claim in said for one in claim["comparisons"] if one["verdict"] != "not run"]
    assert {one["plan"] for one in judged} >= {"table3", "figure6", "claim_sorsa", "claim_od_lora", "claim_lora_sb"}
    assert (tmp_path / "all" / "index.html").is_file()
    print(f"{time.monotonic() - began:.0f} s")
