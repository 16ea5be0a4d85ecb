"""Hosts of the conformance suite that need other libraries: tiny random models of each kind that vislora adapts."""

from __future__ import annotations

import timm
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from vislora.testing import Host, hosts, seeded


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def text_encoder() -> nn.Module:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
            max_position_embeddings=12, bos_token_id=38, eos_token_id=39, pad_token_id=39, projection_dim=16,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=40, bos_token_id=1, eos_token_id=2, use_cache=False,
        )
    )  # fmt: skip


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2,
        num_classes=5,
    )  # fmt: skip


def hf_vit() -> nn.Module:
    return ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16,
            patch_size=8,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


class _OldAttention(nn.Module):
    """The tree that transformers' ViT had before version 5: attention.attention.query, attention.output.dense."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({k: nn.Linear(16, 16) for k in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(16, 16)})

    def forward(self, x):
        q, k, v = (self.attention[name](x) for name in ("query", "key", "value"))
        return x + self.output["dense"]((q @ k.mT / 4).softmax(-1) @ v)


class OldViT(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = (nn.ModuleDict({"attention": _OldAttention()}) for _ in range(2))
        self.vit = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList(blocks)})})

    def forward(self, x):
        for block in self.vit["encoder"]["layer"]:
            x = block["attention"](x)
        return x


def _noise(model: nn.Module, seed: int, *shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed))
    return x.to(next(model.parameters()).dtype)


def _tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(100 + seed))


def run_unet(model: nn.Module, seed: int) -> torch.Tensor:
    return model(_noise(model, seed, 2, 4, 8, 8), torch.tensor([3, 700]), _noise(model, seed + 50, 2, 5, 12)).sample


def library_hosts() -> list[Host]:
    return [
        Host("unet", seeded(unet), None, run_unet),
        Host("text_encoder", seeded(text_encoder), None, lambda m, s: m(_tokens(s)).last_hidden_state),
        Host("llama", seeded(llama), None, lambda m, s: m(_tokens(s)).logits),
        Host("timm_vit", seeded(timm_vit), "vit-qv", lambda m, s: m(_noise(m, s, 2, 3, 16, 16))),
        Host("hf_vit", seeded(hf_vit), "vit-qv", lambda m, s: m(_noise(m, s, 2, 3, 16, 16)).last_hidden_state),
        Host("old_hf_vit", seeded(OldViT), "vit-qv", lambda m, s: m(_noise(m, s, 2, 6, 16))),
    ]


def all_hosts() -> list[Host]:
    return hosts() + library_hosts()
