"""The sweeps that are shipped: every run's settings are words of the script, and what they compare is comparable."""

import functools
import json
import shlex
from pathlib import Path

import pytest
import yaml
from script_runs import opened

from vislora import config
from vislora.metrics.options import ScoreOptions
from vislora.sweep.pictures import Images, Scatter
from vislora.sweep.plan import read

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"eval/subject_driven.py": ScoreOptions}
FILES = [ROOT / "configs" / file for file in (
    "sweeps/table3.yaml", "sweeps/figure8.yaml", "sweeps/figure9.yaml", "paper/nb_lora_table3.yaml",
    "paper/nb_lora_figure8.yaml", "paper/nb_lora_figure9.yaml")]  # fmt: skip
NAMES = [f"{file.parent.name}/{file.stem}" for file in FILES]


@functools.cache
def script(path):
    return opened(path)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_the_scripts_take_every_setting(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read(file)
    seen = set()
    for cell in [*plan.tuning_cells(), *plan.cells({})]:
        parts = {cell.method, cell.subject, *cell.varied.items()}
        if parts <= seen:  # rows, subjects and varied settings are apart: each once, not in every combination
            continue
        seen |= parts
        text = yaml.safe_dump({**cell.settings, "seed": 0}, sort_keys=False)
        (tmp_path / "settings.yaml").write_text(text)
        options, method = script(plan.script).parse(["--config", str(tmp_path / "settings.yaml")])
        assert options.max_train_steps == cell.settings["max_train_steps"]
        assert options.adapter == cell.settings["adapter"] and method is not None
    assert {cell.method for cell in plan.cells({})} == set(plan.methods)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_the_commands_that_evaluate_take_their_flags_and_columns(file):
    plan = read(file)
    for command in plan.evaluate:
        name, *flags = shlex.split(command.format(run="somewhere"))
        options, _ = config.parse(OPTIONS[name], flags, prog=name)
        assert options.run == "somewhere"
    known = {"dino", "clip_i", "clip_t", "lpips_real", "lpips_div", "pres", "drift_dino", "drift_dino_unrelated",
             "drift_dino_class", "drift_denoising"}  # fmt: skip
    for where in plan.collect.values():
        file_, _, path = where.partition(":")
        if file_ == "eval/subject_driven.json" and path.startswith("metrics."):
            assert path.removeprefix("metrics.") in known


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_rows_differ_in_the_method_alone(file):
    """Equal budgets: steps, batch and data are fixed for all, adapters have one rank, a rate is given or tuned."""
    plan = read(file)
    tuned = {label for setting in plan.tune for label in (*(setting.methods or plan.methods), *setting.like)}
    for label, settings in plan.methods.items():
        assert not {"max_train_steps", "train_batch_size", "instance_data_dir"} & settings.keys(), label
        if settings["adapter"] not in ("none", "full"):
            assert settings["rank"] == 16
        rated = "learning_rate" in settings or "learning_rate" in plan.fixed or label in tuned
        assert rated or settings["adapter"] == "none", label


def test_rates_are_chosen_on_subjects_and_seeds_that_are_not_reported():
    plan = read(FILES[0])
    tuning = plan.tuning_cells()
    assert not {cell.subject for cell in tuning} & set(plan.subjects) and not {c.seed for c in tuning} & set(plan.seeds)
    assert {cell.method for cell in tuning} | plan.tune[0].like.keys() == set(plan.methods) - {"base"}
    for label, other in plan.tune[0].like.items():  # another bound of the same norm
        assert plan.methods[label] | {"delta_ratio": 0} == plan.methods[other] | {"delta_ratio": 0}
    assert len(plan.subjects) == len(plan.seeds) == 3 and len(plan.cells({})) == 17 * 9


@pytest.mark.parametrize("file", FILES[:3], ids=NAMES[:3])
def test_the_worlds_subjects_are_those_of_the_world(file):
    world = json.loads((ROOT / "assets/world/world.json").read_text())["subjects"]
    plan = read(file)
    for label, settings in {**plan.subjects, **(plan.tune[0].subjects if plan.tune else {})}.items():
        assert settings["instance_data_dir"] == f"assets/world/{world[label]['photos']}"
        assert settings["instance_prompt"] == world[label]["instance_prompt"]
        assert settings["class_prompt"] == world[label]["class_prompt"]
    prompts = [number for picture in plan.pictures if isinstance(picture, Images) for number in picture.prompts]
    assert prompts and max(prompts) < 25


def test_the_papers_table_is_whole():
    plan = read(FILES[3])
    assert len(plan.subjects) == 30 and plan.fixed["max_train_steps"] == 1600
    bounds = {(s["p"], s["delta"]) for s in plan.methods.values() if s["adapter"] == "nb_lora"}
    expected = {1: (12, 6, 4), 2: (1.8, 1.5, 1.0), float("inf"): (0.9, 0.5, 0.25)}
    assert bounds == {(p, delta) for p, deltas in expected.items() for delta in deltas}
    assert {s["adapter"] for s in plan.methods.values()} == {"lora", "dora", "pissa", "nb_lora"}
    lines = next(picture for picture in plan.pictures if isinstance(picture, Scatter)).lines
    joined = [label for line in lines.values() for label in line]
    assert sorted(joined) == sorted(name for name in plan.methods if name.startswith("nb_lora"))


EIGHT = {"none", "full", "lora", "dora", "pissa", "adalora", "vera", "nb_lora"}
VIT = ["sweeps/figure6", "sweeps/figure7", "sweeps/figure14", "paper/vision/nb_lora_figure6",
       "paper/vision/nb_lora_figure7", "paper/vision/nb_lora_figure14"]  # fmt: skip


@pytest.mark.parametrize("name", VIT)
def test_the_figures_of_forgetting_have_eight_methods_and_three_seeds(name):
    plan = read(ROOT / "configs" / f"{name}.yaml")
    assert {settings["adapter"] for settings in plan.methods.values()} == EIGHT and len(plan.seeds) == 3
    kinds = {type(picture).__name__ for picture in plan.pictures}
    if name.endswith("figure6"):
        ratios = [s["delta_ratio"] for s in plan.methods.values() if s["adapter"] == "nb_lora"]
        assert ratios == [0.1, 0.2, 0.4, 0.8, 1.6] and kinds == {"Scatter", "Steps"}
        return
    assert kinds == {"Against"} and {picture.setting for picture in plan.pictures} == {f.name for f in plan.factors}
    length = "num_train_epochs" if "paper" in name else "max_train_steps"
    assert {f.name for f in plan.factors} == {"learning_rate", "rank", length, "delta_ratio"}
    # Methods that have no such thing are left out, others are not.
    left_out = {"delta_ratio": EIGHT - {"nb_lora"}, "rank": {"none", "full"}, "learning_rate": {"none"}, length: set()}
    for factor in plan.factors:
        kept = {s["adapter"] for label, s in plan.methods.items() if factor.is_for(label)}
        assert kept >= EIGHT - left_out[factor.name] - ({"vera", "full"} if "paper" in name else set())


@pytest.mark.parametrize("name", ["paper/vision/od_lora_table3", "paper/vision/od_lora_table8_base",
                                  "paper/vision/od_lora_table8_large", "sweeps/od_lora_vit"])  # fmt: skip
def test_od_lora_s_tables_have_seven_methods_at_two_ranks(name):
    plan = read(ROOT / "configs" / f"{name}.yaml")
    rows = {(s["adapter"], s.get("rank")) for s in plan.methods.values()}
    adapters = ("lora", "rslora", "lora_plus", "pissa", "dora", "od_lora")
    assert rows == {("full", None), *((adapter, rank) for adapter in adapters for rank in (8, 32))}
    for settings in plan.methods.values():  # the product's scale: 2 for LoRA, 4 / sqrt(rank) for the rest
        if settings["adapter"] in ("lora_plus", "pissa", "dora"):
            assert settings["alpha"] / settings["rank"] == pytest.approx(4 / settings["rank"] ** 0.5)
        elif settings["adapter"] != "full":
            assert settings["alpha"] == (2 * settings["rank"] if settings["adapter"] == "lora" else 4)
