"""Files that stock diffusers and stock PEFT write and read, kohya's names, and every layout into every other."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from hosts import text_encoder, unet
from lora_files import dense, layers, same
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import vislora
from vislora.errors import EnvironmentFault, InputError
from vislora.formats import FORMATS, Base, read, save, written
from vislora.formats.vocabulary import component_of, flat, from_ldm, known
from vislora.io import LORA_FILE


def shake(model):
    """Give PEFT's zero factors values; {module path: its update, as a matrix}."""
    g = torch.Generator().manual_seed(2)
    deltas = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                (adapter,) = module.lora_B
                module.lora_B[adapter].weight.copy_(torch.randn(module.lora_B[adapter].weight.shape, generator=g))
                deltas[name.removeprefix("base_model.model.")] = module.get_delta_weight(adapter).flatten(1).double()
    return deltas


def inject(model, config):
    """What transformers' add_adapter does, for any version of PEFT."""
    inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}


CONFIG = LoraConfig(
    r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1", "proj_in"], rank_pattern={"mid_block.*to_q": 2},
    alpha_pattern={"attn2.to_q": 3, "conv1": 1.5},
)  # fmt: skip


def test_stock_diffusers_files_are_read(pipe, tmp_path):
    pipe.unet.add_adapter(CONFIG)
    inject(pipe.text_encoder, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "fc1"], use_rslora=True))
    wanted = {f"unet.{name}": delta for name, delta in shake(pipe.unet).items()}
    for name, delta in shake(pipe.text_encoder).items():
        wanted[f"text_encoder.text_model.{name.removeprefix('text_model.')}"] = delta
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **{f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict() for part, model in parts.items()},
    )
    file = read(tmp_path)
    assert file.format == "diffusers" and {layer.name for layer in file.layers} == wanted.keys()
    for layer in file.layers:
        assert torch.allclose(dense(layer), wanted[layer.name], atol=1e-6), layer.name
    assert {layer.rank for layer in file.layers} == {2, 4}


def test_stock_peft_folders_are_read(tmp_path):
    model = get_peft_model(unet(), CONFIG)
    wanted = shake(model)
    model.save_pretrained(tmp_path)
    file = read(tmp_path)
    assert file.format == "peft" and {layer.name for layer in file.layers} == {f"unet.{name}" for name in wanted}
    for layer in file.layers:
        assert torch.allclose(dense(layer), wanted[layer.path], atol=1e-6), layer.name
    assert same(read(tmp_path / "adapter_model.safetensors").layers, file.layers, 0)


def test_peft_reads_what_is_written(tmp_path):
    model = get_peft_model(unet(), CONFIG)
    wanted = shake(model)
    model.save_pretrained(tmp_path / "in")
    file = read(tmp_path / "in")
    save(written(file.layers, "peft", file.header, tmp_path / "out"), file.layers)
    again = PeftModel.from_pretrained(unet(), tmp_path / "out" / "unet")
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").flatten(1)
        for name, module in again.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert deltas.keys() == wanted.keys()
    assert all(torch.allclose(deltas[name].double(), wanted[name], atol=1e-6) for name in wanted)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_stock_diffusers_reads_what_is_written(pipe, format, tmp_path):
    adapter = vislora.attach({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, "lora", rank=3, alpha=5.0)
    with torch.no_grad():
        for i, parameter in enumerate(adapter.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    adapter.save(tmp_path / "own")
    wanted = {layer.name: dense(layer) for layer in read(tmp_path / "own").layers}
    for name, delta in adapter.deltas().items():
        own = name.replace("text_encoder.", "text_encoder.text_model.") if name not in wanted else name
        assert torch.allclose(wanted[own], delta.double(), atol=1e-5)
    adapter.detach()
    file = read(tmp_path / "own")
    target, off = save(written(file.layers, format, file.header, tmp_path / "out"), file.layers)
    assert off < 1e-6
    pipe.load_lora_weights(str(target.parent), weight_name=target.name)
    loaded = {
        f"{part}.{name}": module.get_delta_weight("default_0")
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, LoraLayer)
    }
    assert len(loaded) == len(wanted)
    for name, delta in loaded.items():
        own = name if name in wanted else name.replace("text_encoder.", "text_encoder.text_model.")
        assert torch.allclose(delta.double(), wanted[own], atol=1e-5), name


def test_diffusers_own_kohya_files_are_read(pipe, tmp_path):
    """Their alphas are whole numbers, and their text encoders' names lack text_model."""
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "ff.net.0.proj"]))
    inject(pipe.text_encoder, LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    wanted = {f"unet.{n}": d for n, d in shake(pipe.unet).items()}
    for name, delta in shake(pipe.text_encoder).items():
        wanted[f"text_encoder.text_model.{name.removeprefix('text_model.')}"] = delta
    tensors = {
        f"{part}.{key}": tensor
        for part in ("unet", "text_encoder")
        for key, tensor in get_peft_model_state_dict(getattr(pipe, part)).items()
    }
    save_file(convert_state_dict_to_kohya(tensors), tmp_path / "kohya.safetensors")
    file = read(tmp_path / "kohya.safetensors")
    assert file.format == "kohya" and {layer.name for layer in file.layers} == wanted.keys()
    for layer in file.layers:
        lost = 8 / layer.rank  # PEFT's alpha is 8; the converter writes alpha = rank
        assert layer.scale == 1 and torch.allclose(lost * dense(layer), wanted[layer.name], atol=1e-5)


@pytest.mark.parametrize("way", itertools.permutations(["vislora", "diffusers", "kohya", "peft"], 2), ids="-".join)
def test_every_layout_into_every_other(way, tmp_path):
    first, second = way
    made = layers(scale=0.37, conv="vislora" not in way)
    path, _ = save(written(made, first, {"note": "kept"}, tmp_path / "first"), made)
    file = read(path)
    assert file.format == first and file.header["note"] == "kept" and same(made, file.layers)
    path, off = save(written(file.layers, second, file.header, tmp_path / "second"), file.layers)
    again = read(path)
    assert again.format == second and same(made, again.layers) and off < 1e-6
    assert again.header["note"] == "kept" and (second == "vislora") == ("vislora" in again.header)


def test_types_are_kept_where_that_is_exact(tmp_path):
    for scale, dtype in ((1.0, torch.float16), (0.5, torch.float16), (0.37, torch.float32)):
        made = layers(scale=scale, dtype=torch.float16)
        path, off = save(written(made, "kohya", {}, tmp_path / f"{scale}"), made)
        ups = {layer.up.dtype for layer in read(path).layers}
        assert ups == {dtype} and off < 1e-6
    bf16 = layers(scale=1.0, dtype=torch.bfloat16)
    path, off = save(written(bf16, "diffusers", {}, tmp_path / "bf16"), bf16)
    assert {layer.down.dtype for layer in read(path).layers} == {torch.bfloat16} and off < 1e-12


def test_one_rank_a_component(tmp_path):
    made = layers(rank=3)
    path, _ = save(written(made, "peft", {}, tmp_path / "out"), made)
    config = json.loads((path / "unet/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and {layer.rank for layer in read(path).layers} == {4}


def _sdxl() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), cross_attention_dim=2048, layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip


def _sd15() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


@pytest.mark.parametrize("model", [_sdxl, _sd15, unet], ids=["sdxl", "sd15", "tiny"])
def test_the_vocabulary_has_every_layer_and_none_twice(model):
    names = [n for n, m in model().named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(names) > 40
    for name in names:
        assert known("unet")[flat(name)] == [name] and component_of(name) == "unet"
    assert all(len(paths) == 1 for part in ("unet", "text_encoder") for paths in known(part).values())
    encoders = [n for n, m in text_encoder().named_modules() if isinstance(m, torch.nn.Linear)]
    assert all(component_of(name) == "text" for name in encoders)


def test_original_block_names_are_read_as_diffusers_reads_them():
    names = []
    for i in (4, 5, 7, 8):
        names += [f"input_blocks_{i}_1_transformer_blocks_1_attn2_to_out_0", f"input_blocks_{i}_1_proj_in"]
    names += ["middle_block_1_transformer_blocks_9_ff_net_0_proj", "middle_block_1_proj_out"]
    names += [f"output_blocks_{i}_1_transformer_blocks_0_attn1_to_k" for i in range(6)]
    stock = {f"lora_unet_{name}.lora_down.weight": torch.tensor(i) for i, name in enumerate(names)}
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(stock), SimpleNamespace(layers_per_block=2))
    wanted = {int(i): key.removeprefix("lora_unet_").partition(".")[0] for key, i in mapped.items()}
    for old, new in (("input_blocks", "down_blocks"), ("middle_block", "mid_block"), ("output_blocks", "up_blocks")):
        wanted = {i: name.replace(old, new) for i, name in wanted.items()}  # stock diffusers' next step
    assert [from_ldm(name) for name in names] == [wanted[i] for i in range(len(names))]
    assert all(from_ldm(name) in known("unet") for name in names)
    for name, ours in {
        "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
        "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
        "output_blocks_2_2_conv": "up_blocks_0_upsamplers_0_conv",
        "output_blocks_8_0_skip_connection": "up_blocks_2_resnets_2_conv_shortcut",
        "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
        "out_2": "conv_out",
    }.items():
        assert from_ldm(name) == ours and ours in known("unet")


def test_names_come_from_the_base_where_the_vocabulary_lacks_them(tmp_path):
    g = torch.Generator().manual_seed(0)
    weights = {"odd_one.to_q.weight": torch.randn(8, 6, generator=g), "a.b_c.weight": torch.zeros(2, 2)}
    (tmp_path / "base/unet").mkdir(parents=True)
    save_file({**weights, "a_b.c.weight": torch.zeros(2, 2)}, tmp_path / "base/unet/model.safetensors")
    pair = {"lora_down.weight": torch.randn(2, 6), "lora_up.weight": torch.randn(8, 2)}
    file = tmp_path / "odd.safetensors"
    save_file({f"lora_unet_odd_one_to_q.{key}": t for key, t in pair.items()}, file)
    with pytest.raises(InputError, match="is no module of the unet of SD.*--base"):
        read(file)
    assert read(file, Base(tmp_path / "base")).layers[0].path == "odd_one.to_q"
    save_file({f"lora_unet_a_b_c.{key}": t for key, t in pair.items()}, file)
    with pytest.raises(InputError, match=r"a_b_c may be (a\.b_c or a_b\.c|a_b\.c or a\.b_c)"):
        read(file, Base(tmp_path / "base"))


def test_old_spellings_are_read(tmp_path):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    pair = {"down": torch.randn(2, 6), "up": torch.randn(8, 2)}
    spellings = {
        f"unet.{path}.processor.to_out_lora.{{}}.weight": f"unet.{path}.to_out.0",
        f"unet.{path}.to_q.lora.{{}}.weight": f"unet.{path}.to_q",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight":
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    }  # fmt: skip
    save_file({key.format(side): t.clone() for key in spellings for side, t in pair.items()}, tmp_path / LORA_FILE)
    assert {layer.name for layer in read(tmp_path).layers} == set(spellings.values())


def test_dora_goes_where_it_is_read(tmp_path):
    model = get_peft_model(unet(), LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    shake(model)
    model.save_pretrained(tmp_path / "in")
    file = read(tmp_path / "in")
    assert file.has_magnitudes
    for format in ("peft", "diffusers"):
        path, _ = save(written(file.layers, format, {}, tmp_path / format), file.layers)
        pairs = zip(*(sorted(f.layers, key=lambda la: la.name) for f in (file, read(path))), strict=True)
        assert all(torch.equal(a.magnitude, b.magnitude) for a, b in pairs)
    for format in ("kohya", "vislora"):
        with pytest.raises(InputError, match="magnitudes"):
            written(file.layers, format, {}, tmp_path / "no")


@pytest.mark.parametrize("method", vislora.methods())
def test_our_own_files_say_what_the_adapter_does(method, tmp_path):
    base = unet()
    options = {"init_batches": 1} if method == "lora_sb" else {}
    adapter = vislora.attach(base, method, rank=2, **options)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, tensor in adapter.named_tensors():
            if tensor.requires_grad:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=g))
    adapter.save(tmp_path)
    wanted = {name: update.product().double() for name, _, _, update in adapter.site_updates()}
    file = read(tmp_path)
    assert {layer.path for layer in file.layers} == wanted.keys() and file.about.startswith(f"{method}: ")
    for layer in file.layers:
        assert torch.allclose(dense(layer), wanted[layer.path], atol=1e-5)
    assert bool(file.bounds) == (method == "nb_lora")


def test_a_file_that_does_not_come_back_is_removed(tmp_path, monkeypatch):
    made = layers()
    monkeypatch.setitem(FORMATS, "kohya", SimpleNamespace(parts=lambda la, header, out: {
        out / "a.safetensors": next(iter(written(la[1:], "diffusers", {}, out).values()))
    }))  # fmt: skip
    with pytest.raises(EnvironmentFault, match="1 layers did not come back"):
        save(written(made, "kohya", {}, tmp_path), made)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    made = layers()
    path, _ = save(written(made, "diffusers", {}, tmp_path), made)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        save(written(made, "diffusers", {}, tmp_path), made)
    assert path.read_bytes() == before
