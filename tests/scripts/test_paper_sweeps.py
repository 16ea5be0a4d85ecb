"""configs/paper is whole and its grids are read: every table and figure has a row, every cell is one of its script."""

import importlib.util
import re
import shlex

import pytest
import yaml
from pages import script
from script_runs import REPOSITORY

import vislora
from vislora.sweep.plan import read

FOLDER = REPOSITORY / "configs" / "paper"
FILES = sorted(FOLDER.rglob("*.yaml"))
LANGUAGE = [f for f in FILES if yaml.safe_load(f.read_text()).get("script") == "train_scripts/causal_lm.py"]
PAGE = (REPOSITORY / "docs" / "paper.md").read_text()
ITEMS = {"NB-LoRA": (9, 14), "SORSA (arXiv": (5, 2), "SORSA (the same": (3, 4), "OD-LoRA": (10, 7), "LoRA-SB": (8, 3)}


@pytest.mark.parametrize("paper", ITEMS)
def test_every_table_and_figure_of_a_paper_has_its_row(paper):
    section = PAGE.partition(f"## {paper}")[2].partition("\n## ")[0]
    tables, figures = ITEMS[paper]
    rows = dict(re.findall(r"^\| ((?:Table|Figure) \d+) \| (.+) \|$", section, re.M))
    assert set(rows) == {f"Table {i + 1}" for i in range(tables)} | {f"Figure {i + 1}" for i in range(figures)}
    assert all(rest.startswith("diagram") or rest.rpartition("| ")[2].strip() for rest in rows.values())


def test_the_page_names_every_file_and_no_other():
    named = re.findall(r"`((?:vision/)?\w+\.yaml)`", PAGE)
    assert sorted(set(named)) == sorted(str(file.relative_to(FOLDER)) for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_header_says_hardware_time_and_the_papers_numbers(file):
    head = " ".join(line[1:] for line in file.read_text().splitlines() if line.startswith("#"))
    head = " ".join(head.split())
    assert "expected and not measured" in head and re.search(r"H100|H200|A6000", head)
    assert re.search(r"To compare with|no table|From the paper", head)


@pytest.mark.parametrize("file", LANGUAGE, ids=lambda file: file.stem)
def test_a_grid_of_language_runs_is_taken_by_the_scripts(file, tmp_path):
    plan = read(file)
    seen = set()
    for cell in plan.cells({}):
        parts = {cell.method, cell.subject, *cell.varied.items()}
        if parts <= seen:
            continue
        seen |= parts
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**cell.settings, "seed": 0}))
        options, method = script(plan.script).parse(["--config", str(tmp_path / "settings.yaml")])
        assert options.adapter in [*vislora.methods(), "full"]
        asked = {**plan.fixed, **plan.methods[cell.method]}.get("rank") or cell.settings.get("rank")
        assert options.adapter == "full" or method.options()["rank"] == asked
    for command in plan.evaluate:
        name, *flags = shlex.split(command.format(run="somewhere"))
        module = script(name)
        if hasattr(module, "Options"):
            from vislora import config

            options, _ = config.parse(module.Options, flags, prog=name)
            assert options.run == "somewhere" and not options.base
            assert {where.split(".")[-2] for c, where in plan.collect.items() if where.startswith("language.json")} == {
                task for task in options.tasks}  # fmt: skip
        else:
            assert "it" in module.parse(flags).labels
            assert all(":it." in where for where in plan.collect.values() if where.startswith("spectrum/"))


def test_scripts_that_stand_in_the_place_of_a_config_are_there():
    for name in ("reachable", "od_lora_7", "spectrum", "cost"):
        assert importlib.util.spec_from_file_location(name, REPOSITORY / "eval" / f"{name}.py").origin
        assert f"eval/{name}.py" in PAGE
