"""torch.compile: whole graphs, the values of the uncompiled model, and no new graphs as training goes on.

A graph is made for each state of the adapter that callers switch between: with gradient and without, enabled and
disabled, at strength 1 and at any other.
"""

from __future__ import annotations

import pytest
import torch
from hosts import library_hosts
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from vislora import attach, methods
from vislora.adapters import get
from vislora.testing import hosts
from vislora.testing.subject import close

HOSTS = {host.name: host for host in [*hosts(), *library_hosts()]}
# Said by dynamo's own look at the updates that hooks on the root hand to the graph behind them.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(host, method):
    model = host.build(0).train()
    return model, attach(model, get(method)(rank=4, **get(method).quick), targets=host.targets)


def compiled(model):
    graphs = CompileCounter()
    return torch.compile(model, backend=graphs, fullgraph=True), graphs


def trained(host, adapter, model, steps):
    """The losses of a few steps, and what `count` says after each."""
    optimizer = torch.optim.SGD(adapter.param_groups(0.05), momentum=0.9)
    adapter.bind(optimizer, steps)

    def closure():
        loss = host.run(model, 0).float().sub(0.5).square().mean() + adapter.penalty()
        loss.backward()
        return loss

    adapter.prepare(closure)
    for _ in range(steps):
        yield closure().item()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", methods())
def test_every_method_trains_in_one_graph(method):
    host = HOSTS["linear"]
    model, adapter = adapted(host, method)
    fast, graphs = compiled(model)
    plain = list(trained(host, *reversed(adapted(host, method)), 3))
    losses, count = [], []
    for loss in trained(host, adapter, fast, 3):
        losses.append(loss)
        count.append(graphs.frame_count)
    assert losses == pytest.approx(plain, rel=1e-4) and losses[-1] != losses[0]
    assert 0 < count[0] <= 2 and len(set(count)) == 1 and not counters["graph_break"]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mha", "timm_vit", "unet")]


@pytest.mark.parametrize("name", ["conv", *SLOW])
def test_graphs_are_kept_from_step_to_step_and_from_strength_to_strength(name):
    host = HOSTS[name]
    model, adapter = adapted(host, "nb_lora")
    base = host.run(model, 0)
    fast, graphs = compiled(model)
    count = [graphs.frame_count for _ in trained(host, adapter, fast, 3)]
    assert len(set(count)) == 1

    def made(call) -> int:
        before = graphs.frame_count
        close(call(fast), call(model), 1e-5)
        return graphs.frame_count - before

    full = host.run(model, 0)
    strengths = (0.9, 0.5, 0.25, 0.0, 1.0)
    new = [made(lambda m, w=w: setattr(adapter, "weight", w) or host.run(m, 0)) for w in strengths]
    assert sum(new) == new[0] == 1
    close(host.run(fast, 0), full, 1e-5)

    def off(m):
        with adapter.disabled():
            return host.run(m, 0)

    assert [made(off) > 0, made(lambda m: host.run(m, 0)), made(off)] == [True, 0, 0]
    close(off(fast), base, 1e-5)
    with torch.no_grad():
        assert [made(lambda m: host.run(m, 0)) > 0, made(lambda m: host.run(m, 0))] == [True, False]
    assert not counters["graph_break"]


def test_compiled_blocks_of_a_model_follow_the_adapter():
    """As diffusers compiles the repeated blocks alone; the root's hook stays outside."""
    host = HOSTS["timm_vit"]
    model, adapter = adapted(host, "nb_lora")
    plain = list(trained(host, *reversed(adapted(host, "nb_lora")), 3))
    graphs = CompileCounter()
    for block in model.blocks:
        block.compile(backend=graphs, fullgraph=True)
    losses, count = [], []
    for loss in trained(host, adapter, model, 3):
        losses.append(loss)
        count.append(graphs.frame_count)
    assert losses == pytest.approx(plain, rel=1e-4) and len(set(count)) == 1
    x = torch.randn(2, 5, 16)
    before = model.blocks[0](x)  # the root is bypassed
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    assert not torch.equal(model.blocks[0](x), before)
