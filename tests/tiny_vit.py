"""Image models of random weights and image sets of noise and colours, small enough for any test: 16 x 16 pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

SIDE = 16
SHAPE = {"img_size": SIDE, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def timm_vit(seed: int = 0, classes: int = 4) -> torch.nn.Module:
    """A timm VisionTransformer. Leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **SHAPE)
        if classes:  # 0: a bare backbone
            torch.nn.init.normal_(model.head.weight, std=0.2)  # timm's own start is zero
    return model


def save_timm(folder: Path, classes: int = 4) -> Path:
    """The folder as timm's local-dir: reads it."""
    folder.mkdir(parents=True)
    model = timm_vit(classes=classes)
    half = (0.5,) * 3
    cfg = {"input_size": (3, SIDE, SIDE), "mean": half, "std": half, "crop_pct": 1.0, "num_classes": classes}
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg, "interpolation": "bicubic", "fixed_input_size": True}
    save_config_for_hf(model, folder / "config.json", model_args=SHAPE)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def save_conv(folder: Path, classes: int = 4) -> Path:
    """A ConvNeXt, as timm's local-dir: reads it."""
    shape = {"depths": (2, 1, 1, 1), "dims": (8, 8, 16, 16), "kernel_sizes": 3, "patch_size": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("convnext_atto", num_classes=classes, **shape)
    half = (0.5,) * 3
    cfg = {"input_size": (3, SIDE, SIDE), "mean": half, "std": half, "crop_pct": 1.0, "num_classes": classes}
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg, "interpolation": "bicubic", "fixed_input_size": False}
    folder.mkdir(parents=True)
    save_config_for_hf(model, folder / "config.json", model_args=shape)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def save_clip(folder: Path) -> Path:
    """A CLIP of random weights, in a folder that open_clip's local-dir: reads, with a BPE of its own."""
    import open_clip

    folder.mkdir(parents=True)
    vision = {"image_size": SIDE, "layers": 2, "width": 24, "head_width": 8, "patch_size": 4}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    shape = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    about = {"model_cfg": shape, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def hf_vit(model: torch.nn.Module, layer_norm_eps: float = 1e-6) -> torch.nn.Module:
    """transformers' ViTForImageClassification with a timm ViT's weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=SIDE, patch_size=4,
        num_labels=model.num_classes, layer_norm_eps=layer_norm_eps, architectures=["ViTForImageClassification"],
    )  # fmt: skip
    other, w = ViTForImageClassification(config).eval(), model.state_dict()
    new = {
        "vit.embeddings.cls_token": w["cls_token"], "vit.embeddings.position_embeddings": w["pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": w["patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": w["patch_embed.proj.bias"],
    }  # fmt: skip
    names = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj",
             "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}  # fmt: skip
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = w[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for name, value in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                new[f"vit.layers.{i}.attention.{name}.{kind}"] = value
            for there, here in names.items():
                new[f"vit.layers.{i}.{there}.{kind}"] = w[f"blocks.{i}.{here}.{kind}"]
    for there, here in {"vit.layernorm": "norm", "classifier": "head"}.items():
        new |= {f"{there}.{kind}": w[f"{here}.{kind}"] for kind in ("weight", "bias")}
    other.load_state_dict(new)
    return other


def coloured(label: int, i: int, seed: int = 0) -> Image.Image:
    """Noise around one colour a class: easy, but not solved at once."""
    noise = np.random.default_rng([seed, label, i])
    base = np.array([(220, 60, 60), (60, 200, 60), (60, 60, 220), (200, 200, 60)][label % 4])
    pixels = base + noise.normal(0, 60, (SIDE + 4, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def image_folder(folder: Path, classes: int = 4, train: int = 12, test: int = 6, seed: int = 0) -> Path:
    """folder/{train,test}/CLASS/*.png"""
    for split, count in (("train", train), ("test", test)):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                coloured(label, i + (1000 if split == "test" else 0), seed).save(place / f"{i}.png")
    return folder


def parquet_folder(folder: Path, classes: int = 4, train: int = 6, test: int = 4) -> Path:
    """The layout that Hugging Face's hub keeps: data/train-*.parquet and data/validation-*.parquet."""
    import io

    import pyarrow as pa
    from pyarrow import parquet

    (folder / "data").mkdir(parents=True)
    for split, count in (("train", train), ("validation", test)):
        rows, labels = [], []
        for label in range(classes):
            for i in range(count):
                data = io.BytesIO()
                coloured(label, i + (1000 if split == "validation" else 0), 7).save(data, "PNG")
                rows.append({"bytes": data.getvalue(), "path": None})
                labels.append(label)
        image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        names = [f"thing{label}" for label in range(classes)]
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pa.table({"image": image, "label": pa.array(labels, pa.int64())}).replace_schema_metadata(about)
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder
