"""DreamBooth: teach a diffusion model one subject from a handful of photos, by any adapter.

On the embedded world, offline, in minutes on two CPU cores:

    accelerate launch train_scripts/dreambooth.py --adapter nb_lora --p 1 --delta 6

On your own photos and a Stable Diffusion 1.x or 2.x:

    accelerate launch --mixed_precision bf16 train_scripts/dreambooth.py --adapter nb_lora --p 1 --delta 6 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --instance_data_dir photos/dog --instance_prompt "a photo of sks dog" --max_train_steps 800
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

import vislora
from vislora import adapters, config, optim, world
from vislora.baselines import BASELINES
from vislora.data.captions import check_tokens
from vislora.diffusion import conditioning, loss, models, validation
from vislora.diffusion.dataset import class_set, instance_set
from vislora.diffusion.options import FREE_ON_RESUME, DreamBoothOptions
from vislora.diffusion.results import conclude, draw_base
from vislora.diffusion.verify import exported_error
from vislora.errors import InputError, run_script
from vislora.training import checkpoint, telemetry
from vislora.training.cores import use_cores
from vislora.training.dry_run import describe
from vislora.training.random import first_position, generator
from vislora.training.resume import load_state, require_same_run, save_state
from vislora.training.run import InterruptFlag, RunFolder
from vislora.training.schedule import first_rate


def main(argv: list[str]) -> None:
    options, method = parse(argv)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    precision = accelerator.mixed_precision
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision", "fp16 is not supported on a CPU", "take bf16 or no")
    torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
    use_cores(accelerator.num_processes, options.cpu_threads)

    # Everything that can be known to be wrong is found before anything large is loaded.
    prompts = validation.prompts_of(options.validation_prompt)
    photos = instance_set(options, options.resolution or models.resolution_of(options.pretrained_model_name_or_path))
    RunFolder.check(options.output_dir, options.resume_from_checkpoint)

    dtype = models.weight_dtype(precision, method)
    diffusion = models.load(
        options.pretrained_model_name_or_path, options.revision, options.variant, dtype, accelerator.device
    )
    adapter = attach(options, method, diffusion)
    if options.dry_run:
        print(describe(adapter, f"{len(photos)} photos, first caption: {photos.captions[0]!r}"))
        return
    main_process = accelerator.is_main_process
    folder = RunFolder.create(options.output_dir, options.resume_from_checkpoint) if main_process else None
    (path,) = broadcast_object_list([str(folder.path) if folder else None])
    with folder or RunFolder(Path(path)) as folder:
        if next(adapter.parameters(), None) is None:
            return draw_base(options, adapter, diffusion, [p.path for p in photos.photos], prompts, folder)
        Run(options, adapter, accelerator, diffusion, photos, prompts, folder).go()


def parse(argv: list[str]) -> tuple[DreamBoothOptions, vislora.Method]:
    """The options; those of the embedded world where neither a model nor photos are named."""
    words = dict(
        prog="dreambooth.py", description=__doc__.splitlines()[0],
        methods={name: adapters.get(name) for name in vislora.methods()} | BASELINES,
    )  # fmt: skip
    options, method = config.parse(DreamBoothOptions, argv, **words)
    if options.pretrained_model_name_or_path is None and options.instance_data_dir is None:
        options, method = config.parse(DreamBoothOptions, argv, base=world.defaults("dreambooth"), **words)
    options.require_whole()
    optim.require_fit(options.optimizer, method)
    return options, method


def attach(options: DreamBoothOptions, method: vislora.Method, diffusion: models.DiffusionModels) -> vislora.Adapter:
    """The adapter on the UNet and, where it trains, the text encoder; refused now if it could not be exported."""
    parts, targets = {"unet": diffusion.unet}, {"unet": options.target_words()}
    if options.train_text_encoder:
        parts["text_encoder"], targets["text_encoder"] = diffusion.text_encoder, None
    adapter = vislora.attach(parts, method, targets=targets, seed=options.seed)
    adapter.check_exportable(options.export_rank)
    return adapter


class Run:
    """One training run, from the frozen model to the exported adapter."""

    def __init__(self, options, adapter, accelerator, diffusion, photos, prompts, folder):
        self.options, self.adapter, self.folder = options, adapter, folder
        self.accelerator, self.models = accelerator, diffusion
        self.main, self.photos, self.classes = accelerator.is_main_process, photos, None
        photos.use(diffusion, self.main)
        texts = [*photos.captions, *([options.class_prompt] if options.with_prior_preservation else [])]
        check_tokens(diffusion.tokenizer, [*texts, *prompts], "prompt")
        with adapter.disabled():  # class images and cached embeddings are the base model's
            self.embeddings = conditioning.EmbeddingCache(diffusion, texts)
            if options.class_images():
                with accelerator.main_process_first():
                    self.classes = class_set(options, diffusion, folder.path, self.main)
                self.classes.use(diffusion, self.main)
        self.sampler = diffusion.pipeline()
        self.validation = validation.Validation(options, prompts, [p.path for p in photos.photos], folder.samples)

        optimizer = optim.from_options(options, self.adapter, {"text_encoder": options.text_encoder_lr})
        a_step = options.train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes
        self.total = options.max_train_steps or options.num_train_epochs * math.ceil(len(photos) / a_step)
        self.scheduler = get_scheduler(
            options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps, num_training_steps=self.total,
            num_cycles=options.lr_num_cycles, power=options.lr_power,
        )  # fmt: skip
        if options.gradient_checkpointing:
            diffusion.unet.enable_gradient_checkpointing()
            if options.train_text_encoder:
                diffusion.text_encoder.gradient_checkpointing_enable()
        self.unet, self.optimizer = accelerator.prepare(diffusion.unet, optimizer)
        self.text_encoder = accelerator.prepare(diffusion.text_encoder) if options.train_text_encoder else None
        self.predict = loss.denoiser(self.unet, diffusion.dtype)
        self.adapter.bind(self.optimizer, self.total, first_rate(self.scheduler, self.total))

    def go(self) -> None:
        """Train, from the start or a checkpoint, and leave the run's results in its folder."""
        o, start = self.options, 0 if self.options.resume_from_checkpoint is None else self.resume()
        if self.main:
            again = replace(o, output_dir=None, resume_from_checkpoint=None)
            self.folder.write_config(config.to_dict(again, self.adapter.method))
        if start == 0:
            if self.main:
                self.validation.draw(self.sampler, 0)
            steps = itertools.count()  # a data-driven start sees the run's first batches
            self.adapter.prepare(lambda: self.backward(next(steps))["loss"])
        with telemetry.Log(self.folder, o.report_to if self.main else "none") as log, InterruptFlag() as stop:
            self.train(start, log, stop)
            if self.main and not stop:
                self.finish(log)
        if stop:
            again = f"--output_dir {self.folder.path} --resume_from_checkpoint latest"
            print(f"vislora: stopped by a signal; to go on, add {again}", file=sys.stderr)
            raise SystemExit(stop.status)

    def train(self, start: int, log: telemetry.Log, stop: InterruptFlag) -> None:
        """Optimizer steps start + 1 to the last; each goes by the numbers step and seed alone."""
        o, trained = self.options, [m for m in (self.unet, self.text_encoder) if m is not None]
        bar = tqdm(total=self.total, initial=start, desc="training", disable=not self.main)
        sums: dict[str, torch.Tensor] = {}
        logged, since = start, time.perf_counter()
        for model in trained:
            model.train()
        for step in range(start, self.total):
            parts = self.backward(step)
            parts["grad_norm"] = self.accelerator.clip_grad_norm_(self.adapter.parameters(), o.max_grad_norm)
            rate = self.scheduler.get_last_lr()[0]  # of this step
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            sums = {name: sums.get(name, 0) + value.detach() for name, value in parts.items()}
            done = step + 1
            bar.update()
            if self.main and (done % o.logging_steps == 0 or done == self.total):
                values = {name: float(value) / (done - logged) for name, value in sums.items()}
                values |= {"lr": rate, "seconds_per_step": (time.perf_counter() - since) / (done - logged)}
                by_site, largest = telemetry.layers(self.adapter)
                log.write(done, values | largest, by_site)
                share = {"bound": f"{largest['largest_share']:.0%}"} if "largest_share" in largest else {}
                bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{values['lr']:.1e}", **share)
                sums, logged, since = {}, done, time.perf_counter()
            if self.main and (done % o.checkpointing_steps == 0 or stop):
                self.save(done)
            if self.main and o.validation_steps and done % o.validation_steps == 0 and done < self.total:
                log.images(done, "samples", self.validation.draw(self.sampler, done))
                since = time.perf_counter()
            if stop:
                break
        bar.close()
        for model in trained:
            model.eval()

    def backward(self, step: int) -> dict[str, torch.Tensor]:
        """Forward and backward over optimizer step `step`'s batches. Returns the mean loss and its parts."""
        o, parts, micros = self.options, {}, self.options.gradient_accumulation_steps
        for micro in range(micros):
            position = first_position(
                step, micro, self.accelerator.process_index, batch=o.train_batch_size, accumulation=micros,
                world=self.accelerator.num_processes,
            )  # fmt: skip
            torch.manual_seed(generator(o.seed, "dropout", position).initial_seed())  # dropout knows no generators
            last = micro == micros - 1
            with nullcontext() if last else self.accelerator.no_sync(self.unet):
                terms = self.losses(position)
                self.accelerator.backward(terms["total"] / micros)
            for name, value in terms.items():
                key = "loss" if name == "total" else f"loss_{name}"
                parts[key] = parts.get(key, 0) + value.detach() / micros
        if self.adapter.method.has_penalty():  # once an optimizer step, whatever the accumulation
            parts["penalty"] = self.adapter.penalty()
            self.accelerator.backward(parts["penalty"])
        return parts

    def losses(self, position: int) -> dict[str, torch.Tensor]:
        """The loss of the batch that begins at a global position."""
        o, count, device = self.options, self.options.train_batch_size, self.accelerator.device
        latents, prompts = self.photos.draw(position, count, device)
        streams = [generator(o.seed, "noise", q) for q in range(position, position + count)]
        prior = None
        if self.classes is not None:
            more, class_prompts = self.classes.draw(position, count, device)
            latents, prompts = torch.cat([latents, more]), prompts + class_prompts
            streams += [generator(o.seed, "class noise", q) for q in range(position, position + count)]
            prior = loss.ClassImages(count, o.prior_loss_weight)
        elif o.with_prior_preservation:
            of_class = [o.class_prompt] * count
            base = self.embeddings.lookup(of_class)
            prior = loss.BaseOutput(self.embed(of_class), self.adapter.disabled, base, o.prior_loss_weight)
        schedule, embeddings = self.models.scheduler, self.embed(prompts)
        return loss.noise_prediction_loss(
            self.predict, schedule, latents, embeddings, streams, snr_gamma=o.snr_gamma, prior=prior
        )

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Embeddings (n, tokens, width): from the cache, or through the text encoder where that trains."""
        if not self.options.train_text_encoder:
            return self.embeddings.lookup(prompts)
        return conditioning.encode(self.models, conditioning.tokenize(self.models, prompts), True, self.text_encoder)

    def about(self) -> dict:
        own = {"adapter_options": self.adapter.method.options()}
        return {"config": config.to_dict(self.options) | own, "photos": self.photos.hashes()}

    def save(self, step: int) -> None:
        save_state(
            self.folder.checkpoints, step, self.adapter, self.optimizer.optimizer, self.scheduler,
            self.accelerator.scaler, self.about(), self.options.checkpoints_total_limit,
        )  # fmt: skip

    def resume(self) -> int:
        """Bring the run back to its checkpoint; returns the step to go on from."""
        saved = checkpoint.load(checkpoint.resolve(self.folder.checkpoints, self.options.resume_from_checkpoint))
        about = self.about()
        require_same_run(saved.state["config"], about["config"], FREE_ON_RESUME)
        if saved.state["photos"] != about["photos"]:
            wrong = "holds other photos than the run began with"
            raise InputError(self.options.instance_data_dir, wrong, "restore them, or start a new run")
        load_state(saved, self.adapter, self.optimizer.optimizer, self.scheduler, self.accelerator.scaler)
        if self.main:
            self.folder.rewind(saved.step)
            print(f"resumed {saved.path} at step {saved.step}")
        return saved.step

    def finish(self, log: telemetry.Log) -> None:
        """The adapter in our format and in diffusers', the proof that stock diffusers reads it, images, the card."""
        self.adapter.save(self.folder.adapter)
        file = self.adapter.export(self.folder.path, "diffusers", self.options.export_rank)
        error = exported_error(self.sampler, self.adapter, self.folder.path, rank=self.options.export_rank)
        log.images(self.total, "samples", self.validation.draw(self.sampler, self.total))
        grid = self.validation.compare(self.total)
        conclude(self.folder, self.options, self.adapter, self.total, grid, self.models.pipeline_class, file, error)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run_script(main)
