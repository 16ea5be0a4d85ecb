"""What each of two processes does in tests/distributed: python two_processes.py RANK FOLDER; results land in FOLDER.

`CASES` also run in one process, on both processes' data, to compare with.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed as group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vislora import attach, distributed, linalg
from vislora.io import read, write
from vislora.prepare import weight_gradients
from vislora.training import processes

STEPS = 10  # ends with a renewal of bases
OF_ATTACH = ("sorsa", "full")  # start at attach, where all devices must agree
CASES = {
    "sorsa": {},
    "full": {},
    "lora": {},
    "nb_lora": {"delta": 3.0},
    "lora_sb": {"init_lr": 0.05, "init_batches": 2},
    "lora_sb noisy": {"init_lr": 0.05, "init_noise": 0.02, "niter": 3},
    "lora_ga": {"init_batches": 2},
    "od_lora": {"init_rounds": 2, "init_steps": 3},
    "od_lora limited": {"init_rounds": 2, "init_steps": 3, "form": "limited_capacity"},
    "rslora optimal": {"optimal_gradient": True},
    "adalora": {"init_r": 4, "tinit": 2, "tfinal": 4},
}
SHARDED = ("lora", "nb_lora", "dora", "sorsa", "od_lora", "adalora", "lora_ga", "lora_sb", "full")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16)).train()


class Attending(nn.Module):
    """Three tokens through a linear, torch's attention, whose weights are read, and another linear."""

    def __init__(self):
        super().__init__()
        self.a, self.attn, self.b = nn.Linear(4, 16), nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        h = self.a(x.unflatten(-1, (3, 4)))
        return self.b(h + self.attn(h, h, h, need_weights=False)[0]).mean(1)


def options(case: str) -> dict:
    return {} if case == "full" else {"rank": 2 if case == "adalora" else 4, **CASES.get(case, {})}


def sharded(case: str, ranks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """An adapter's tensors, deltas and what it saves after STEPS steps; in shards where `ranks` is one of several."""
    torch.manual_seed(0)
    model, alone = Attending().train(), len(ranks) > 1
    if case == "full" and not alone:  # its tensors are the model's own
        shard(model)
    more = {} if case == "full" else {"targets": ["a", "in_proj_weight[q]", "in_proj_weight[v]", "out_proj", "b"]}
    if case == "lora_ga":
        more["rank"] = 2  # its start takes twice as many directions, and `a` has four
    adapter = attach(model, case, **{**options(case), **more})
    if case != "full" and not alone:
        shard(model)
    optimizer = torch.optim.SGD(adapter.param_groups(0.05), momentum=0.9)
    adapter.bind(optimizer, STEPS)
    closure = closures(model, ranks, adapter)
    adapter.prepare(closure)
    for _ in range(STEPS):
        loss = closure()
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        saved = read(adapter.save(folder))[0]
    deltas = {f"delta {name}": distributed.whole(delta) for name, delta in adapter.deltas().items()}
    total = distributed.mean(loss.detach(), torch.device("cpu")) if not alone else loss.detach()
    return {**saved, **deltas, "loss": total}


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.a, mesh=mesh)
    fully_shard(model.attn, mesh=mesh)
    fully_shard(model, mesh=mesh)


def batch(call: int, ranks: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight samples of each rank, of its own."""
    parts = []
    for rank in ranks:
        g = torch.Generator().manual_seed(100 * call + rank)
        parts.append((torch.randn(8, 12, generator=g), torch.randn(8, 16, generator=g)))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def ddp(model: nn.Module) -> nn.Module:
    # DDP would itself send the first process's buffers around before each forward, and hide what is tested here.
    return DistributedDataParallel(model, broadcast_buffers=False)


def closures(model: nn.Module, ranks: tuple[int, ...], adapter):
    """Forward and backward over one batch after another."""
    calls = iter(range(10_000))

    def closure():
        x, y = batch(next(calls), ranks)
        loss = (model(x) - y).square().mean() + adapter.penalty()
        loss.backward()
        return loss

    return closure


def gradients(ranks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """What `weight_gradients` gives over two calls."""
    model = net()
    adapter = attach(model, "lora", rank=2)
    wrapped = ddp(model) if len(ranks) == 1 else model
    found = weight_gradients(adapter, closures(wrapped, ranks, adapter), 2)
    return {site.name: gradient for _, site, gradient in found}


def trained(case: str, ranks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """An adapter's tensors after its start and STEPS steps of SGD; under DDP where `ranks` is one of several."""
    model = net()
    adapter = attach(model, case.split()[0], **options(case))
    wrapped = ddp(model) if len(ranks) == 1 else model
    optimizer = torch.optim.SGD(adapter.param_groups(0.05), momentum=0.9)
    adapter.bind(optimizer, STEPS)
    closure = closures(wrapped, ranks, adapter)
    adapter.prepare(closure)
    started = {f"start {name}": t.detach().clone() for name, t in adapter.named_tensors()}
    for _ in range(STEPS):
        closure()
        optimizer.step()
        optimizer.zero_grad()
    return {**started, **{name: t.detach() for name, t in adapter.named_tensors()}}


def refusals() -> str:
    """What a model in shards cannot do."""
    told = []
    model = net()
    adapter = attach(model, "lora", rank=4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    for call in (adapter.merge, lambda: attach(model, "lora", rank=2, name="later")):
        try:
            call()
        except ValueError as error:
            told.append(str(error))
    return "\n".join(told)


def of_chance(rank: int) -> dict[str, torch.Tensor]:
    """A model's weights, drawn otherwise by each process and laid out as on no disk, once it is in shards; and what it
    computes from one input in the precision that was asked for."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    torch.manual_seed(rank)
    tower, head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Linear(16, 8)
    model = nn.Sequential(tower, head).to(memory_format=torch.channels_last)
    asked = SimpleNamespace(num_processes=2, device=torch.device("cpu"), mixed_precision="bf16",
                            autocast=lambda: torch.autocast("cpu", torch.bfloat16))  # fmt: skip
    assert processes.network(asked, model, tower, head.parameters()) is model
    assert distributed.is_sharded(tower[0].weight) and not distributed.is_sharded(head.weight)
    with torch.no_grad():
        out, coarse = (forward(torch.ones(1, 3, 4, 4)) for forward in (model, lambda x: head(tower(x))))
    assert out.dtype == torch.float32 and (out - coarse).abs().max() > 1e-4  # rounded to bf16 within
    return {"out": out, **{name: distributed.whole(p.detach()) for name, p in model.named_parameters()}}


def unreached(rank: int) -> str:
    """The error where one process's loss misses a layer, which all must raise or the others would wait for ever."""
    model = net()
    adapter = attach(model, "lora_ga", rank=4)

    def closure():
        x, _ = batch(0, (rank,))
        loss = (model(x) if rank else model[0](x)).square().mean()
        loss.backward()
        return loss

    try:
        adapter.prepare(closure)
    except ValueError as error:
        return str(error)
    return "no error"


def other_device() -> None:
    """Decompositions of this process come with other signs, as they may from another device's library."""
    for name in ("product_svd", "top_svd"):
        setattr(linalg, name, negated(getattr(linalg, name)))
    plain = linalg.orthonormal
    linalg.orthonormal = lambda x: plain(x) * torch.tensor([-1.0, 1.0, 1.0, -1.0])


def negated(decompose):
    """The same decomposition with both bases negated."""

    def other(*args, **words):
        U, S, V = decompose(*args, **words)
        return -U, S, -V

    return other


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    group.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case in SHARDED:
        write(sharded(case, (rank,)), {}, folder / f"sharded {case}-{rank}.safetensors")
    for case in CASES:
        if rank == 1 and case not in OF_ATTACH and linalg.top_svd.__name__ == "top_svd":
            other_device()
        write(trained(case, (rank,)), {}, folder / f"{case}-{rank}.safetensors")
    write(gradients((rank,)), {}, folder / f"gradients-{rank}.safetensors")
    write(of_chance(rank), {}, folder / f"chance-{rank}.safetensors")
    (folder / f"refused-{rank}").write_text(refusals())
    (folder / f"unreached-{rank}").write_text(unreached(rank))
    group.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
