"""Checks of training: gradients, what moves and what must not, bounds, a task that must be learned."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .. import linalg
from ..adapters import Method
from .subject import Subject, close


def factors_batched_equal_single(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter)
    part = next(iter(adapter.parts.values()))
    alone = [s.method.factors(part.tensors_of(site)) for site in part.sites]
    for single, together in zip(alone, part(), strict=True):
        close(single.product(), together.product(), 1e-5)


def factors_pass_gradcheck(s: Subject) -> None:
    adapter = s.attach(model=s.model.double())
    part = next(iter(adapter.parts.values()))
    generator = torch.Generator().manual_seed(1)
    for site in part.sites[:1]:
        tensors = vars(part.tensors_of(site))
        names = [n for n, t in tensors.items() if isinstance(t, nn.Parameter)]
        noise = {n: 0.3 * torch.randn(tensors[n].shape, generator=generator, dtype=torch.float64) for n in names}
        inputs = [(tensors[n].detach() + noise[n]).requires_grad_() for n in names]

        def product(*values, names=names, tensors=tensors):
            update = s.method.factors(SimpleNamespace(**{**tensors, **dict(zip(names, values, strict=True))}))
            pieces = (update.product(), update.magnitude)
            return tuple(1 * piece for piece in pieces if piece is not None)

        assert torch.autograd.gradcheck(product, inputs, fast_mode=True)


def every_tensor_trains(s: Subject) -> None:
    adapter = s.attach()
    start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    s.train(adapter, steps=2)
    still = [n for n, p in adapter.named_parameters() if torch.equal(p, start[n])]
    assert not still, f"got no gradient in two steps: {still}"


def only_the_adapter_changes(s: Subject) -> None:
    base = {k: v.clone() for k, v in s.model.state_dict().items()}
    adapter = s.attach()
    storages = [t.data_ptr() for _, t in adapter.named_tensors()]
    assert len(storages) == len(set(storages)), "two tensors share their storage"
    fixed = {n: t.clone() for n, t in adapter.named_tensors() if not isinstance(t, nn.Parameter)}
    s.train(adapter)
    now = s.model.state_dict()
    assert list(base) == [k for k in now if "vislora_" not in k]
    assert all(torch.equal(v, now[k]) for k, v in base.items())
    if type(s.method).on_step is Method.on_step and not s.method.needs_prepare:
        assert all(torch.equal(t, fixed[n]) for n, t in adapter.named_tensors() if n in fixed)
    assert s.model.load_state_dict(base, strict=True).missing_keys == []
    trainable = {id(p) for p in s.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}


def learns_a_planted_update(s: Subject) -> None:
    adapter = s.attach()
    optimizer = torch.optim.Adam(adapter.param_groups(0.02))
    s.bind(adapter, optimizer, 300)
    generator = torch.Generator().manual_seed(5)
    planted = []  # reached from noisy tensors of the method's own, so that every method can represent it
    for _, site, tensors, _ in adapter.site_updates():
        noisy = {}
        for name, t in vars(tensors).items():
            spread = 0.3 * (t.std().item() if t.numel() > 1 else 0.0) or 0.1
            noise = spread * torch.randn(t.shape, generator=generator)
            noisy[name] = (t + noise).detach() if isinstance(t, nn.Parameter) else t
        update = s.method.factors(SimpleNamespace(**noisy)).with_row_scale(site.weight())
        goal = update.dense(site.weight()).detach()
        if s.method.drops_tail:
            U, S, V = linalg.top_svd(goal, s.method.rank)
            goal = U @ torch.diag(S) @ V.mT
        planted.append(goal)
    losses = []
    for _ in range(300):
        loss = torch.zeros(())
        for part in adapter.parts.values():
            for site, update, goal in zip(part.sites, part(), planted, strict=True):
                loss = loss + (update.dense(site.weight()) - goal).square().sum() / goal.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # The least one: a method that renews its bases jumps back a little each time, in proportion to the rate.
    assert min(losses) < losses[0] / 10, f"{losses[0]:.3g} -> {min(losses):.3g}"


def bound_holds_under_wild_steps(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter, steps=20, lr=1.0)
    for name, _, tensors, update in adapter.site_updates():
        bound = s.method.bound(tensors)
        if bound is not None:
            norm = linalg.schatten(linalg.product_singular_values(*update.factors()), bound.p)
            assert norm <= bound.delta * (1 + 1e-5), f"{name}: {norm} > {bound.delta}"


def checkpointing_gives_equal_gradients(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter)
    grads = []
    # The flash kernel of the CPU may sum in another order when it is run again.
    with sdpa_kernel(SDPBackend.MATH):
        for wrapped in (False, True):
            call = lambda: s.host.run(s.model, 0)  # noqa: E731
            out = checkpoint(call, use_reentrant=False) if wrapped else call()
            out.float().square().mean().backward()
            grads.append([p.grad.clone() for p in adapter.parameters()])
            for p in adapter.parameters():
                p.grad = None
    for plain, recomputed in zip(*grads, strict=True):
        close(plain, recomputed, 1e-5)
