"""Every method on a GPU: the same training as on the CPU, no waiting for the device, half precision, files.

Without a GPU these are skipped: `pytest -n 4 tests/test_cuda.py` where there is one.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hosts import all_hosts
from torch import nn

import vislora
from vislora import linalg, optim
from vislora.testing.subject import Host, close
from vislora.training.optimizer_state import load_optimizer, optimizer_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HOSTS = {
    host.name: host for host in all_hosts() if host.name in ("linear", "fused_qkv", "conv", "mha", "unet", "llama")
}
STEPS = 3


@pytest.fixture
def no_waiting():
    """Inside, what makes the host wait for the device raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see everything
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


class Trained:
    """A method on a host on a device, and its training by plain descent, which is continuous in the gradient."""

    def __init__(self, host: Host, method: str, device: str, dtype: torch.dtype = torch.float32, lr: float = 0.05):
        self.host, self.model = host, host.build(0).eval().to(device, dtype)
        self.model.register_forward_pre_hook(self._moved, with_kwargs=True)
        rank = 2 if host.name == "conv" else 4
        self.adapter = vislora.attach(self.model, method, targets=host.targets, rank=rank, seed=0)
        self.optimizer = torch.optim.SGD(self.adapter.param_groups(lr))
        self.adapter.bind(self.optimizer, STEPS)
        self.adapter.prepare(lambda: self.backward(0))

    def _moved(self, model: nn.Module, args: tuple, kwargs: dict):
        device = next(model.parameters()).device

        def move(x):
            return x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x

        return tuple(map(move, args)), {name: move(x) for name, x in kwargs.items()}

    def backward(self, step: int) -> torch.Tensor:
        out = self.host.run(self.model, step)
        out = out if out.dtype == torch.float64 else out.float()
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
        loss = (weights * out).mean() + self.adapter.penalty()
        loss.backward()
        return loss.detach()

    def step(self, step: int) -> torch.Tensor:
        loss = self.backward(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("method", vislora.methods())
@pytest.mark.parametrize("host", HOSTS.values(), ids=list(HOSTS))
def test_a_gpu_trains_as_the_cpu_does(host, method):
    """From one start: singular vectors are free in their signs, and another device takes others. Some models compute
    parts in float32 in any case; SORSA's penalty points anywhere while its bases are orthonormal to rounding."""
    cpu, gpu = (Trained(host, method, device, torch.float64) for device in ("cpu", "cuda"))
    held = dict(cpu.adapter.named_tensors())
    with torch.no_grad():
        for name, tensor in gpu.adapter.named_tensors():
            assert tensor.is_cuda
            tensor.copy_(held[name])
    rounded = host.name in ("unet", "llama") or method == "sorsa"
    for step in range(STEPS):
        near = pytest.approx(gpu.step(step).item(), rel=1e-4 if rounded else 1e-9, abs=1e-12)
        assert cpu.step(step).item() == near
    deltas = [side.adapter.deltas() for side in (cpu, gpu)]
    assert list(deltas[0]) == list(deltas[1])
    for name, delta in deltas[0].items():
        close(delta, deltas[1][name].cpu(), 1e-3 if rounded else 1e-6)


class TestWaiting:
    @pytest.fixture
    def ready(self, method):
        side = Trained(HOSTS["linear"], method, "cuda")
        side.step(0)
        return side, torch.randn(3, 5, 12, device="cuda")

    @pytest.mark.parametrize("method", vislora.methods())
    def test_a_step_does_not_wait_for_the_device(self, ready, no_waiting):
        side, inputs = ready
        loss = side.model(inputs).square().mean() + side.adapter.penalty()
        loss.backward()
        nn.utils.clip_grad_norm_(list(side.adapter.parameters()), 1.0)
        side.optimizer.step()
        side.optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", vislora.methods())
def test_a_half_base_trains_float32_tensors(method, dtype):
    side = Trained(HOSTS["llama"], method, "cuda", dtype)
    assert all(p.dtype == torch.float32 for p in side.adapter.parameters())
    assert all(side.step(step).isfinite() for step in range(STEPS))
    assert side.host.run(side.model, 0).dtype == dtype
    assert all(delta.isfinite().all() for delta in side.adapter.deltas().values())


def test_bases_of_a_batch_and_of_dependent_columns():
    x = torch.randn(4, 40, 5, device="cuda")
    x[1] = 0
    x[2, :, 3] = x[2, :, 1]
    Q = linalg.orthonormal(x)
    assert (Q.mT @ Q - torch.eye(5, device="cuda")).abs().max() < 1e-5
    close(Q[::3], linalg.orthonormal(x[::3].cpu()).cuda(), 1e-5)
    close(Q @ (Q.mT @ x), x, 1e-5)


def one_step(side: Trained, optimizer: torch.optim.Optimizer, step: int) -> None:
    side.backward(step)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("host", ["linear", "conv", "unet"])
@pytest.mark.parametrize("method", ["lora", "nb_lora", "dora", "od_lora"])
def test_the_fused_optimizer_is_the_usual_one_and_resumes(method, host):
    sides = [Trained(HOSTS[host], method, "cuda", torch.float64) for _ in range(3)]
    ways = zip(sides, (True, False, True), strict=True)
    built = [optim.build("adamw", side.adapter, 1e-3, fused=fused) for side, fused in ways]
    for step in range(STEPS):
        for side, optimizer in zip(sides[:2], built, strict=False):
            one_step(side, optimizer, step)
    assert built[0].param_groups[0]["fused"] and not built[1].param_groups[0]["fused"]
    names = [list(side.adapter.named_parameters()) for side in sides]
    sides[2].adapter.load_tensors(dict(sides[0].adapter.named_tensors()))
    load_optimizer(built[2], names[2], *optimizer_tensors(built[0], names[0]))
    for side, optimizer in zip(sides, built, strict=True):
        one_step(side, optimizer, STEPS)
    fused, usual, resumed = (dict(side.adapter.named_tensors()) for side in sides)
    for name, tensor in fused.items():  # a GPU adds some gradients in an order that changes from run to run
        close(tensor, resumed[name], 1e-9)
        close(tensor, usual[name], 1e-9)


@pytest.mark.parametrize("method", ["lora", "nb_lora", "sorsa", "od_lora", "dora"])
def test_autocast_and_a_loss_scale(method):
    side = Trained(HOSTS["linear"], method, "cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    before = {name: delta.clone() for name, delta in side.adapter.deltas().items()}
    inputs = torch.randn(3, 5, 12, device="cuda")
    for _ in range(STEPS):
        with torch.autocast("cuda", torch.float16):
            loss = (side.model(inputs).float() - 1).square().mean()
        scaler.scale(loss + side.adapter.penalty()).backward()
        scaler.step(side.optimizer)
        scaler.update()
        side.optimizer.zero_grad()
    after = side.adapter.deltas()
    assert scaler.get_scale() >= 2.0**10  # no step was skipped
    assert all(not torch.equal(before[name], after[name]) and after[name].isfinite().all() for name in before)


@pytest.mark.parametrize("method", vislora.methods())
def test_saved_on_a_gpu_and_loaded_on_a_cpu(method, tmp_path):
    side = Trained(HOSTS["linear"], method, "cuda")
    side.step(0)
    side.adapter.save(tmp_path)
    other = HOSTS["linear"].build(0).eval()
    loaded = vislora.load(other, tmp_path)
    weights = {name: weight() for name, _, weight in loaded.base_weights()}
    for name, delta in side.adapter.deltas().items():  # some are small differences of what is as large as the weight
        close(weights[name] + delta.cpu(), weights[name] + loaded.deltas()[name], 1e-6)


@pytest.mark.parametrize("method", vislora.methods())
def test_a_merged_model_computes_the_same_on_a_gpu(method):
    side = Trained(HOSTS["llama"], method, "cuda")
    side.step(0)
    with torch.no_grad():
        unmerged = side.host.run(side.model, 1)
        side.adapter.merge()
        close(unmerged, side.host.run(side.model, 1), 1e-4)
