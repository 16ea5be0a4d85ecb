"""What eval/speed.py lets take turns: one model each, frozen, fully trained, or with an adapter; and what a step costs.

Every variant gets its gradient down to the model's input, as the frozen one must, so that a ratio is what the adapter
adds. A step is forward, backward, clearing the gradients and, where something trains, fused AdamW.
"""

from __future__ import annotations

import contextlib
import copy
import time
import weakref
from collections.abc import Callable

import torch
from speed_models import Host
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vislora
from vislora import adapters

PEFT = ("lora", "dora", "vera", "delora", "adalora")
QUICK = {"lora_ga": {"init_batches": 1}, "lora_sb": {"init_batches": 1}, "od_lora": {"init_rounds": 1, "init_steps": 1}}
_STEPS = 100_000  # of the schedules: AdaLoRA's and OD-LoRA's events are not what a step costs


def names() -> list[str]:
    """Every variant's name."""
    own = [*vislora.methods(), "od_lora:between"]
    return ["frozen", "joined", "joined:lora", "norms", *(f"peft:{name}" for name in PEFT), *own, "full"]


class Variant:
    """A model, its inputs and `step()`."""

    def __init__(self, host: Host, name: str, rank: int, dtype: torch.dtype, device: str,
                 base: nn.Module | None = None, batch: int = 1):  # fmt: skip
        """base: a model whose large weights this one shares, where nothing trains them. batch: copies of the inputs."""
        self.host, self.name, self.optimizer, self.penalty = host, name, None, None
        self.model = model_of(host, dtype, device) if base is None or name == "full" else _sharing(base)
        self.inputs = tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in host.inputs())
        self.inputs = tuple(torch.cat([x] * batch) for x in self.inputs)
        self.inputs[0].requires_grad_(True)
        self.model.train()
        trained: list[nn.Parameter] = []
        if name == "full":
            trained = list(self.model.requires_grad_(True).parameters())
        elif name == "norms":  # LN-tuning: nearly frozen, what PEFT's comparison of methods starts from
            norms = [m for m in self.model.modules() if "Norm" in type(m).__name__ and not list(m.children())]
            trained = [p.requires_grad_(True) for m in norms for p in m.parameters()]
        elif name.startswith("peft:"):
            trained = _peft(self.model, name.removeprefix("peft:"), rank, host.targets)
        elif name.startswith("joined"):
            self.model = host.joined(self.model) if host.joined else self.model
            if name == "joined:lora":
                trained = list(self._attach("lora", rank, list(host.joined_targets)).parameters())
        elif name != "frozen":
            # "between" two renewals of the bases: where more steps are made than there are, none is due.
            adapter = self._attach(name.removesuffix(":between"), rank, total=1 if ":" in name else _STEPS)
            trained = list(adapter.parameters())
        if trained and self.optimizer is None:
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def _attach(self, name: str, rank: int, targets: list[str] | None = None, total: int = _STEPS) -> vislora.Adapter:
        kind = adapters.get(name)
        options = {"rank": rank, **QUICK.get(name, {})}
        if name == "nb_lora":
            options |= {"p": 1, "delta": float(rank)}
        if name == "pissa":
            options |= {"niter": 1}  # a rough start costs the same steps
        adapter = vislora.attach(self.model, kind(**options), targets=targets or self.host.targets)
        self.optimizer = torch.optim.AdamW(adapter.param_groups(1e-4), weight_decay=0.0, fused=True)
        adapter.bind(self.optimizer, total, first_lr=1e-4)
        adapter.prepare(self.backward)
        self.penalty = adapter.penalty if kind(**options).has_penalty() else None
        return adapter

    def forward(self) -> Tensor:
        loss = self.host.call(self.model, self.inputs).float().square().mean()
        return loss if self.penalty is None else loss + self.penalty()

    def backward(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.inputs[0].grad = None

    def seconds(self) -> float:
        """One step's: of the device on a GPU, of this thread's processor time on a CPU."""
        if self.inputs[0].device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.step()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1000
        began = time.thread_time()
        self.step()
        return time.thread_time() - began


def model_of(host: Host, dtype: torch.dtype, device: str) -> nn.Module:
    """The host's model, frozen; on a GPU made there and in its dtype: elsewhere 8 billion numbers take a minute."""
    torch.manual_seed(0)
    with torch.device(device), _default(dtype if device == "cuda" else torch.float32):
        model = host.build()
    return model.to(device, dtype).requires_grad_(False)


def _sharing(base: nn.Module) -> nn.Module:
    """A copy with weights of its own but for those of a million numbers and more."""
    large = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.parameters() if p.numel() >= 2**20}
    return copy.deepcopy(base, large)


@contextlib.contextmanager
def _default(dtype: torch.dtype):
    """Inside, new tensors have this dtype."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def _peft(model: nn.Module, kind: str, rank: int, targets: list[str]) -> list[nn.Parameter]:
    """Inject one of PEFT's methods, as diffusers does; returns what trains. Its own defaults, but the rank."""
    import peft

    configs: dict[str, Callable] = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets),
        "dora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=True),
        "vera": lambda: peft.VeraConfig(r=rank, target_modules=targets),
        "delora": lambda: peft.DeloraConfig(r=rank, target_modules=targets),
        "adalora": lambda: peft.AdaLoraConfig(init_r=rank, target_r=max(1, rank // 2), target_modules=targets,
                                              total_step=_STEPS),
    }
    peft.get_peft_model(model, configs[kind]())
    return [p for p in model.parameters() if p.requires_grad]


class _Counter(TorchDispatchMode):
    """Counts operators that are not views, and casts of tensors with at least `large` numbers; follows live bytes."""

    def __init__(self, large: int):
        super().__init__()
        self.large, self.ops, self.casts, self.live, self.peak = large, 0, 0, 0, 0
        self.known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in ("aten::_unsafe_view", "aten::detach"):
            self.ops += 1
            if func._schema.name == "aten::_to_copy" and out.numel() >= self.large and out.dtype != args[0].dtype:
                self.casts += 1
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._follow(t, given)
        return out

    def _follow(self, t: Tensor, given: set[int]) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.known or key in given:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self.known[key] = weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        self.known.pop(key, None)


class _Kept:
    """A tensor that the graph holds for the backward."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def counts(variant: Variant) -> dict[str, int]:
    """Of one step without the optimizer: operators, large casts, bytes saved for the backward, peak bytes.

    Casts: those of tensors with as many numbers as the first input has, a quarter at least. saved: storages kept for
    the backward that are no parameter or buffer. peak: the largest sum of living tensors that the step has made, or on
    a GPU what its allocator says.
    """
    variant.step()
    model = variant.model
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def keep(t: Tensor) -> _Kept:
        kept.add(held := _Kept(t.detach()))  # with its graph, what a node keeps of its own output would hold the node
        return held

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        loss = variant.forward()
        # What a part of the graph that nobody holds any more had kept is gone from the set.
        storages = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes() for held in kept}
    saved = sum(size for pointer, size in storages.items() if pointer not in weights)
    del loss
    counter = _Counter(variant.inputs[0].numel() // 4)
    cuda = variant.inputs[0].device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with counter if not cuda else contextlib.nullcontext():
        variant.backward()
    peak = torch.cuda.max_memory_allocated() - before if cuda else counter.peak
    model.zero_grad()
    variant.inputs[0].grad = None
    if cuda:
        with counter:
            variant.backward()
    model.zero_grad()
    variant.inputs[0].grad = None
    return {"ops": counter.ops, "casts": counter.casts, "saved": saved, "peak": peak}
