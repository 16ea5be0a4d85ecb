"""Sequence classification: GLUE's tasks, or any texts with labels, by any adapter and a head that trains beside it.

    accelerate launch train_scripts/sequence_classification.py --adapter lora_sb --rank 8 \
        --model_name_or_path FacebookAI/roberta-large --task_name mrpc

    accelerate launch train_scripts/sequence_classification.py --adapter lora_sb --rank 8

The second runs on the embedded world: does an answer fit its question? Its tiny Llama knows the capitals and the sums.
"""

from __future__ import annotations

import itertools
import logging
import math
from contextlib import nullcontext
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, get_scheduler

import vislora
from vislora import adapters, config, distributed, optim, probe, world
from vislora.baselines import BASELINES
from vislora.errors import InputError, run_script
from vislora.language import models, results
from vislora.language.batches import Plan
from vislora.language.classification import (
    ClassificationOptions,
    Labelled,
    WithHead,
    collate,
    encoder_targets,
    losses,
    optimizer_of,
)  # fmt: skip
from vislora.language.estimate import of_classifier
from vislora.language.metrics import METRICS
from vislora.language.options import FREE_ON_RESUME
from vislora.training import checkpoint, processes, telemetry, zero
from vislora.training.begin import begin
from vislora.training.cores import use_compiler, use_cores
from vislora.training.dry_run import describe
from vislora.training.meter import Meter
from vislora.training.random import first_position, generator
from vislora.training.resume import load_state, require_same_run, save_state
from vislora.training.run import InterruptFlag, RunFolder
from vislora.training.schedule import first_rate

AUTO = AutoModelForSequenceClassification


def main(argv: list[str]) -> None:
    options, method = parse(argv)
    models.quiet()
    accelerator = processes.start(options.mixed_precision, takes_zero=True)
    precision = accelerator.mixed_precision
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision", "fp16 is not supported on a CPU", "take bf16 or no")
    quantized = options.load_in_4bit or options.load_in_8bit
    processes.require_served(accelerator, method, quantized, options.compile)
    if processes.is_zero(accelerator):
        zero.require_fit(accelerator, method, options)
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    use_cores(accelerator.num_processes, options.cpu_threads)

    RunFolder.check(options.output_dir, options.resume_from_checkpoint)
    name, more = options.model_name_or_path, {"trust_remote_code": options.trust_remote_code}
    tokenizer = models.load_tokenizer(options.tokenizer_name or name, options.revision, options.trust_remote_code)
    with accelerator.main_process_first():
        data = Labelled.read(options, tokenizer)
    torch.manual_seed(generator(options.seed, "head").initial_seed())  # transformers draws the head from it
    model = models.load(
        AUTO, name, dtype=models.weight_dtype(options.dtype, precision, method), device=accelerator.device,
        quantized=models.quantization(options), revision=options.revision, num_labels=max(1, len(data.classes)),
        attn_implementation=options.attn_implementation, ignore_mismatched_sizes=True, **more,
    )  # fmt: skip
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders classify by the last token before the padding
    if data.classes:
        model.config.id2label, model.config.label2id = (
            dict(enumerate(data.classes)), {word: i for i, word in enumerate(data.classes)}
        )  # fmt: skip
    for _, head in models.heads(model):
        head.float()
    targets = options.target_words() or (encoder_targets(model) if isinstance(method, vislora.Method) else None)
    adapter = vislora.attach(model, method, targets=targets, seed=options.seed)
    results.check_exportable(adapter, options)
    if options.dry_run:
        line = f"{len(data.train)} examples, {len(data.held)} held out, {data.cut} were cut"
        memory = of_classifier(options, WithHead(adapter, model), model, tokenizer, data, accelerator)
        print(describe(adapter, line, memory))
        return
    main_process = accelerator.is_main_process
    folder = RunFolder.create(options.output_dir, options.resume_from_checkpoint) if main_process else None
    (path,) = broadcast_object_list([str(folder.path) if folder else None])
    with folder or RunFolder(Path(path)) as folder:
        Run(options, WithHead(adapter, model), accelerator, model, tokenizer, data, folder).go()


def parse(argv: list[str]) -> tuple[ClassificationOptions, vislora.Method]:
    """The options; those of the embedded world where neither a model nor data are named."""
    words = dict(
        prog="sequence_classification.py", description=__doc__.splitlines()[0],
        methods={name: adapters.get(name) for name in vislora.methods()} | BASELINES,
    )  # fmt: skip
    options, method = config.parse(ClassificationOptions, argv, **words)
    if (options.model_name_or_path, options.train_file, options.task_name) == (None, None, None):
        options, method = config.parse(
            ClassificationOptions, argv, base=world.defaults("sequence_classification"), **words
        )
    options.require_both("task_name" if options.train_file is None else "train_file")
    optim.require_fit(options.optimizer, method)
    probe.require_fit(options.probe_steps, method)
    return options, method


class Run:
    """One training run, from the frozen model to the saved adapter and head."""

    def __init__(self, options, adapter, accelerator, model, tokenizer, data, folder):
        self.options, self.adapter, self.folder = options, adapter, folder
        self.accelerator, self.inner, self.tokenizer, self.data = accelerator, model, tokenizer, data
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.sharded = processes.is_sharding(accelerator)
        self.reads = self.main or self.sharded  # what reads the base's weights
        self.saves = self.reads or processes.is_zero(accelerator)
        self.plan = Plan([len(ids) for ids in data.train], options.seed)
        self.micros = options.gradient_accumulation_steps
        self.a_step = options.per_device_train_batch_size * self.micros * accelerator.num_processes
        self.an_epoch = math.ceil(len(data.train) / self.a_step)
        self.total = options.max_train_steps or math.ceil(options.num_train_epochs * len(data.train) / self.a_step)
        if options.gradient_checkpointing:
            models.checkpointing(model)
        if options.compile:
            use_compiler(model)
        optimizer = optimizer_of(options, adapter, fused=accelerator.scaler is None)
        self.scheduler = get_scheduler(
            options.lr_scheduler_type, optimizer, num_warmup_steps=options.warmup(self.total),
            num_training_steps=self.total,
        )  # fmt: skip
        self.model, self.optimizer = processes.prepare(accelerator, model, optimizer, adapter.parameters())
        if next(adapter.adapter.parameters(), None) is not None:
            adapter.adapter.bind(self.optimizer, self.total, first_rate(self.scheduler, self.total))

    def go(self) -> None:
        """Train, from the start or a checkpoint, and leave the run's results in its folder."""
        self.best: dict[str, float] = {}
        o, start = self.options, 0 if self.options.resume_from_checkpoint is None else self.resume()
        if self.main:
            begin(self.folder, o, self.adapter)
        with telemetry.Log(self.folder, o.report_to if self.main else "none") as log, InterruptFlag() as stop:
            if start == 0:
                steps = itertools.count()  # a data-driven start sees the run's first batches
                self.adapter.prepare(lambda: self.backward(next(steps))["loss"])
                self.optimizer.zero_grad()
            self.train(start, log, stop)
            if self.reads and not processes.stopping(self.accelerator, stop):
                values = {**self.evaluate(self.total, log), **{f"best_{k}": v for k, v in self.best.items()}}
                with processes.written(self.folder, self.main) as folder:
                    self.adapter.save(folder.adapter)
                    results.conclude(
                        folder, o, self.adapter.adapter, self.inner, self.tokenizer, AUTO, self.total, values,
                        self.device, self.main,
                    )  # fmt: skip
        processes.leave(self.accelerator, stop, self.folder)

    def train(self, start: int, log: telemetry.Log, stop: InterruptFlag) -> None:
        """Optimizer steps start + 1 to the last; each goes by the numbers step and seed alone."""
        o, most = self.options, math.inf if self.options.max_grad_norm is None else self.options.max_grad_norm
        bar = tqdm(total=self.total, initial=start, desc="training", disable=not self.main)
        meter = Meter([self.optimizer], self.accelerator.scaler)
        if self.reads and self.due(start):  # it comes after the checkpoint, and is made again
            self.evaluate(start, log)
        self.model.train()
        processes.begin_steps(self.optimizer)
        for step in range(start, self.total):
            parts = self.backward(step)
            own = self.adapter.parameters()
            parts["grad_norm"] = processes.clip_gradients(self.accelerator, self.optimizer, own, most)
            meter.add(parts)
            rate = self.scheduler.get_last_lr()[0]  # of this step
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            done = step + 1
            bar.update()
            if done % o.logging_steps == 0 or done == self.total:
                values = meter.read(lambda value: distributed.mean(value, self.device)) | {"lr": rate}
                values["memory_mib"] = models.memory_mib(self.device)
                by_site, largest = telemetry.layers(self.adapter.adapter) if self.reads else ({}, {})
                if self.main:
                    log.write(done, values | largest, by_site)
                    bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{values['lr']:.1e}")
            if o.probe_steps and done % o.probe_steps == 0 and done < self.total:
                with meter.paused():
                    found = probe.cosines(self.adapter, partial(self.backward, done), o.gradient_accumulation_steps)
                    self.optimizer.zero_grad()  # the head's, which is no part of the adapter
                    if self.main:
                        log.write(done, *telemetry.alignment(found))
            stopping = processes.ends_step(self.accelerator, stop, done == self.total)
            if self.saves and (done % o.save_steps == 0 or stopping):
                self.save(done)
            if self.reads and self.due(done):
                with meter.paused():
                    self.evaluate(done, log)
            if stopping:
                break
        bar.close()
        self.model.eval()

    def due(self, done: int) -> bool:
        """Whether the run is evaluated on its way after so many steps."""
        return 0 < done < self.total and done % (self.options.eval_steps or self.an_epoch) == 0

    def backward(self, step: int) -> dict[str, torch.Tensor]:
        """Forward and backward over optimizer step `step`'s batches. Returns the mean loss and the penalty."""
        o, total = self.options, 0
        penalty = self.adapter.penalty() if self.adapter.method.has_penalty() else None
        for micro in range(self.micros):
            position = first_position(
                step, micro, self.accelerator.process_index, batch=o.per_device_train_batch_size,
                accumulation=self.micros, world=self.accelerator.num_processes,
            )  # fmt: skip
            torch.manual_seed(generator(o.seed, "dropout", position).initial_seed())  # dropout knows no generators
            chosen = [self.plan.row(q)[0] for q in range(position, position + o.per_device_train_batch_size)]
            batch = collate([self.data.train[i] for i in chosen], self.tokenizer, self.device)
            labels = torch.tensor([self.data.train_labels[i] for i in chosen], device=self.device)
            last = micro == self.micros - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                logits = self.model(**batch).logits.float()
                one = losses(logits, labels, self.data.classes) / self.micros
                total = total + one.detach()
                one = one if penalty is None or not last else one + penalty
                processes.backward(self.accelerator, self.optimizer, one, last)
        if self.sharded:
            distributed.average_gradients(self.adapter.parameters(), self.device)
        return {"loss": total} if penalty is None else {"loss": total, "penalty": penalty.detach()}

    @torch.no_grad()
    def evaluate(self, step: int, log: telemetry.Log) -> dict[str, float]:
        """The metrics of the held-out rows, by the model behind any wrapper; the best of each is kept beside."""
        found: list[float] = []
        training, size = self.inner.training, self.options.per_device_eval_batch_size
        self.inner.eval()
        for at in range(0, len(self.data.held), size):
            batch = collate(self.data.held[at : at + size], self.tokenizer, self.device)
            logits = self.inner(**batch).logits.float()
            found += (logits.argmax(-1) if self.data.classes else logits[:, 0]).tolist()
        self.inner.train(training)
        wanted = [int(x) for x in self.data.held_labels] if self.data.classes else self.data.held_labels
        values = {f"eval_{name}": METRICS[name](found, wanted) for name in self.data.metrics}
        self.best = {name: max(value, self.best.get(name, value)) for name, value in values.items()}
        if not self.main:
            return values
        log.write(step, values, {})
        tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        return values

    def about(self) -> dict:
        own = {"adapter_options": self.adapter.method.options()}
        digest = sha256(repr((self.data.train, self.data.train_labels)).encode()).hexdigest()
        return {"config": config.to_dict(self.options) | own, "data": digest}

    def save(self, step: int) -> None:
        with processes.written(self.folder, self.main) as folder, processes.whole(self.optimizer) as optimizer:
            save_state(
                folder.checkpoints, step, self.adapter, optimizer, self.scheduler,
                self.accelerator.scaler, self.about() | {"best": self.best}, self.options.save_total_limit,
            )  # fmt: skip

    def resume(self) -> int:
        """Bring the run back to its checkpoint; returns the step to go on from."""
        saved = checkpoint.load(checkpoint.resolve(self.folder.checkpoints, self.options.resume_from_checkpoint))
        about = self.about()
        require_same_run(saved.state["config"], about["config"], FREE_ON_RESUME)
        if saved.state["data"] != about["data"]:
            raise InputError("--train_file", "holds other rows than the run began with", "restore them, or start anew")
        load_state(saved, self.adapter, self.optimizer.optimizer, self.scheduler, self.accelerator.scaler)
        self.best = saved.state.get("best", {})
        if self.main:
            again = self.due(saved.step) or saved.step == self.total
            self.folder.rewind(saved.step, "eval_" if again else None)
            print(f"resumed {saved.path} at step {saved.step}")
        return saved.step


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run_script(main)
