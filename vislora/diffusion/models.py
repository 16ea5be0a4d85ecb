"""Load a latent diffusion model, frozen and ready to adapt, after checking what can be checked before it is large."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from vislora.adapters import Method
from vislora.baselines import Baseline
from vislora.diffusion.hub import brief, hub_errors
from vislora.errors import InputError, near

SAMPLERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The weight files' stems by the library that model_index.json names for a part.
STEMS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model", "pytorch_model")}


@dataclass(frozen=True)
class Family:
    """Models that share a pipeline: which folders must be there, and which parts are left out on loading."""

    pipeline: type  # the diffusers class, named by model_index.json's _class_name
    models: tuple[str, ...]  # sub-folders with weights
    tokenizers: tuple[str, ...]
    convolutional: tuple[str, ...]  # kept in channels_last
    left_out: tuple[str, ...]  # optional parts that training and sampling do without


FAMILIES = {
    "StableDiffusionPipeline": Family(
        pipeline=StableDiffusionPipeline,
        models=("text_encoder", "vae", "unet"),
        tokenizers=("tokenizer",),
        convolutional=("vae", "unet"),
        left_out=("safety_checker", "feature_extractor", "image_encoder"),
    )
}


@dataclass
class DiffusionModels:
    """The frozen parts of a Stable Diffusion 1.x or 2.x model. `scheduler` is the noise schedule of training (DDPM)."""

    path: str
    family: Family
    dtype: torch.dtype  # of the base weights; the VAE's own may be float32
    tokenizer: object
    text_encoder: torch.nn.Module
    vae: torch.nn.Module
    unet: torch.nn.Module
    scheduler: DDPMScheduler

    @property
    def pipeline_class(self) -> str:
        """Name of the diffusers class that loads this model."""
        return self.family.pipeline.__name__

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def vae_factor(self) -> int:
        """Pixels a side that one latent covers."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """Side in pixels of the square images that the model was trained on."""
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else max(size)) * self.vae_factor

    def pipeline(self, scheduler: str = "ddim"):
        """A pipeline for sampling over these very modules (no copies), with a sampler of its own: "ddim" or "dpm".

        InputError for another sampler.
        """
        if scheduler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise InputError("scheduler", f"{scheduler!r} is unknown{near(scheduler, SAMPLERS)}", f"one of {known}")
        sampler = SAMPLERS[scheduler].from_config(self.scheduler.config)
        parts = {name: getattr(self, name) for name in (*self.family.models, *self.family.tokenizers)}
        parts |= dict.fromkeys(self.family.left_out)
        pipe = self.family.pipeline(**parts, scheduler=sampler, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def weight_dtype(precision: str, method: Method | Baseline) -> torch.dtype:
    """The weights' type under accelerate's --mixed_precision: its own, but float32 where the base itself trains."""
    if isinstance(method, Baseline) and method.trains_base:
        return torch.float32
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def load(
    path: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DiffusionModels:
    """Load the model in the folder `path`, or the hub's model of that id, frozen, in eval mode, on `device`.

    The parts with convolutions are kept in channels_last, on a CPU ten times as fast and more. With dtype
    float16 the VAE stays in float32: its activations overflow half precision, and the images turn black.

    InputError when the folder lacks a part, a file of it is broken, or the family is unknown;
    EnvironmentFault when the hub cannot be reached. Both before any weights are read.
    """
    if dtype not in DTYPES:
        raise InputError("dtype", f"{dtype} is no precision to load in", f"one of {', '.join(map(str, DTYPES))}")
    path = str(path)
    folder = _folder(path)
    if folder is None:
        folder = _download(path, revision, variant)
    family = check_folder(folder, variant)

    diffusers.utils.logging.disable_progress_bar()  # bars of loading would bury the run's own
    transformers.utils.logging.disable_progress_bar()
    precision = {"default": dtype, "vae": torch.float32 if dtype == torch.float16 else dtype}
    try:
        pipe = family.pipeline.from_pretrained(
            folder,
            variant=variant,
            dtype=precision,
            local_files_only=True,
            requires_safety_checker=False,
            **dict.fromkeys(family.left_out),
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(path, f"cannot be loaded ({brief(error)})", "save or download it again") from error

    for name in family.models:
        part = getattr(pipe, name).requires_grad_(False).eval().to(device)
        if name in family.convolutional:
            part.to(memory_format=torch.channels_last)
    # Latents are not confined to [-1, 1] as pixels are, so no schedule may clip its estimate of them.
    schedule = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    parts = {name: getattr(pipe, name) for name in (*family.models, *family.tokenizers)}
    return DiffusionModels(path=path, family=family, dtype=dtype, scheduler=schedule, **parts)


def check_folder(folder: str | Path, variant: str | None = None) -> Family:
    """The family of the model in `folder`, once every part it needs is there and every safetensors file is whole.

    Reads the headers alone. InputError naming the missing or broken file, or the unknown family.
    """
    folder = Path(folder)
    index = _json(folder / "model_index.json")
    family = _family(folder / "model_index.json", index)
    found: set[str | None] = set()
    for name in family.models:
        _json(folder / name / "config.json")
        entry = index.get(name)
        library = entry[0] if isinstance(entry, list) and entry else None
        if library not in STEMS:
            wrong = f"names {entry!r} as its {name}"
            raise InputError(str(folder / "model_index.json"), wrong, "a part of diffusers or transformers is needed")
        found.add(_check_weights(folder / name, STEMS[library], variant))
    if variant is not None and variant not in found:
        raise InputError(str(folder), f"no part has files of variant {variant!r}", "leave --variant out, or mend it")
    for name in family.tokenizers:
        if not any((folder / name / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise InputError(str(folder / name / "vocab.json"), "no such file", "the tokenizer's vocabulary is needed")
    _json(folder / "scheduler" / "scheduler_config.json")
    return family


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


def resolution_of(path: str | Path, revision: str | None = None) -> int:
    """`DiffusionModels.resolution` of the model at `path`, from its two small configuration files alone.

    InputError and EnvironmentFault as for `load`.
    """
    folder = _folder(str(path))
    if folder is None:
        subject = str(path) if revision is None else f"{path}@{revision}"
        with hub_errors(subject, revision, None):
            files = [hf_hub_download(str(path), f"{part}/config.json", revision=revision) for part in ("unet", "vae")]
    else:
        check_folder(folder)
        files = [folder / part / "config.json" for part in ("unet", "vae")]
    unet, vae = (_json(Path(file)) for file in files)
    size = unet["sample_size"]
    return (size if isinstance(size, int) else max(size)) * 2 ** (len(vae["block_out_channels"]) - 1)


def _folder(path: str) -> Path | None:
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


def _download(repo: str, revision: str | None, variant: str | None) -> Path:
    """The folder of hub model `repo` in the local cache. Its family is checked before its weights are fetched."""
    subject = repo if revision is None else f"{repo}@{revision}"
    with hub_errors(subject, revision, variant):
        index = _json(Path(hf_hub_download(repo, "model_index.json", revision=revision)))
        family = _family(f"{repo}/model_index.json", index)
        return Path(
            family.pipeline.download(repo, revision=revision, variant=variant, **dict.fromkeys(family.left_out))
        )
