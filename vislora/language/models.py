"""Language models and tokenizers: loaded from a folder or the hub, in any precision, and written back merged."""

from __future__ import annotations

import errno
import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from vislora.adapter import Adapter
from vislora.baselines import Baseline
from vislora.baselines.full import FullHandle
from vislora.errors import EnvironmentFault, InputError
from vislora.handle import Handle
from vislora.pretrained import whole

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
log = logging.getLogger("vislora")


@contextmanager
def readable(subject: str) -> Iterator[None]:
    """What transformers raises while it loads, as one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        brief = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise EnvironmentFault(subject, "the disk is full", "free some space in HF_HOME") from error
        raise InputError(subject, f"cannot be loaded ({brief})", "name a folder or a hub id") from error


def weight_dtype(word: str, precision: str, method: Any) -> torch.dtype:
    """The frozen weights' type. "auto": that of --mixed_precision; float32 where the base itself trains."""
    if isinstance(method, Baseline) and method.trains_base:
        return torch.float32
    if word != "auto":
        return _DTYPES[word]
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False):
    """The tokenizer. Where it has no padding token, its end token is named one: padding is told by place, never by id.

    Raises InputError for what cannot be loaded.
    """
    require_there(name)
    with readable(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_there(name: str) -> None:
    """Raise InputError for a path that is none: the hub's client would take it for an id."""
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise InputError("--model_name_or_path", f"{name}: no such folder", "check the path")


def quantization(options: Any) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration of --load_in_4bit or --load_in_8bit; None for neither."""
    if not (options.load_in_4bit or options.load_in_8bit):
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        wrong = "the package bitsandbytes is not installed"
        raise EnvironmentFault("--load_in_4bit", wrong, 'pip install "vislora[quantized]"') from None
    if options.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=_DTYPES[options.bnb_4bit_compute_dtype],
    )


def load(
    auto: Any, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu", quantized: Any = None, **more: Any
) -> nn.Module:
    """A model by one of transformers' Auto classes, frozen, in eval mode, on `device`. InputError for what it refuses.

    quantized: a BitsAndBytesConfig, or None. more: keywords of from_pretrained.
    """
    require_there(name)
    with readable(name):
        if quantized is not None:
            more |= {"quantization_config": quantized, "device_map": {"": device}}
            model = auto.from_pretrained(name, dtype=dtype, **more)
        else:
            model = whole(auto, name, lambda made: [head for head, _ in heads(made)], dtype=dtype, **more).to(device)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # generation asks for it by itself
    return model.requires_grad_(False).eval()


def context_length(name: str, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """The longest sequence that the model was made for, where its configuration tells."""
    with readable(name):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def takes_positions(model: nn.Module) -> bool:
    """Whether a model can be told where its tokens stand; recurrent ones, such as RWKV, read padding as text."""
    return "position_ids" in inspect.signature(model.forward).parameters


def require_packable(model: nn.Module) -> None:
    """Raise InputError for a model whose examples in one row could not be kept apart."""
    if not takes_positions(model):
        wrong = f"{type(model).__name__} takes no positions: examples in one row would run into each other"
        raise InputError("--packing", wrong, "leave it out")


def changes(adapter: Handle) -> Iterator[tuple[str, slice | None, Tensor]]:
    """(module name, rows or None, delta in float32) of one adapted matrix after another, at strength 1."""
    if isinstance(adapter, Adapter):
        for _, site, _, update in adapter.site_updates():
            yield site.path, site.rows, update.dense(site.weight()).float()
    else:
        for name, _, delta in adapter.changes():
            yield name, None, delta.float()


@torch.no_grad()
def write_merged(adapter: Handle, model: nn.Module, tokenizer, folder: Path, auto: Any, name: str, **more: Any) -> Path:
    """Write `folder`, a plain model of transformers' with the adapter in its weights, and the tokenizer.

    Of full fine-tuning it is the model itself. Otherwise the base is loaded again from `name` in its own precision, a
    quantized one too, and every delta is added in float32: nothing of quantization stays but what the adapter learned
    around it. A classifier's head, which trains beside the adapter, is taken from `model`.
    """
    if isinstance(adapter, FullHandle):
        merged = model
    else:
        with readable(name):
            merged = auto.from_pretrained(name, dtype="auto", **more)
        own = dict(merged.named_modules())
        for path, rows, delta in changes(adapter):
            weight = own[path].weight if rows is None else own[path].weight[rows]
            weight.copy_(weight.float() + delta.to(weight.device))
        for path, module in heads(model):
            for key, tensor in module.state_dict().items():
                own[path].get_parameter(key).copy_(tensor)
    try:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        wrong = f"cannot be written ({error.strerror})"
        raise EnvironmentFault(str(folder), wrong, "free some space; the adapter is saved") from error
    return folder


def heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of what a classifier has on top of its encoder; nothing for a language model."""
    if model.get_output_embeddings() is not None or not hasattr(model, "base_model_prefix"):
        return []
    return [(name, child) for name, child in model.named_children()
            if name != model.base_model_prefix and not name.startswith("vislora_")
            and next(child.parameters(), None) is not None]  # fmt: skip


def checkpointing(model: nn.Module, on: bool = True) -> None:
    """Compute activations again in the backward (on), or keep them. InputError where the model cannot."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # until transformers 5.2x
    if not on:
        return getattr(model, f"{kind}_checkpointing_disable")()
    with readable("--gradient_checkpointing"):
        words = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{kind}_checkpointing_enable")(**words)


def is_checkpointed(model: nn.Module) -> bool:
    """Whether activations are computed again in the backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def memory_mib(device: torch.device) -> float:
    """The most that was held at once: of a GPU's memory, or of this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def quiet() -> None:
    """No bars and no advice of transformers' while it loads."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loaders fork
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
