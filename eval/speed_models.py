"""The random models that eval/speed.py measures on: how to build, feed and adapt each, and which layers to join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TINY = "tiny"  # every size is cut down: for tests


@dataclass(frozen=True)
class Host:
    """A model to adapt.

    targets: name suffixes that vislora and PEFT both take. inputs: made once; the first one gets a gradient.
    call: (model, inputs) to the output. joined: the model with its frozen q, k, v (or k, v) as one product each.
    joined_targets: as targets, on that model. ranks: those measured by default.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    targets: list[str]
    joined: Callable[[nn.Module], nn.Module] | None = None
    ranks: tuple[int, ...] = (16, 128)
    without: tuple[str, ...] = ()  # variants whose start takes minutes at this size
    joined_targets: tuple[str, ...] = ("to_qkv", "attn2.to_q", "to_kv", "to_out.0")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _join_diffusers(model: nn.Module) -> nn.Module:
    """diffusers' own joining: q, k, v of a self-attention in one product, k and v of a cross-attention."""
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    for module in model.modules():
        if isinstance(module, Attention):
            module.fuse_projections(fuse=True)
            module.set_processor(FusedAttnProcessor2_0())
    return model


def unet(size: str) -> Host:
    from diffusers import UNet2DConditionModel

    widths, side, text = ((64, 128, 128), 32, 128) if size != TINY else ((8, 16, 16), 8, 12)

    def build() -> nn.Module:
        return UNet2DConditionModel(
            sample_size=side, block_out_channels=widths, cross_attention_dim=text, norm_num_groups=8,
            attention_head_dim=8 if size != TINY else 4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ).to(memory_format=torch.channels_last)  # fmt: skip

    def inputs() -> tuple[Tensor, ...]:
        return noise(2, 4, side, side), torch.tensor([3, 700]), noise(2, 77, text, seed=1)

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    ranks = (16, 64) if size != TINY else (4,)  # its narrowest layers are 64 wide
    return Host("unet", build, inputs, lambda m, x: m(*x).sample, targets, _join_diffusers, ranks)


def sd_block(size: str) -> Host:
    """One transformer block of Stable Diffusion 1.5's first level: 320 wide, 1,024 tokens."""
    from diffusers.models.attention import BasicTransformerBlock

    width, heads, tokens, text = (320, 8, 1024, 768) if size != TINY else (16, 2, 10, 12)

    def build() -> nn.Module:
        return BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=text)

    def call(m: nn.Module, x: tuple[Tensor, ...]) -> Tensor:
        return m(x[0], encoder_hidden_states=x[1])

    def inputs() -> tuple[Tensor, ...]:
        return noise(1, tokens, width), noise(1, 77, text, seed=1)

    ranks = (16, 128) if size != TINY else (4,)
    return Host("sd_block", build, inputs, call, ["to_q", "to_k", "to_v", "to_out.0"], _join_diffusers, ranks)


def linear(size: str) -> Host:
    """One layer as wide as Stable Diffusion 1.5's first level, on 1,024 tokens."""
    width, tokens = (320, 1024) if size != TINY else (16, 10)

    def build() -> nn.Module:
        return nn.ModuleDict({"layer": nn.Linear(width, width)})

    ranks = (16, 128) if size != TINY else (4,)
    inputs, call = lambda: (noise(tokens, width),), lambda m, x: m["layer"](x[0])
    return Host("linear", build, inputs, call, ["layer"], ranks=ranks)


def vit(size: str) -> Host:
    import timm

    words = {} if size != TINY else {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    side, batch = (224, 4) if size != TINY else (16, 2)

    def build() -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **words)

    ranks = (16, 128) if size != TINY else (4,)
    targets = ["attn.qkv", "attn.proj"]
    return Host("vit", build, lambda: (noise(batch, 3, side, side),), lambda m, x: m(*x), targets, ranks=ranks)


def _llama(name: str, hidden: int, wide: int, layers: int, heads: int, groups: int, tokens: int, ranks,
           without: tuple[str, ...] = ()) -> Host:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, vocab_size=64,
                         num_attention_heads=heads, num_key_value_heads=groups, use_cache=False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def call(m: nn.Module, x: tuple[Tensor, ...]) -> Tensor:
        return m(inputs_embeds=x[0]).last_hidden_state

    return Host(name, lambda: LlamaModel(config), lambda: (noise(1, tokens, hidden),), call, targets, ranks=ranks,
                without=without)  # fmt: skip


def llama(size: str) -> Host:
    """A tiny Llama of four layers; every linear is adapted."""
    numbers = (256, 688, 4, 4, 4, 256, (16, 128)) if size != TINY else (16, 24, 1, 2, 1, 6, (4,))
    return _llama("llama", *numbers)


def llm_block(size: str) -> Host:
    """One layer of Llama 3.2 1B's width: 2,048, 8,192 in the MLP, 32 heads on 8; every linear is adapted."""
    numbers = (2048, 8192, 1, 32, 8, 512, (16, 128)) if size != TINY else (32, 48, 1, 2, 1, 6, (4,))
    return _llama("llm_block", *numbers)


def sd15(size: str) -> Host:
    """Stable Diffusion 1.5's UNet at 512 px, a batch of 4, in channels_last; 128 adapted layers."""
    from diffusers import UNet2DConditionModel

    widths, text, side, batch = ((320, 640, 1280, 1280), 768, 64, 4) if size != TINY else ((8, 8, 16, 16), 12, 8, 1)
    words = {} if size != TINY else {"attention_head_dim": 4, "norm_num_groups": 4, "layers_per_block": 1}

    def build() -> nn.Module:
        model = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=text, **words)
        return model.to(memory_format=torch.channels_last)

    def inputs() -> tuple[Tensor, ...]:
        return noise(batch, 4, side, side), torch.arange(batch) * 200 + 3, noise(batch, 77, text, seed=1)

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    ranks = (16, 128) if size != TINY else (4,)
    return Host("sd15", build, inputs, lambda m, x: m(*x).sample, targets, _join_diffusers, ranks)


def vit_b(size: str) -> Host:
    """timm's ViT-B/16 at 224 px, a batch of 32, qkv and proj."""
    import timm

    words = {} if size != TINY else {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    side, batch = (224, 32) if size != TINY else (16, 2)

    def build() -> nn.Module:
        return timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=10, **words)

    ranks = (16, 128) if size != TINY else (4,)
    targets = ["attn.qkv", "attn.proj"]
    return Host("vit_b", build, lambda: (noise(batch, 3, side, side),), lambda m, x: m(*x), targets, ranks=ranks)


def llama_1b(size: str) -> Host:
    """Llama 3.2 1B's sixteen layers on 2,048 tokens; every linear is adapted."""
    numbers = (2048, 8192, 16, 32, 8, 2048, (16, 128)) if size != TINY else (16, 24, 1, 2, 1, 6, (4,))
    return _llama("llama_1b", *numbers, without=("sorsa", "pissa", "olora"))


def llama_8b(size: str) -> Host:
    """Llama 3 8B's 32 layers on 2,048 tokens; every linear is adapted."""
    numbers = (4096, 14336, 32, 32, 8, 2048, (16,)) if size != TINY else (16, 24, 1, 2, 1, 6, (4,))
    return _llama("llama_8b", *numbers, without=("sorsa", "pissa", "olora", "full"))


SMALL = {f.__name__: f for f in (unet, sd_block, linear, vit, llama, llm_block)}
FULL = {f.__name__: f for f in (sd15, vit_b, llama_1b, llama_8b)}  # for a GPU
HOSTS = SMALL | FULL
