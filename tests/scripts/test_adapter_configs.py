"""configs/adapters: an entry for every method, that names its paper and fits the embedded world's layers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from script_runs import opened

import vislora
from vislora import adapters
from vislora.diffusion import models

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRIES = REPOSITORY / "configs" / "adapters"


@pytest.fixture(scope="module")
def script():
    return opened("train_scripts/dreambooth.py")


@pytest.fixture(scope="module")
def world():
    return models.load(str(REPOSITORY / "assets/world/tiny-sd"), None, None, torch.float32, torch.device("cpu"))


def test_every_method_has_an_entry_and_every_entry_a_method():
    assert sorted(file.stem for file in ENTRIES.iterdir()) == vislora.methods()


@pytest.mark.parametrize("name", vislora.methods())
def test_an_entry_names_its_paper_and_fits_the_world(script, world, name):
    file = ENTRIES / f"{name}.yaml"
    text = file.read_text(encoding="utf-8")
    header = text.split("\n\n")[0]
    paper = re.search(r"arXiv \d{4}\.\d{4,5}|under review", inspect.getmodule(adapters.get(name)).__doc__)[0]
    assert paper in header and f"--config configs/adapters/{name}.yaml" in header
    options, method = script.parse(["--config", str(file)])
    assert options.adapter == name and type(method) is adapters.get(name)
    assert options.instance_data_dir.endswith("owl") and f"  rank: {method.rank}\n" in text
    adapter = script.attach(options, method, world)
    try:
        assert len(adapter.sites) == 56 and adapter.method_name == name
    finally:
        adapter.detach()
