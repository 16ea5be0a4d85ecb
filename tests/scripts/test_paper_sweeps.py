"""configs/paper is whole and its grids are read: every table and figure has a row, every cell is one of its script."""

import importlib.util
import re
import shlex

import pytest
import yaml
from pages import script
from script_runs import REPOSITORY

import vislora
from vislora.language.tasks import TASKS
from vislora.sweep.plan import read

FOLDER = REPOSITORY / "configs" / "paper"
FILES = sorted(FOLDER.rglob("*.yaml"))
SCRIPTS = ("train_scripts/causal_lm.py", "train_scripts/sequence_classification.py")
LANGUAGE = [f for f in FILES if yaml.safe_load(f.read_text()).get("script") in SCRIPTS]
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
    head = header(file)
    assert re.search(r"Hardware( there)?: (an A100 or H100|one A6000|four H200|one H200|eight GPUs|not stated)", head)
    said = head.rpartition(" Time on one H100, expected and not measured (python eval/paper_times.py): ")
    times = script("eval/paper_times.py")
    assert said[2] == times.words(*times.of_file(file)) + "."  # what the command prints
    numbers = re.search(r"(To compare with|The paper's rows|From the paper).*", head)
    assert numbers or "no table" in head
    if numbers and not re.search(r"no table|published table|not a score|stand in the picture|gives neither", head):
        assert re.search(r"\d+\.\d|\.\d\d\d", numbers[0].partition(" Time on ")[0]), head


def header(file):
    lines = [line.removeprefix("#") for line in file.read_text().splitlines() if line.startswith("#")]
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_lines_keep_to_their_length(file):
    assert max(map(len, file.read_text().splitlines())) <= 120


def test_times_are_those_that_the_papers_measured():
    """Where the arithmetic begins: OD-LoRA's Table 6, and LoRA-SB's Table 5 with one of its own rows for another."""
    times = script("eval/paper_times.py")
    run = {"model_name_or_path": "meta-llama/Meta-Llama-3-8B", "dataset_name": "meta-math/MetaMathQA",
           "dataset_split": "train[:100000]", "adapter": "lora"}  # fmt: skip
    assert times.hours(run) == pytest.approx(1.61)
    assert times.hours(run | {"dataset_name": "m-a-p/CodeFeedback-Filtered-Instruction"}) == pytest.approx(1.72)
    assert times.hours(run | {"gradient_checkpointing": True}) == pytest.approx(1.61 * 1.5)
    assert times.hours(run | {"adapter": "full"}) == pytest.approx(1.61 * 1.5)
    small = {"model_name_or_path": "Llama-3.2-3B", "dataset_name": "commonsense_170k.json", "adapter": "lora"}
    mistral = run | {"model_name_or_path": "mistralai/Mistral-7B-v0.1", "dataset_split": "train[:50000]"}
    ratio = (4 * 3600 + 54 * 60 + 31) / (3 * 3600 + 3 * 60 + 57)
    assert times.hours(small) / times.hours(mistral) == pytest.approx(ratio)
    assert [times.words(1, 1 / 60), times.words(3, 0.5), times.words(1, 2.04), times.words(2, 30.4)] == [
        "a minute", "3 runs, 30 minutes", "2.0 hours", "2 runs, 30 hours"]  # fmt: skip


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
        own = {} if options.adapter == "full" else method.options()
        for name, value in cell.settings.items():  # every word of the file has become an option
            found = own[name] if name in own else getattr(options, name)
            if isinstance(found, tuple | list):
                assert list(found) == (value if isinstance(value, list) else [value]), name
            else:
                assert str(found) == str(value) or float(found) == float(value), name
    for command in plan.evaluate:
        name, *flags = shlex.split(command.format(run="somewhere"))
        module = script(name)
        if hasattr(module, "Options"):
            from vislora import config

            options, _ = config.parse(module.Options, flags, prog=name)
            assert options.run == "somewhere" and not options.base
            columns = {where.split(".")[-2] for where in plan.collect.values() if where.startswith("language.json")}
            assert columns == {task.partition("=")[0] for task in options.tasks} <= TASKS.keys()
        else:
            assert "it" in module.parse(flags).labels
            assert all(":it." in where for where in plan.collect.values() if where.startswith("spectrum/"))


def test_scripts_that_stand_in_the_place_of_a_config_are_there():
    for name in ("reachable", "od_lora_7", "spectrum", "cost"):
        assert importlib.util.spec_from_file_location(name, REPOSITORY / "eval" / f"{name}.py").origin
        assert f"eval/{name}.py" in PAGE


def plan_of(name):
    return read(FOLDER / f"{name}.yaml")


def test_the_papers_language_tables_have_all_their_rows():
    """Methods, ranks, rates, models and seeds of each table, as the papers print them."""

    def rows(name):
        plan = plan_of(name)
        ranks = {cell.method: [] for cell in plan.cells({})}
        for cell in plan.cells({}):
            ranks[cell.method] += [] if cell.settings.get("rank") in ranks[cell.method] else [cell.settings.get("rank")]
        return plan, {(plan.methods[m]["adapter"], rank) for m, each in ranks.items() for rank in each}

    def rates(plan):
        return next(setting.values for setting in plan.grid if setting.name == "learning_rate")

    plan, found = rows("nblora_table1")
    assert found == {("lora", 128), ("pissa", 128), ("nb_lora", 128)} and rates(plan) == [2e-5, 5e-5, 1e-4, 5e-4]
    for model in ("mistral_7b", "llama3_8b", "llama2_13b"):
        for data in ("metamath", "codefeedback"):
            plan, found = rows(f"nblora_table2_{model}_{data}")
            assert {name for name, _ in found} == {"lora", "dora", "pissa", "nb_lora"}
            low = [1e-5, 5e-5, 1e-4, 2e-4] if model == "mistral_7b" else [5e-5, 1e-4, 5e-4, 7e-4]
            assert rates(plan) == low and plan.methods["nb_lora"]["delta"] == 128
    seven = {(name, r) for name in ("lora", "rslora", "lora_plus", "pissa", "dora", "od_lora") for r in (8, 32)}
    for model, rate in (("gemma2b", 2e-4), ("llama3_8b", 1e-4)):
        for table in (f"odlora_table1_{model}", f"odlora_table2_{model}_math", f"odlora_table2_{model}_code"):
            plan, found = rows(table)
            assert found == seven | {("full", None)} and len(plan.seeds) == 3
            assert float(plan.fixed["learning_rate"]) == rate
            assert float(plan.methods["full"]["learning_rate"]) == pytest.approx(rate / 10)
    for data in ("math", "code"):
        plan, found = rows(f"odlora_table5_{data}")
        assert len(plan.methods) == 10 and len(plan.subjects) == 2 and len(plan.seeds) == 3
        optimizers = {s.get("optimizer", "adamw") for s in plan.methods.values()}
        assert optimizers == {"adamw", "lora_pro", "scaled_adamw", "alt_lora"}
    plan, found = rows("lorasb_table1")
    small = {(name, rank) for name in ("lora_xs", "lora_sb") for rank in (32, 64, 96)}
    others = {("full", None), ("lora", 32), ("rslora", 32), ("pissa", 32)}
    assert found == rows("lorasb_table2")[1] == small | others and len(plan.subjects) == 2 and len(plan.seeds) == 3
    plan, found = rows("lorasb_table3")
    assert found == {(name, rank) for name in ("lora_xs", "lora_sb") for rank in (8, 16, 24)} | {
        ("full", None), ("lora", 8), ("rslora", 8), ("pissa", 8)}  # fmt: skip
    epochs = {label: about["num_train_epochs"] for label, about in plan.subjects.items()}
    assert epochs == {"cola": 30, "rte": 30, "mrpc": 30, "stsb": 30, "qnli": 15, "sst2": 15}
    for data in ("math", "code"):
        plan, found = rows(f"sorsa_table1_{data}")
        assert found == {(name, rank) for name in ("sorsa", "pissa", "lora") for rank in (128, 64)}
        assert {label: about["rank"] for label, about in plan.subjects.items()} == {
            "Llama 2 7B": 128, "RWKV6 7B": 64, "Mistral 7B": 64, "Gemma 7B": 64}  # fmt: skip
    plan = plan_of("adalora_baseline")
    assert len(plan.subjects) == 8 and all(about["init_r"] == about["rank"] for about in plan.subjects.values())


@pytest.mark.parametrize("file", [f for f in FILES if f.stem.startswith(("odlora", "od_lora"))], ids=lambda f: f.stem)
def test_scales_are_od_lora_s(file):
    """Section 4.1: the product's factor is 2 for LoRA, and 4 / sqrt(rank) for every other method."""
    raw = yaml.safe_load(file.read_text())
    each = [raw["adapter_options"] | {"adapter": raw["adapter"]}] if "adapter" in raw else [
        dict(cell.settings) for cell in read(file).cells({})]  # fmt: skip
    for settings in each:
        rank, alpha, name = settings.get("rank"), settings.get("alpha"), settings["adapter"]
        if name == "full":
            continue
        scale = alpha / rank if name in ("lora", "lora_plus", "pissa", "dora", "lora_ga") else alpha / rank**0.5
        assert scale == pytest.approx(2 if name == "lora" else 4 / rank**0.5), settings
