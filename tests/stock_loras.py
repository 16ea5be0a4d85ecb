"""Adapters on tiny pipelines, and what stock diffusers and PEFT make of the files that they export."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer

import vislora

# diffusers' own converters of Flux files take a width of 3072 for granted, so a tiny file stays off its single blocks;
# its reader of text encoders in kohya's files goes by a file's having out_proj.
TARGETS = {
    "sdxl": {"unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
             "text_encoder": ["q_proj", "out_proj", "fc1"], "text_encoder_2": ["v_proj", "out_proj", "fc2"]},
    "sd3": {"transformer": "all-linear", "text_encoder": ["q_proj", "out_proj", "fc1"],
            "text_encoder_2": ["v_proj", "out_proj"]},
    "flux": {"transformer": r"transformer_blocks\.0\..*(to_.|to_out\.0|add_._proj|to_add_out|linear|proj|net\.2)",
             "text_encoder": ["q_proj", "out_proj", "fc1"]},
}  # fmt: skip
T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}


def attach(pipe, family: str, method="lora", targets=None, **options):
    """An adapter whose every layer does something."""
    adapter = vislora.attach(pipe, method, targets=targets or TARGETS[family], **options)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in adapter.named_tensors():
            if p.requires_grad or (adapter.method.needs_prepare and p.dim() == 2):
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return adapter


def neutral(pipe, name: str) -> str:
    """A module's name as files have it."""
    part, _, path = name.partition(".")
    bare = part.startswith("text_encoder") and path.startswith("encoder.layers")
    return f"{part}.text_model.{path}" if bare else name


def stock_deltas(pipe) -> dict[str, torch.Tensor]:
    return {
        neutral(pipe, f"{part}.{name}"): module.get_delta_weight(next(iter(module.lora_A))).flatten(1)
        for part, root in pipe.components.items() if isinstance(root, torch.nn.Module)
        for name, module in root.named_modules() if isinstance(module, LoraLayer)
    }  # fmt: skip


def deltas(adapter, pipe) -> dict[str, torch.Tensor]:
    return {neutral(pipe, name): delta.flatten(1) for name, delta in adapter.deltas().items() if delta.any()}


def agree(a, b, tolerance=1e-5) -> bool:
    return a.keys() == b.keys() and all((a[k] - b[k]).norm() <= tolerance * b[k].norm() for k in b)


def dense(file) -> dict[str, torch.Tensor]:
    return {la.name: (la.factors()[0] @ la.factors()[1]).float() for la in file.layers}
