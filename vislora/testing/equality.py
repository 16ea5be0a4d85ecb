"""Checks that hook, dense matrix, merged weight and the disabled model agree."""

from __future__ import annotations

import torch

from .subject import Subject, close, refused, weight_of


def hook_equals_dense(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter)
    moved = s.run()
    other = s.host.build(0).eval()
    for name, delta in adapter.deltas().items():
        weight_of(other, name).data += delta
    with adapter.disabled():
        base = s.run()
    assert (moved - base).abs().max() > 1e-4, "training moved nothing"
    close(moved, s.run(model=other), 1e-4)


def bf16_base_keeps_its_dtype(s: Subject) -> None:
    s.model.to(torch.bfloat16)
    adapter = s.attach()
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    base = s.run()
    s.train(adapter)
    hooked = s.run()
    assert hooked.dtype == base.dtype
    with adapter.merged():
        merged = s.run()
    moved = (hooked.float() - base.float()).norm()
    assert moved > 0 and (hooked.float() - merged.float()).norm() < 0.1 * moved + 0.03 * base.float().norm()


def autocast_agrees(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter, lr=0.01)  # of updates many times the weights (LoRA+ at 0.05), rounding is a large share
    plain = s.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = s.run()
    assert (plain.float() - cast.float()).norm() < 0.05 * plain.float().norm()


def merged_equals_hook_and_restores(s: Subject) -> None:
    before = {k: v.clone() for k, v in s.model.state_dict().items()}
    adapter = s.attach()
    s.train(adapter)
    hooked = s.run()
    try:
        with adapter.merged():
            close(hooked, s.run(), 1e-4)
            raise KeyError("to leave by")
    except KeyError:
        pass
    now = s.model.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in before.items())
    assert torch.equal(hooked, s.run())
    refused(adapter.unmerge, "not merged")


def disabled_is_the_base(s: Subject) -> None:
    before = s.run()
    adapter = s.attach()
    s.train(adapter)
    with adapter.disabled():
        assert torch.equal(before, s.run())
    assert not torch.equal(before, s.run())


def weight_scales_the_delta(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter)
    full = adapter.deltas()
    adapter.weight = 0.5
    half = adapter.deltas()
    assert all(torch.equal(half[k], 0.5 * d) for k, d in full.items())
    hooked = s.run()
    with adapter.merged():
        close(hooked, s.run(), 1e-4)
    adapter.weight = 0.0
    with adapter.disabled():
        base = s.run()
    assert torch.equal(s.run(), base)
