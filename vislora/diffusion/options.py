"""The options of DreamBooth training, in the words of the diffusers scripts: what train_scripts/dreambooth.py takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vislora.data.concepts import read_concepts
from vislora.errors import InputError
from vislora.optim import own_options
from vislora.options import option

_MODEL, _DATA, _PRIOR, _ADAPTER = "model", "data", "prior preservation", "adapter"
_TRAIN, _OPTIMIZER, _LOSS, _IMAGES, _RUN = "training", "optimizer", "loss", "validation images", "run"

# What a resumed run may change: no step already made was a function of it.
FREE_ON_RESUME = frozenset({
    "max_train_steps", "num_train_epochs", "validation_prompt", "num_validation_images", "validation_steps",
    "validation_inference_steps", "output_dir", "logging_steps", "probe_steps", "report_to", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "dry_run", "sample_batch_size", "class_data_dir",
    "cpu_threads", "instance_data_dir", "pretrained_model_name_or_path", "export_rank", "conditioning_data_dir",
    "push_to_hub", "hub_model_id", "drift_steps", "keep",
})  # fmt: skip


@dataclass(frozen=True)
class DreamBoothOptions:
    """Everything a DreamBooth run is a function of, beside the adapter's own options."""

    pretrained_model_name_or_path: str | None = option(
        None, "a folder in diffusers' format or a hub id; with no data named either, the embedded world", group=_MODEL
    )
    revision: str | None = option(None, "of a hub model: branch, tag or commit", group=_MODEL)
    variant: str | None = option(None, "of the weight files, such as fp16", group=_MODEL)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "of the frozen weights and of computation, what trains stays float32; none: accelerate's setting",
        group=_MODEL,
    )  # fmt: skip
    base_quantization: Literal["none", "nf4", "int8"] = option(
        "none", "keep the linears of the frozen denoiser, and of T5, in 4 or 8 bits (needs bitsandbytes)", group=_MODEL
    )
    max_sequence_length: int | None = option(
        None, "tokens that T5 reads of a prompt; none: 256 in SD3, 512 in Flux", group=_MODEL
    )

    instance_data_dir: str | None = option(None, "the folder with the subject's photos", group=_DATA)
    instance_prompt: str | None = option(
        None, "the prompt of every photo without a caption of its own (.txt beside it, or metadata.jsonl)", group=_DATA
    )
    caption_column: str = option("text", "metadata.jsonl's key for captions", group=_DATA)
    caption_dropout: float = option(
        0.0, "the share of captions that give way to the empty prompt", group=_DATA, aliases=("caption_dropout_rate",)
    )
    concepts_list: str | None = option(
        None, "several subjects in one run: a JSON list of objects with instance_data_dir and, of each its own, "
        "instance_prompt, class_prompt and class_data_dir", group=_DATA,
    )  # fmt: skip
    resolution: int | None = option(None, "side of the square training images, pixels; none: the model's", group=_DATA)
    center_crop: bool = option(False, "cut the middle, not a random square", group=_DATA)
    random_flip: bool = option(False, "mirror half of the images", group=_DATA)
    use_aspect_ratio_buckets: bool = option(
        False, "train on sizes of about resolution^2 pixels, each photo in the one nearest to its own shape",
        group=_DATA, aliases=("enable_bucket",),
    )  # fmt: skip
    bucket_reso_steps: int = option(64, "pixels that the buckets' sides are multiples of", group=_DATA)
    cache_latents: bool = option(True, "encode every image once, before training", group=_DATA)
    crop_variants: int = option(4, "how many random crops and flips each image has", group=_DATA)

    with_prior_preservation: bool = option(False, "hold on to what the class prompt gives", group=_PRIOR)
    prior_source: Literal["images", "base_output"] = option(
        "images", "class images, or the frozen model's own prediction for the class prompt", group=_PRIOR
    )
    class_prompt: str | None = option(None, "names the class without the subject", group=_PRIOR)
    class_data_dir: str | None = option(None, "folder of class images; none: class_images in the run", group=_PRIOR)
    num_class_images: int = option(100, "images to have; the missing ones are generated first", group=_PRIOR)
    prior_loss_weight: float = option(1.0, "of the prior term", group=_PRIOR)
    sample_batch_size: int = option(4, "images generated at a time, class images and validation", group=_PRIOR)

    adapter: str = option(
        "nb_lora", "a method, or full, none or peft; its options are flags of their own", group=_ADAPTER
    )
    targets: tuple[str, ...] = option(
        (), "of the denoiser: a preset, a pattern, or suffixes of layer names; none: its attention, or for full all",
        group=_ADAPTER, aliases=("lora_layers",),
    )  # fmt: skip
    train_text_encoder: bool = option(False, "adapt the CLIP text encoders too", group=_ADAPTER)
    export_rank: int | None = option(
        None, "squeeze the exported file to this rank by truncated SVD; none: nothing is lost", group=_ADAPTER
    )

    train_batch_size: int = option(4, "photos a step and process", group=_TRAIN)
    gradient_accumulation_steps: int = option(1, "batches an optimizer step", group=_TRAIN)
    gradient_checkpointing: bool = option(False, "compute activations again in the backward: less memory", group=_TRAIN)
    max_train_steps: int | None = option(None, "optimizer steps; none: num_train_epochs", group=_TRAIN)
    num_train_epochs: int = option(100, "passes over the photos, where max_train_steps is none", group=_TRAIN)
    learning_rate: float = option(1e-4, "the largest of the schedule", group=_TRAIN)
    text_encoder_lr: float = option(5e-6, "the same for the text encoders", group=_TRAIN)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = option("constant", "shape of the schedule", group=_TRAIN)
    lr_warmup_steps: int = option(0, "steps of linear warm-up", group=_TRAIN)
    lr_num_cycles: int = option(1, "of cosine_with_restarts", group=_TRAIN)
    lr_power: float = option(1.0, "of polynomial", group=_TRAIN)
    adam_beta1: float = option(0.9, "AdamW's", group=_TRAIN)
    adam_beta2: float = option(0.999, "AdamW's", group=_TRAIN)
    adam_weight_decay: float = option(1e-2, "AdamW's", group=_TRAIN)
    adam_epsilon: float = option(1e-8, "AdamW's", group=_TRAIN)
    use_ema: bool = option(False, "draw and keep a moving average of what trains", group=_TRAIN)
    ema_decay: float = option(0.999, "of the average, a step", group=_TRAIN)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", group=_TRAIN)
    allow_tf32: bool = option(False, "faster float32 products on recent GPUs", group=_TRAIN)
    compile: bool = option(False, "compute the network that trains in graphs, by torch.compile", group=_TRAIN)

    optimizer: Literal["adamw", "adamw8bit", "prodigy", "scaled_adamw", "lora_pro", "alt_lora"] = option(
        "adamw", "8 bits need bitsandbytes, prodigy (which finds its rate; give learning_rate 1) prodigyopt; the last "
        "three treat the two factors of a LoRA-shaped adapter together", group=_OPTIMIZER,
    )  # fmt: skip
    use_8bit_adam: bool = option(False, "the same as --optimizer adamw8bit", group=_OPTIMIZER)
    prodigy_beta3: float | None = option(None, "of its estimate of the rate; none: sqrt(adam_beta2)", group=_OPTIMIZER)
    prodigy_decouple: bool | None = option(None, "weight decay as AdamW's; none: true", group=_OPTIMIZER)
    prodigy_use_bias_correction: bool | None = option(None, "as Adam's; none: false", group=_OPTIMIZER)
    prodigy_safeguard_warmup: bool | None = option(
        None, "no rate of a warm-up in its estimate; none: false", group=_OPTIMIZER
    )
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

    prediction_type: Literal["epsilon", "v_prediction"] | None = option(
        None, "what the UNet predicts; none: as the model says", group=_LOSS
    )
    rescale_betas_zero_snr: bool = option(
        False, "a noise schedule whose last step has no signal; for v_prediction", group=_LOSS,
        aliases=("zero_terminal_snr",),
    )  # fmt: skip
    snr_gamma: float | None = option(
        None, "min-SNR loss weights with this gamma; 5 is usual", group=_LOSS, aliases=("min_snr_gamma",)
    )
    debiased_estimation_loss: bool = option(False, "loss weights 1 / sqrt(SNR)", group=_LOSS)
    noise_offset: float = option(0.0, "share of noise that is one value a channel; 0.05 is usual", group=_LOSS)
    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = option("l2", "of the prediction's error", group=_LOSS)
    huber_schedule: Literal["snr", "exponential", "constant"] = option(
        "snr", "how the threshold of huber and smooth_l1 goes with the timestep", group=_LOSS
    )
    huber_c: float = option(0.1, "that threshold, the least or constant one", group=_LOSS)
    huber_scale: float = option(1.0, "of the threshold, where its schedule is not snr", group=_LOSS)
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] | None = option(
        None, "of flow matching: how timesteps are drawn and errors weighed; none: logit_normal for SD3, "
        "even for Flux", group=_LOSS,
    )  # fmt: skip
    logit_mean: float = option(0.0, "of logit_normal", group=_LOSS)
    logit_std: float = option(1.0, "of logit_normal", group=_LOSS)
    mode_scale: float = option(1.29, "of mode", group=_LOSS)
    precondition_outputs: bool = option(
        False, "flow matching's error is the image's, sigma^2 times the velocity's", group=_LOSS
    )
    masked_loss: bool = option(
        False, "errors count by a mask: STEM-masklabel.png beside a photo, white where it counts, or its transparency",
        group=_LOSS,
    )  # fmt: skip
    conditioning_data_dir: str | None = option(
        None, "the folder with the masks, each of its photo's name", group=_LOSS, aliases=("mask_dir",)
    )

    validation_prompt: tuple[str, ...] = option(
        (), "prompts to draw before, during and after training, or one .txt file with a prompt a line", group=_IMAGES,
        aliases=("validation_prompts",),
    )  # fmt: skip
    num_validation_images: int = option(4, "for each prompt", group=_IMAGES)
    validation_steps: int | None = option(None, "draw every so many steps; none: only before and after", group=_IMAGES)
    validation_inference_steps: int = option(25, "sampler steps of an image", group=_IMAGES)
    guidance_scale: float | None = option(
        None, "guidance of generated images, and what a guidance-distilled Flux is told in training; none: 7.5, SDXL "
        "5, SD3 7, Flux 3.5", group=_IMAGES,
    )  # fmt: skip

    cpu_threads: int | None = option(None, "threads to compute with; none: all cores", group=_RUN)
    output_dir: str | None = option(None, "the run's folder; none: a new number under runs/", group=_RUN)
    seed: int = option(0, "all chance in the run is a function of it", group=_RUN)
    logging_steps: int = option(10, "steps between lines of metrics.jsonl", group=_RUN)
    probe_steps: int | None = option(
        None, "steps between cosines of full and equivalent gradient (OD-LoRA's measure); none: never", group=_RUN
    )
    drift_steps: int | None = option(
        None, "steps between measurements of how far the denoiser is from its base on unrelated prompts, by --seed "
        "(eval/subject_driven.py has its own: not the same number); none: never", group=_RUN,
    )  # fmt: skip
    report_to: str = option(
        "tensorboard", "where else metrics go: tensorboard, wandb or another tracker of accelerate's, all, or none",
        group=_RUN,
    )  # fmt: skip
    checkpointing_steps: int = option(500, "steps between checkpoints", group=_RUN)
    checkpoints_total_limit: int | None = option(None, "how many to keep; none: all", group=_RUN)
    keep: Literal["last", "best"] = option(
        "last", "of the checkpoints, as the run's adapter; best: the one that drifted least from the base among those "
        "whose validation images of the token match the photos as well as the best one's (DINO)", group=_RUN,
    )  # fmt: skip
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint's folder, or latest, with the --output_dir of the run", group=_RUN
    )
    push_to_hub: bool = option(False, "upload the finished run, without its checkpoints, to the hub", group=_RUN)
    hub_model_id: str | None = option(None, "owner/name there; none: the folder's name under your own", group=_RUN)
    dry_run: bool = option(False, "check everything, say what would be trained, and stop", group=_RUN)

    def __post_init__(self):
        for name in (
            "crop_variants", "num_class_images", "sample_batch_size", "train_batch_size", "logging_steps",
            "gradient_accumulation_steps", "num_train_epochs", "num_validation_images", "validation_inference_steps",
            "checkpointing_steps", "cpu_threads", "max_train_steps", "validation_steps", "checkpoints_total_limit",
            "resolution", "export_rank", "bucket_reso_steps", "max_sequence_length", "drift_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name}", f"{value} is below 1", "give 1 or more")
        for name in (
            "learning_rate", "text_encoder_lr", "adam_epsilon", "max_grad_norm", "lr_power", "snr_gamma", "huber_c",
            "huber_scale", "logit_std",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"--{name}", f"{value} is not a positive number", "give one, such as 1e-4")
        for name in (
            "lr_warmup_steps", "prior_loss_weight", "adam_weight_decay", "guidance_scale", "noise_offset", "mode_scale",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise InputError(f"--{name}", f"{value} is negative or not finite", "give 0 or more")
        for name in ("adam_beta1", "adam_beta2", "ema_decay", "prodigy_beta3"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"--{name}", f"{value} is not in [0, 1)", "0.9 and 0.999 are usual")
        if not 0 <= self.caption_dropout <= 1:
            raise InputError("--caption_dropout", f"{self.caption_dropout} is not in [0, 1]", "0.1 is usual")
        if not math.isfinite(self.logit_mean):
            raise InputError("--logit_mean", f"{self.logit_mean} is not finite", "0 is usual")
        if self.loss_type in ("huber", "smooth_l1") and self.huber_schedule != "constant" and self.huber_c > 1:
            wrong = f"{self.huber_c} is above 1, where the schedule {self.huber_schedule} begins"
            raise InputError("--huber_c", wrong, "0.1 is usual")
        if self.use_8bit_adam:
            if self.optimizer not in ("adamw", "adamw8bit"):
                raise InputError("--use_8bit_adam", f"the optimizer is {self.optimizer}", "give one of the two")
            object.__setattr__(self, "optimizer", "adamw8bit")
        if self.conditioning_data_dir is not None and not self.masked_loss:
            raise InputError("--conditioning_data_dir", "names masks that are not used", "add --masked_loss")
        if self.hub_model_id is not None and not self.push_to_hub:
            raise InputError("--hub_model_id", "names where nothing is sent", "add --push_to_hub")
        if self.optimizer_damping is not None and not 0 <= self.optimizer_damping < math.inf:
            wrong = f"{self.optimizer_damping} is negative or not finite"
            raise InputError("--optimizer_damping", wrong, "give 0 or more")
        if self.keep == "best":
            self._require_choice()
        own_options(self)

    def _require_choice(self) -> None:
        """Of --keep best: every checkpoint stays and has its validation images."""
        if self.checkpoints_total_limit is not None:
            wrong = f"--checkpoints_total_limit {self.checkpoints_total_limit} removes what there is to choose from"
            raise InputError("--keep best", wrong, "leave the limit out")
        if self.validation_steps not in (None, self.checkpointing_steps):
            wrong = f"images come every {self.validation_steps} steps, checkpoints every {self.checkpointing_steps}"
            raise InputError("--keep best", wrong, f"give --validation_steps {self.checkpointing_steps}, or none")
        object.__setattr__(self, "validation_steps", self.checkpointing_steps)

    def require_whole(self) -> None:
        """Raise InputError unless model, photos and, for prior preservation, the class prompt are there."""
        both = "give both the model and the photos, or neither"
        if self.pretrained_model_name_or_path is None:
            raise InputError("--pretrained_model_name_or_path", "is not given", both)
        if self.concepts_list is not None:
            for name in ("instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir"):
                if getattr(self, name) is not None:
                    wrong = "stands beside --concepts_list, whose entries each have their own"
                    raise InputError(f"--{name}", wrong, "give one of the two")
            lacking = [c.instance_data_dir for c in read_concepts(self.concepts_list) if c.class_prompt is None]
            if self.with_prior_preservation and lacking:
                wrong = f"{lacking[0]} has no class_prompt, which --with_prior_preservation needs"
                raise InputError(f"--concepts_list {self.concepts_list}", wrong, 'give one, such as "a dog"')
            return
        if self.instance_data_dir is None:
            raise InputError("--instance_data_dir", "is not given", both)
        if self.with_prior_preservation and self.class_prompt is None:
            raise InputError("--class_prompt", "is needed by --with_prior_preservation", 'give one, such as "a dog"')

    def target_words(self) -> str | tuple[str, ...] | None:
        """`targets` as `vislora.attach` takes it: one word may be a preset or a pattern."""
        return None if not self.targets else self.targets[0] if len(self.targets) == 1 else self.targets

    def class_images(self) -> bool:
        """Whether batches hold class images."""
        return self.with_prior_preservation and self.prior_source == "images"
