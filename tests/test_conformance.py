"""Every method x every check x every kind of host. `pytest -k nb_lora-fused_qkv` runs one corner of it.

The hosts of `further_hosts` (SDXL, SD3, Flux, their text encoders, open_clip) have the layers of the others in other
trees, behind other callers. What is new there are names, call signatures, the rank of outputs and which path of torch
reads a weight, so by default they run the checks that those may break, by one method of plain factors and by one that
computes all layers together; the whole product is marked slow.
"""

from __future__ import annotations

import pytest
from hosts import all_hosts, further_hosts

from vislora import methods
from vislora.adapters import get
from vislora.testing import CHECKS, METHOD_CHECKS, Subject, definition, equality, files, learning

_HOSTS = {host.name: host for host in all_hosts()}
_FURTHER = {host.name: host for host in further_hosts()}
_TREES = {
    "lora": (
        definition.starts_as_the_base,
        equality.hook_equals_dense,
        equality.bf16_base_keeps_its_dtype,
        equality.autocast_agrees,
        equality.merged_equals_hook_and_restores,
        equality.disabled_is_the_base,
        files.saved_and_loaded_is_equal,
        files.detach_leaves_no_trace,
        files.copies_outlive_the_original,
    ),
    "nb_lora": (learning.every_tensor_trains, learning.checkpointing_gives_equal_gradients),
}


def subject(method, host):
    return Subject(get(method)(rank=4, **get(method).quick), host)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("host", _HOSTS)
@pytest.mark.parametrize("method", methods())
def test_conformance(method, host, check):
    check(subject(method, _HOSTS[host]))


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", methods())
def test_method(method, check):
    check(subject(method, _HOSTS["linear"]))


@pytest.mark.parametrize("host", _FURTHER)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Flux's norms under autocast
@pytest.mark.parametrize(
    "method, check", [(m, c) for m in _TREES for c in _TREES[m]], ids=lambda x: getattr(x, "__name__", x)
)
def test_trees(method, host, check):
    check(subject(method, _FURTHER[host]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("host", _FURTHER)
@pytest.mark.parametrize("method", methods())
def test_whole_product(method, host, check):
    check(subject(method, _FURTHER[host]))
