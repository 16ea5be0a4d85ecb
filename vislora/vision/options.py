"""The options of image classification, in the words of the diffusers and transformers scripts: what
train_scripts/classification.py takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vislora.errors import InputError
from vislora.optim import own_options
from vislora.options import option

_MODEL, _TARGET, _SOURCE, _IMAGE, _ADAPTER = "model", "target data", "source data", "augmentation", "adapter"
_TRAIN, _OPTIMIZER, _EVALUATION, _RUN = "training", "optimizer", "evaluation", "run"

# What a resumed run may change: no step already made was a function of it.
FREE_ON_RESUME = frozenset({
    "output_dir", "logging_steps", "probe_steps", "report_to", "checkpointing_steps", "checkpoints_total_limit",
    "final_model",
    "resume_from_checkpoint", "dry_run", "eval_batch_size", "cpu_threads", "dataloader_num_workers", "data_dir",
    "dataset_name", "source_dataset_name", "model_name_or_path", "export_rank", "knn",
})  # fmt: skip


@dataclass(frozen=True)
class ClassificationOptions:
    """Everything a classification run is a function of, beside the adapter's own options."""

    model_name_or_path: str | None = option(
        None, "a folder or name of timm, transformers or open_clip; with no data named either, the embedded world",
        group=_MODEL, aliases=("pretrained_model_name_or_path", "model"),
    )  # fmt: skip
    library: Literal["timm", "transformers", "open_clip"] | None = option(
        None, "whose name it is; none: found out", group=_MODEL
    )
    pretrained: str | None = option(
        None, "weights for a name of timm or open_clip: a .safetensors file, random, or open_clip's tag", group=_MODEL
    )
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "of training's forward and backward; scores are float32. none: accelerate's setting", group=_MODEL
    )
    channels_last: bool = option(False, "keep images and convolutions in that layout", group=_MODEL)
    gradient_checkpointing: bool = option(False, "compute activations again in the backward: less memory", group=_MODEL)

    dataset_name: str | None = option(
        None, "a set of torchvision, a folder (class folders in train/ and test/, parquet, save_to_disk, idx), hub id",
        group=_TARGET,
    )  # fmt: skip
    dataset_config_name: str | None = option(None, "of a hub dataset, or a torchvision set's partition", group=_TARGET)
    train_split: str = option("train", "one, or several joined by +", group=_TARGET, aliases=("train_split_name",))
    test_split: str = option("test", "what is reported on; test means validation where there is no test", group=_TARGET)
    train_val_split: float = option(
        0.1, "share of every class's training images held out, by the seed, to choose the best checkpoint",
        group=_TARGET, aliases=("validation_split",),
    )  # fmt: skip
    max_train_samples: int | None = option(None, "of the training images, by the seed", group=_TARGET)
    image_column_name: str | None = option(None, "of a Hugging Face dataset; none: image or img", group=_TARGET)
    label_column_name: str | None = option(None, "the same; none: label, labels or fine_label", group=_TARGET)
    data_dir: str = option("data", "where torchvision's sets lie, or are downloaded to", group=_TARGET)

    source_dataset_name: str | None = option(
        None, "what the model knew before, as --dataset_name; none: forgetting is not measured", group=_SOURCE
    )
    source_config_name: str | None = option(None, "as --dataset_config_name", group=_SOURCE,
                                             aliases=("source_dataset_config_name",))  # fmt: skip
    source_unlabelled: bool = option(
        False, "its labels are missing, or not those of the model's head: measure the drift of features alone",
        group=_SOURCE, aliases=("unlabelled",),
    )  # fmt: skip
    source_image_column_name: str | None = option(None, "as --image_column_name", group=_SOURCE)
    source_label_column_name: str | None = option(None, "as --label_column_name", group=_SOURCE)
    source_train_split: str = option("train", "neighbours are sought there", group=_SOURCE)
    source_test_split: str = option("test", "as --test_split", group=_SOURCE)
    max_source_samples: int | None = option(
        1000, "scored during training, the same by the seed; before and after it is all of them", group=_SOURCE
    )
    max_source_bank: int | None = option(10_000, "training images that neighbours are sought among", group=_SOURCE)
    zero_shot_templates: str = option(
        "openai", "of a CLIP's source head: simple, openai, or a file with a template a line", group=_SOURCE
    )
    knn: bool = option(
        False, "score the source by neighbours too; on the way among as many as --max_source_samples", group=_SOURCE
    )

    crop_scale: float = option(1.0, "below 1: random crops of this share of the area or more", group=_IMAGE)
    hflip: float = option(0.0, "chance of mirroring", group=_IMAGE)
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = option("none", "of each image", group=_IMAGE)
    randaugment_ops: int = option(2, "operations an image", group=_IMAGE)
    randaugment_magnitude: int = option(9, "of 30", group=_IMAGE)
    random_erasing: float = option(0.0, "chance of erasing a rectangle", group=_IMAGE)
    mixup_alpha: float = option(0.0, "0: no mixup; with cutmix too, each batch takes one", group=_IMAGE)
    cutmix_alpha: float = option(0.0, "0: no cutmix", group=_IMAGE)
    label_smoothing: float = option(0.0, "spread over all classes", group=_IMAGE,
                                    aliases=("label_smoothing_factor",))  # fmt: skip

    adapter: str = option(
        "nb_lora", "a method, or full, none (linear probe) or peft; its options are flags of their own", group=_ADAPTER
    )
    targets: tuple[str, ...] = option(
        (), "a preset, a pattern, or suffixes of layer names; none: q and v, or all of the model for full",
        group=_ADAPTER, aliases=("target_modules",),
    )  # fmt: skip
    export_rank: int | None = option(None, "squeeze the exported file to this rank", group=_ADAPTER)

    train_batch_size: int = option(
        64, "images a step and process", group=_TRAIN, aliases=("per_device_train_batch_size",)
    )
    gradient_accumulation_steps: int = option(1, "batches an optimizer step", group=_TRAIN)
    max_train_steps: int | None = option(None, "optimizer steps; none: num_train_epochs", group=_TRAIN,
                                         aliases=("max_steps",))  # fmt: skip
    num_train_epochs: float = option(3.0, "passes over the images, where max_train_steps is none", group=_TRAIN)
    learning_rate: float = option(5e-3, "of the adapter, the largest of the schedule", group=_TRAIN)
    head_lr: float | None = option(None, "of the new head; none: learning_rate", group=_TRAIN)
    head_weight_decay: float | None = option(None, "of the new head; none: adam_weight_decay", group=_TRAIN)
    lr_scheduler: Literal["one_cycle", "cosine", "linear", "constant"] = option(
        "one_cycle", "one_cycle: up from 1/25 and down to 1/250,000 by cosines, momentum left alone", group=_TRAIN,
        aliases=("lr_scheduler_type",),
    )  # fmt: skip
    warmup_ratio: float = option(0.1, "share of the steps in which the rate rises", group=_TRAIN)
    warmup_steps: int | None = option(None, "the same in steps; none: by warmup_ratio", group=_TRAIN,
                                      aliases=("lr_warmup_steps",))  # fmt: skip
    adam_beta1: float = option(0.9, "AdamW's", group=_TRAIN)
    adam_beta2: float = option(0.999, "AdamW's", group=_TRAIN)
    adam_weight_decay: float = option(1e-2, "AdamW's", group=_TRAIN, aliases=("weight_decay",))
    adam_epsilon: float = option(1e-8, "AdamW's", group=_TRAIN)
    max_grad_norm: float = option(1.0, "all gradients together are clipped to this norm", group=_TRAIN)
    allow_tf32: bool = option(False, "faster float32 products on recent GPUs", group=_TRAIN, aliases=("tf32",))
    compile: bool = option(False, "compute the network that trains in graphs, by torch.compile", group=_TRAIN,
                           aliases=("torch_compile",))  # fmt: skip
    ema_decay: float | None = option(None, "score and keep an average of what trains; 0.999 is usual", group=_TRAIN)
    ema_warmup: bool = option(True, "let early averages forget the start", group=_TRAIN)
    final_model: Literal["last", "best"] = option(
        "last", "what is reported and saved as the adapter; the other is kept and scored beside it", group=_TRAIN
    )

    optimizer: Literal["adamw", "scaled_adamw", "lora_pro", "alt_lora"] = option(
        "adamw", "of the adapter; the others treat two factors together. The head has AdamW", group=_OPTIMIZER,
        aliases=("optim",),
    )
    optimizer_damping: float | None = option(None, "of the others' inverses of Gram matrices; none: 1e-6",
                                             group=_OPTIMIZER)  # fmt: skip
    lora_pro_moments: Literal["full", "factors"] | None = option(None, "lora_pro's; none: full", group=_OPTIMIZER)
    alt_lora_plus: bool | None = option(None, "divide by a second moment; none: true", group=_OPTIMIZER)
    alt_lora_alternate: bool | None = option(None, "move one factor a step, in turn; none: false", group=_OPTIMIZER)

    eval_steps: int | None = option(
        None, "steps between scores of validation and source; none: ten times in the run", group=_EVALUATION
    )
    eval_batch_size: int = option(128, "images", group=_EVALUATION, aliases=("per_device_eval_batch_size",))
    max_eval_samples: int | None = option(None, "of the test images, by the seed; none: all", group=_EVALUATION)

    dataloader_num_workers: int = option(0, "processes that read images", group=_RUN)
    cpu_threads: int | None = option(None, "threads to compute with; none: all cores", group=_RUN)
    output_dir: str | None = option(None, "the run's folder; none: a new number under runs/", group=_RUN)
    seed: int = option(0, "all chance in the run is a function of it", group=_RUN)
    logging_steps: int = option(10, "steps between lines of metrics.jsonl", group=_RUN)
    probe_steps: int | None = option(
        None, "steps between cosines of full and equivalent gradient (OD-LoRA's measure); none: never", group=_RUN
    )
    report_to: Literal["tensorboard", "none"] = option("tensorboard", "where else metrics go", group=_RUN)
    checkpointing_steps: int = option(500, "steps between checkpoints", group=_RUN, aliases=("save_steps",))
    checkpoints_total_limit: int | None = option(2, "how many to keep; none: all", group=_RUN,
                                                 aliases=("save_total_limit",))  # fmt: skip
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint's folder, or latest, with the --output_dir of the run", group=_RUN
    )
    dry_run: bool = option(False, "check everything, say what would be trained, and stop", group=_RUN)

    def __post_init__(self):
        for name in (
            "train_batch_size", "gradient_accumulation_steps", "logging_steps", "checkpointing_steps",
            "eval_batch_size", "max_train_steps", "eval_steps", "cpu_threads", "checkpoints_total_limit", "export_rank",
            "max_train_samples", "max_source_samples", "max_source_bank", "max_eval_samples", "randaugment_ops",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name}", f"{value} is below 1", "give 1 or more")
        for name in ("learning_rate", "head_lr", "adam_epsilon", "max_grad_norm", "num_train_epochs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"--{name}", f"{value} is not a positive number", "give one, such as 5e-3")
        for name in ("adam_weight_decay", "head_weight_decay", "mixup_alpha", "cutmix_alpha", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise InputError(f"--{name}", f"{value} is negative or not finite", "give 0 or more")
        shares = ("train_val_split", "adam_beta1", "adam_beta2", "warmup_ratio", "label_smoothing")
        for name in (*shares, "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"--{name}", f"{value} is not in [0, 1)", "give a share below 1")
        for name in ("hflip", "random_erasing", "crop_scale"):
            if not 0 <= getattr(self, name) <= 1 or (name == "crop_scale" and not self.crop_scale):
                raise InputError(f"--{name}", f"{getattr(self, name)} is no share", "give one up to 1")
        if not 0 <= self.randaugment_magnitude <= 30:
            raise InputError("--randaugment_magnitude", f"{self.randaugment_magnitude} is not in 0 to 30", "9 is usual")
        if self.dataloader_num_workers < 0:
            raise InputError("--dataloader_num_workers", f"{self.dataloader_num_workers} is negative", "give 0 or more")
        for name in ("randaugment_ops", "randaugment_magnitude"):
            if self.auto_augment != "randaugment" and getattr(self, name) != getattr(type(self), name):
                wrong = f"{getattr(self, name)} beside --auto_augment {self.auto_augment}: nothing reads it"
                raise InputError(f"--{name}", wrong, "add --auto_augment randaugment, or leave it out")
        if not self.ema_warmup and self.ema_decay is None:
            raise InputError("--no_ema_warmup", "there is no average without --ema_decay", "add it, or leave this out")
        if self.final_model == "best" and not self.train_val_split:
            raise InputError("--final_model", "best beside --train_val_split 0: nothing to choose by", "hold some out")
        if self.knn and self.source_unlabelled:
            raise InputError("--knn", "has no labels to vote with beside --source_unlabelled", "leave one of them out")
        own_options(self)

    @property
    def data(self) -> tuple[str | None, str | None]:
        """Where the target's and the source's images are."""
        return self.dataset_name, self.source_dataset_name

    def warmup(self, total: int) -> float:
        """The share of `total` steps in which the rate rises."""
        return self.warmup_ratio if self.warmup_steps is None else min(1.0, self.warmup_steps / total)

    def require_whole(self) -> None:
        """Raise InputError unless model and target data are there."""
        for name in ("model_name_or_path", "dataset_name"):
            if getattr(self, name) is None:
                raise InputError(f"--{name}", "is not given", "give both the model and the data, or neither")
        if self.knn and self.source_dataset_name is None:
            raise InputError("--knn", "has no source data to look in", "give --source_dataset_name")
        if self.source_unlabelled and self.source_dataset_name is None:
            raise InputError("--source_unlabelled", "has no source data", "give --source_dataset_name")

    def target_words(self) -> str | tuple[str, ...] | None:
        """`targets` as `vislora.attach` takes it: one word may be a preset or a pattern."""
        return None if not self.targets else self.targets[0] if len(self.targets) == 1 else self.targets
