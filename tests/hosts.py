"""Hosts of the conformance suite that need other libraries: tiny random models of each kind that vislora adapts."""

from __future__ import annotations

import timm
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from open_clip.model import CLIP
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from vislora.testing import Host, hosts, seeded


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
        max_position_embeddings=12, bos_token_id=38, eos_token_id=39, pad_token_id=39, projection_dim=16,
    )  # fmt: skip


def text_encoder() -> nn.Module:
    return CLIPTextModel(_clip_config())


def text_encoder_2() -> nn.Module:
    """The second encoder of SDXL, the first two of SD3."""
    return CLIPTextModelWithProjection(_clip_config())


def t5() -> nn.Module:
    """The last encoder of SD3 and Flux."""
    return T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))


def sdxl_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=(2, 4), norm_num_groups=4, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    )  # fmt: skip


def sd3_transformer() -> nn.Module:
    """Of SD 3.5 medium's kind, with a second attention in the first block. Frozen: torch rounds otherwise where not."""
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=8, pooled_projection_dim=10,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).requires_grad_(False)  # fmt: skip


def flux_transformer() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    )


def open_clip_model() -> CLIP:
    return CLIP(
        embed_dim=8, vision_cfg=dict(layers=2, width=16, head_width=8, patch_size=8, image_size=16),
        text_cfg=dict(context_length=8, vocab_size=40, width=16, heads=2, layers=2),
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


def _sentences(seed: int) -> torch.Tensor:
    """Tokens with their end, where CLIP reads the sentence."""
    return nn.functional.pad(_tokens(seed), (0, 1), value=39)


def run_unet(model: nn.Module, seed: int) -> torch.Tensor:
    return model(_noise(model, seed, 2, 4, 8, 8), torch.tensor([3, 700]), _noise(model, seed + 50, 2, 5, 12)).sample


def run_sdxl(model: nn.Module, seed: int) -> torch.Tensor:
    more = {"text_embeds": _noise(model, seed + 70, 2, 10), "time_ids": _noise(model, seed + 80, 2, 6)}
    steps, text = torch.tensor([3, 700]), _noise(model, seed + 50, 2, 5, 12)
    return model(_noise(model, seed, 2, 4, 8, 8), steps, text, added_cond_kwargs=more).sample


def run_sd3(model: nn.Module, seed: int) -> torch.Tensor:
    text, pooled = _noise(model, seed + 50, 2, 5, 12), _noise(model, seed + 70, 2, 10)
    return model(_noise(model, seed, 2, 4, 8, 8), text, pooled, torch.tensor([3.0, 700.0])).sample


def run_flux(model: nn.Module, seed: int) -> torch.Tensor:
    text, pooled = _noise(model, seed + 50, 2, 5, 12), _noise(model, seed + 70, 2, 10)
    at = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    steps = torch.tensor([0.3, 0.7], dtype=text.dtype)
    return model(_noise(model, seed, 2, 16, 4), text, pooled, steps, img_ids=at, txt_ids=torch.zeros(5, 3)).sample


def run_open_clip(model: nn.Module, seed: int) -> torch.Tensor:
    return torch.cat(model(_noise(model, seed, 2, 3, 16, 16), _tokens(seed))[:2], dim=-1)


def library_hosts() -> list[Host]:
    return [
        Host("unet", seeded(unet), None, run_unet),
        Host("text_encoder", seeded(text_encoder), None, lambda m, s: m(_tokens(s)).last_hidden_state),
        Host("llama", seeded(llama), None, lambda m, s: m(_tokens(s)).logits),
        Host("timm_vit", seeded(timm_vit), "vit-qv", lambda m, s: m(_noise(m, s, 2, 3, 16, 16))),
        Host("hf_vit", seeded(hf_vit), "vit-qv", lambda m, s: m(_noise(m, s, 2, 3, 16, 16)).last_hidden_state),
        Host("old_hf_vit", seeded(OldViT), "vit-qv", lambda m, s: m(_noise(m, s, 2, 6, 16))),
    ]


def further_hosts() -> list[Host]:
    """Hosts whose layers are of the kinds above, in other trees and behind other callers."""
    every_query = ["attn.to_q", "attn2.to_v", "attn.to_out.0", "add_k_proj", "0.attn.add_q_proj", "to_add_out"]
    return [
        Host("sdxl_unet", seeded(sdxl_unet), ["to_q", "to_v", "proj_in", "conv1", "conv_shortcut"], run_sdxl),
        Host("text_encoder_2", seeded(text_encoder_2), None, lambda m, s: m(_sentences(s)).text_embeds),
        Host("t5", seeded(t5), None, lambda m, s: m(_tokens(s)).last_hidden_state),
        Host("sd3", seeded(sd3_transformer), every_query, run_sd3),  # the last block's add_q_proj has no effect
        Host("flux", seeded(flux_transformer), None, run_flux),
        Host("open_clip", seeded(open_clip_model), "attention", run_open_clip),
    ]


def all_hosts() -> list[Host]:
    return hosts() + library_hosts()
