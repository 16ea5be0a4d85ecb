"""The names of SDXL's, SD3's and Flux's original checkpoints, which kohya's files use.

Some matrices of SD3 and Flux hold several of diffusers', row after row: q, k and v, and in Flux's single blocks what
the MLP takes. A LoRA of the parts becomes one of the whole, and the other way round, without loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..linalg import precise
from .lora import Layer
from .vocabulary import flat

_BLOCKS = 64  # of each kind, more than any released size has
_MLP = 4  # rows of a single block's MLP over its width

# {original path: paths of diffusers' modules, in the order of their rows}; {} is the block's number.
_SD3 = {
    "joint_blocks.{}.x_block.attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "joint_blocks.{}.x_block.attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "joint_blocks.{}.x_block.attn2.qkv": tuple(f"transformer_blocks.{{}}.attn2.to_{x}" for x in "qkv"),
    "joint_blocks.{}.x_block.attn2.proj": ("transformer_blocks.{}.attn2.to_out.0",),
    "joint_blocks.{}.x_block.mlp.fc1": ("transformer_blocks.{}.ff.net.0.proj",),
    "joint_blocks.{}.x_block.mlp.fc2": ("transformer_blocks.{}.ff.net.2",),
    "joint_blocks.{}.x_block.adaLN_modulation.1": ("transformer_blocks.{}.norm1.linear",),
    "joint_blocks.{}.context_block.attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"),
    "joint_blocks.{}.context_block.attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "joint_blocks.{}.context_block.mlp.fc1": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "joint_blocks.{}.context_block.mlp.fc2": ("transformer_blocks.{}.ff_context.net.2",),
    "joint_blocks.{}.context_block.adaLN_modulation.1": ("transformer_blocks.{}.norm1_context.linear",),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}  # fmt: skip
_FLUX = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "single_blocks.{}.linear1": (*(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
                                 "single_transformer_blocks.{}.proj_mlp"),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}  # fmt: skip
_TABLES = {"sd3": _SD3, "flux": _FLUX}


@cache
def parts_of(family: str) -> dict[str, tuple[str, ...]]:
    """{original path: diffusers' paths} of "sd3" or "flux", a line a module."""

    def lines() -> Iterator[tuple[str, tuple[str, ...]]]:
        for name, paths in _TABLES[family].items():
            for i in range(_BLOCKS) if "{}" in name else (0,):
                yield name.format(i), tuple(path.format(i) for path in paths)

    return dict(lines())


@cache
def by_flat(family: str) -> dict[str, str]:
    """{flat name: original path}."""
    return {flat(name): name for name in parts_of(family)}


@cache
def whole_of(family: str) -> dict[str, str]:
    """{diffusers' path: the original path that holds it}."""
    return {path: name for name, paths in parts_of(family).items() for path in paths}


def named_in(name: str) -> str | None:
    """"sd3" or "flux" for a flat name that the one has and the other has not."""
    fits = [family for family in _TABLES if name in by_flat(family)]
    return fits[0] if len(fits) == 1 else None


def fused(layers: list[Layer], family: str) -> list[Layer]:
    """Layers of a transformer under their original paths; scales must be 1.

    Parts that share their inner factor are stacked; others stand block by block, so that ranks add up.
    Raises InputError for a module that the original checkpoint does not have.
    """
    found: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        whole = whole_of(family).get(layer.path)
        if whole is None:
            wrong = f"{layer.name} has no name in {family}'s original checkpoint"
            raise InputError("export", wrong, "export it as diffusers or peft")
        found.setdefault(whole, {})[layer.path] = layer
    return [_whole(name, own, parts_of(family)[name]) for name, own in found.items()]


def _whole(name: str, own: dict[str, Layer], paths: tuple[str, ...]) -> Layer:
    first = next(iter(own.values()))
    if len(paths) == 1:
        return replace(first, path=name, up=_order(name, first.up, first.shape[1]))
    width = next((la.shape[0] for path, la in own.items() if "proj_mlp" not in path), first.shape[1])
    sizes = [_MLP * width if "proj_mlp" in path else width for path in paths]
    sizes = [own[path].shape[0] if path in own else size for path, size in zip(paths, sizes, strict=True)]
    shared = all(torch.equal(la.down, first.down) for la in own.values())
    if shared:
        ups = [own[p].up if p in own else first.up.new_zeros(m, first.rank) for p, m in zip(paths, sizes, strict=True)]
        kind = max((la.up.dtype for la in own.values()), key=lambda kind: kind.itemsize)
        return replace(first, path=name, up=torch.cat([up.to(kind) for up in ups]))
    present = [path for path in paths if path in own]
    kind = max((own[path].up.dtype for path in present), key=lambda kind: kind.itemsize)
    up = torch.zeros(sum(sizes), sum(own[path].rank for path in present), dtype=kind)
    column = 0
    for i, path in enumerate(paths):
        if path in own:
            row, rank = sum(sizes[:i]), own[path].rank
            up[row : row + sizes[i], column : column + rank] = own[path].up.to(kind)
            column += rank
    return replace(first, path=name, up=up, down=torch.cat([own[path].down for path in present]))


def split(file: Path, layers: list[Layer], family: str) -> list[Layer]:
    """Layers under original paths as those of diffusers' modules.

    A part's columns that are zero in the outer factor are left out, and parts of which all are; where no number is but
    zero, each part keeps its rank. Raises InputError for rows that do not divide.
    """
    return [part for layer in layers for part in _parts(file, layer, parts_of(family)[layer.path])]


def _parts(file: Path, layer: Layer, paths: tuple[str, ...]) -> list[Layer]:
    if len(paths) == 1:
        up = _order(layer.path, layer.up, layer.shape[1])
        return [replace(layer, path=paths[0], up=up, keys=layer.keys if up is layer.up else None)]
    m, n = layer.shape
    width = m // 3 if len(paths) == 3 else n
    sizes = [width] * 3 + [m - 3 * width] * (len(paths) - 3)
    if sum(sizes) != m or min(sizes) <= 0 or layer.magnitude is not None:
        wrong = f"{layer.name} is {m} x {n}, of which no {len(paths)} modules can be made"
        raise InputError(str(file), wrong, "use a plain LoRA of the released model")
    blocks = list(zip(paths, layer.up.split(sizes), strict=True))
    columns = [precise(up).abs().amax(0) > 0 for _, up in blocks]
    if not any(bool(kept.any()) for kept in columns):
        return [replace(layer, path=path, up=up.clone(), keys=None) for path, up in blocks]
    return [
        replace(layer, path=path, up=up[:, kept].clone(), down=layer.down[kept].clone(), keys=None)
        for (path, up), kept in zip(blocks, columns, strict=True)
        if kept.any()
    ]


def _order(name: str, up: Tensor, n: int) -> Tensor:
    """A last modulation is (shift, scale) in the original checkpoints and (scale, shift) in diffusers."""
    if not name.endswith("adaLN_modulation.1") or up.shape[0] != 2 * n:
        return up
    first, second = up.chunk(2)
    return torch.cat([second, first])


_LDM_RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_LDM_OUTER = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def to_ldm(path: str) -> str:
    """A path of diffusers' SDXL UNet in the original one, which kohya's SDXL trainer builds; the inverse of `from_ldm`."""
    if path in _LDM_OUTER:
        return _LDM_OUTER[path]
    words = path.split(".")
    if words[0] == "mid_block":
        kind, i, rest = words[1], int(words[2]), ".".join(words[3:])
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * i}.{_LDM_RESNET[rest]}"
    side, block, kind, i, rest = words[0], int(words[1]), words[2], int(words[3]), ".".join(words[4:])
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.2.conv"
    outer = f"input_blocks.{3 * block + i + 1}" if side == "down_blocks" else f"output_blocks.{3 * block + i}"
    return f"{outer}.1.{rest}" if kind == "attentions" else f"{outer}.0.{_LDM_RESNET[rest]}"
