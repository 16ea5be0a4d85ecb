"""torch.compile: whole graphs, and no new ones as training goes on."""

from __future__ import annotations

import pytest
import torch
from hosts import library_hosts, further_hosts
from torch._dynamo.testing import CompileCounter

from vislora import attach, methods
from vislora.adapters import get
from vislora.testing import hosts

HOSTS = {host.name: host for host in [*hosts(), *library_hosts(), *further_hosts()]}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    """The model compiled as one graph, and how often that happened."""
    graphs = CompileCounter()
    return torch.compile(model, backend=graphs, fullgraph=True), graphs


import os, warnings
def test_probe():
    warnings.simplefilter("default")
    for name in os.environ["HOSTS"].split(","):
        for method in os.environ.get("METHODS", "lora").split(","):
            torch._dynamo.reset()
            host = HOSTS[name]
            model = host.build(0).train()
            try:
                adapter = attach(model, get(method)(rank=4, **get(method).quick), targets=host.targets)
                fast, graphs = compiled(model)
                opt = torch.optim.SGD(adapter.param_groups(0.01))
                adapter.bind(opt, 5)
                def closure():
                    loss = host.run(fast, 0).float().square().mean(); loss.backward(); return loss
                adapter.prepare(closure)
                n=[]
                for _ in range(4):
                    closure(); opt.step(); opt.zero_grad(); n.append(graphs.frame_count)
                s=[]
                for w in (0.9,0.8,0.7,0.0,1.0):
                    adapter.weight = w; host.run(fast,0); s.append(graphs.frame_count)
                adapter.weight=0.5
                d=[]
                for _ in range(2):
                    host.run(fast,0)
                    with adapter.disabled(): host.run(fast,0); d.append(graphs.frame_count)
                g=[]
                with torch.no_grad():
                    for _ in range(2): host.run(fast,0); g.append(graphs.frame_count)
                print(name, method, n, s, d, g)
            except Exception as e:
                print(name, method, type(e), str(e)[:600].replace('\n',' | '))
