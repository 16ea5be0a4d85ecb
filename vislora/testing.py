"""The conformance suite: what every method must do on every host. Another package runs `check(MyMethod())`.

A check is a function of a Subject (a method on a host) that asserts; `CHECKS` lists them all, and nothing in them
names a method: what may differ between methods is declared as a trait on the method. METHOD_CHECKS ask nothing of
the host and run on the first one only.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from . import linalg
from .adapter import Adapter
from .adapters import Method
from .attach import attach
from .errors import InputError
from .io import FILE, load, read, write


@dataclass(frozen=True)
class Host:
    """A small model to adapt: `build(seed)` makes it, `targets` names its sites, `run(model, seed)` calls it."""

    name: str
    build: Callable[[int], nn.Module]
    targets: Any
    run: Callable[[nn.Module, int], Tensor]


@dataclass
class Subject:
    """A method on a host, with the model built and nothing attached."""

    method: Method
    host: Host
    model: nn.Module = field(init=False)

    def __post_init__(self):
        self.model = self.host.build(0).eval()

    def attach(self, name: str = "default", seed: int = 0, model: nn.Module | None = None) -> Adapter:
        return attach(model or self.model, self.method, targets=self.host.targets, name=name, seed=seed)

    def run(self, seed: int = 0, model: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            return self.host.run(model or self.model, seed)

    def train(self, adapter: Adapter, steps: int = 3, lr: float = 0.05) -> None:
        """A few optimizer steps that move every tensor visibly."""
        optimizer = torch.optim.AdamW(adapter.param_groups(lr), weight_decay=0.0)
        adapter.bind(optimizer, steps)
        for step in range(steps):
            out = self.host.run(self.model, step)
            # Towards an uneven target: a model that ends in a LayerNorm has no gradient towards a constant one.
            target = torch.linspace(-1, 1, out.numel()).view_as(out)
            ((out.float() - target).square().mean() + adapter.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Assert that a and b differ by at most `tolerance` of the larger one's greatest entry."""
    scale = max(a.abs().max().item(), b.abs().max().item(), 1e-30)
    off = (a.double() - b.double()).abs().max().item() / scale
    assert off <= tolerance, f"differ by {off:.2e} of the largest entry, {tolerance:.0e} allowed"


def refused(call: Callable[[], Any], *words: str) -> None:
    """Assert that call() raises InputError and that its message holds every word."""
    try:
        call()
    except InputError as error:
        for word in words:
            assert word in str(error), f"{word!r} is not in {str(error)!r}"
    else:
        raise AssertionError(f"was accepted; an error with {words} was due")


# ---- options and documentation


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
    assert re.search(r"\d{4}\.\d{4,5}", module.__doc__ or ""), "the file's first line names no paper"
    assert len(inspect.getsource(module).splitlines()) <= 150


def parameter_count_is_the_documented_one(s: Subject) -> None:
    line = re.search(r"Parameters per layer: ([^,.]*)", inspect.getdoc(type(s.method))).group(1)
    formula = re.sub(r"(\w) \(", r"\1*(", line)
    adapter = s.attach()
    for part in adapter.parts.values():
        for site in part.sites:
            trained = sum(t.numel() for t in vars(part.tensors_of(site)).values() if isinstance(t, nn.Parameter))
            assert trained == eval(formula, {}, {"r": s.method.rank, "m": site.m, "n": site.n}), site.name


# ---- the start


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
    if "rank" not in {f.name for f in dataclasses.fields(s.method)}:
        return
    big = dataclasses.replace(s.method, rank=10_000)
    refused(lambda: attach(s.model, big, targets=s.host.targets), "rank", "10000")
    assert list(s.model.state_dict()) == keys and [p.requires_grad for p in s.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in s.model.modules())


# ---- hook, dense matrix and merge agree


def hook_equals_dense(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter)
    moved = s.run()
    other = s.host.build(0).eval()
    weights = dict(other.named_modules())
    for name, delta in adapter.deltas().items():
        weights[name].weight.data += delta
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
    s.train(adapter)
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


# ---- training


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
    if type(s.method).on_step is Method.on_step:
        assert all(torch.equal(t, fixed[n]) for n, t in adapter.named_tensors() if n in fixed)
    assert s.model.load_state_dict(base, strict=True).missing_keys == []
    trainable = {id(p) for p in s.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}


def learns_a_planted_update(s: Subject) -> None:
    adapter = s.attach()
    generator = torch.Generator().manual_seed(5)
    planted = []  # reached from noisy tensors of the method's own, so that every method can represent it
    for _, site, tensors, _ in adapter.site_updates():
        noisy = {}
        for name, t in vars(tensors).items():
            spread = 0.3 * (t.std().item() if t.numel() > 1 else 0.0) or 0.1
            noise = spread * torch.randn(t.shape, generator=generator)
            noisy[name] = (t + noise).detach() if isinstance(t, nn.Parameter) else t
        update = s.method.factors(SimpleNamespace(**noisy)).with_row_scale(site.weight())
        planted.append(update.dense(site.weight()).detach())
    optimizer = torch.optim.Adam(adapter.param_groups(0.02))
    adapter.bind(optimizer, 300)
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
    assert min(losses[-20:]) < losses[0] / 10, f"{losses[0]:.3g} -> {losses[-1]:.3g}"


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


# ---- files, copies, several at once


def saved_and_loaded_is_equal(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter)
    out, tensors = s.run(), {n: t.clone() for n, t in adapter.named_tensors()}
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        adapter.detach()
        again = load(s.model, folder)
    assert again.method == s.method and again.method_name == adapter.method_name
    assert {n: True for n in tensors} == {n: torch.equal(t, tensors[n]) for n, t in again.named_tensors()}
    assert torch.equal(out, s.run())


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
        try_with({**tensors, name: torch.zeros(*tensors[name].shape, 2)}, "needed")
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
    modules = dict(other.named_modules())
    for name, delta in second.deltas().items():
        modules[name].weight.data += delta + first.deltas()[name]
    close(both, s.run(model=other), 2e-4)
    with second.disabled():
        assert torch.equal(alone, s.run()), "training one adapter moved the other"
    before = dict(s.model.state_dict())
    for inner, outer in ((first, second), (second, first)):
        with inner.merged() as _, outer.merged():
            close(both, s.run(), 2e-4)
    assert torch.equal(both, s.run()) and all(torch.equal(v, before[k]) for k, v in s.model.state_dict().items())
    left = {n: t.clone() for n, t in first.named_tensors()}
    second.detach()
    assert all(torch.equal(t, left[n]) for n, t in first.named_tensors())
    assert not any(p.requires_grad for n, p in s.model.named_parameters() if "vislora_" not in n)


def detach_leaves_no_trace(s: Subject) -> None:
    before, keys = s.run(), list(s.model.state_dict())
    flags = [p.requires_grad for p in s.model.parameters()]
    adapter = s.attach()
    s.train(adapter)
    moved = s.run()
    adapter.detach()
    assert torch.equal(before, s.run()) and list(s.model.state_dict()) == keys
    assert [p.requires_grad for p in s.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in s.model.modules())
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
    assert torch.equal(out, s.run(model=twin))
    s.train(adapter)
    assert torch.equal(out, s.run(model=twin)) and not torch.equal(out, s.run())


METHOD_CHECKS: tuple[Callable[[Subject], None], ...] = (
    options_round_trip,
    documented,
    factors_pass_gradcheck,
    learns_a_planted_update,
)
CHECKS: tuple[Callable[[Subject], None], ...] = (
    parameter_count_is_the_documented_one,
    starts_as_the_base,
    start_is_a_function_of_the_seed,
    too_large_a_rank_is_refused_without_a_trace,
    hook_equals_dense,
    bf16_base_keeps_its_dtype,
    autocast_agrees,
    merged_equals_hook_and_restores,
    disabled_is_the_base,
    weight_scales_the_delta,
    factors_batched_equal_single,
    every_tensor_trains,
    only_the_adapter_changes,
    bound_holds_under_wild_steps,
    checkpointing_gives_equal_gradients,
    saved_and_loaded_is_equal,
    damaged_files_are_refused_without_a_trace,
    two_adapters_add,
    detach_leaves_no_trace,
    copies_are_independent,
)


class _Attention(nn.Module):
    """A fused projection as timm names it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.proj((q @ k.mT / 4).softmax(-1) @ v)


def _seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make


def _feed(*shape: int) -> Callable[[nn.Module, int], Tensor]:
    def run(model: nn.Module, seed: int) -> Tensor:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed))
        return model(x.to(next(model.parameters()).dtype))

    return run


def hosts() -> list[Host]:
    """The hosts that need torch alone: a chain of linears without and with bias, and fused attention blocks."""
    chain = _seeded(lambda: nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12, bias=False)))
    fused = _seeded(lambda: nn.Sequential(_Attention(), _Attention()))
    return [
        Host("linear", chain, "all-linear", _feed(3, 5, 12)),
        Host("fused_qkv", fused, ["qkv[q]", "qkv[v]"], _feed(2, 6, 16)),
    ]


def check(method: Method, on: Iterable[Host] | None = None) -> int:
    """Run every check of `method` on every host (the built-in ones by default). Returns how many ran."""
    ran = 0
    for i, host in enumerate(hosts() if on is None else on):
        for one in CHECKS if i else METHOD_CHECKS + CHECKS:
            one(Subject(method, host))
            ran += 1
    return ran
