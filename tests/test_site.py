"""Targets: presets, suffixes, patterns, slices, and what is refused."""

from __future__ import annotations

import pytest
from hosts import (
    OldViT,
    flux_transformer,
    hf_vit,
    llama,
    open_clip_model,
    sd3_transformer,
    sdxl_unet,
    t5,
    text_encoder,
    text_encoder_2,
    timm_vit,
    unet,
)
from torch import nn

from vislora import attach
from vislora.errors import InputError
from vislora.site import find


def names(model, targets):
    return [site.name for site in find(model, targets)]


def test_presets_by_host():
    u = names(unet(), "unet-attention")
    assert len(u) == 32 and {n.split("attn", 1)[1][2:] for n in u} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert u == names(unet(), None) == names(unet(), "attention")
    t = names(text_encoder(), None)
    assert len(t) == 8 and all("self_attn" in n for n in t)
    assert names(timm_vit(), None) == [f"blocks.{i}.attn.qkv[{s}]" for i in (0, 1) for s in "qv"]
    assert names(hf_vit(), None) == [f"layers.{i}.attention.{s}_proj" for i in (0, 1) for s in "qv"]
    old = [f"vit.encoder.layer.{i}.attention.attention.{s}" for i in (0, 1) for s in ("query", "value")]
    assert names(OldViT(), None) == old
    every = names(llama(), "all-linear")
    assert "lm_head" in every and names(llama(), None) == [n for n in every if n != "lm_head"]
    assert len(names(llama(), "attention")) == 8
    assert len(names(timm_vit(), "attention")) == 8 and "blocks.0.attn.proj" in names(timm_vit(), "attention")


def test_presets_of_larger_denoisers_and_their_encoders():
    def leaves(model, targets=None):
        return {n.partition("blocks.")[2].partition(".")[2] for n in names(model, targets)}

    own, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ours, second = {f"attn.{n}" for n in own + text}, {f"attn2.{n}" for n in own}
    assert leaves(sd3_transformer()) == ours | second == leaves(sd3_transformer(), "attention")
    assert leaves(flux_transformer()) == ours  # of single blocks q, k and v; their output is one with the MLP's
    assert len(names(flux_transformer(), None)) == 8 + 3
    sdxl = names(sdxl_unet(), None)
    assert len(sdxl) == len(names(sdxl_unet(), "attention")) and {n.split("attn")[-1][2:] for n in sdxl} == {
        "to_q", "to_k", "to_v", "to_out.0"
    }
    encoder = names(t5(), None)
    assert encoder == [f"encoder.block.{i}.layer.0.SelfAttention.{s}" for i in (0, 1) for s in "qkvo"]
    assert encoder == names(t5(), "attention") == names(t5(), "text-encoder-attention")
    assert names(text_encoder_2(), None) == names(text_encoder_2(), "text-encoder-attention") != []
    assert not any("text_projection" in n for n in names(text_encoder_2(), None))


def test_presets_find_the_towers_of_open_clip():
    model = open_clip_model()
    image = [f"visual.transformer.resblocks.{i}.attn" for i in (0, 1)]
    text = [f"transformer.resblocks.{i}.attn" for i in (0, 1)]
    assert names(model, "vit-qv") == names(model, None) == [f"{b}.in_proj_weight[{s}]" for b in image for s in "qv"]
    four = [*(f"in_proj_weight[{s}]" for s in "qkv"), "out_proj"]
    assert names(model, "text-encoder-attention") == [f"{b}.{leaf}" for b in text for leaf in four]
    assert names(model, "attention") == [f"{b}.{leaf}" for b in image + text for leaf in four]
    alone = [n.removeprefix("visual.") for n in names(model, "vit-qv")]
    assert names(model.visual, None) == names(model.visual, "vit-qv") == alone


def test_a_pipelines_denoiser_and_every_encoder_are_found():
    class Pipeline:
        components = {
            "text_encoder": text_encoder_2(), "text_encoder_2": text_encoder_2(), "text_encoder_3": t5(),
            "transformer": sd3_transformer(), "vae": nn.Linear(2, 2), "tokenizer": None,
        }  # fmt: skip

    adapter = attach(Pipeline, "lora", rank=2)
    assert {n.split(".")[0] for n in adapter.sites} == {"transformer"}
    adapter.detach()
    adapter = attach(Pipeline, "lora", rank=2, targets=dict.fromkeys(Pipeline.components.keys() - {"vae", "tokenizer"}))
    every = {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}
    assert {n.split(".")[0] for n in adapter.sites} == every


def test_suffixes_slices_and_patterns():
    vit = timm_vit()
    both = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv[k]", "mlp.fc1")]
    assert names(vit, ["qkv[k]", "fc1"]) == both
    assert names(vit, ["attn.qkv"]) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert names(vit, r"blocks\.1\..*fc\d") == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert names(vit, "fc2") == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    assert names(vit, r".*qkv.*") == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    shapes = {(s.m, s.n) for s in find(vit, "vit-qv")}
    assert shapes == {(16, 16)}
    q, v = find(vit, "vit-qv")[:2]
    assert (q.rows, v.rows) == (slice(0, 16), slice(32, 48))


@pytest.mark.parametrize(
    "targets, words",
    [
        pytest.param("to_qq", ("to_qq", "to_q"), marks=pytest.mark.case("C02")),
        (["to_q", "to_w"], ("to_w",)),
        (["unet-attention", "to_q"], ("unet-attention", "alone")),
        ("unet-atention", ("unet-attention",)),
        pytest.param(["conv_norm_out"], ("conv_norm_out", "GroupNorm"), marks=pytest.mark.case("C03")),
        ("to_(", ("to_(", "regular expression")),
        ([], ("matches no layer",)),
    ],
)
def test_refused(targets, words):
    with pytest.raises(InputError) as error:
        find(unet(), targets)
    assert all(word in str(error.value) for word in words), error.value


def test_whole_and_slice_of_one_matrix_are_refused():
    with pytest.raises(InputError, match="whole and by a slice"):
        find(timm_vit(), ["qkv", "qkv[q]"])


def test_convolutions_are_named_not_preset():
    model = unet()
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    every = names(model, "all-linear")
    assert convolutions and not convolutions & set(every + names(model, None))
    assert len(names(model, ["proj_in", "proj_out"])) == 2 * len(names(model, ["attn1.to_q"]))
    by_pattern = names(model, r"(.*\.)?(conv\w*|proj_in|proj_out)")
    assert by_pattern == [n for n in dict(model.named_modules()) if n in convolutions]
    (site,) = find(model, ["conv_in"])
    assert (site.m, site.n, site.shape) == (8, 4 * 9, (8, 4, 3, 3))


def test_multihead_attention_is_offered_by_rows_and_whole():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    raw = "self_attn.in_proj_weight"
    assert names(model, "all-linear") == [raw, "self_attn.out_proj", "linear1", "linear2"] == names(model, None)
    assert names(model, "vit-qv") == [f"{raw}[q]", f"{raw}[v]"]
    four = [*(f"{raw}[{s}]" for s in "qkv"), "self_attn.out_proj"]
    assert names(model, "attention") == names(model, "text-encoder-attention") == four
    apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert names(apart, "all-linear") == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]
    assert [(s.m, s.n) for s in find(apart, "vit-qv")] == [(8, 8), (8, 4)]
    with pytest.raises(InputError, match="dropout: 0.5 beside self_attn.in_proj_weight"):
        attach(model, "lora", rank=2, dropout=0.5, targets="vit-qv")


def test_components_and_their_own_targets():
    parts = {"unet": unet(), "text_encoder": text_encoder()}
    adapter = attach(parts, "lora", rank=2)
    assert {n.split(".")[0] for n in adapter.sites} == {"unet", "text_encoder"}
    adapter.detach()
    adapter = attach(parts, "lora", rank=2, targets={"unet": ["attn2.to_q"]})
    assert len(adapter.sites) == 4 and all(n.endswith("attn2.to_q") for n in adapter.sites)
    with pytest.raises(InputError, match="did you mean unet"):
        attach(parts, "lora", targets={"unnet": None}, name="other")
    with pytest.raises(InputError, match="give a module"):
        attach(3, "lora")
