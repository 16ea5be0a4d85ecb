"""Two gloo processes on this machine, fed different data: equal adapters, and those of one process that saw it all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from two_processes import CASES, SHARDED, gradients, sharded, trained

from vislora import distributed
from vislora.io import read
from vislora.testing.subject import close

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both processes left their tensors."""
    place = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    loopback = next((name for name in os.listdir("/sys/class/net") if name.startswith("lo")), None)
    if loopback:  # a machine's own name may not resolve
        environment["GLOO_SOCKET_IFNAME"] = loopback
    command = [sys.executable, two_processes.__file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(place)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-3000:]
    return place


def of(folder: Path, what: str, rank: int) -> dict[str, torch.Tensor]:
    return read(folder / f"{what}-{rank}.safetensors")[0]


@pytest.mark.case("F32")
@pytest.mark.parametrize("case", CASES)
def test_both_end_with_equal_adapters(folder, case):
    first, second = (of(folder, case, rank) for rank in range(2))
    moved = [name for name in first if name.startswith("start ")]
    assert any(not torch.equal(first[name], first[name.removeprefix("start ")]) for name in moved)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_weights_that_each_process_drew_are_the_first_ones_on_all(folder):
    first, second = (of(folder, "chance", rank) for rank in range(2))
    assert len(first) == 5 and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_gradients_are_those_of_all_data(folder):
    alone = gradients((0, 1))
    for rank in range(2):
        for name, gradient in of(folder, "gradients", rank).items():
            close(gradient, alone[name], 1e-5)


@pytest.mark.parametrize("case", ["lora", "nb_lora", "lora_sb", "lora_ga", "adalora", "full"])
def test_it_is_the_adapter_of_one_process_that_saw_both_batches(folder, case):
    alone = trained(case, (0, 1))
    for name, tensor in of(folder, case, 0).items():
        close(tensor, alone[name], 1e-5 if name.startswith("start ") else 1e-4)


@pytest.mark.parametrize("case", SHARDED)
def test_a_model_in_shards_trains_as_one_that_is_whole(folder, case):
    alone = sharded(case, (0, 1))
    for rank in range(2):
        there = of(folder, f"sharded {case}", rank)
        assert there.keys() == alone.keys()
        for name, tensor in there.items():
            close(tensor, alone[name], 1e-4)


def test_what_a_model_in_shards_cannot_do_is_said(folder):
    for rank in range(2):
        told = (folder / f"refused-{rank}").read_text().splitlines()
        for line, words in zip(told, ("0 is in shards -> save", "attach first"), strict=True):
            assert words in line


def test_a_layer_that_one_process_does_not_reach_is_an_error_on_both(folder):
    for rank in range(2):
        assert "2: got no gradient from the closure" in (folder / f"unreached-{rank}").read_text()


def test_one_process_calls_no_collective(monkeypatch):
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(distributed.group, name, lambda *_, **__: pytest.fail("a collective ran"))
    tensor = torch.ones(2)
    assert distributed.processes() == 1 and distributed.mean(tensor, torch.device("cpu")) is tensor
    distributed.from_first(tensor)
