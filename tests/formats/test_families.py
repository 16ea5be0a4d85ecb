"""Exports of SDXL, SD3 and Flux, denoiser and text encoders, in every layout, against stock diffusers and PEFT."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from stock_loras import T5, TARGETS, agree, attach, deltas, dense, neutral, stock_deltas
from tiny_pipelines import build

import vislora
from vislora.adapters import get
from vislora.cli import main
from vislora.errors import InputError
from vislora.export import kohya_copy, read_certificate
from vislora.formats import Layer, family, read, save, written
from vislora.formats.original import by_flat, named_in, parts_of, to_ldm, whole_of
from vislora.formats.vocabulary import flat, from_ldm
from vislora.io import LORA_FILE
from vislora.io import read as read_tensors


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_stock_diffusers_reads_every_layer(name, format, tmp_path):
    pipe = build(name)
    adapter = attach(pipe, name, rank=3, alpha=5.0)
    file, wanted = adapter.export(tmp_path, format), deltas(adapter, pipe)
    adapter.detach()
    assert agree(dense(read(file)), wanted), "our own reader"
    again = vislora.load(pipe, file)
    assert agree(deltas(again, pipe), wanted)
    again.detach()
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    loaded = stock_deltas(pipe)
    if (name, format) == ("sd3", "kohya"):  # of which stock diffusers reads nothing
        assert not any(key.startswith("transformer") for key in loaded)
        return
    if (name, format) == ("flux", "kohya"):  # whose converter forgets the pipeline's name before these
        wanted = {key: delta for key, delta in wanted.items() if not key.startswith("transformer.time_text_embed")}
    assert agree(loaded, wanted)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_stock_peft_reads_every_layer(name, tmp_path):
    pipe = build(name)
    targets = TARGETS[name] | ({T5[name]: ["q", "wi_0"]} if name in T5 else {})
    adapter = attach(pipe, name, targets=targets, rank=2)
    wanted = deltas(adapter, pipe)
    folder = adapter.export(tmp_path, "peft")
    adapter.detach()
    for part in targets:
        model = PeftModel.from_pretrained(getattr(pipe, part), folder / part)
        found = {
            neutral(pipe, f"{part}.{key.removeprefix('base_model.model.')}"): m.get_delta_weight("default").flatten(1)
            for key, m in model.named_modules() if isinstance(m, LoraLayer)
        }  # fmt: skip
        assert agree(found, {key: d for key, d in wanted.items() if key.startswith(f"{part}.")})
    assert agree(dense(read(folder)), wanted)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_every_layout_into_every_other(name, tmp_path, capsys):
    """By the command, from our own files: what each says comes back, T5 encoders in kohya's and PEFT's."""
    pipe = build(name)
    adapter = attach(pipe, name, "nb_lora", rank=2, p=2, delta=1.0)
    adapter.save(tmp_path / "own")
    wanted, last = deltas(adapter, pipe), tmp_path / "own"
    for format in ("kohya", "peft", "diffusers", "kohya", "diffusers"):
        out = tmp_path / f"{format}{len(list(tmp_path.iterdir()))}"
        main(["export", str(last), "--format", format, "-o", str(out)])
        file = read(out)
        assert file.format == format and agree(dense(file), wanted)
        last = out
    assert "read back to" in capsys.readouterr().out
    if name in T5:
        other = attach(pipe, name, targets={T5[name]: ["q", "wo"]}, name="t5", rank=2)
        with pytest.raises(InputError, match=f"no place for {T5[name]}"):
            other.export(tmp_path / "t5")
        file = read(other.export(tmp_path / "t5", "kohya"))
        assert agree(dense(file), deltas(other, pipe))
        assert all(key.startswith("lora_te3_encoder_block_0_layer_") for key in file.stored[""].tensors)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_every_method_in_every_layout(name, tmp_path):
    """Rank 2, denoiser and encoders; magnitudes stay in PEFT's folders and fold into a rank elsewhere."""
    pipe = build(name)
    targets = {part: words for part, words in TARGETS[name].items() if part in ("transformer", "unet", "text_encoder")}
    if name == "sd3":
        targets["transformer"] = r"transformer_blocks\.[12]\.attn\..*"
    for method in vislora.methods():
        adapter = attach(pipe, name, get(method)(rank=2), targets)
        wanted = deltas(adapter, pipe)
        for format in ("diffusers", "kohya", "peft"):
            folder = tmp_path / method / format
            if "magnitude" not in adapter.method.roles.values():
                assert agree(dense(read(adapter.export(folder, format))), wanted), (method, format)
            elif format == "peft":
                assert all(layer.magnitude is not None for layer in read(adapter.export(folder, format)).layers)
            else:
                with pytest.raises(InputError, match="magnitudes.*give a rank"):
                    adapter.export(folder, format)
        adapter.detach()


def test_dora_folds_into_a_rank_and_says_what_it_lost(tmp_path):
    pipe = build("sdxl")
    adapter = attach(pipe, "sdxl", "dora", {"unet": ["attn2.to_q"], "text_encoder": ["q_proj"]}, rank=2)
    wanted = deltas(adapter, pipe)
    for rank in (3, 16):
        file = adapter.export(tmp_path / str(rank), "kohya", rank=rank)
        stated, found = read_certificate(file)["modules"], dense(read(file))
        for name, delta in wanted.items():
            lost = torch.linalg.svdvals(delta)[rank:].norm() / delta.norm()
            assert abs((found[name] - delta).norm() / delta.norm() - lost) < 1e-5
            own = name.replace("text_model.", "")
            assert abs(stated[own]["lost"] - lost) < 1e-5 and (lost < 1e-5) == (rank == 16)
    mixed = read(adapter.export(tmp_path / "mixed", "diffusers", rank=16))
    assert {la.component: la.magnitude is not None for la in mixed.layers} == {"unet": True, "text_encoder": False}
    adapter.detach()
    pipe.load_lora_weights(tmp_path / "mixed")
    te = {key: delta for key, delta in stock_deltas(pipe).items() if key.startswith("text")}
    assert agree(te, {key: delta for key, delta in wanted.items() if key.startswith("text")}, 1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_transformers_dora_keeps_its_magnitudes_in_diffusers_layout(name, tmp_path):
    pipe = build(name)
    ids = torch.arange(6).repeat(1, 1)
    adapter = attach(pipe, name, "dora", {"transformer": ["to_q", "to_k", "to_out.0"]}, rank=2)
    own = run(pipe, ids)
    adapter.export(tmp_path)
    adapter.detach()
    base = run(pipe, ids)
    pipe.load_lora_weights(tmp_path)
    assert (run(pipe, ids) - own).norm() < 1e-4 * (own - base).norm()


def run(pipe, ids) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    config, text = pipe.transformer.config, torch.randn(1, 6, pipe.transformer.config.joint_attention_dim, generator=g)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=g)
    with torch.no_grad():
        if isinstance(pipe, FluxPipeline):
            x = torch.randn(1, 4, config.in_channels, generator=g)
            where = torch.zeros(4, 3), torch.zeros(6, 3)
            return pipe.transformer(
                x, text, pooled, torch.tensor([0.5]), *where, guidance=torch.ones(1), return_dict=False
            )[0]
        x = torch.randn(1, 4, 8, 8, generator=g)
        return pipe.transformer(x, text, pooled, torch.tensor([500.0]), return_dict=False)[0]


# ---- the original names, against stock converters of whole checkpoints


def released(name: str) -> torch.nn.Module:
    """The released model's widths, with few blocks, without storage."""
    with torch.device("meta"):
        if name == "flux":
            return FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
        return SD3Transformer2DModel(
            num_layers=3, num_attention_heads=24, caption_projection_dim=1536, joint_attention_dim=4096,
            pooled_projection_dim=2048, pos_embed_max_size=4, in_channels=16, dual_attention_layers=(0, 1),
        )  # fmt: skip


def random_layers(model: torch.nn.Module) -> list[Layer]:
    g = torch.Generator().manual_seed(0)
    made = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            m, n = module.weight.shape
            up, down = torch.randn(m, 1, generator=g), torch.randn(1, n, generator=g)
            made.append(Layer("transformer", path, up, down))
    return made


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_rows_go_where_stock_converters_of_checkpoints_take_them(name, tmp_path):
    model = released(name)
    layers = random_layers(model)
    wanted = {f"{la.path}.weight": (la.up * la.down.sum()).flatten() for la in layers}
    stored, _ = read_tensors(save(written(layers, "kohya", {}, tmp_path), layers)[0])
    whole = {key[len("lora_unet_") :].removesuffix(".lora_up.weight"): up for key, up in stored.items() if "up" in key}
    weights = {}
    for key, up in whole.items():
        down = stored[f"lora_unet_{key}.lora_down.weight"]
        weights[f"{by_flat(name)[key]}.weight"] = (up * down.sum(1)).sum(1, keepdim=True)
    filler = Filler(weights)
    if name == "flux":
        found = convert_flux_transformer_checkpoint_to_diffusers(filler)
    else:
        found = convert_sd3_transformer_checkpoint_to_diffusers(filler)
    for key, value in wanted.items():
        assert torch.allclose(found[key].flatten(), value, rtol=1e-4, atol=1e-3), key


class Filler(dict):
    """A checkpoint that has biases and norms too, of zeros."""

    def pop(self, key, *default):
        if key in self or default:
            return super().pop(key, *default)
        weight = self.seen.get(key.replace(".bias", ".weight"))
        return torch.zeros(len(weight) if weight is not None else 3)

    def __init__(self, weights):
        super().__init__(weights)
        self.seen = dict(weights)


def test_stock_diffusers_splits_fluxs_single_blocks_alike(tmp_path):
    layers = random_layers(released("flux"))
    file, _ = save(written(layers, "kohya", {}, tmp_path), layers)
    found = FluxPipeline.lora_state_dict(str(file))
    for layer in layers:
        key = f"transformer.{layer.path}"
        if "time_text_embed" in key or layer.path in ("x_embedder", "context_embedder", "norm_out.linear", "proj_out"):
            key = layer.path  # the converter forgets the pipeline's name before these
        up, down = found[f"{key}.lora_B.weight"], found[f"{key}.lora_A.weight"]
        assert torch.allclose(up @ down.sum(1), layer.up[:, 0] * layer.down.sum(), rtol=1e-4, atol=1e-3), key


def comfy_sd3_keys(blocks: int) -> set[str]:
    """What ComfyUI loads of an SD3 file: "lora_unet_" before the name of a weight of its MMDiT, dots as underscores."""
    stream = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    sides = [f"joint_blocks.{i}.{side}" for i in range(blocks) for side in ("x_block", "context_block")]
    names = [f"{side}.{leaf}" for side in sides for leaf in stream]
    names += [f"joint_blocks.{i}.x_block.attn2.{leaf}" for i in range(blocks) for leaf in ("qkv", "proj")]
    names += ["context_embedder", "x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    names += [f"{side}_embedder.mlp.{i}" for side in "ty" for i in (0, 2)]
    return {f"lora_unet_{name.replace('.', '_')}" for name in names}


def test_kohyas_sd3_keys_are_those_that_comfyui_knows(tmp_path):
    pipe = build("sd3")
    file = attach(pipe, "sd3", rank=2).export(tmp_path, "kohya")
    stored, header = read_tensors(file)
    unet = {key.partition(".")[0] for key in stored if key.startswith("lora_unet_")}
    assert unet <= comfy_sd3_keys(3) and len(unet) == 36
    encoders = {key.partition(".")[0] for key in stored} - unet
    assert all(key.startswith(("lora_te1_text_model_encoder_layers_", "lora_te2_text_model_enc")) for key in encoders)
    qkv = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert stored[f"{qkv}.lora_up.weight"].shape == (48, 6) and stored[f"{qkv}.alpha"] == 6
    assert header["ss_network_dim"] == "6" and header["ss_base_model_version"] == "3-5-medium"


def test_a_fused_files_parts_share_what_they_shared(tmp_path):
    """Files trained on the fused matrix: split when read, and whole again at the same rank when written."""
    g = torch.Generator().manual_seed(0)
    qkv, one = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
    held = {}
    for key, m in ((qkv, 48), (one, 7 * 16)):
        held[f"{key}.lora_up.weight"] = torch.randn(m, 4, generator=g)
        held[f"{key}.lora_down.weight"], held[f"{key}.alpha"] = torch.randn(4, 16, generator=g), torch.tensor(2.0)
    save_file(held, tmp_path / "in.safetensors")
    file = read(tmp_path / "in.safetensors")
    assert len(file.layers) == 7 and all(layer.rank == 4 and layer.scale == 0.5 for layer in file.layers)
    again, _ = read_tensors(save(written(file.layers, "kohya", file.header, tmp_path / "out"), file.layers)[0])
    for key in (qkv, one):
        assert torch.equal(again[f"{key}.lora_up.weight"], 0.5 * held[f"{key}.lora_up.weight"])
        assert torch.equal(again[f"{key}.lora_down.weight"], held[f"{key}.lora_down.weight"])
    assert {named_in(flat(name)) for name in parts_of("flux") if "block" in name} == {"flux"}


def test_other_spellings_of_transformers_are_read(tmp_path):
    """ComfyUI's dotted names with PEFT's words, and OneTrainer's lora_transformer_."""
    pair = {"A": torch.randn(2, 16), "B": torch.randn(16, 2)}
    dotted = {f"diffusion_model.double_blocks.3.txt_attn.proj.lora_{x}.weight": t for x, t in pair.items()}
    save_file(dotted, tmp_path / "dotted.safetensors")
    assert [layer.name for layer in read(tmp_path / "dotted.safetensors").layers] == [
        "transformer.transformer_blocks.3.attn.to_add_out"
    ]
    names = {"A": "lora_down", "B": "lora_up"}
    own = {f"lora_transformer_transformer_blocks_3_attn_to_q.{names[x]}.weight": t for x, t in pair.items()}
    save_file(own, tmp_path / "own.safetensors")
    assert read(tmp_path / "own.safetensors").layers[0].path == "transformer_blocks.3.attn.to_q"


def test_a_transformer_that_may_be_either_is_refused_or_told_by_the_header(tmp_path):
    layer = Layer("transformer", "transformer_blocks.0.attn.to_out.0", torch.randn(16, 2), torch.randn(2, 16))
    with pytest.raises(InputError, match="may be SD3's or Flux's"):
        written([layer], "kohya", {}, tmp_path)
    for word, name in (("flux-1-dev/lora", "double_blocks_0_img_attn_proj"),
                       ("stable-diffusion-3-medium/lora", "joint_blocks_0_x_block_attn_proj")):  # fmt: skip
        ((_, part),) = written([layer], "kohya", {"modelspec.architecture": word}, tmp_path).items()
        assert f"lora_unet_{name}.lora_up.weight" in part.tensors
    other = Layer("transformer", "transformer_blocks.0.attn1.to_q", torch.randn(16, 2), torch.randn(2, 16))
    with pytest.raises(InputError, match="no name in flux's original checkpoint"):
        written([other], "kohya", {"modelspec.architecture": "flux-1-dev/lora"}, tmp_path)


# ---- SDXL's block names, headers, the pair of files


def test_sdxls_blocks_bear_the_original_names(tmp_path):
    pipe = build("sdxl")
    stored, header = read_tensors(attach(pipe, "sdxl", rank=2).export(tmp_path, "kohya"))
    names = {key.partition(".")[0] for key in stored}
    assert not any("_blocks_" in name and "down_" in name for name in names)
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
    assert "lora_unet_middle_block_1_proj_in" in names and "lora_te2_text_model_encoder_layers_0_mlp_fc2" in names
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{k: v for k, v in pipe.unet.config.items() if not k.startswith("_")})
    own = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(own) > 100 and all(from_ldm(flat(to_ldm(name))) == flat(name) for name in own)
    assert len({to_ldm(name) for name in own}) == len(own)
    odd = build("sdxl")  # of one layer a block: the numbers of the original names count two
    odd.unet.register_to_config(layers_per_block=1)
    stored, header = read_tensors(attach(odd, "sdxl", rank=2).export(tmp_path / "odd", "kohya"))
    assert any("lora_unet_down_blocks_1_attentions" in key for key in stored) and "vislora.sgm" not in header


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_headers_name_the_family(name, tmp_path):
    words = {
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "networks.lora"),
        "sd3": ("3-5-medium", "stable-diffusion-3-3-5-medium/lora", "networks.lora_sd3"),
        "flux": ("flux1", "flux-1-dev/lora", "networks.lora_flux"),
    }[name]
    adapter = attach(build(name), name, rank=2)
    _, header = read_tensors(adapter.export(tmp_path, "kohya"))
    said = header["ss_base_model_version"], header["modelspec.architecture"], header["ss_network_module"]
    assert said == words and header["ss_v2"] == "False" and header["modelspec.resolution"] == "1024x1024"
    _, header = read_tensors(adapter.export(tmp_path, "diffusers"))
    assert header["modelspec.architecture"] == words[1] and family.group(family.stated(header)) == name


def test_sd2s_flags(tmp_path):
    small = {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",), "attention_head_dim": 8,
             "up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1}  # fmt: skip
    unet = UNet2DConditionModel(cross_attention_dim=1024, **small)
    adapter = vislora.attach({"unet": unet}, "lora", rank=2)
    _, header = read_tensors(adapter.export(tmp_path, "kohya"))
    assert (header["ss_v2"], header["ss_base_model_version"]) == ("True", "sd_v2")
    _, header = read_tensors(kohya_copy(adapter, tmp_path, prediction_type="v_prediction"))
    assert header["ss_base_model_version"] == "sd_v2_v" and header["modelspec.prediction_type"] == "v"
    assert header["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora" and header["ss_v2"] == "True"
    plain = vislora.attach({"unet": UNet2DConditionModel(cross_attention_dim=768, **small)}, "lora", rank=2)
    _, header = read_tensors(kohya_copy(plain, tmp_path, prediction_type="epsilon"))
    assert (header["ss_v2"], header["ss_base_model_version"]) == ("False", "sd_v1")
    assert header["modelspec.prediction_type"] == "epsilon"


def test_a_pair_of_files(tmp_path, caplog):
    """diffusers' own loader takes the file of its own name of the two."""
    pipe = build("sdxl")
    adapter = attach(pipe, "sdxl", rank=2)
    first, second = adapter.export(tmp_path), kohya_copy(adapter, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora.safetensors", LORA_FILE]
    assert agree(dense(read(first)), dense(read(second)))
    wanted = deltas(adapter, pipe)
    adapter.detach()
    pipe.load_lora_weights(tmp_path)
    assert agree(stock_deltas(pipe), wanted)
    pipe.unload_lora_weights()
    dora = attach(pipe, "sdxl", "dora", {"unet": ["to_q"]}, rank=2)
    with caplog.at_level("INFO", "vislora"):
        assert kohya_copy(dora, tmp_path / "dora") is None
    assert len([r for r in caplog.records if "no kohya copy" in r.getMessage()]) == 1
    assert kohya_copy(dora, tmp_path / "dora", rank=2) is not None


def test_names_of_the_tables_are_one_to_one():
    for name in ("sd3", "flux"):
        assert len(by_flat(name)) == len(parts_of(name))
        assert len(whole_of(name)) == sum(map(len, parts_of(name).values()))
        own = [n for n, m in released(name).named_modules() if isinstance(m, torch.nn.Linear)]
        assert own and all(path in whole_of(name) for path in own)
