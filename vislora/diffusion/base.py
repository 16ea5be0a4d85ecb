"""The base model as files: where it lies, of which family it is, and whether every part of it is there and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from vislora.diffusion.family import FAMILIES, Family
from vislora.diffusion.hub import brief, hub_errors
from vislora.errors import InputError, near

# The weight files' stems by the library that model_index.json names for a part.
STEMS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model", "pytorch_model")}
_ABSENT = (None, [None, None])  # how model_index.json names a part that was left out


def check_folder(folder: str | Path, variant: str | None = None) -> Family:
    """The family of the model in `folder`, once every part it needs is there and every safetensors file is whole.

    Reads the headers alone. InputError naming the missing or broken file, or the unknown family.
    """
    folder = Path(folder)
    index = _json(folder / "model_index.json")
    family = _family(folder / "model_index.json", index)
    left_out, found = absent(folder, family), set()
    for name in family.models:
        entry = index.get(name)
        if name in left_out:
            continue
        _json(folder / name / "config.json")
        library = entry[0] if isinstance(entry, list) and entry else None
        if library not in STEMS:
            wrong = f"names {entry!r} as its {name}"
            raise InputError(str(folder / "model_index.json"), wrong, "a part of diffusers or transformers is needed")
        found.add(_check_weights(folder / name, STEMS[library], variant))
    if variant is not None and variant not in found:
        raise InputError(str(folder), f"no part has files of variant {variant!r}", "leave --variant out, or mend it")
    for name in family.tokenizers:
        if name in left_out:
            continue
        if not any((folder / name / file).is_file() for file in ("tokenizer.json", "vocab.json", "spiece.model")):
            raise InputError(str(folder / name / "vocab.json"), "no such file", "the tokenizer's vocabulary is needed")
    _json(folder / "scheduler" / "scheduler_config.json")
    return family


def absent(folder: str | Path, family: Family) -> list[str]:
    """The optional parts that the model in `folder` lacks."""
    index = _json(Path(folder) / "model_index.json")
    return [name for name in family.optional if index.get(name) in _ABSENT]


def _family(file: Path | str, index: dict) -> Family:
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        hint = near(name, FAMILIES) if isinstance(name, str) else ""
        raise InputError(str(file), f"_class_name {name!r} is unknown{hint}", f"known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _json(file: Path) -> dict:
    """The object in a JSON file; InputError when it is missing or no such thing."""
    if not file.is_file():
        raise InputError(str(file), "no such file", "give a folder as diffusers' save_pretrained writes it")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(str(file), f"cannot be read ({brief(error)})", "save or download the model again") from error
    if not isinstance(content, dict):
        raise InputError(str(file), "holds no JSON object", "save or download the model again")
    return content


def _weight_files(stems: tuple[str, ...], variant: str | None) -> Iterator[tuple[str, str | None]]:
    """(file name, variant it is of) in the order in which the libraries look for a part's weights."""
    for tag in dict.fromkeys((variant, None)):
        dot = f".{tag}" if tag else ""
        for stem in stems:
            yield f"{stem}{dot}.safetensors", tag
            yield f"{stem}.safetensors.index{dot}.json", tag
            yield f"{stem}{dot}.bin", tag
            yield f"{stem}.bin.index{dot}.json", tag


def _check_weights(folder: Path, stems: tuple[str, ...], variant: str | None) -> str | None:
    """The variant that was found. InputError when there are no weights, a shard is missing, or a file is cut short."""
    for name, tag in _weight_files(stems, variant):
        if not (folder / name).is_file():
            continue
        files = [name]
        if name.endswith(".json"):
            shards = _json(folder / name).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise InputError(str(folder / name), "lists no shards", "save or download the model again")
            files = sorted(set(map(str, shards.values())))
        for file in files:
            _check_file(folder / file)
        return tag
    there = ", ".join(file.name for stem in stems for file in sorted(folder.glob(f"{stem}*")))
    remedy = f"there is {there}: check --variant" if there else "the part's weights are needed"
    raise InputError(str(folder / f"{stems[0]}.safetensors"), "no such file", remedy)


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise InputError(str(file), "no such file, though its index lists it", "save or download the model again")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass  # opening it holds the header against the file's length
        except (SafetensorError, OSError) as error:
            raise InputError(str(file), f"is broken ({brief(error)})", "save or download the model again") from error


@dataclass(frozen=True)
class Facts:
    """resolution: side in pixels of the images it was trained on. grain: what both sides of an image are a multiple
    of."""

    family: Family
    resolution: int
    grain: int


def facts_of(path: str | Path, revision: str | None = None) -> Facts:
    """The facts of the model at `path`, from its small files alone.

    InputError and EnvironmentFault as for `vislora.diffusion.models.load`.
    """
    folder = local_folder(str(path))
    if folder is not None:
        family = check_folder(folder)
        configs = {part: _json(folder / part / "config.json") for part in (family.denoiser, "vae")}
    else:
        subject = str(path) if revision is None else f"{path}@{revision}"
        with hub_errors(subject, revision, None):
            index = _json(Path(hf_hub_download(str(path), "model_index.json", revision=revision)))
            family = _family(f"{path}/model_index.json", index)
            files = {p: hf_hub_download(str(path), f"{p}/config.json", revision=revision)
                     for p in (family.denoiser, "vae")}  # fmt: skip
        configs = {part: _json(Path(file)) for part, file in files.items()}
    factor = vae_factor(configs["vae"])
    return Facts(family, family.latent_side(configs) * factor, factor * family.patch)


def vae_factor(config) -> int:
    """Pixels a side that one latent covers, by the VAE's configuration."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def local_folder(path: str) -> Path | None:
    """The local folder that `path` names, None for a hub id. InputError when it is neither."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise InputError(path, "is a file, not a model's folder", "name the folder that holds model_index.json")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        # A hub id is owner/name; anything else without a folder behind it is a mistyped path.
        raise InputError(path, "no such folder, and no hub id (owner/name)", "check --pretrained_model_name_or_path")
    return None


def download(repo: str, revision: str | None, variant: str | None) -> Path:
    """The folder of hub model `repo` in the local cache. Its family is checked before its weights are fetched."""
    subject = repo if revision is None else f"{repo}@{revision}"
    with hub_errors(subject, revision, variant):
        index = _json(Path(hf_hub_download(repo, "model_index.json", revision=revision)))
        family = _family(f"{repo}/model_index.json", index)
        return Path(
            family.pipeline.download(repo, revision=revision, variant=variant, **dict.fromkeys(family.left_out))
        )
