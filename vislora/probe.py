"""The gradient probe: how well an adapter's step follows the step that full fine-tuning would make.

OD-LoRA's measure (section 3.1, equation 2, figures 2 and 4), for every method: with G the gradient of the adapted
weight, gradient descent on the method's own tensors moves the weight along -G~, the equivalent gradient; the probe is
the cosine between G and G~ in the Frobenius inner product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from . import distributed
from .adapter import Adapter
from .adapters import Method
from .errors import InputError
from .linalg import precise, without_autocast
from .part import Part
from .prepare import Key, devices, watched
from .site import Site, qualified


def require_fit(steps: int | None, method: object) -> None:
    """Raise InputError where a run asks for the probe (every `steps` steps) of what has no low-rank update."""
    if steps is not None and steps < 1:
        raise InputError("--probe_steps", f"{steps} is less than 1", "give a number of steps, or leave it out")
    if steps is not None and not isinstance(method, Method):
        wrong = f"measures the updates of vislora's methods, not {type(method).__name__.lower()}"
        raise InputError("--probe_steps", wrong, "leave it out, or take another --adapter")


def cosines(adapter: Adapter, closure: Callable[[], object], backwards: int = 1) -> dict[str, float]:
    """{site: cosine between its full and its equivalent gradient}, in [-1, 1]; 0 where one of the two vanishes.

    closure() runs forward and backward, `backwards` times over where an optimizer step accumulates so many batches.
    With one backward each layer's full gradient is measured and freed while the backward runs, so that the device
    holds one at a time; with more, their sums wait on the CPU. Gradients of all tensors, requires_grad of the weights
    and the global random state are afterwards what they were. Of several processes each measures its own batches; where
    the model is in shards, all measure the mean of their gradients, and must call this together.
    Differs from the paper: a role with a learning rate of its own (LoRA+) is weighted by it. Optimizers that replace
    gradients (LoRA-Pro and its kin) are not looked through.
    Raises InputError for layers that the loss does not reach, and for more backward passes than were announced.
    """
    owners: dict[Key, list[tuple[str, Part, Site]]] = {}
    for component, part in adapter.parts.items():
        for site in part.sites:
            owners.setdefault(site.key, []).append((qualified(component, site.name), part, site))
    weights = [named[0][2] for named in owners.values()]
    found: dict[str, float] = {}
    sums: dict[Key, Tensor] = {}
    arrived = dict.fromkeys(owners, 0)

    def add(weight: Site, gradient: Tensor) -> None:
        key, gradient = weight.key, distributed.whole(gradient)
        arrived[key] += 1
        if arrived[key] > backwards:
            wrong = f"{owners[key][0][0]} got more than {backwards} gradients"
            raise InputError("probe", wrong, "say how many backward passes the closure makes")
        if backwards > 1:
            gradient = gradient.to("cpu", torch.promote_types(gradient.dtype, torch.float32))
            gradient = sums[key] = sums.pop(key) + gradient if key in sums else gradient
        if arrived[key] == backwards:
            whole = sums.pop(key, gradient).to(weight.parameter.device).flatten(1)
            for name, part, site in owners[key]:
                found[name] = _cosine(part, site, whole if site.rows is None else whole[site.rows])

    kept = [(p, p.grad) for p in adapter.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        with watched(weights, add), torch.random.fork_rng(devices(weights)):
            closure()
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
    for key, count in arrived.items():
        if count < backwards:
            wrong = f"{owners[key][0][0]} got {count} of {backwards} gradients"
            raise InputError("probe", wrong, "have the closure run every forward and backward that it stands for")
    return {name: found[name] for sites in owners.values() for name, _, _ in sites}


@torch.no_grad()
def _cosine(part: Part, site: Site, gradient: Tensor) -> float:
    with without_autocast(gradient.device):
        G = full_gradient(part, site, precise(gradient))
        outer, inner = equivalent_gradient(part, site, G)
    if inner is None:
        product, square = (G * outer).sum(), outer.square().sum()
    else:
        product = ((G @ inner.mT) * outer).sum()
        square = ((outer.mT @ outer) * (inner @ inner.mT)).sum()
    size = torch.linalg.vector_norm(G) * square.clamp_min(0).sqrt()
    return (product / size).clamp(-1, 1).item() if size > 0 else 0.0


@torch.no_grad()
def full_gradient(part: Part, site: Site, gradient: Tensor) -> Tensor:
    """The gradient of the adapted weight (m, n), from that of the frozen one, whose rows DoRA's magnitudes rescale."""
    weight = site.weight().to(gradient.dtype)
    scale = part.method.factors(part.tensors_of(site)).with_row_scale(weight).row_scale
    return gradient if scale is None else gradient / (1 + part.strength * (scale[:, None].to(gradient.dtype) - 1))


@torch.enable_grad()
def equivalent_gradient(part: Part, site: Site, G: Tensor) -> tuple[Tensor, Tensor | None]:
    """G~ of the full gradient G (m, n) as factors (m, k), (k, n), or as (m, n) and None where it has no such form.

    G~ = J J^T G for the Jacobian J of the weight by the site's trainable tensors. J^T G is their own gradient; J times
    it comes by differentiating J^T u, which is linear in u, once more.
    """
    own = part.own_tensors(site)
    trained = {name: t.detach().to(G.dtype).requires_grad_() for name, t in own.items() if isinstance(t, nn.Parameter)}
    fixed = {n: t.to(G.dtype) for n, t in vars(part.tensors_of(site)).items() if n not in trained}
    update = part.method.factors(SimpleNamespace(**fixed, **trained))
    up, down = update.factors()
    if update.magnitude is None:
        gradients = _gradients(((G @ down.mT) * up).sum(), trained)
        d_up, d_down = _tangents([up, down], trained, _stepped(part, gradients))
        return torch.cat([d_up, up.detach()], dim=1), torch.cat([down.detach(), d_down])
    weight = site.weight().to(G.dtype)
    gradients = _gradients((G * update.with_row_scale(weight).dense(weight)).sum(), trained)
    # The norm that DoRA's gradient takes for a constant moves with the step all the same.
    moving = replace(update, detach_norm=False).with_row_scale(weight).dense(weight)
    return _tangents([moving], trained, _stepped(part, gradients))[0], None


def _gradients(loss: Tensor, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(trained, found, strict=True))


def _stepped(part: Part, gradients: dict[str, Tensor]) -> list[Tensor]:
    """Gradients, each times its role's share of the learning rate."""
    method = part.method
    return [method.lr_ratio(method.roles.get(name, "")) * gradient for name, gradient in gradients.items()]


def _tangents(outputs: list[Tensor], trained: dict[str, Tensor], directions: list[Tensor]) -> list[Tensor]:
    """How the outputs move when the trained tensors move along directions."""
    probes = [torch.zeros_like(out, requires_grad=True) for out in outputs]
    moving = [(out, u) for out, u in zip(outputs, probes, strict=True) if out.requires_grad]
    back = torch.autograd.grad(
        [out for out, _ in moving], list(trained.values()), [u for _, u in moving], create_graph=True,
        materialize_grads=True,
    )  # fmt: skip
    live = [(g, d) for g, d in zip(back, directions, strict=True) if g.requires_grad]
    return list(torch.autograd.grad([g for g, _ in live], probes, [d for _, d in live], materialize_grads=True))
