"""Networks by name, file and folder; what is missing is named with its place."""

from __future__ import annotations

import json

import open_clip
import pytest
import timm
import torch
from metric_world import tiny_dino
from safetensors.torch import save_file

from vislora import world
from vislora.errors import InputError
from vislora.metrics import backbones
from vislora.metrics.transforms import IMAGENET, OPENAI

TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def test_papers_weights_from_a_folder(tmp_path, monkeypatch):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # small, in the place of vit_small_patch16_224.dino
    monkeypatch.setitem(backbones.DINO, "s16", name)
    with pytest.raises(InputError, match=rf"{name}.safetensors: no such file -> put its weights"):
        backbones.dino("s16", "full", str(tmp_path))
    model = timm.create_model(name, num_classes=0)
    save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    whole, cut = (backbones.dino("s16", how, str(tmp_path)) for how in ("full", "crop"))
    assert whole.identifier == f"timm/{name}"
    assert whole.transform.name.startswith("full224_bilinear") and cut.transform.name.startswith("r256c224_bicubic")
    assert (whole.transform.mean, whole.transform.std) == IMAGENET
    assert whole.view != cut.view
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.eval()(x)
    assert torch.allclose(whole.images(x), theirs / theirs.norm(dim=1, keepdim=True), atol=1e-6)


def test_clip_from_a_folder_has_quickgelu(tmp_path, monkeypatch):
    for name, quick in (("small-quickgelu", True), ("small", False)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**TOWERS, "quick_gelu": quick}))
    open_clip.add_model_config(tmp_path)
    for name in ("small-quickgelu", "small"):
        save_file({k: v.contiguous() for k, v in open_clip.create_model(name).state_dict().items()},
                  tmp_path / f"{name}.safetensors")  # fmt: skip
    monkeypatch.setitem(backbones.CLIP, "L14", "small-quickgelu")
    clip = backbones.clip("L14", str(tmp_path))
    assert (clip.transform.mean, clip.transform.std) == OPENAI and clip.transform.name.startswith("r32c32_bicubic")
    assert clip.texts(["a dog", "a cat"]).norm(dim=1) == pytest.approx(1, abs=1e-6)
    with pytest.raises(InputError, match="small has GELU activations, OpenAI's weights need QuickGELU"):
        backbones.clip("small", str(tmp_path))


def test_a_folder_of_openai_s_clip_has_quickgelu_too(tmp_path):
    """Its weights fit either activation, and only its folder's name says whose they are."""
    open_clip.add_model_config(_config(tmp_path, "towers"))
    state = {k: v.contiguous() for k, v in open_clip.create_model("towers").state_dict().items()}

    def saved(place, quick: bool):
        place.mkdir(parents=True)
        cfg = {"model_cfg": {**TOWERS, "quick_gelu": quick}, "preprocess_cfg": {"mean": OPENAI[0], "std": OPENAI[1]}}
        (place / "open_clip_config.json").write_text(json.dumps(cfg))
        save_file(state, place / "open_clip_model.safetensors")
        return backbones.clip(str(place))

    hub = tmp_path / "models--timm--vit_small_clip.openai" / "snapshots"
    quick = saved(hub / "1a2b", True)
    assert quick.activations == "QuickGELU"
    with pytest.raises(InputError, match="has GELU activations, OpenAI's weights need QuickGELU.*quick_gelu"):
        saved(hub / "3c4d", False)
    mine = saved(tmp_path / "a" / "b" / "mine", False)  # nothing says that these are OpenAI's: recorded
    assert mine.activations == "GELU"
    file = tmp_path / "a" / "b" / "mine" / "open_clip_config.json"
    file.write_text(file.read_text().replace('"quick_gelu": false', '"quick_gelu": true'))
    assert backbones.clip(str(file.parent)).view != mine.view  # whose features are others


def _config(folder, name: str):
    (folder / f"{name}.json").write_text(json.dumps(TOWERS))
    return folder / f"{name}.json"


def test_the_world_s_networks(small_world):
    dino, clip = backbones.dino("s16", "full"), backbones.clip("L14")
    assert dino.identifier == "world/tiny-dino" and clip.identifier == "world/tiny-clip"
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert dino.images(x).norm(dim=1) == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        assert torch.allclose(clip.images(x), clip.network.encode_image(x, normalize=True), atol=1e-6)
    red, other = clip.texts(["a red apple on grass", "a red apple on grass"])
    assert torch.equal(red, other)


def test_offline_the_papers_networks_say_their_file_and_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = r"put DIR/{0}.safetensors, from the hub's {1}, and give --backbones DIR"
    dino = "vit_small_patch16_224.dino"
    with pytest.raises(InputError, match=f"{dino}: cannot be loaded.*{said.format(dino, 'timm/' + dino)}"):
        backbones.dino("s16", "full", backbones.PAPERS)
    clip = "ViT-B-32-quickgelu"
    hub = "timm/vit_base_patch32_clip_224.openai"
    with pytest.raises(InputError, match=f"{clip}: cannot be loaded.*{said.format(clip, hub)}"):
        backbones.clip("B32", backbones.PAPERS)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "ROOT", tmp_path)
    with pytest.raises(InputError, match=r"tiny-dino/model.safetensors: is not there.*--backbones papers"):
        backbones.dino("s16", "full")
    with pytest.raises(InputError, match=r"ViT-L-14-quickgelu.safetensors: no such file.*timm/vit_large"):
        backbones.clip("L14", str(tmp_path))
    with pytest.raises(InputError, match="'vit_smal' is no network"):
        backbones.dino("vit_smal", "full")
    with pytest.raises(InputError, match="'B31' is no network that open_clip knows.*B32"):
        backbones.clip("B31")
    folder = tiny_dino(tmp_path / "mine")
    assert backbones.dino(str(folder), "full").identifier == str(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be loaded"):
        backbones.dino(str(folder), "full")
