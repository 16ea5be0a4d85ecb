"""What FSDP gathers at a time, and what throw-away folders and signals come to."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.utils import DistributedType
from torch import nn

from vislora import adapters
from vislora.errors import InputError
from vislora.training.processes import blocks, ends_step, leave, require_served, stopping, written
from vislora.training.run import InterruptFlag, RunFolder

ALONE = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO, device=torch.device("cpu"))


class Named(nn.Module):
    """Says which blocks it has, one inside another, as diffusers' UNets do."""

    _no_split_modules = ["Inner", "Outer"]

    def __init__(self):
        super().__init__()
        self.rows = nn.ModuleList([Outer(), nn.Linear(2, 2)])


class Inner(nn.Linear):
    pass


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner(2, 2)


def test_named_blocks_are_taken_inner_before_outer():
    model = Named()
    assert blocks(model) == [model.rows[0].inner, model.rows[0]]
    assert blocks(nn.Sequential(model)) == blocks(model)  # what wraps it names none
    assert blocks(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("name, kinds, count", [
    ("vit_tiny_patch16_224", {"Block"}, 12),
    ("resnet18", {"BasicBlock"}, 8),
    ("swin_tiny_patch4_window7_224", {"SwinTransformerStage", "SwinTransformerBlock"}, 16),
    ("convnext_atto", {"ConvNeXtStage", "ConvNeXtBlock"}, 16),
])  # fmt: skip
def test_of_models_that_name_none_the_repeated_ones_are_taken(name, kinds, count):
    with torch.device("meta"):
        found = blocks(timm.create_model(name))
    assert {type(block).__name__ for block in found} == kinds and len(found) == count


def test_compiled_graphs_are_refused_in_shards_alone(monkeypatch):
    lora, both = adapters.get("lora")(), SimpleNamespace(**vars(ALONE) | {"num_processes": 2, "mixed_precision": "no"})
    require_served(both, lora, False, compiled=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    require_served(both, lora, False)
    with pytest.raises(InputError, match="--compile is not served: .* -> leave it out"):
        require_served(both, lora, False, compiled=True)


def test_one_process_writes_and_speaks(tmp_path, capsys):
    for main in (True, False):
        with written(RunFolder(tmp_path), main) as folder:
            (folder.path / "file").write_text("here")
            print(f"main {main}")
            print(f"error {main}", file=sys.stderr)
        assert folder.path.exists() == main
    said = capsys.readouterr()
    assert said.out == "main True\n" and said.err == "error True\n"


def test_a_signal_stops_the_run_and_says_how_to_go_on(tmp_path, capsys):
    stop = InterruptFlag()
    leave(ALONE, stop, RunFolder(tmp_path))
    assert not ends_step(ALONE, stop, False)
    stop.status = 143
    assert stopping(ALONE, stop) and ends_step(ALONE, stop, False)
    with pytest.raises(SystemExit) as end:
        leave(ALONE, stop, RunFolder(tmp_path))
    assert end.value.code == 143
    assert f"--output_dir {tmp_path} --resume_from_checkpoint latest" in capsys.readouterr().err
