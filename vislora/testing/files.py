"""Checks of files and copies, and of several adapters on one model."""

from __future__ import annotations

import copy
import pickle
import tempfile

import torch
from torch import Tensor

from ..io import FILE, load, read, write
from .subject import Subject, close, refused, weight_of


def saved_and_loaded_is_equal(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter)
    out, tensors = s.run(), {n: t.clone() for n, t in adapter.named_tensors()}
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        adapter.detach()
        again = load(s.model, folder)
    assert again.method == adapter.method and again.method_name == adapter.method_name
    assert {n: True for n in tensors} == {n: torch.equal(t, tensors[n]) for n, t in again.named_tensors()}
    close(out, s.run(), 1e-6)  # equal tensors; a product's last bit may depend on where in memory they lie


def damaged_files_are_refused_without_a_trace(s: Subject) -> None:
    adapter = s.attach()
    with tempfile.TemporaryDirectory() as folder:
        file = adapter.save(folder)
        adapter.detach()
        tensors, header = read(file)
        name = next(iter(tensors))

        def try_with(changed: dict[str, Tensor], *words: str) -> None:
            write(changed, header, file)
            refused(lambda: load(s.model, folder), *words)
            assert not any("vislora" in key for key in s.model.state_dict())

        try_with({n: t for n, t in tensors.items() if n != name}, "missing")
        try_with({**tensors, "stranger": torch.zeros(2)}, "stranger", "no layer")
        try_with({**tensors, name: tensors[name] * float("nan")}, name, "NaN")
        try_with({**tensors, name: torch.zeros(*tensors[name].shape, 2)}, "do not fit")
        try_with({**tensors, name: tensors[name].int()}, "int32")
        write(tensors, header, file)
        (file.parent / FILE).write_bytes(file.read_bytes()[:-5])
        refused(lambda: load(s.model, folder), FILE, "safetensors")
        write(tensors, header, file)
        s.model.load_state_dict({k: 1.5 * v if v.is_floating_point() else v for k, v in s.model.state_dict().items()})
        refused(lambda: load(s.model, folder), "another base")
        load(s.model, folder, allow_other_base=True)


def two_adapters_add(s: Subject) -> None:
    first, second = s.attach("first", seed=1), s.attach("second", seed=2)
    refused(lambda: s.attach("first"), "first", "taken")
    s.train(first)
    with second.disabled():
        alone = s.run()
    s.train(second)
    both = s.run()
    other = s.host.build(0).eval()
    deltas = first.deltas()
    for name, delta in second.deltas().items():
        weight_of(other, name).data += delta + deltas[name]
    close(both, s.run(model=other), 2e-4)
    with second.disabled():
        assert torch.equal(alone, s.run()), "training one adapter moved the other"
    before = dict(s.model.state_dict())
    for inner, outer in ((first, second), (second, first)):
        with inner.merged(), outer.merged():
            close(both, s.run(), 2e-4)
    assert torch.equal(both, s.run()) and all(torch.equal(v, before[k]) for k, v in s.model.state_dict().items())
    left = {n: t.clone() for n, t in first.named_tensors()}
    second.detach()
    assert all(torch.equal(t, left[n]) for n, t in first.named_tensors())
    assert not any(p.requires_grad for n, p in s.model.named_parameters() if "vislora_" not in n)


def detach_leaves_no_trace(s: Subject) -> None:
    before, keys = s.run(), list(s.model.state_dict())
    flags, kinds = [p.requires_grad for p in s.model.parameters()], [type(m) for m in s.model.modules()]
    adapter = s.attach()
    s.train(adapter)
    moved = s.run()
    adapter.detach()
    assert torch.equal(before, s.run()) and list(s.model.state_dict()) == keys
    assert [p.requires_grad for p in s.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in s.model.modules())
    assert [type(m) for m in s.model.modules()] == kinds
    adapter = s.attach()
    s.train(adapter)
    adapter.detach(merge=True)
    close(moved, s.run(), 1e-4)
    assert list(s.model.state_dict()) == keys


def copies_are_independent(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter)
    out = s.run()
    twin = copy.deepcopy(s.model)
    close(out, s.run(model=twin), 1e-6)
    s.train(adapter)
    close(out, s.run(model=twin), 1e-6)
    assert not torch.equal(out, s.run())


def copies_outlive_the_original(s: Subject) -> None:
    base = s.run()
    adapter = s.attach()
    s.train(adapter)
    out = s.run()
    twin = copy.deepcopy(s.model)
    again, its_adapter = pickle.loads(pickle.dumps((s.model, adapter)))
    adapter.detach()
    for model in (twin, again):
        close(out, s.run(model=model), 1e-6)
    own = [p for name, p in twin.named_parameters() if "vislora_" in name]
    s.host.run(twin, 0).float().square().mean().backward()
    assert own and all(p.requires_grad for p in own) and any(p.grad is not None and p.grad.any() for p in own)
    with torch.no_grad():
        for p in own:
            p.mul_(1.5).add_(0.1)
    assert not torch.equal(out, s.run(model=twin)), "the copy's parameters do nothing"
    its_adapter.detach()
    assert torch.equal(base, s.run(model=again)) and torch.equal(base, s.run())
