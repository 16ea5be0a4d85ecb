"""Checks of a method's definition: options, documentation, factors, the start."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys

import torch
from torch import nn

from ..attach import attach
from .subject import Subject, close, refused


def options_round_trip(s: Subject) -> None:
    cls = type(s.method)
    assert cls() == cls.from_options("it", cls().options())
    assert cls.from_options("it", s.method.options()) == s.method
    names = [field.name for field in dataclasses.fields(cls)]
    refused(lambda: cls.from_options("it", {"no_such_option": 1}), "no_such_option", *names)


def documented(s: Subject) -> None:
    module = sys.modules[type(s.method).__module__]
    text = inspect.getdoc(type(s.method)) or ""
    for word in ("Equation:", "Parameters per layer:", "Export rank:", "Differs from the paper:"):
        assert word in text, f"{word} is missing from the docstring"
    assert re.search(r"arXiv \d{4}\.\d{4,5}|under review", module.__doc__ or ""), "the file names no paper"
    assert len(inspect.getsource(module).splitlines()) <= 150


def roles_name_every_trained_tensor(s: Subject) -> None:
    trained = {name.rpartition(".")[2] for name, _ in s.attach().named_parameters()}
    assert trained == set(s.method.roles), "roles and trained tensors differ"
    assert set(s.method.roles.values()) <= {"up", "down", "core", "scale", "magnitude"}


def parameter_count_is_the_documented_one(s: Subject) -> None:
    line = re.search(r"Parameters per layer: ((?:[^,.]|\.\d)*)", inspect.getdoc(type(s.method))).group(1)
    formula = re.sub(r"([\w)]) (?=[\w(])", r"\1*", line).replace("^", "**")
    adapter = s.attach()
    for part in adapter.parts.values():
        for site in part.sites:
            trained = sum(t.numel() for t in vars(part.tensors_of(site)).values() if isinstance(t, nn.Parameter))
            assert trained == eval(formula, {}, {"r": s.method.rank, "m": site.m, "n": site.n}), site.name


def starts_as_the_base(s: Subject) -> None:
    before = s.run()
    adapter = s.attach()
    after = s.run()
    if not s.method.identity_at_init:
        return
    if s.method.exact_identity:
        assert torch.equal(before, after)
        assert all(not d.any() for d in adapter.deltas().values())
    else:
        close(before, after, 2e-5)


def start_is_a_function_of_the_seed(s: Subject) -> None:
    state = torch.random.get_rng_state()
    first = dict(s.attach().named_tensors())
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state was drawn from"
    again = dict(s.attach(model=s.host.build(0)).named_tensors())
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    for name, tensor in s.attach(name="alone", model=s.host.build(0)).named_tensors():
        assert torch.equal(tensor, first[name]), "the start depends on the adapter's name"


def too_large_a_rank_is_refused_without_a_trace(s: Subject) -> None:
    keys, flags = list(s.model.state_dict()), [p.requires_grad for p in s.model.parameters()]
    if not s.method.rank_fits_layers:
        return
    big = dataclasses.replace(s.method, rank=10_000)
    refused(lambda: attach(s.model, big, targets=s.host.targets), "rank", "10000")
    assert list(s.model.state_dict()) == keys and [p.requires_grad for p in s.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in s.model.modules())
