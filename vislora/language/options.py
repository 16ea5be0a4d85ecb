"""The options of language training, in transformers' words: those of every script, and causal_lm.py's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vislora.errors import InputError
from vislora.language.templates import template
from vislora.optim import own_options
from vislora.options import option

_MODEL, _DATA, _ADAPTER, _TRAIN, _RUN = "model", "data", "adapter", "training", "run"
_OPTIMIZER, _EVAL = "optimizer", "evaluation"

# What a resumed run may change: no step already made was a function of it.
FREE_ON_RESUME = frozenset({
    "model_name_or_path", "dataset_name", "max_train_steps", "num_train_epochs", "output_dir", "logging_steps",
    "probe_steps", "report_to", "save_steps", "save_total_limit", "resume_from_checkpoint", "dry_run", "cpu_threads",
    "merge",
    "eval_dataset_name", "eval_dataset_split", "max_eval_samples", "eval_steps", "eval_answers",
    "per_device_eval_batch_size", "sample_prompt", "max_new_tokens", "export_rank", "validation_file",
})  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """What every language run is a function of, beside its task and the adapter's own options."""

    model_name_or_path: str | None = option(
        None, "a folder of transformers' or a hub id; with no data named either, the embedded world", group=_MODEL
    )
    tokenizer_name: str | None = option(None, "none: the model's", group=_MODEL)
    revision: str | None = option(None, "of a hub model: branch, tag or commit", group=_MODEL,
                                  aliases=("model_revision",))  # fmt: skip
    trust_remote_code: bool = option(False, "run code that a hub model brings", group=_MODEL)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the frozen weights, what trains stays float32; auto: that of --mixed_precision", group=_MODEL,
        aliases=("torch_dtype",),
    )  # fmt: skip
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "of computation; none: accelerate's setting", group=_MODEL
    )
    tf32: bool = option(False, "faster float32 products on recent GPUs", group=_MODEL, aliases=("allow_tf32",))
    compile: bool = option(False, "compute the model in graphs, by torch.compile", group=_MODEL,
                           aliases=("torch_compile",))  # fmt: skip
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = option(
        None, "none: transformers' choice", group=_MODEL
    )
    load_in_4bit: bool = option(False, "a base of 4 bits, by bitsandbytes", group=_MODEL)
    load_in_8bit: bool = option(False, "a base of 8 bits, by bitsandbytes", group=_MODEL)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "of a 4-bit base", group=_MODEL)
    use_bnb_nested_quant: bool = option(True, "quantize the 4-bit scales too", group=_MODEL)
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", "in which a 4-bit base computes", group=_MODEL
    )

    adapter: str = option(
        "nb_lora", "a method, or full, none or peft; its options are flags of their own", group=_ADAPTER
    )
    targets: tuple[str, ...] = option(
        (), "a preset, a pattern, or suffixes of layer names; none: every linear but the output's", group=_ADAPTER,
        aliases=("target_modules",),
    )  # fmt: skip
    export_rank: int | None = option(
        None, "squeeze the exported PEFT adapter to this rank by truncated SVD; none: nothing is lost", group=_ADAPTER
    )
    merge: bool = option(False, "also write the whole model with the adapter in its weights, in model/", group=_ADAPTER)

    per_device_train_batch_size: int = option(
        8, "rows a step and process", group=_TRAIN, aliases=("train_batch_size",)
    )
    gradient_accumulation_steps: int = option(1, "batches an optimizer step", group=_TRAIN)
    gradient_checkpointing: bool = option(False, "compute activations again in the backward: less memory", group=_TRAIN)
    num_train_epochs: float = option(1.0, "passes over the data, where max_train_steps is none", group=_TRAIN)
    max_train_steps: int | None = option(
        None, "optimizer steps; none: num_train_epochs", group=_TRAIN, aliases=("max_steps",)
    )
    learning_rate: float = option(1e-4, "the largest of the schedule", group=_TRAIN)
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = option("cosine", "shape of the schedule", group=_TRAIN, aliases=("lr_scheduler",))
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises", group=_TRAIN)
    warmup_steps: int | None = option(None, "the same in steps; none: by warmup_ratio", group=_TRAIN,
                                      aliases=("lr_warmup_steps",))  # fmt: skip
    max_grad_norm: float | None = option(1.0, "gradients are clipped to this norm; none: they are not", group=_TRAIN)
    penalty_unclipped: bool = option(
        False, "add an adapter's penalty after clipping, as SORSA's code does", group=_TRAIN
    )

    optimizer: Literal["adamw", "scaled_adamw", "lora_pro", "alt_lora"] = option(
        "adamw", "the others treat the two factors of a LoRA-shaped adapter together", group=_OPTIMIZER,
        aliases=("optim",),
    )  # fmt: skip
    adam_beta1: float = option(0.9, "AdamW's", group=_OPTIMIZER)
    adam_beta2: float = option(0.999, "AdamW's", group=_OPTIMIZER)
    adam_weight_decay: float = option(0.0, "AdamW's", group=_OPTIMIZER, aliases=("weight_decay",))
    adam_epsilon: float = option(1e-8, "AdamW's", group=_OPTIMIZER)
    optimizer_damping: float | None = option(
        None, "of the others' inverses of the factors' Gram matrices; none: 1e-6", group=_OPTIMIZER
    )
    lora_pro_moments: Literal["full", "factors"] | None = option(
        None, "Adam's moments of the whole matrix's gradient, or of the factors'; none: full", group=_OPTIMIZER
    )
    alt_lora_plus: bool | None = option(None, "divide by a second moment; none: true", group=_OPTIMIZER)
    alt_lora_alternate: bool | None = option(
        None, "move one factor a step, in turn; none: false, both at every step", group=_OPTIMIZER
    )

    cpu_threads: int | None = option(None, "threads to compute with; none: all cores", group=_RUN)
    output_dir: str | None = option(None, "the run's folder; none: a new number under runs/", group=_RUN)
    seed: int = option(0, "all chance in the run is a function of it", group=_RUN)
    logging_steps: int = option(10, "steps between lines of metrics.jsonl", group=_RUN)
    probe_steps: int | None = option(
        None, "steps between cosines of full and equivalent gradient (OD-LoRA's measure); none: never", group=_RUN
    )
    report_to: Literal["tensorboard", "none"] = option("tensorboard", "where else metrics go", group=_RUN)
    save_steps: int = option(500, "steps between checkpoints", group=_RUN, aliases=("checkpointing_steps",))
    save_total_limit: int | None = option(None, "how many to keep; none: all", group=_RUN,
                                          aliases=("checkpoints_total_limit",))  # fmt: skip
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint's folder, or latest, with the --output_dir of the run", group=_RUN
    )
    dry_run: bool = option(False, "check everything, say what would be trained, and stop", group=_RUN)

    def __post_init__(self):
        self._least(1, "per_device_train_batch_size", "gradient_accumulation_steps", "max_train_steps", "cpu_threads",
                    "logging_steps", "save_steps", "save_total_limit", "export_rank")  # fmt: skip
        self._least(0, "warmup_steps", "warmup_ratio", "adam_weight_decay", "optimizer_damping")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "num_train_epochs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"--{name}", f"{value} is not a positive number", "give one, such as 1e-4")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name}", f"{getattr(self, name)} is not in [0, 1)", "0.9 and 0.999 are usual")
        if self.warmup_ratio >= 1:
            wrong = f"{self.warmup_ratio} is no share of the steps"
            raise InputError("--warmup_ratio", wrong, "give less than 1, or --warmup_steps")
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("--load_in_8bit", "stands beside --load_in_4bit", "leave one out")
        own_options(self)

    def _least(self, least: int, *names: str) -> None:
        """Raise InputError for the first of the options that is below `least` or not finite."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"--{name}", f"{value} is below {least}", f"give {least} or more")

    def target_words(self) -> str | tuple[str, ...] | None:
        """`targets` as `vislora.attach` takes it: one word may be a preset or a pattern."""
        return None if not self.targets else self.targets[0] if len(self.targets) == 1 else self.targets

    def warmup(self, total: int) -> int:
        """Steps of warm-up in a run of `total`; a ratio is rounded up, as transformers does."""
        return math.ceil(self.warmup_ratio * total) if self.warmup_steps is None else self.warmup_steps

    def require_both(self, data: str) -> None:
        """Raise InputError unless model and data are there."""
        for name in ("model_name_or_path", data):
            if getattr(self, name) is None:
                raise InputError(f"--{name}", "is not given", "give both the model and the data, or neither")


@dataclass(frozen=True)
class CausalLMOptions(TrainOptions):
    """Everything that a run of train_scripts/causal_lm.py is a function of, beside the adapter's own options."""

    dataset_name: str | None = option(
        None, "json, jsonl, csv or parquet file, folder of them or of save_to_disk, or a hub id", group=_DATA,
        aliases=("data", "train_file"),
    )  # fmt: skip
    dataset_config_name: str | None = option(None, "of a hub data set, such as main", group=_DATA)
    dataset_split: str = option("train", 'and slices: "train[:1000]", "train[10%:20%]"', group=_DATA)
    dataset_field: tuple[str, ...] = option(
        (), "columns of prompt and response, or one of plain text; none: known by their names", group=_DATA
    )
    prompt_template: str | None = option(
        None, "a name, or a text with {instruction}; none: alpaca for instructions, prompts as they are", group=_DATA
    )
    chat_template: str | None = option(
        None, "for messages: a file of Jinja, or chatml; none: the tokenizer's", group=_DATA
    )
    max_length: int = option(512, "tokens of an example; more are cut off", group=_DATA,
                             aliases=("max_seq_length", "cutoff_len", "model_max_length"))  # fmt: skip
    truncation: Literal["sequence", "parts"] = option(
        "sequence", "parts: prompt and response are cut to max_length each, as SORSA's code does", group=_DATA
    )
    train_on_prompt: bool = option(False, "take the loss on prompts too", group=_DATA, aliases=("train_on_inputs",))
    packing: bool = option(False, "several examples in a row, which do not see each other", group=_DATA)
    max_train_samples: int | None = option(None, "use the first so many rows", group=_DATA)
    loss_normalization: Literal["tokens", "means"] = option(
        "tokens", "every learned token of an optimizer step counts alike, or the mean of its batches' means, as the "
        "papers' code of 2024", group=_TRAIN,
    )  # fmt: skip

    eval_dataset_name: str | None = option(
        None, "held-out data, as --dataset_name", group=_EVAL, aliases=("validation_file",)
    )
    eval_dataset_split: str = option("test", "of a folder or a hub data set; slices as above", group=_EVAL)
    validation_split_percentage: float = option(
        0.0, "hold out the last so many percent of the training rows, where there is no other held-out data",
        group=_EVAL,
    )  # fmt: skip
    max_eval_samples: int | None = option(None, "use the first so many held-out rows", group=_EVAL)
    per_device_eval_batch_size: int = option(8, "rows at a time, of held-out data and prompts", group=_EVAL)
    eval_steps: int | None = option(None, "evaluate every so many steps; none: only before and after", group=_EVAL)
    sample_prompt: tuple[str, ...] = option(
        (), "instructions to answer at every evaluation; none: the first held-out rows' own", group=_EVAL
    )
    num_samples: int = option(3, "how many held-out rows that is", group=_EVAL)
    eval_answers: int = option(0, "generate answers to so many held-out rows and count the right ones", group=_EVAL)
    max_new_tokens: int = option(128, "of a sample or an answer", group=_EVAL)

    def __post_init__(self):
        super().__post_init__()
        self._least(1, "max_train_samples", "max_eval_samples", "per_device_eval_batch_size", "eval_steps",
                    "max_new_tokens")  # fmt: skip
        self._least(2, "max_length")
        self._least(0, "num_samples", "eval_answers", "validation_split_percentage")
        if self.validation_split_percentage > 50:
            wrong = f"{self.validation_split_percentage} holds out more than half"
            raise InputError("--validation_split_percentage", wrong, "give 50 or less")
        if self.packing and self.truncation == "parts":
            raise InputError("--packing", "rows of max_length hold no longer examples", "--truncation sequence")
        if self.packing and self.attn_implementation == "flash_attention_2":
            raise InputError("--packing", "flash_attention_2 takes no block mask", "--attn_implementation sdpa")
        if self.prompt_template is not None:
            template(self.prompt_template)
