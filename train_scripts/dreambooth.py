"""DreamBooth: teach a diffusion model one subject from a handful of photos, by any adapter.

On the embedded world, offline, in minutes on two CPU cores:

    accelerate launch train_scripts/dreambooth.py --adapter nb_lora --p 1 --delta 6

On your own photos and a Stable Diffusion 1.x, 2.x, XL or 3, or Flux:

    accelerate launch --mixed_precision bf16 train_scripts/dreambooth.py --adapter nb_lora --p 1 --delta 6 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --instance_data_dir photos/dog --instance_prompt "a photo of sks dog" --max_train_steps 800
"""

from __future__ import annotations

import itertools
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

import vislora
from vislora import adapters, config, distributed, optim, probe, world
from vislora.baselines import BASELINES
from vislora.diffusion import conditioning, keeping, models, objective, publish, quantize, validation
from vislora.diffusion.base import facts_of
from vislora.diffusion.dataset import class_set, instance_set
from vislora.diffusion.denoising import Denoising, set_computation
from vislora.diffusion.estimate import estimate
from vislora.diffusion.options import FREE_ON_RESUME, DreamBoothOptions
from vislora.diffusion.results import conclude, draw_base
from vislora.diffusion.verify import exported_error
from vislora.errors import InputError, run_script
from vislora.export import kohya_copy
from vislora.training import checkpoint, processes, telemetry
from vislora.training.begin import begin
from vislora.training.cores import use_cores
from vislora.training.dry_run import describe
from vislora.training.ema import EMA
from vislora.training.meter import Meter
from vislora.training.random import first_position, generator
from vislora.training.resume import load_state, require_same_run, save_state
from vislora.training.run import InterruptFlag, RunFolder
from vislora.training.schedule import first_rate


def main(argv: list[str]) -> None:
    options, method = parse(argv)
    accelerator = processes.start(options.mixed_precision)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision", "fp16 is not supported on a CPU", "take bf16 or no")
    processes.require_served(accelerator, method, options.base_quantization != "none", options.compile)
    torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
    use_cores(accelerator.num_processes, options.cpu_threads)

    # Everything that can be known to be wrong is found before anything large is loaded.
    telemetry.require_trackers(options.report_to)
    quantize.require_quantizable(options.base_quantization, method)
    prompts = validation.prompts_of(options.validation_prompt)
    facts = facts_of(options.pretrained_model_name_or_path, options.revision)
    photos = instance_set(options, objective.require_fit(options, facts))
    keeper = keeping.keeper_of(options, method, prompts)
    where = options.output_dir, options.resume_from_checkpoint
    RunFolder.check(*where, data={photo.path.parent for photo in photos.photos})
    if options.push_to_hub and not options.dry_run:
        publish.require_hub(options.hub_model_id)

    diffusion = models.load(
        options.pretrained_model_name_or_path, options.revision, options.variant,
        models.weight_dtype(accelerator.mixed_precision, method), accelerator.device, guidance=options.guidance_scale,
        sequence=options.max_sequence_length, noise=objective.schedule_changes(options),
        quantization=options.base_quantization,
    )  # fmt: skip
    objective.process_of(options, diffusion)  # refuses a noise schedule that cannot be trained by
    adapter = attach(options, method, diffusion)
    if options.dry_run:
        data = f"{len(photos)} photos, first caption: {photos.captions[0]!r}"
        print(describe(adapter, data, estimate(options, adapter, diffusion, photos, accelerator)))
        return
    with processes.run_folder(accelerator, *where) as folder:
        if next(adapter.parameters(), None) is None:
            return draw_base(options, adapter, diffusion, [p.path for p in photos.photos], prompts, folder)
        Run(options, adapter, accelerator, diffusion, photos, prompts, folder, keeper).go()


def parse(argv: list[str]) -> tuple[DreamBoothOptions, vislora.Method]:
    """The options; those of the embedded world where neither a model nor photos are named."""
    words = dict(
        prog="dreambooth.py", description=__doc__.splitlines()[0],
        methods={name: adapters.get(name) for name in vislora.methods()} | BASELINES,
    )  # fmt: skip
    options, method = config.parse(DreamBoothOptions, argv, **words)
    named = options.pretrained_model_name_or_path, options.instance_data_dir, options.concepts_list
    if not any(named):
        options, method = config.parse(DreamBoothOptions, argv, base=world.defaults("dreambooth"), **words)
    options.require_whole()
    optim.require_fit(options.optimizer, method)
    probe.require_fit(options.probe_steps, method)
    return options, method


def attach(options: DreamBoothOptions, method: vislora.Method, diffusion: models.DiffusionModels) -> vislora.Adapter:
    """The adapter on the denoiser and, where they train, the text encoders; refused now if it could not be exported."""
    targets = {diffusion.family.denoiser: options.target_words()}
    targets |= dict.fromkeys(diffusion.family.clip if options.train_text_encoder else ())
    parts = {name: diffusion.parts[name] for name in targets}
    adapter = vislora.attach(parts, method, targets=targets, seed=options.seed)
    adapter.check_exportable(options.export_rank)
    return adapter


class Run:
    """One training run, from the frozen model to the exported adapter."""

    def __init__(self, options, adapter, accelerator, diffusion, photos, prompts, folder, keeper):
        self.options, self.adapter, self.folder, self.keeper = options, adapter, folder, keeper
        self.accelerator, self.models = accelerator, diffusion
        self.main, self.photos, classes = accelerator.is_main_process, photos, None
        self.sharded = processes.is_sharding(accelerator)
        self.reads = self.main or self.sharded  # what reads the base's weights, or runs the model
        photos.use(diffusion, self.main)
        texts = [*photos.texts(), *(set(photos.classes) if options.with_prior_preservation else ())]
        conditioning.warn_of_cuts(diffusion, [*texts, *prompts])
        with adapter.disabled():  # class images and cached embeddings are the base model's
            embeddings = conditioning.EmbeddingCache(diffusion, texts)
            if options.class_images():
                with accelerator.main_process_first():
                    classes = class_set(options, diffusion, folder.path, self.main)
                classes.use(diffusion, self.main, photos)
        self.sampler = diffusion.pipeline()
        paths = [photo.path for photo in photos.photos]
        self.validation = validation.Validation(options, prompts, paths, folder.samples, diffusion, self.sharded)

        encoders = diffusion.family.clip if options.train_text_encoder else ()
        rates = dict.fromkeys(encoders, options.text_encoder_lr)
        optimizer = optim.from_options(options, self.adapter, rates, accelerator.scaler is None)
        self.total = photos.steps(accelerator.num_processes)
        self.scheduler = get_scheduler(
            options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps, num_training_steps=self.total,
            num_cycles=options.lr_num_cycles, power=options.lr_power,
        )  # fmt: skip
        set_computation(options, diffusion)
        own, network = adapter.parameters(), diffusion.denoiser
        self.network, self.optimizer = processes.prepare(accelerator, network, optimizer, own)
        prepared = {name: processes.network(accelerator, diffusion.parts[name], None) for name in encoders}
        self.trained = [self.network, *prepared.values()]
        self.denoising = Denoising(options, diffusion, adapter, photos, classes, embeddings, self.network, prepared)
        self.adapter.bind(self.optimizer, self.total, first_rate(self.scheduler, self.total))
        self.ema = EMA(adapter.named_parameters(), options.ema_decay, warmup=True) if options.use_ema else None

    def go(self) -> None:
        """Train, from the start or a checkpoint, and leave the run's results in its folder."""
        o, start = self.options, 0 if self.options.resume_from_checkpoint is None else self.resume()
        if self.main:
            begin(self.folder, o, self.adapter)
        if self.reads and start < self.total and start % (o.validation_steps or self.total) == 0:
            with self.averaged():  # before the first step; and images come after the checkpoint: are they there?
                self.validation.sheet(self.sampler, start)
        if start == 0:
            steps = itertools.count()  # a data-driven start sees the run's first batches
            self.adapter.prepare(lambda: self.backward(next(steps))["loss"])
            if self.ema is not None:  # which such a start has moved
                self.ema = EMA(self.adapter.named_parameters(), o.ema_decay, warmup=True)
        if self.reads and (o.drift_steps or self.keeper):
            self.drift = keeping.drift_of(o, self.models, self.adapter)
        settings = {name: str(value) for name, value in config.to_dict(o).items()}
        with telemetry.Log(self.folder, o.report_to if self.main else "none", settings) as log, InterruptFlag() as stop:
            self.train(start, log, stop)
            if self.reads and not processes.stopping(self.accelerator, stop):
                with processes.written(self.folder, self.main) as folder, self.averaged():
                    self.finish(log, folder)
        processes.leave(self.accelerator, stop, self.folder)

    def train(self, start: int, log: telemetry.Log, stop: InterruptFlag) -> None:
        """Optimizer steps start + 1 to the last; each goes by the numbers step and seed alone."""
        o, meter = self.options, Meter([self.optimizer], self.accelerator.scaler)
        bar = tqdm(total=self.total, initial=start, desc="training", disable=not self.main)
        for model in self.trained:
            model.train()
        for step in range(start, self.total):
            parts = self.backward(step)
            parts["grad_norm"] = self.accelerator.clip_grad_norm_(self.adapter.parameters(), o.max_grad_norm)
            meter.add(parts)
            rate = self.scheduler.get_last_lr()[0]  # of this step
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
                if self.ema is not None:
                    self.ema.update()
            done = step + 1
            bar.update()
            if done % o.logging_steps == 0 or done == self.total:
                values = meter.read(lambda value: distributed.mean(value, self.accelerator.device)) | {"lr": rate}
                with meter.paused():
                    by_site, largest = telemetry.layers(self.adapter) if self.reads else ({}, {})
                    if self.main:
                        log.write(done, values | largest, by_site)
                share = {"bound": f"{largest['largest_share']:.0%}"} if "largest_share" in largest else {}
                bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{values['lr']:.1e}", **share)
            if o.probe_steps and done % o.probe_steps == 0 and done < self.total:
                with meter.paused():
                    found = probe.cosines(self.adapter, partial(self.backward, done), o.gradient_accumulation_steps)
                    if self.main:
                        log.write(done, *telemetry.alignment(found))
            if self.reads and o.drift_steps and done % o.drift_steps == 0:
                with meter.paused(), self.averaged():
                    drift = self.drift.measure()
                if self.main:
                    log.write(done, drift, {})
            stopping = processes.ends_step(self.accelerator, stop, done == self.total)
            if self.reads and (done % o.checkpointing_steps == 0 or stopping or (done == self.total and self.keeper)):
                self.save(done)
            if self.reads and o.validation_steps and done % o.validation_steps == 0 and done < self.total:
                with meter.paused(), self.averaged():
                    log.images(done, "samples", self.validation.draw(self.sampler, done))
            if stopping:
                break
        bar.close()
        for model in self.trained:
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
            with nullcontext() if self.sharded or micro == micros - 1 else self.accelerator.no_sync(self.network):
                terms = self.denoising.losses(position)
                self.accelerator.backward(terms["total"] / micros)
            for name, value in terms.items():
                key = "loss" if name == "total" else f"loss_{name}"
                parts[key] = parts.get(key, 0) + value.detach() / micros
        if self.adapter.method.has_penalty():  # once an optimizer step, whatever the accumulation
            parts["penalty"] = self.adapter.penalty()
            self.accelerator.backward(parts["penalty"])
        if self.sharded:
            distributed.average_gradients(self.adapter.parameters(), self.accelerator.device)
        return parts

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, what trains holds its moving average, where one is kept."""
        return nullcontext() if self.ema is None else self.ema.swapped()

    def about(self) -> dict:
        own = {"adapter_options": self.adapter.method.options()}
        return {"config": config.to_dict(self.options) | own, "photos": self.photos.hashes()}

    def save(self, step: int) -> None:
        with processes.written(self.folder, self.main) as folder:
            save_state(
                folder.checkpoints, step, self.adapter, self.optimizer.optimizer, self.scheduler,
                self.accelerator.scaler, self.about(), self.options.checkpoints_total_limit,
                {} if self.ema is None else {"ema": self.ema.state()},
            )  # fmt: skip

    def resume(self) -> int:
        """Bring the run back to its checkpoint; returns the step to go on from."""
        saved = checkpoint.load(checkpoint.resolve(self.folder.checkpoints, self.options.resume_from_checkpoint))
        about = self.about()
        require_same_run(saved.state["config"], about["config"], FREE_ON_RESUME)
        self.photos.require_same(saved.state["photos"])
        load_state(saved, self.adapter, self.optimizer.optimizer, self.scheduler, self.accelerator.scaler)
        if self.ema is not None:
            self.ema.load_state(saved.tensors["ema"])
        if self.main:
            self.folder.rewind(saved.step)
            self.validation.rewind(saved.step)
            print(f"resumed {saved.path} at step {saved.step}")
        return saved.step

    def finish(self, log: telemetry.Log, folder: RunFolder) -> None:
        """Into `folder`: the adapter in our format and stock tools', proof that diffusers reads it, images, a card."""
        o, kept, seen = self.options, None, (self.folder, self.validation, self.sampler, self.photos)
        if self.keeper:
            kept = self.keeper.choose(self.adapter, *seen, self.drift, self.total)
        self.adapter.save(folder.adapter)
        file = self.adapter.export(folder.path, "diffusers", o.export_rank)
        kind = getattr(self.models.scheduler.config, "prediction_type", None)
        copy = kohya_copy(self.adapter, folder.path, o.export_rank, kind)
        error = exported_error(self.sampler, self.adapter, folder.path, rank=o.export_rank)
        log.images(self.total, "samples", self.validation.sheet(self.sampler, self.total))
        grid = self.validation.compare(kept.step if kept else self.total)
        conclude(folder, o, self.adapter, self.total, grid, self.models.pipeline_class, file, error, copy, kept)
        if o.push_to_hub and self.main:
            print(f"hub        {publish.push(self.folder.path, o.hub_model_id)}")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run_script(main)
