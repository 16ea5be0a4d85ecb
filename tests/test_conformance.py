"""Every method x every check x every host. `pytest -k nb_lora-fused_qkv` runs one corner of it."""

from __future__ import annotations

import pytest
from hosts import all_hosts

from vislora import methods
from vislora.adapters import get
from vislora.testing import CHECKS, METHOD_CHECKS, Subject

_HOSTS = {host.name: host for host in all_hosts()}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("host", _HOSTS)
@pytest.mark.parametrize("method", methods())
def test_conformance(method, host, check):
    check(Subject(get(method)(rank=4, **get(method).quick), _HOSTS[host]))


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", methods())
def test_method(method, check):
    check(Subject(get(method)(rank=4, **get(method).quick), _HOSTS["linear"]))
