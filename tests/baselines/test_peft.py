"""PEFT's own methods behind our handle, held to what the conformance suite asks of methods."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import yaml
from hosts import all_hosts, run_unet, unet
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraModel

import vislora
from vislora.baselines.peft import Peft
from vislora.io import read, write
from vislora.measure import norms
from vislora.testing import Subject, seeded
from vislora.testing.subject import close, refused

HOSTS = {host.name: host for host in all_hosts()}
# Small options where a type's own are made for larger layers.
TYPES = {
    "LORA": {"r": 4}, "ADALORA": {"init_r": 4, "target_r": 2}, "VERA": {"r": 4}, "LOHA": {"r": 4}, "LOKR": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0}, "BOFT": {"boft_block_size": 4}, "IA3": {}, "DELORA": {"r": 4}, "HRA": {},
    "RANDLORA": {"r": 4}, "MISS": {"r": 4}, "SHIRA": {"r": 2}, "LN_TUNING": {"target_modules": ["norm1", "norm_out"]},
}  # fmt: skip
EXACT_START = sorted(TYPES.keys() - {"HRA"})  # HRA's reflections cancel to rounding
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's advice on its own options


def state(model) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(before, model) -> bool:
    now = model.state_dict()
    return list(before) == list(now) and all(torch.equal(t, now[name]) for name, t in before.items())


def untouched(model, before, flags) -> bool:
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    grads = [p.requires_grad for p in model.parameters()] == flags
    return same(before, model) and grads and not hooks and "peft_config" not in model.__dict__


class Injected(Subject):
    def attach(self, name="default", seed=0, model=None):
        return vislora.attach(model or self.model, self.method, name=name, seed=seed)

    def bind(self, adapter, optimizer, steps):
        adapter.bind(optimizer, steps)


def subject(kind: str, host: str = "unet", **options) -> Injected:
    return Injected(Peft({"peft_type": kind, **TYPES[kind], **options}), HOSTS[host])


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_trains_is_switched_saved_loaded_and_taken_out(kind, tmp_path):
    s = subject(kind)
    before, out, flags = state(s.model), s.run(), [p.requires_grad for p in s.model.parameters()]
    random = torch.random.get_rng_state()
    handle = s.attach()
    assert torch.equal(random, torch.random.get_rng_state())
    if kind in EXACT_START:
        assert torch.equal(out, s.run())
    close(out, s.run(), 1e-5)
    start = {n: t.clone() for n, t in handle.named_tensors()}
    assert {id(p) for p in s.model.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}
    base = {n: t.clone() for n, t in s.model.state_dict().items() if "base_layer" in n}
    s.train(handle)
    moved = s.run()
    assert not torch.equal(out, moved)
    reached = [n for n, p in handle.named_parameters() if not torch.equal(p, start[n])]
    assert len(reached) > len(list(handle.parameters())) / 2
    assert all(torch.equal(t, s.model.state_dict()[n]) for n, t in base.items())
    with handle.disabled():
        assert torch.equal(out, s.run())
        refused(lambda: handle.save(tmp_path), "disabled")
    assert torch.equal(moved, s.run()) and all(p.requires_grad for p in handle.parameters())
    now = state(s.model)
    with handle.merged():
        close(moved, s.run(), 1e-4)
        refused(handle.disabled().__enter__, "merged")
    assert torch.equal(moved, s.run()) and same(now, s.model)
    with handle.hidden():
        assert same(before, s.model) and torch.equal(out, s.run())
    assert same(now, s.model)

    handle.save(tmp_path)
    handle.detach()
    assert untouched(s.model, before, flags) and torch.equal(out, s.run())
    again = vislora.load(s.model, tmp_path)
    close(moved, s.run(), 1e-6)  # AdaLoRA's file leaves out what was pruned; last bits depend on where memory lies
    assert again.sites
    again.detach(merge=True)
    close(moved, s.run(), 1e-4)
    assert list(s.model.state_dict()) == list(before) and [p.requires_grad for p in s.model.parameters()] == flags


@pytest.mark.parametrize("kind", ["LORA", "OFT", "VERA", "LOHA"])
@pytest.mark.parametrize("host", ["linear", "text_encoder", "llama", "hf_vit"])
def test_deltas_are_what_the_weights_would_have_to_change_by(kind, host):
    s = subject(kind, host)
    handle = s.attach()
    s.train(handle)
    other = s.host.build(0).eval()
    modules = dict(other.named_modules())
    deltas = handle.deltas()
    for name, delta in deltas.items():
        modules[name].weight.data += delta
    close(s.run(), s.run(model=other), 1e-4)
    measured = norms(handle)
    assert set(deltas) == set(handle.sites) == set(measured)
    for name, delta in deltas.items():
        assert measured[name].norm == pytest.approx(delta.norm().item(), rel=1e-4)


def test_the_start_is_a_function_of_the_seed():
    first, again, other = (dict(subject("LORA").attach(seed=seed).named_tensors()) for seed in (1, 1, 2))
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    assert not all(torch.equal(t, other[n]) for n, t in first.items())


def test_the_file_is_pefts_own_and_strict(tmp_path):
    s = subject("LORA")
    before, flags = state(s.model), [p.requires_grad for p in s.model.parameters()]
    handle = s.attach()
    s.train(handle)
    moved = s.run()
    handle.save(tmp_path)
    theirs = PeftModel.from_pretrained(seeded(unet)(0).eval(), tmp_path)
    close(moved, run_unet(theirs, 0), 1e-6)
    handle.detach()
    file = tmp_path / "adapter_model.safetensors"
    tensors, header = read(file)
    name = next(iter(tensors))
    for changed, words in (
        ({n: t for n, t in tensors.items() if n != name}, (name,)),
        ({**tensors, "base_model.model.stranger": torch.zeros(2)}, ("stranger",)),
        ({**tensors, name: tensors[name] * float("nan")}, (name, "NaN")),
        ({**tensors, name: torch.zeros(3, 3)}, (name, "(3, 3)")),
        ({**tensors, name: tensors[name].int()}, (name, "int32")),
    ):
        write(changed, header, file)
        refused(lambda: vislora.load(s.model, tmp_path), *words)
        assert untouched(s.model, before, flags)
    write(tensors, header, file)
    refused(lambda: vislora.load(s.model, tmp_path, weight=0.5), "weight", "0.5")
    assert untouched(s.model, before, flags)
    s.model.load_state_dict({k: 1.5 * v for k, v in before.items()})
    refused(lambda: vislora.load(s.model, tmp_path), "another base")
    vislora.load(s.model, tmp_path, allow_other_base=True)


def test_a_folder_that_peft_wrote_loads(tmp_path):
    model = get_peft_model(seeded(unet)(0).eval(), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    out = run_unet(model, 0)
    model.save_pretrained(tmp_path)
    parts = {"unet": seeded(unet)(0).eval(), "text_encoder": HOSTS["text_encoder"].build(0)}
    handle = vislora.load(parts, tmp_path)
    assert handle.method.kind == "LORA" and all(site.endswith("to_q") for site in handle.sites)
    close(out, run_unet(parts["unet"], 0), 1e-6)


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "lora_only"},
                                     {"modules_to_save": ["conv_out"]}], ids=lambda o: next(iter(o)))  # fmt: skip
def test_base_tensors_that_peft_writes_or_trains_come_back(options, tmp_path):
    s = subject("LORA", **options)
    before, out, flags = state(s.model), s.run(), [p.requires_grad for p in s.model.parameters()]
    handle = s.attach()
    close(out, s.run(), 1e-4)
    s.train(handle)
    moved = s.run()
    with handle.disabled():
        assert torch.equal(out, s.run())
    assert torch.equal(moved, s.run())
    assert (handle.base_copy > 0) == ("modules_to_save" not in options)
    if "modules_to_save" in options:
        assert handle.deltas()["conv_out"].any()
    assert handle.export(tmp_path) is None and not list(tmp_path.iterdir())
    handle.detach()
    assert untouched(s.model, before, flags)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def test_plain_lora_and_dora_are_exported_as_an_adapters_are(options, tmp_path):
    s = subject("LORA", **options)
    handle = s.attach()
    s.train(handle)
    moved, deltas = s.run(), handle.deltas()
    handle.export(tmp_path)
    handle.detach()
    adapter = vislora.load(s.model, tmp_path)
    assert adapter.method_name == ("dora" if options.get("use_dora") else "lora")
    close(moved, s.run(), 1e-5)
    ours = adapter.deltas()
    for name, delta in deltas.items():
        close(delta, ours[f"{name}"], 1e-3)


def test_what_is_no_lora_is_not_exported_and_said_once(tmp_path, caplog):
    handle = subject("BOFT").attach()
    with caplog.at_level(logging.WARNING):
        assert handle.export(tmp_path) is None
    assert "BOFT" in caplog.text and not list(tmp_path.iterdir())
    encoder = subject("LORA", "text_encoder", use_dora=True).attach()
    assert encoder.parts[""].unplain("text_encoder") and not encoder.parts[""].unplain("unet")


def adalora_reference(steps: int) -> tuple[dict, list[float]]:
    """The tensors and penalties of PEFT's own AdaLoRA, trained in PEFT's way."""
    model = seeded(unet)(0).eval()
    handle = subject("ADALORA").attach(model=model)
    start = {n: t.clone() for n, t in handle.named_tensors() if not n.startswith("schedule.")}
    sites = handle.sites
    handle.detach()
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=steps, target_modules=sites)
    peft = get_peft_model(model, config)
    own = {n.removeprefix("base_model.model."): p for n, p in peft.named_parameters()}
    with torch.no_grad():
        for name, tensor in start.items():
            own[name].copy_(tensor)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], 0.05, weight_decay=0.0)
    penalties = []
    for step in range(1, steps + 1):
        out = run_unet(model, step)

        class Output:
            loss = out.square().mean()

        forward = model.forward
        model.forward = lambda: Output  # noqa: B023  what PEFT's forward adds its term to
        before = Output.loss.item()
        loss = AdaLoraModel.forward(peft.base_model).loss
        model.forward = forward
        penalties.append(loss.item() - before)
        loss.backward()
        optimizer.step()
        peft.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return {n: p.detach() for n, p in own.items() if "lora_" in n}, penalties


def train_adalora(handle, optimizer, model, steps, first=1) -> list[float]:
    penalties = []
    for step in range(first, steps + 1):
        penalty = handle.penalty()
        (run_unet(model, step).square().mean() + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        penalties.append(penalty.item())
    return penalties


def test_adalora_follows_the_steps_as_in_pefts_own_loop_and_resumes_exactly(tmp_path):
    expected, terms = adalora_reference(6)
    s = subject("ADALORA")
    handle = s.attach()
    optimizer = torch.optim.AdamW(handle.param_groups(0.05), weight_decay=0.0)
    handle.bind(optimizer, 6)
    penalties = train_adalora(handle, optimizer, s.model, 3)
    half = {n: t.clone() for n, t in handle.named_tensors()}
    moments = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in handle.named_parameters()}
    penalties += train_adalora(handle, optimizer, s.model, 6, first=4)
    assert penalties == pytest.approx(terms, rel=1e-4)
    got = dict(handle.named_tensors())
    for name, tensor in expected.items():
        close(tensor, got[name], 1e-4)
    pruned = sum(int((t == 0).sum()) for n, t in got.items() if n.endswith(".lora_E.default") and "schedule" not in n)
    assert pruned == 2 * len(handle.sites)  # 4 to 2 a layer, on average
    whole = {n: t.clone() for n, t in got.items()}

    handle.save(tmp_path)
    moved = s.run()
    handle.detach()
    other = s.attach()
    optimizer = torch.optim.AdamW(other.param_groups(0.05), weight_decay=0.0)
    other.bind(optimizer, 6)
    other.load_tensors(half)
    other.step = 3
    for name, p in other.named_parameters():
        optimizer.state[p] = moments[name]
    train_adalora(other, optimizer, s.model, 6, first=4)
    resumed = dict(other.named_tensors())
    assert resumed.keys() == whole.keys() and all(torch.equal(t, resumed[n]) for n, t in whole.items())
    other.detach()
    spent = vislora.load(s.model, tmp_path)
    close(moved, s.run(), 1e-6)
    refused(lambda: spent.bind(torch.optim.SGD(spent.param_groups(0.1)), 6), "spent its budget")


def test_kasas_terms_come_through_the_penalty():
    handle = subject("LORA", kasa_config={"beta": 0.1, "gamma": 0.1}).attach()
    assert handle.method.has_penalty() and handle.penalty() > 0 and handle.penalty().requires_grad
    assert not subject("LORA").method.has_penalty()


def test_files_in_json_and_yaml_and_adapter_config_are_read(tmp_path):
    settings = {"peft_type": "lora", "r": 4, "lora_dropout": 0.1, "init_lora_weights": "gaussian"}
    (tmp_path / "a.json").write_text(json.dumps(settings))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "b.yaml").write_text("peft_type: DELORA\ndelora_lambda: 1e-1\n")
    LoraConfig(r=4, target_modules=["to_q"]).save_pretrained(tmp_path)
    one, two = Peft(tmp_path / "a.json"), Peft(tmp_path / "a.yaml")
    assert one.settings == two.settings == {**settings, "peft_type": "LORA"} and one.kind == "LORA"
    assert Peft(tmp_path / "b.yaml").settings["delora_lambda"] == 0.1
    own = Peft(tmp_path / "adapter_config.json").settings
    assert own["target_modules"] == ["to_q"] and "inference_mode" not in own and "peft_version" not in own
    assert Peft(LoraConfig(r=4, target_modules=["to_q"]).to_dict()).settings["r"] == 4


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, ("names no peft_type", "LORA", "BOFT")),
        ({"peft_type": "LORRA"}, ("LORRA", "did you mean", "LORA")),
        ({"peft_type": "PREFIX_TUNING"}, ("PREFIX_TUNING", "prompt")),
        ({"peft_type": "P_TUNING"}, ("P_TUNING", "prompt")),
        ({"peft_type": "XLORA"}, ("XLORA",)),
        ({"peft_type": "LORA", "init_lora_weights": "eva"}, ("eva", "data")),
        ({"peft_type": "LORA", "monteclora_config": {}}, ("monteclora_config",)),
        ({"peft_type": "LORA", "lora_alhpa": 3}, ("lora_alhpa", "lora_alpha")),
        ({"peft_type": "LORA", "r": -1}, ("LORA", "-1")),
        ({"peft_type": "LORA", "target_modules": ["nowhere"]}, ("LORA", "nowhere")),
        ({"peft_type": "ADALORA", "init_r": 2, "target_r": 2}, ("init_r", "target_r")),
        ({"peft_type": "MISS", "r": 500}, ("MISS", "500")),
    ],
)
def test_bad_configurations_are_refused_without_a_trace(given, words):
    model = seeded(unet)(0)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    refused(lambda: vislora.attach(model, "peft", peft_config=given), *words)
    assert untouched(model, before, flags)
    vislora.attach(model, "none").detach()  # nothing holds it


def test_targets_and_names():
    model = seeded(unet)(0)
    handle = vislora.attach(model, "peft", targets=["to_v"], peft_config={"peft_type": "LOKR"}, name="mine")
    assert all(site.endswith("to_v") for site in handle.sites) and "mine" in model.peft_config
    for method in ("lora", "full"):
        refused(lambda method=method: vislora.attach(model, method), "peft", "detach")
    handle.detach()
    config = {"peft_type": "LORA", "target_modules": ["to_q"]}
    refused(lambda: vislora.attach(model, "peft", targets=["to_v"], peft_config=config), "to_v", "keep one")
    refused(lambda: vislora.attach(model, "peft"), "peft_config", "needs it")
    fused = HOSTS["fused_qkv"].build(0)
    refused(lambda: vislora.attach(fused, "peft", targets=["qkv[q]"], peft_config={"peft_type": "LORA"}), "qkv[q]")
    parts = {"unet": model, "text_encoder": HOSTS["text_encoder"].build(0)}
    both = vislora.attach(parts, "peft", peft_config={"peft_type": "LORA", "r": 2})
    assert {site.partition(".")[0] for site in both.sites} == {"unet", "text_encoder"}
    both.detach()
    config = {"peft_type": "LORA", "target_modules": ["to_q"]}  # of which the text encoder has none
    refused(lambda: vislora.attach(parts, "peft", peft_config=config), "LORA", "to_q")
    assert "peft_config" not in model.__dict__
    vislora.attach(parts, "peft", peft_config={**config, "target_modules": ["to_q", "q_proj"]}).detach()


def test_a_type_that_peft_cannot_merge_has_no_norms(caplog):
    s = Injected(Peft({"peft_type": "LILY", "r": 4}), HOSTS["unet"])
    handle = s.attach()
    with caplog.at_level(logging.WARNING):
        assert norms(handle) == {}
    assert "LILY" in caplog.text
    refused(handle.deltas, "LILY")
    before = state(s.model)
    refused(handle.merge, "LILY")
    assert same(before, s.model)
