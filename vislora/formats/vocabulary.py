"""The module names of Stable Diffusion's UNets and text encoders, by which kohya's underscore names are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache

_BLOCK = (
    *(f"attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
_RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
_LAYER = (*(f"self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_DEPTH = 10  # transformer blocks in a row, SDXL's largest


def flat(path: str) -> str:
    """A path as kohya's keys write it."""
    return path.replace(".", "_")


def _unet() -> Iterator[str]:
    yield from ("conv_in", "conv_out")
    yield from (f"{part}.linear_{i}" for part in ("time_embedding", "add_embedding") for i in (1, 2))
    sides = [(f"down_blocks.{i}", 2) for i in range(4)] + [(f"up_blocks.{i}", 3) for i in range(4)]
    stages = [("mid_block", 2), *sides]
    for stage, count in stages:
        for i in range(count):
            yield from (f"{stage}.resnets.{i}.{leaf}" for leaf in _RESNET)
            yield from (f"{stage}.attentions.{i}.{leaf}" for leaf in ("proj_in", "proj_out"))
            blocks = (f"{stage}.attentions.{i}.transformer_blocks.{d}" for d in range(_DEPTH))
            yield from (f"{block}.{leaf}" for block in blocks for leaf in _BLOCK)
        if stage != "mid_block":
            yield f"{stage}.{'downsamplers' if stage.startswith('down') else 'upsamplers'}.0.conv"


def _text_encoder() -> Iterator[str]:
    layers = (f"text_model.encoder.layers.{i}" for i in range(32))  # SDXL's second encoder has 32
    yield from (f"{layer}.{leaf}" for layer in layers for leaf in _LAYER)
    yield "text_projection"


def _t5() -> Iterator[str]:
    for i in range(24):
        yield from (f"encoder.block.{i}.layer.0.SelfAttention.{leaf}" for leaf in "qkvo")
        yield from (f"encoder.block.{i}.layer.1.DenseReluDense.{leaf}" for leaf in ("wi", "wi_0", "wi_1", "wo"))


def by_flat_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """{flat name: the paths that are written so}; more than one is ambiguous."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(flat(path), []).append(path)
    return found


@cache
def known(component: str) -> dict[str, list[str]]:
    """`by_flat_name` of every module that LoRAs of these models adapt; {} for a component without a vocabulary."""
    if component == "unet":
        return by_flat_name(_unet())
    # T5 is SD3's third encoder and Flux's second.
    clip = _text_encoder() if component in ("text_encoder", "text_encoder_2") else ()
    return by_flat_name([*clip, *(_t5() if component in ("text_encoder_2", "text_encoder_3") else ())])


def component_of(path: str) -> str | None:
    """"unet" for a path of these models' UNet, "text" for one of their encoders, None for any other."""
    if [path] == known("unet").get(flat(path)):
        return "unet"
    encoder = path if path.startswith("text_") else f"text_model.{path}"
    return "text" if [encoder] == known("text_encoder").get(flat(encoder)) else None


_LDM_RESNET = {
    "in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
_LDM_OUTER = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
_LDM_BLOCK = re.compile(r"(?P<side>input_blocks|output_blocks)_(?P<i>\d+)_(?P<j>\d)_(?P<rest>.+)")
_LDM_MIDDLE = re.compile(r"middle_block_(?P<j>[012])_(?P<rest>.+)")


def from_ldm(name: str) -> str:
    """A flat name of the original checkpoints' UNet in diffusers' flat name; any other name unchanged.

    Two resnets a block on the way down, three on the way up, as in all of SD 1.x, 2.x and XL. Mirrors
    the layout that diffusers' conversion of LDM checkpoints establishes.
    """
    if name in _LDM_OUTER:
        return _LDM_OUTER[name]
    middle = _LDM_MIDDLE.fullmatch(name)
    if middle:
        j, rest = int(middle["j"]), middle["rest"]
        resnet = f"mid_block_resnets_{j // 2}_{_LDM_RESNET.get(rest, rest)}"
        return f"mid_block_attentions_0_{rest}" if j == 1 else resnet
    match = _LDM_BLOCK.fullmatch(name)
    if match is None:
        return name
    i, j, rest = int(match["i"]), int(match["j"]), match["rest"]
    down = match["side"] == "input_blocks"
    block, layer = divmod(i - 1 if down else i, 3)
    stage = f"{'down' if down else 'up'}_blocks_{block}"
    if rest in ("op", "conv"):
        return f"{stage}_{'downsamplers' if down else 'upsamplers'}_0_conv"
    return f"{stage}_attentions_{layer}_{rest}" if j == 1 else f"{stage}_resnets_{layer}_{_LDM_RESNET.get(rest, rest)}"
