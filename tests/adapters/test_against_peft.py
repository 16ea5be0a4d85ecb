"""LoRA, rsLoRA, DoRA and PiSSA against the installed PEFT: outputs and gradients from equal factors."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from vislora import attach


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))


@pytest.mark.parametrize(
    "method, options, theirs",
    [
        ("lora", {"alpha": 6}, {}),
        ("rslora", {"alpha": 6}, {"use_rslora": True}),
        ("dora", {"alpha": 6}, {"use_dora": True}),
        ("pissa", {}, {"init_lora_weights": "pissa"}),
    ],
)
def test_outputs_and_gradients_agree(method, options, theirs):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    alpha = options.get("alpha", 4)
    peft = get_peft_model(chain(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["0", "2"], **theirs)).double()
    model = chain().double()
    adapter = attach(model, method, rank=4, **options)
    ours = dict(adapter.named_parameters())
    layers = {name: getattr(peft.base_model.model, name) for name in ("0", "2")}
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, layer in layers.items():
            pairs = [("A", layer.lora_A["default"].weight), ("B", layer.lora_B["default"].weight)]
            if method == "pissa":  # singular vectors come up to sign: the products must agree, then factors are shared
                start = [t for n, t in adapter.named_tensors() if n in (f"{name}.A0", f"{name}.B0")]
                product = pairs[1][1] @ pairs[0][1]
                assert torch.allclose(start[1] @ start[0], product, atol=1e-5)
                continue
            for key, weight in pairs:
                weight.add_(0.3 * torch.randn(weight.shape, generator=noise, dtype=torch.float64))
                ours[f"{name}.{key}"].copy_(weight)
            if method == "dora":
                assert torch.allclose(ours[f"{name}.c"], layer.lora_magnitude_vector["default"].weight, atol=1e-6)
                layer.lora_magnitude_vector["default"].weight.mul_(1.1)
                ours[f"{name}.c"].copy_(layer.lora_magnitude_vector["default"].weight)
    out, expected = model(x.double()), peft(x.double())
    assert torch.allclose(out, expected, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in layers.items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a, b = ours[f"{name}.A"], ours[f"{name}.B"]
        if method == "pissa":  # B dA + dB A is free of signs
            theirs_move, our_move = B @ A.grad + B.grad @ A, b @ a.grad + b.grad @ a
            assert torch.allclose(our_move, theirs_move, rtol=1e-3, atol=1e-4 * theirs_move.abs().max().item())
            continue
        assert torch.allclose(a.grad, A.grad, rtol=1e-6, atol=1e-8)
        assert torch.allclose(b.grad, B.grad, rtol=1e-6, atol=1e-8)
        if method == "dora":
            assert torch.allclose(ours[f"{name}.c"].grad, layer.lora_magnitude_vector["default"].weight.grad, rtol=1e-6)
