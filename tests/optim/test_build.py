"""The optimizers over real adapters: which fit, pairs by role, schedules, resuming, hooks, learning."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers.optimization import get_scheduler
from lora_pairs import M, N, give, noise, pair
from torch import nn

import vislora
from vislora import adapters, attach, optim
from vislora.diffusion.options import DreamBoothOptions
from vislora.errors import InputError
from vislora.training import checkpoint
from vislora.training.resume import load_state, save_state

VARIANTS = {
    "scaled_adamw": ("scaled_adamw", {}),
    "lora_pro": ("lora_pro", {}),
    "lora_pro-factors": ("lora_pro", {"moments": "factors"}),
    "alt_lora": ("alt_lora", {}),
    "alt_lora-alternate": ("alt_lora", {"alternate": True}),
    "alt_lora-plain": ("alt_lora", {"plus": False}),
}
SHAPED = ["dora", "lora", "lora_ga", "lora_plus", "olora", "pissa", "rslora"]
each_variant = pytest.mark.parametrize("variant", VARIANTS)


class Task:
    """A two-layer network that must learn what a rank-2 change of its weights computes."""

    def __init__(self, method: str, variant: str, lr: float, seed: int = 0, **settings):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 10))
        self.x = torch.randn(64, 12)
        teacher = copy.deepcopy(self.model)
        with torch.no_grad():
            for layer in (teacher[0], teacher[2]):
                m, n = layer.weight.shape
                layer.weight += torch.randn(m, 2) @ torch.randn(2, n) / (m * n) ** 0.25
            self.y = teacher(self.x)
        own = {"loraplus_lr_ratio": 4.0} if method == "lora_plus" else {}
        self.adapter = attach(self.model, method, rank=4, seed=seed, **own)
        name, own = VARIANTS[variant]
        self.optimizer = optim.build(name, self.adapter, lr, **own, **settings)
        self.adapter.bind(self.optimizer, 100)
        self.adapter.prepare(self.backward)

    def backward(self) -> torch.Tensor:
        loss = (self.model(self.x) - self.y).square().mean()
        loss.backward()
        return loss

    def train(self, steps: int, scheduler=None) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(self.backward().item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
        return losses

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.adapter.named_parameters()}


def test_lora_and_its_kin_are_lora_shaped_and_nothing_else():
    assert [name for name in vislora.methods() if adapters.get(name).is_lora_shaped()] == SHAPED


def test_the_command_line_knows_every_optimizer_and_option():
    assert list(get_args(get_type_hints(DreamBoothOptions)["optimizer"])) == [
        "adamw", "adamw8bit", "prodigy", "scaled_adamw", "lora_pro", "alt_lora"] == optim.names()  # fmt: skip
    fields = DreamBoothOptions.__dataclass_fields__
    own = ("optimizer_", "lora_pro_", "alt_lora_", "prodigy_")
    assert {name for name in fields if name.startswith(own)} == set(optim._OWN)


@pytest.mark.parametrize("method", sorted(set(vislora.methods()) - set(SHAPED)))
def test_other_methods_are_refused_in_one_line(method):
    adapter = attach(nn.Sequential(nn.Linear(8, 8)), method, rank=2)
    optim.build("adamw", adapter, 0.1)
    for name in ("scaled_adamw", "lora_pro", "alt_lora"):
        with pytest.raises(InputError, match=f"{name}.* {method} .*dora, lora, .*rslora$") as error:
            optim.build(name, adapter, 0.1)
        assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused():
    adapter = attach(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2)
    with pytest.raises(InputError, match="scaled_adam.*did you mean scaled_adamw"):
        optim.build("scaled_adam", adapter, 0.1)
    with pytest.raises(InputError, match="damping: -1"):
        optim.build("lora_pro", adapter, 0.1, damping=-1.0)
    with pytest.raises(InputError, match="in no parameter group"):
        optim.ScaledAdamW([next(adapter.parameters())], optim.pairs_of(adapter))


@pytest.mark.parametrize("given", [
    {"optimizer_damping": 0.1}, {"lora_pro_moments": "full", "optimizer": "alt_lora"},
    {"alt_lora_plus": True, "optimizer": "scaled_adamw"}, {"alt_lora_alternate": False, "optimizer": "lora_pro"},
    {"optimizer_damping": -1.0, "optimizer": "lora_pro"},
])  # fmt: skip
def test_an_option_of_another_optimizer_is_refused(given):
    with pytest.raises(InputError, match="--" + next(iter(given))):
        DreamBoothOptions(**given)


def test_prodigy_has_one_rate():
    pytest.importorskip("prodigyopt")
    adapter = attach(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2)
    options = DreamBoothOptions(optimizer="prodigy", learning_rate=1.0, prodigy_beta3=0.5)
    optimizer = optim.from_options(options, adapter)
    assert type(optimizer).__name__ == "Prodigy" and optimizer.param_groups[0]["beta3"] == 0.5
    adapter.detach()
    adapter = attach(nn.Sequential(nn.Linear(8, 8)), "lora_plus", rank=2)
    with pytest.raises(InputError, match="prodigy has one rate for all, the adapter asks for 2"):
        optim.build("prodigy", adapter, 1.0)


def test_options_reach_the_optimizer():
    adapter = attach(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2)
    usual = {"learning_rate": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_weight_decay": 0.2, "adam_epsilon": 0.1}
    for given, expected in (
        ({}, {}),
        ({"optimizer": "scaled_adamw"}, {"damping": 1e-6}),
        ({"optimizer": "scaled_adamw", "optimizer_damping": 0.5}, {"damping": 0.5}),
        ({"optimizer": "lora_pro", "lora_pro_moments": "factors"}, {"moments": "factors", "damping": 1e-6}),
        ({"optimizer": "alt_lora", "alt_lora_plus": False}, {"plus": False, "alternate": False}),
        ({"optimizer": "alt_lora", "alt_lora_alternate": True}, {"plus": True, "alternate": True}),
    ):
        optimizer = optim.from_options(DreamBoothOptions(**usual, **given), adapter)
        assert {key: getattr(optimizer, key) for key in expected} == expected
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.3, (0.5, 0.7), 0.2, 0.1)


def test_pairs_are_found_by_role_on_row_blocks_too():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    adapter = attach(model, "dora", targets="vit-qv", rank=2, alpha=6)
    pairs, named = optim.pairs_of(adapter), dict(adapter.named_parameters())
    assert len(pairs) == len(adapter.sites) == 4
    for site, p in zip(adapter.sites, pairs, strict=True):
        assert p.down is named[f"{site}.A"] and p.up is named[f"{site}.B"] and p.scale == 3.0


@each_variant
@pytest.mark.parametrize("method", SHAPED)
def test_every_lora_shaped_method_learns(method, variant):
    lr = 0.3 if variant == "alt_lora-plain" else 0.02
    losses = Task(method, variant, lr, betas=(0.9, 0.9), weight_decay=0.0).train(200)
    assert losses[-1] < losses[0] / 10, f"{losses[0]:.3g} -> {losses[-1]:.3g}"


@each_variant
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, variant):
    def start(seed):
        task = Task("dora", variant, 0.01, seed=seed)
        return task, get_scheduler("cosine", task.optimizer, num_warmup_steps=2, num_training_steps=9)

    whole, schedule = start(0)
    whole.train(5, schedule)
    save_state(tmp_path, 5, whole.adapter, whole.optimizer, schedule, None, {}, None)
    whole.train(4, schedule)
    again, schedule = start(1)
    again.train(1, schedule)  # what it has learned and stored by then is replaced
    load_state(checkpoint.load(tmp_path / "checkpoint-5"), again.adapter, again.optimizer, schedule, None)
    again.train(4, schedule)
    end = again.tensors()
    assert all(torch.equal(t, end[name]) for name, t in whole.tensors().items())


@each_variant
def test_schedules_act(variant):
    task = Task("lora_plus", variant, 0.01, weight_decay=0.5)
    schedule = get_scheduler("constant_with_warmup", task.optimizer, num_warmup_steps=2)
    start = task.tensors()
    task.train(1, schedule)  # the rate is 0
    assert all(torch.equal(t, start[name]) for name, t in task.tensors().items())
    task.train(2, schedule)
    assert all(not torch.equal(t, start[name]) for name, t in task.tensors().items())


@each_variant
def test_factors_go_by_their_own_groups(variant):
    """Half of B's rate is half of B's step; A, whose rate stays, is where it was."""
    name, own = VARIANTS[variant]
    moved = []
    for rate in (0.02, 0.04):
        p = pair()
        groups = [{"params": [p.down], "lr": 0.01}, {"params": [p.up], "lr": rate}]
        optimizer = optim._PAIRED[name](groups, [p], weight_decay=0.0, **own)
        start = p.up.detach().clone()
        for _ in range(2 if "alternate" in variant else 1):
            give(p, noise(M, N))
            optimizer.step()
        moved.append((p.down.detach(), p.up.detach() - start))
    assert torch.equal(moved[0][0], moved[1][0]) and torch.allclose(2 * moved[0][1], moved[1][1], rtol=1e-9)


@pytest.mark.parametrize("variant", ["lora_pro", "alt_lora", "alt_lora-plain"])
def test_bf16_factors_take_the_float32_step_rounded_once(variant):
    name, own = VARIANTS[variant]
    low, high = pair(dtype=torch.bfloat16), pair(dtype=torch.bfloat16)
    high = adapters.Pair(nn.Parameter(high.down.float()), nn.Parameter(high.up.float()), high.scale)
    one, two = (optim._PAIRED[name]([p.down, p.up], [p], lr=0.05, **own) for p in (low, high))
    start = low.up.detach().clone()
    give(low, noise(M, N))
    high.down.grad, high.up.grad = low.down.grad.float(), low.up.grad.float()
    one.step()
    two.step()
    assert torch.equal(low.down, high.down.bfloat16()) and not torch.equal(low.up, start)
    if name == "lora_pro":  # alt_lora's B goes by the new A, which is rounded by then
        assert torch.equal(low.up, high.up.bfloat16())
    else:
        assert torch.allclose(low.up.float(), high.up, rtol=0.02, atol=0.02)
    assert all(t.dtype == torch.float32 for s in one.state.values() for t in s.values() if isinstance(t, torch.Tensor))


@each_variant
def test_step_hooks_run_once_and_gradients_stay(variant):
    task, calls = Task("dora", variant, 0.01), []
    task.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    task.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    task.backward()
    given = {name: p.grad.clone() for name, p in task.adapter.named_parameters()}
    task.optimizer.step()
    assert calls == ["before", "after"] and task.adapter.step == 1
    assert all(torch.equal(p.grad, given[name]) for name, p in task.adapter.named_parameters())


def test_step_hooks_run_once_where_torchs_own_step_had_hooks_before():
    code = """
import torch
p, q = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
torch.optim.AdamW([p])
from vislora.adapters import Pair
from vislora.optim import ScaledAdamW
optimizer, calls = ScaledAdamW([p, q], [Pair(p, q, 1.0)]), []
optimizer.register_step_post_hook(lambda *_: calls.append(1))
optimizer.step()
assert calls == [1], calls
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(vislora.__file__).parents[1])


@each_variant
def test_factors_without_some_directions_are_stepped_on_in_the_others(variant):
    """Rounding is no direction: two equal columns, far larger than the damping, or two factors that are both zero."""
    name, own = VARIANTS[variant]
    p = pair(dtype=torch.float32)
    with torch.no_grad():
        p.up.mul_(300.0)[:, 1] = p.up[:, 0]
        p.down[1] = p.down[0]
    start = [t.detach().clone() for t in (p.down, p.up)]
    optimizer = optim._PAIRED[name]([p.down, p.up], [p], lr=1e-3, weight_decay=0.0, damping=0.0, **own)
    for _ in range(2):
        give(p, noise(M, N))
        optimizer.step()
    for now, before in zip((p.down, p.up), start, strict=True):
        assert 0 < (now - before).abs().max() < 0.1
    with torch.no_grad():
        p.down.zero_()
        p.up.zero_()
    give(p, noise(M, N))
    optimizer.step()
    assert p.down.isfinite().all() and p.up.isfinite().all()


@each_variant
def test_closures_and_forgotten_states(variant):
    one, two = Task("lora", variant, 0.01), Task("lora", variant, 0.01)
    one.train(3)
    for _ in range(3):
        two.optimizer.zero_grad()
        assert two.optimizer.step(two.backward).requires_grad
    assert all(torch.equal(t, two.tensors()[name]) for name, t in one.tensors().items())
    two.optimizer.zero_grad()
    name, own = VARIANTS[variant]
    fresh = optim.build(name, two.adapter, 0.01, **own)
    for parameter in two.adapter.parameters():  # as a method does that renews its factors
        two.optimizer.state.pop(parameter, None)
    start = two.tensors()
    ends = []
    for optimizer in (two.optimizer, fresh):
        two.adapter.load_tensors(start)
        for _ in range(3):
            two.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(two.tensors())
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())


@each_variant
def test_half_a_pair_and_broken_factors_are_refused(variant):
    task = Task("lora", variant, 0.01)
    start = task.tensors()
    task.optimizer.step()  # no gradients at all: nothing moves
    assert all(torch.equal(t, start[name]) for name, t in task.tensors().items())
    task.backward()
    first = optim.pairs_of(task.adapter)[0]
    kept, first.down.grad = first.down.grad, None
    with pytest.raises(InputError, match="the other has none"):
        task.optimizer.step()
    first.down.grad = kept
    with torch.no_grad():
        first.up.fill_(float("nan"))
        first.down.fill_(float("nan"))
    with pytest.raises(InputError, match="no longer finite.*lower learning rate"):
        task.optimizer.step()
