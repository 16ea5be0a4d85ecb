"""Classification: tune an image model on a new task, and watch what it loses on the one that it knew.

On the embedded world, offline, in a minute or so on two CPU cores:

    accelerate launch train_scripts/classification.py --adapter nb_lora --p 1 --delta_ratio 0.1

A ViT-B/16 that knows ImageNet, tuned on SVHN (configs/paper/vision has the papers' whole grids):

    accelerate launch train_scripts/classification.py --adapter nb_lora --p 1 --delta_ratio 0.1 \
        --model_name_or_path vit_base_patch16_224.orig_in21k_ft_in1k --dataset_name svhn --train_batch_size 128 \
        --source_dataset_name data/imagenet
"""

from __future__ import annotations

import itertools
import logging
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm

import vislora
from vislora import adapters, config, distributed, optim, probe, world
from vislora.baselines import BASELINES
from vislora.errors import InputError, run_script
from vislora.training import checkpoint, processes, telemetry
from vislora.training.begin import begin
from vislora.training.cores import use_compiler, use_cores
from vislora.training.dry_run import describe
from vislora.training.meter import Meter
from vislora.training.random import first_position, generator
from vislora.training.resume import require_same_run
from vislora.training.run import InterruptFlag, RunFolder
from vislora.vision import augment, forgetting, heads, models, results, task
from vislora.vision.estimate import estimate
from vislora.vision.evaluate import Evaluator, SourceTask, preprocess_words
from vislora.vision.options import FREE_ON_RESUME, ClassificationOptions
from vislora.vision.state import Tuned


def main(argv: list[str]) -> None:
    options, method = parse(argv)
    accelerator = processes.start(options.mixed_precision)
    if accelerator.mixed_precision not in ("no", "bf16"):
        wrong = f"{accelerator.mixed_precision} is not supported: two optimizers would share one loss scale"
        raise InputError("--mixed_precision", wrong, "take bf16 or no")
    processes.require_served(accelerator, method, False, options.compile)
    torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
    use_cores(accelerator.num_processes, options.cpu_threads)

    # Everything that can be known to be wrong is found before a model is loaded.
    RunFolder.check(*(where := (options.output_dir, options.resume_from_checkpoint)), data=options.data)
    with accelerator.main_process_first():  # which may download
        sets = task.load(options)
        tower = models.load(options.model_name_or_path, options.library, options.pretrained, options.seed)
    model = classifier(options, method, tower, sets).to(accelerator.device)
    adapter = vislora.attach(tower.model, method, targets=options.target_words(), seed=options.seed)
    if options.export_rank is not None:
        adapter.check_exportable(options.export_rank)
    if options.dry_run:
        line = f"{len(sets.train)} training images of {len(sets.train.classes)} classes"
        print(describe(adapter, line, estimate(options, adapter, model, accelerator)))
        return
    with processes.run_folder(accelerator, *where) as folder:
        Run(options, adapter, accelerator, model, sets, folder).go()


def parse(argv: list[str]) -> tuple[ClassificationOptions, vislora.Method]:
    """The options; those of the embedded world where neither a model nor data are named."""
    words = dict(
        prog="classification.py", description=__doc__.splitlines()[0],
        methods={name: adapters.get(name) for name in vislora.methods()} | BASELINES,
    )  # fmt: skip
    options, method = config.parse(ClassificationOptions, argv, **words)
    if options.model_name_or_path is None and options.dataset_name is None:
        options, method = config.parse(ClassificationOptions, argv, base=world.defaults("classification"), **words)
    options.require_whole()
    probe.require_fit(options.probe_steps, method)
    optim.require_fit(options.optimizer, method)
    return options, method


def classifier(options, method, tower: models.Tower, sets: task.Sets) -> heads.Classifier:
    """The tower with a new head and, where there is source data, the head that knows it."""
    source = sets.source and heads.source_head(tower, sets.source.classes, options.zero_shot_templates)
    if options.channels_last:
        tower.to(memory_format=torch.channels_last)
    if options.gradient_checkpointing:
        tower.checkpoint_gradients()
    whole, frozen = getattr(method, "trains_base", False), not getattr(method, "trains", True)
    return heads.Classifier(tower, len(sets.train.classes), source, options.seed, whole, frozen)


class Run:
    """One training run, from the model as it came to the adapter, its head and the price of both."""

    def __init__(self, options, adapter, accelerator, model, sets, folder):
        o = self.options = options
        self.adapter, self.accelerator, self.model, self.sets, self.folder = adapter, accelerator, model, sets, folder
        self.main, preprocess = accelerator.is_main_process, model.tower.preprocess
        self.sharded = processes.is_sharding(accelerator)
        self.reads = self.main or self.sharded  # what reads the base's weights
        self.step_images = o.train_batch_size * o.gradient_accumulation_steps * accelerator.num_processes
        self.total = o.max_train_steps or math.ceil(o.num_train_epochs * len(sets.train) / self.step_images)
        self.tuned = Tuned(adapter, model.head, o, self.total)
        self.stream = augment.Stream(sets.train, augment.training(preprocess, o), o.seed)
        self.mix = augment.mixer(o, len(sets.train.classes))
        if o.compile:
            use_compiler(model.tower)
        self.network = processes.network(accelerator, model, model.tower, self.tuned.parameters())
        self.evaluate = Evaluator(accelerator, model, augment.evaluation(preprocess), o.eval_batch_size,
                                  o.dataloader_num_workers, o.channels_last)  # fmt: skip
        old = (sets.source, sets.few, sets.bank, sets.few_bank)
        self.source = SourceTask(self.evaluate, *old) if sets.source else None
        self.nuclear_ratio = forgetting.NuclearRatio(adapter)
        self.every = o.eval_steps or max(1, self.total // 10)
        self.seconds, self.images = 0.0, 0

    def go(self) -> None:
        """Train, from the start or a checkpoint, and leave the run's results in its folder."""
        o, start = self.options, 0 if self.options.resume_from_checkpoint is None else self.resume()
        if self.main:
            begin(self.folder, o, self.adapter)
        with self.adapter.disabled():
            before = self.source and self.source.before()
        with telemetry.Log(self.folder, o.report_to if self.main else "none") as log, InterruptFlag() as stop:
            if start == 0:
                self.measure(0, log)
                self.model.train()
                first = self.batches(0)  # a data-driven start sees the run's first batches
                self.adapter.prepare(lambda: self.backward(first))
                self.tuned.zero_grad()
            self.train(start, log, stop)
            if not processes.stopping(self.accelerator, stop):
                with processes.written(self.folder, self.main) as folder:
                    self.finish(before, folder)
        processes.leave(self.accelerator, stop, self.folder)

    def positions(self, start: int):
        """The first position of every micro-batch of this process from optimizer step `start` on, without end."""
        o, a, micros = self.options, self.accelerator, self.options.gradient_accumulation_steps
        for k in itertools.count(start * micros):
            yield first_position(*divmod(k, micros), a.process_index, batch=o.train_batch_size, accumulation=micros,
                                 world=a.num_processes)  # fmt: skip

    def batches(self, start: int):
        """(first position, (images, labels)) of these micro-batches."""
        o = self.options
        places = (range(p, p + o.train_batch_size) for p in self.positions(start))
        loaded = augment.batches(self.stream, places, o.dataloader_num_workers, self.accelerator.device)
        return zip(self.positions(start), loaded, strict=False)

    def train(self, start: int, log: telemetry.Log, stop: InterruptFlag) -> None:
        """Optimizer steps start + 1 to the last; each goes by the numbers step and seed alone."""
        o, batches = self.options, self.batches(start)
        bar = tqdm(total=self.total, initial=start, desc="training", disable=not self.main)
        meter, logged = Meter(self.tuned.optimizers.values()), start
        self.model.train()
        for step in range(start, self.total):
            loss = self.backward(batches)
            norm = self.accelerator.clip_grad_norm_(self.tuned.parameters(), o.max_grad_norm)
            meter.add({"loss": loss, "grad_norm": norm})
            rates = {f"{name}_lr": s.get_last_lr()[0] for name, s in self.tuned.schedulers.items()}  # of this step
            self.tuned.step()
            done = step + 1
            bar.update()
            if done % o.logging_steps == 0 or done == self.total:
                values = meter.read(lambda value: distributed.mean(value, self.accelerator.device)) | rates
                spent, images = values.pop("seconds_per_step") * (done - logged), (done - logged) * self.step_images
                self.seconds, self.images, logged = self.seconds + spent, self.images + images, done
                values["images_per_second"] = images / spent
                by_site, largest = telemetry.layers(self.adapter) if self.reads else ({}, {})
                if self.main:
                    log.write(done, values | largest, by_site)
                    bar.set_postfix(loss=f"{values['loss']:.3f}")
            with meter.paused():
                if o.probe_steps and done % o.probe_steps == 0 and done < self.total:
                    self.probe(done, log)
                if done % self.every == 0 or done == self.total:
                    self.measure(done, log)
                stopping = processes.ends_step(self.accelerator, stop, done == self.total)
                if self.reads and (done % o.checkpointing_steps == 0 or stopping):
                    with processes.written(self.folder, self.main) as folder:
                        self.tuned.save(folder.checkpoints, done, self.about())
            if stopping:
                break
        bar.close()
        self.model.eval()

    def backward(self, batches) -> torch.Tensor:
        """Forward and backward over the next optimizer step's batches. Returns the mean loss, the penalty in it."""
        o, total, micros = self.options, 0.0, self.options.gradient_accumulation_steps
        for micro in range(micros):
            position, (images, labels) = next(batches)
            torch.manual_seed(generator(o.seed, "dropout", position).initial_seed())  # dropout knows no generators
            images, targets = self.mix(images, labels, position)
            if o.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with nullcontext() if self.sharded or micro == micros - 1 else self.accelerator.no_sync(self.network):
                loss = augment.cross_entropy(self.network(images), targets, o.label_smoothing) / micros
                self.accelerator.backward(loss)
            total = total + loss.detach()
        if self.adapter.method.has_penalty():  # once an optimizer step, whatever the accumulation
            penalty = self.adapter.penalty()
            self.accelerator.backward(penalty)
            total = total + penalty.detach()
        if self.sharded:
            distributed.average_gradients(self.tuned.parameters(), self.accelerator.device)
        return total

    def probe(self, step: int, log: telemetry.Log) -> None:
        """The cosine of full and equivalent gradient in every site, over the batches of the step to come."""
        batches, micros = self.batches(step), self.options.gradient_accumulation_steps
        found = probe.cosines(self.adapter, lambda: self.backward(batches), micros)
        self.tuned.zero_grad()  # the head's, which is no part of the adapter
        if self.main:
            log.write(step, *telemetry.alignment(found))

    def measure(self, step: int, log: telemetry.Log) -> None:
        """Validation and source accuracy after `step` steps, of the averaged model where there is one."""
        values = {}
        with nullcontext() if self.tuned.ema is None else self.tuned.ema.swapped():
            if self.sets.validation is not None:
                values["validation_accuracy"] = self.evaluate.target(self.sets.validation).top1
                self.tuned.consider(values["validation_accuracy"], step)
            if self.source is not None:
                values |= self.source.on_the_way()
            values["nuclear_ratio"] = self.nuclear_ratio()
        values |= forgetting.means(values, "validation_accuracy")
        if self.main:
            log.write(step, values, {})
            said = ", ".join(f"{k.replace('_', ' ')} {v:.1%}" for k, v in values.items() if k.endswith("accuracy"))
            tqdm.write(f"step {step}: {said}")

    def about(self) -> dict:
        own = {"adapter_options": self.adapter.method.options()}
        return {"config": config.to_dict(self.options) | own, "data": self.sets.fingerprints()}

    def resume(self) -> int:
        """Bring the run back to its checkpoint; returns the step to go on from."""
        saved = checkpoint.load(checkpoint.resolve(self.folder.checkpoints, self.options.resume_from_checkpoint))
        about = self.about()
        require_same_run(saved.state["config"], about["config"], FREE_ON_RESUME)
        self.sets.require_same(saved.state["data"])
        self.tuned.load(saved)
        if self.main:
            self.folder.rewind(saved.step)
            print(f"resumed {saved.path} at step {saved.step}")
        return saved.step

    def finish(self, before: results.Source | None, folder: RunFolder) -> None:
        """The last model and the best one, scored and saved in `folder`, with tables, pictures and the card."""
        o, tuned, sets = self.options, self.tuned, self.sets
        ends: dict[str, float] = {}
        for name, tensors in tuned.ends():  # what is reported comes at the end, and stays in the model
            tuned.load_tensors(tensors)
            if self.reads and (name == "best" or o.final_model == "best"):
                self.write_tensors(folder.path / name)
            if name != o.final_model and tuned.best.step != self.total:
                ends = results.end_figures(name, self.evaluate.target(sets.test), self.source and self.source.head())
        target, after = self.evaluate.target(sets.test), self.source and self.source.full()
        if tuned.best.step == self.total:  # last and best are one, scored once
            other = "best" if o.final_model == "last" else "last"
            ends = results.end_figures(other, target, after and after.head)
        if not self.reads:
            return
        self.write_tensors(folder.path)
        trains = next(self.adapter.parameters(), None) is not None
        exported = results.export(self.adapter, folder.path, o.export_rank) if trains else None
        source_classes = sets.source.classes if sets.source else ()
        results.write_tables(folder.path, sets.train.classes, target, source_classes, before, after)
        figures = {
            "steps": self.total, "trainable_parameters": sum(p.numel() for p in self.adapter.parameters()),
            "head_parameters": sum(p.numel() for p in self.model.head.parameters()),
            **results.target_figures(target), **results.source_figures(before, after, target.top1), **ends,
            "best_step": tuned.best.step, "best_validation_accuracy": tuned.best.accuracy,
            "nuclear_ratio": self.nuclear_ratio(), "final_model": o.final_model,
            "images_per_second": self.images / self.seconds if self.seconds else None,
            **results.peak_memory(self.accelerator.device), "preprocess": preprocess_words(self.model.tower.preprocess),
        }  # fmt: skip
        results.conclude(folder, o, self.adapter, figures, sets.train.classes, exported)

    def write_tensors(self, place: Path) -> None:
        """place/adapter, where something of the model trains, and place/head.safetensors."""
        if next(self.adapter.parameters(), None) is not None:
            self.adapter.save(place / "adapter")
        results.save_head(self.model.head, self.sets.train.classes, place)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run_script(main)
