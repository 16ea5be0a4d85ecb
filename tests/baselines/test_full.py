"""Full and partial fine-tuning, and the frozen base, held to what the conformance suite asks of methods."""

from __future__ import annotations

import pytest
import torch
from hosts import all_hosts, run_unet, unet
from torch import nn

import vislora
from vislora.baselines.full import Full
from vislora.io import FILE, header_of, read, write
from vislora.measure import certificate, norms
from vislora.testing import Subject, equality, files, seeded
from vislora.testing.subject import close, refused

HOSTS = {host.name: host for host in all_hosts()}
WHOLE = [host for host in HOSTS if host != "fused_qkv"]
SHARED = (equality.disabled_is_the_base, equality.autocast_agrees, files.copies_are_independent)


class Whole(Subject):
    """Full fine-tuning of a host, without targets."""

    def attach(self, name="default", seed=0, model=None):
        return vislora.attach(model or self.model, self.method, name=name, seed=seed)

    def bind(self, adapter, optimizer, steps):
        adapter.bind(optimizer, steps)


def state(model) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(before, model) -> bool:
    now = model.state_dict()
    return before.keys() == now.keys() and all(torch.equal(t, now[name]) for name, t in before.items())


@pytest.fixture(params=HOSTS)
def subject(request):
    return Whole(Full(), HOSTS[request.param])


@pytest.mark.parametrize("check", SHARED, ids=lambda check: check.__name__)
def test_checks_of_the_conformance_suite(subject, check):
    check(subject)


def test_starts_as_the_base_trains_everything_and_leaves_no_trace(subject):
    s = subject
    before, out = state(s.model), s.run()
    flags = [p.requires_grad for p in s.model.parameters()]
    handle = s.attach()
    assert torch.equal(out, s.run())
    assert all(not d.any() for d in handle.deltas().values())
    assert {id(p) for p in handle.parameters()} == {id(p) for p in s.model.parameters()}
    s.train(handle, steps=2)
    reached = {n for n, p in handle.named_parameters() if not torch.equal(p, before[n])}
    assert len(reached) > len(flags) / 2  # what the loss does not reach has no gradient
    moved, trained = s.run(), state(s.model)
    handle.detach()
    assert same(before, s.model) and torch.equal(out, s.run())
    assert [p.requires_grad for p in s.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in s.model.modules())
    again = s.attach()
    again.load_tensors(trained)
    again.detach(merge=True)
    assert same(trained, s.model) and torch.equal(moved, s.run())


def test_deltas_are_the_difference_of_the_weights(subject):
    s = subject
    handle = s.attach()
    s.train(handle)
    moved = s.run()
    other = s.host.build(0).eval()
    modules = dict(other.named_modules())
    matrices = {n for n, p in s.model.named_parameters() if p.dim() > 1}
    deltas = handle.deltas()
    assert {f"{n}.weight" if f"{n}.weight" in matrices else n for n in deltas} == matrices
    for name, delta in deltas.items():
        (modules[name].weight if name in modules else other.get_parameter(name)).data += delta
    own = dict(s.model.named_parameters())
    for name, parameter in other.named_parameters():
        if parameter.dim() < 2:
            parameter.data.copy_(own[name])
    close(moved, s.run(model=other), 1e-4)
    with handle.disabled():
        assert all(torch.equal(d, deltas[n]) for n, d in handle.deltas().items())
        refused(lambda: handle.save("nowhere"), "disabled")
    measured = norms(handle)
    for name, delta in deltas.items():
        exact = torch.linalg.svdvals(delta.flatten(1))[0].item()
        assert measured[name].spectral == pytest.approx(exact, rel=1e-3)
        assert measured[name].norm == pytest.approx(delta.norm().item(), rel=1e-5) and measured[name].bound is None


def test_saved_and_loaded_is_equal_and_strict(subject, tmp_path):
    s = subject
    base = state(s.model)
    handle = s.attach()
    s.train(handle)
    out, trained = s.run(), state(s.model)
    file = handle.save(tmp_path)
    handle.detach()
    again = vislora.load(s.model, tmp_path)
    assert again.method == Full() and same(trained, s.model) and torch.equal(out, s.run())
    again.detach()
    assert same(base, s.model)
    tensors, header = read(file)
    name = next(n for n, t in tensors.items() if t.dim() > 1)
    for changed, words in (
        ({n: t for n, t in tensors.items() if n != name}, (name,)),
        ({**tensors, "stranger.weight": torch.zeros(2)}, ("stranger",)),
        ({**tensors, name: tensors[name] * float("nan")}, (name, "NaN")),
        ({**tensors, name: torch.zeros(3, 3, 3)}, (name, "(3, 3, 3)")),
        ({**tensors, name: tensors[name].int()}, (name, "int32")),
    ):
        write(changed, header, file)
        refused(lambda: vislora.load(s.model, tmp_path), *words)
        assert same(base, s.model)
    write(tensors, header, file)
    s.model.load_state_dict({k: 1.5 * v if v.is_floating_point() else v for k, v in base.items()})
    refused(lambda: vislora.load(s.model, tmp_path), "another base")
    vislora.load(s.model, tmp_path, allow_other_base=True)
    assert same(trained, s.model)


@pytest.mark.parametrize("host", WHOLE)
def test_targets_train_the_modules_they_name_alone(host, tmp_path):
    s = Subject(Full(), HOSTS[host])
    targets = {
        "linear": "all-linear", "timm_vit": ["attn.proj"], "conv": ["first", "grouped"], "mha": ["attn.out_proj"]
    }.get(host, "attention")  # fmt: skip
    handle = vislora.attach(s.model, "full", targets=targets)
    names = {n for n, p in s.model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in handle.named_parameters()}
    assert {n.rpartition(".")[0] for n in names} == set(handle.sites)
    assert set(handle.deltas()) == set(handle.sites) and "weight" in {n.rpartition(".")[2] for n in names}
    before = state(s.model)
    optimizer = torch.optim.AdamW(handle.param_groups(0.05))
    handle.bind(optimizer, 1)
    s.backward(handle, 0)
    optimizer.step()
    changed = {n for n, t in s.model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and changed <= names and handle.step == 1
    out = s.run()
    assert len(read(handle.save(tmp_path))[0]) == len(names)
    handle.detach()
    assert same(before, s.model)
    vislora.load(s.model, tmp_path)
    assert torch.equal(out, s.run())


def test_what_cannot_be_trained_is_refused_without_a_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    refused(lambda: vislora.attach(model, "full"), "float16", "float32")
    assert same(before, model) and [p.requires_grad for p in model.parameters()] == flags
    fused = HOSTS["fused_qkv"].build(0)
    refused(lambda: vislora.attach(fused, "full", targets=["qkv[q]"]), "qkv[q]", "name the whole matrix")
    refused(lambda: vislora.attach(fused, "full", rank=4), "rank", "full has no such option")
    refused(lambda: vislora.attach(fused, "full", targets=["qkw"]), "qkw", "qkv")
    handle = vislora.attach(fused, "full")
    refused(lambda: setattr(handle, "weight", 0.5), "weight", "0.5")
    for method in ("full", "none", "lora"):
        refused(lambda method=method: vislora.attach(fused, method), "full", "detach")
    handle.detach()
    adapter = vislora.attach(fused, "lora", rank=2, targets=["qkv[q]"])
    refused(lambda: vislora.attach(fused, "full"), "default", "detach that adapter first")
    adapter.detach()
    vislora.attach(fused, "full").detach()


def test_a_model_that_is_cast_later_takes_its_base_along():
    model = HOSTS["linear"].build(0)
    before = state(model.to(torch.float32))
    handle = vislora.attach(model, "full")
    with torch.no_grad():
        next(handle.parameters()).add_(1.0)
    model.to(torch.bfloat16)
    with handle.disabled():
        assert all(torch.equal(t, before[n].to(torch.bfloat16)) for n, t in model.state_dict().items())
    assert max(d.abs().max().item() for d in handle.deltas().values()) == pytest.approx(1.0, rel=0.02)
    handle.detach()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_tensors_that_the_model_has_replaced_are_not_trained_unseen():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    handle = vislora.attach(model, "full")
    optimizer = torch.optim.SGD(handle.param_groups(0.1))
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())  # as fully_shard does
    refused(lambda: handle.bind(optimizer, 1), "1.weight was replaced")
    model[1].weight = dict(handle.named_parameters())["1.weight"]
    handle.bind(optimizer, 1)


def test_buffers_that_training_moves_come_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = state(model)
    handle = vislora.attach(model, "full")
    model.train()(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    with handle.disabled():
        assert same(before, model)
    assert "1.running_mean" in dict(handle.named_tensors())
    handle.detach()
    assert same(before, model)


def test_components_have_rates_and_files_of_their_own(tmp_path):
    parts = {"unet": HOSTS["unet"].build(0), "text_encoder": HOSTS["text_encoder"].build(0)}
    handle = vislora.attach(parts, "full", targets={"unet": None, "text_encoder": ["q_proj"]})
    groups = handle.param_groups(0.1, {"text_encoder": 0.01})
    assert [(g["lr"], len(g["params"])) for g in groups] == [(0.1, len(list(parts["unet"].parameters()))), (0.01, 4)]
    assert "text_encoder.encoder.layers.0.self_attn.q_proj" in handle.sites
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.01)
    handle.save(tmp_path / "ours")
    assert handle.export(tmp_path) == tmp_path / "unet"
    trained = {c: state(root) for c, root in parts.items()}
    for component, root in parts.items():
        read_back = type(root).from_pretrained(tmp_path / component).state_dict()
        assert all(torch.equal(t, read_back[n]) for n, t in trained[component].items())
    handle.detach()
    vislora.load(parts, tmp_path / "ours")
    assert all(same(trained[c], root) for c, root in parts.items())
    refused(lambda: vislora.load({"unet": HOSTS["unet"].build(0)}, tmp_path / "ours"), "text_encoder")


def test_a_bare_unets_file_finds_its_place_in_a_pipelines_parts(tmp_path):
    model = seeded(unet)(0).eval()
    handle = vislora.attach(model, "full")
    with torch.no_grad():
        next(handle.parameters()).add_(0.5)
    out = run_unet(model, 0)
    handle.save(tmp_path)
    handle.check_exportable()
    parts = {"unet": seeded(unet)(0).eval(), "text_encoder": HOSTS["text_encoder"].build(0)}
    vislora.load(parts, tmp_path)
    assert torch.equal(out, run_unet(parts["unet"], 0))
    half = seeded(unet)(0).to(torch.bfloat16).eval()
    vislora.load(half, tmp_path)  # for use, not for training
    assert half.dtype == torch.bfloat16
    close(out, run_unet(half, 0).float(), 0.05)
    stranger = vislora.attach(nn.Linear(3, 3), "full")
    refused(stranger.check_exportable, "no place for Linear")


def test_a_damaged_header_is_refused(tmp_path):
    model = HOSTS["linear"].build(0)
    handle = vislora.attach(model, "full")
    tensors = {n: t.detach().clone() for n, t in handle.named_tensors()}
    write(tensors, header_of(handle), tmp_path / FILE)
    handle.detach()
    refused(lambda: vislora.load(model, tmp_path), "damaged header", "whole")


def test_the_frozen_base_answers_for_no_change():
    model = HOSTS["unet"].build(0)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    handle = vislora.attach(model, "none")
    assert not any(p.requires_grad for p in model.parameters()) and list(handle.parameters()) == []
    assert handle.deltas() == {} and handle.penalty() == 0 and handle.sites == []
    assert certificate(handle)["largest_norm"] == 0.0
    with handle.disabled(), handle.merged():
        assert same(before, model)
    for call, word in (
        (lambda: handle.save("x"), "nothing to save"),
        (lambda: handle.export("x"), "nothing to export"),
        (lambda: handle.bind(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 1), "trains nothing"),
        (lambda: vislora.attach(nn.Linear(2, 2), "none", targets=["x"]), "trains nothing"),
    ):
        refused(call, word)
    handle.detach()
    assert [p.requires_grad for p in model.parameters()] == flags
