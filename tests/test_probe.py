"""The gradient probe against brute force: the dense weight's gradient, and one small step of the factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vislora
from vislora import probe
from vislora.errors import InputError

LAYERS = {"0": 0, "2": 2}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9)).double()


class Trained:
    """A little network with an adapter after a few steps, and the loss of a batch of it."""

    def __init__(self, method: str, **options):
        torch.manual_seed(0)
        self.model, self.x, self.y = network(), torch.randn(7, 12).double(), torch.randn(7, 9).double()
        self.adapter = vislora.attach(self.model, method, targets="all-linear", rank=3, **options)
        optimizer = torch.optim.Adam(self.adapter.param_groups(1e-2))
        self.adapter.bind(optimizer, 100)
        self.adapter.prepare(self.backward)
        for _ in range(12):
            optimizer.zero_grad()
            self.backward()
            optimizer.step()
        optimizer.zero_grad()

    def backward(self) -> torch.Tensor:
        loss = (self.model(self.x) - self.y).square().mean()
        loss.backward()
        return loss

    def deltas(self) -> dict[str, torch.Tensor]:
        return {name: update.dense(site.weight()) for name, site, _, update in self.adapter.site_updates()}

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """dL/dW of a plain network with the adapted weights."""
        plain, deltas = network(), self.deltas()
        for name, at in LAYERS.items():
            plain[at].weight.data = self.model[at].weight.data + deltas[name]
            plain[at].bias.data = self.model[at].bias.data.clone()
        (plain(self.x) - self.y).square().mean().backward()
        return {name: plain[at].weight.grad for name, at in LAYERS.items()}

    @torch.no_grad()
    def step(self, size: float) -> None:
        """Gradient descent on the adapter's tensors, each at its role's rate."""
        for name, parameter in self.adapter.named_parameters():
            role = self.adapter.method.roles.get(name.rpartition(".")[2], "")
            parameter -= size * self.adapter.method.lr_ratio(role) * parameter.grad


@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {"alpha": 5}), ("od_lora", {}), ("nb_lora", {"delta": 2.0}), ("nb_lora", {"p": float("inf")}),
     ("sorsa", {}), ("dora", {}), ("lora_plus", {}), ("delora", {}), ("vera", {}), ("lora_sb", {})],
)  # fmt: skip
def test_cosine_is_that_of_a_small_step_and_the_dense_gradient(method, options):
    run = Trained(method, **options)
    found = probe.cosines(run.adapter, run.backward)
    full = run.full_gradients()
    run.backward()
    run.step(1e-5)
    ahead = run.deltas()
    run.step(-2e-5)
    for name, G in full.items():
        equivalent = (run.deltas()[name] - ahead[name]) / 2e-5
        expected = (G * equivalent).sum() / (G.norm() * equivalent.norm())
        assert found[name] == pytest.approx(expected.item(), abs=1e-7)
        assert 0 < found[name] < 1


def test_lora_is_equation_2():
    run = Trained("lora", alpha=6)
    found = probe.cosines(run.adapter, run.backward)
    for part in run.adapter.parts.values():
        for site in part.sites:
            t, G = part.tensors_of(site), run.full_gradients()[site.name]
            with torch.no_grad():
                equivalent = 4 * (G @ t.A.mT @ t.A + t.B @ t.B.mT @ G)
                outer, inner = probe.equivalent_gradient(part, site, G)
            torch.testing.assert_close(outer @ inner, equivalent)
            cosine = torch.nn.functional.cosine_similarity(G.flatten(), equivalent.flatten(), dim=0)
            assert found[site.name] == pytest.approx(cosine.item())


def test_training_is_as_if_nobody_had_looked():
    run = Trained("lora")
    run.backward()
    before = {name: p.grad.clone() for name, p in run.adapter.named_parameters()}
    state = torch.random.get_rng_state()

    def noisy():
        torch.rand(3)
        run.backward()

    probe.cosines(run.adapter, noisy)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(p.grad, before[name]) for name, p in run.adapter.named_parameters())
    assert all(not run.model[at].weight.requires_grad and run.model[at].weight.grad is None for at in LAYERS.values())


def test_accumulated_batches_are_one_gradient():
    run, halves = Trained("sorsa"), []
    whole = probe.cosines(run.adapter, run.backward)

    def in_two():
        for rows in (slice(0, 3), slice(3, 7)):
            ((run.model(run.x[rows]) - run.y[rows]).square().sum() / run.y.numel()).backward()
            halves.append(rows)

    found = probe.cosines(run.adapter, in_two, backwards=2)
    assert len(halves) == 2 and found == pytest.approx(whole, abs=1e-7)


def test_fused_slices_are_measured_apart():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.qkv = nn.Linear(8, 24)
    adapter = vislora.attach(model, "lora", targets=["qkv[q]", "qkv[v]"], rank=2)
    x, y = torch.randn(5, 8), torch.randn(5, 24)
    found = probe.cosines(adapter, lambda: (model.qkv(x) - y).square().mean().backward())
    assert list(found) == ["qkv[q]", "qkv[v]"] and all(0 < c < 1 for c in found.values())


@pytest.mark.parametrize(("times", "announced", "words"), [(2, 1, "more than 1"), (1, 2, "1 of 2"), (0, 1, "0 of 1")])
def test_passes_that_were_not_announced_are_refused(times, announced, words):
    run = Trained("lora")

    def closure():
        for _ in range(times):
            run.backward()

    with pytest.raises(InputError, match=f"probe: .*{words}.*->"):
        probe.cosines(run.adapter, closure, announced)
    assert all(p.grad is None for p in run.adapter.parameters())
    assert not run.model[0].weight.requires_grad


def test_no_gradient_is_no_direction():
    run = Trained("lora")
    assert set(probe.cosines(run.adapter, lambda: (0 * run.model(run.x)).sum().backward()).values()) == {0.0}
