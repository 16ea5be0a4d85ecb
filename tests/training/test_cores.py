"""Threads: `accelerate launch` holds a CPU process to one, which a script undoes."""

from __future__ import annotations

import os

import pytest
import torch

from vislora.training.cores import use_cores


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_cores_are_shared_among_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    torch.set_num_threads(1)
    use_cores(1, None)
    assert torch.get_num_threads() == 1  # not launched by accelerate: left alone
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for processes, expected in ((1, 6), (2, 3), (4, 1), (9, 1)):
        use_cores(processes, None)
        assert torch.get_num_threads() == expected
    use_cores(1, 2)
    assert torch.get_num_threads() == 2
