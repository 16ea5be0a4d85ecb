"""LoRA files for tests: random layers of a tiny Stable Diffusion, and what stock tools write."""

from __future__ import annotations

import torch

from vislora.formats import Layer
from vislora.linalg import product_singular_values

LINEAR = {
    "unet": ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.1.attentions.0.proj_in",
             "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "down_blocks.0.attentions.0.proj_out"),
    "text_encoder": ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1"),
}  # fmt: skip


def layers(components=("unet", "text_encoder"), rank=3, scale=1.0, dtype=torch.float32, conv=False, size=(12, 10)):
    """Random layers; the i-th has rank + i % 2."""
    g = torch.Generator().manual_seed(rank)
    made = []
    for component in components:
        for i, path in enumerate(LINEAR[component.removesuffix("_2")]):
            r = rank + i % 2
            up, down = torch.randn(size[0], r, generator=g), torch.randn(r, size[1], generator=g)
            made.append(Layer(component, path, up.to(dtype), down.to(dtype), scale))
    if conv:
        up, down = torch.randn(6, rank, 1, 1, generator=g), torch.randn(rank, 4, 3, 3, generator=g)
        made.append(Layer("unet", "down_blocks.0.resnets.0.conv1", up.to(dtype), down.to(dtype), scale))
    return made


def dense(layer: Layer) -> torch.Tensor:
    """The update as a matrix, float64."""
    up, down = layer.factors()
    return up @ down


def norm(layer: Layer, p: float) -> float:
    return torch.linalg.vector_norm(product_singular_values(*layer.factors()), ord=p).item()


def same(a: list[Layer], b: list[Layer], tolerance: float = 1e-6) -> bool:
    """Whether both say the same of the same layers."""
    a, b = ({layer.name: dense(layer) for layer in group} for group in (a, b))
    return a.keys() == b.keys() and all((a[k] - b[k]).norm() <= tolerance * a[k].norm() for k in a)
