"""Causal language models: fine-tune one on instructions, conversations or text, by any adapter.

On the embedded world, offline, in a minute or two on two CPU cores:

    accelerate launch train_scripts/causal_lm.py --adapter sorsa --rank 16

A paper's run, whole, on its own model and data (configs/paper has them all):

    accelerate launch train_scripts/causal_lm.py --config configs/paper/sorsa_llama2_7b_metamath.yaml
"""

from __future__ import annotations

import itertools
import logging
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, get_scheduler

import vislora
from vislora import adapters, config, distributed, optim, probe, world
from vislora.baselines import BASELINES
from vislora.errors import InputError, run_script
from vislora.language import models, results
from vislora.language.batches import Plan, collate
from vislora.language.data import Data
from vislora.language.estimate import of_causal_lm
from vislora.language.evaluation import Evaluation
from vislora.language.loss import share, token_losses
from vislora.language.options import FREE_ON_RESUME, CausalLMOptions
from vislora.training import checkpoint, processes, telemetry, zero
from vislora.training.begin import begin
from vislora.training.cores import use_compiler, use_cores
from vislora.training.dry_run import describe
from vislora.training.meter import Meter
from vislora.training.random import first_position, generator
from vislora.training.resume import load_state, require_same_run, save_state
from vislora.training.run import InterruptFlag, RunFolder
from vislora.training.schedule import first_rate


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

    # Everything that can be known to be wrong is found before anything large is loaded.
    RunFolder.check(options.output_dir, options.resume_from_checkpoint)
    name = options.model_name_or_path
    tokenizer = models.load_tokenizer(options.tokenizer_name or name, options.revision, options.trust_remote_code)
    with accelerator.main_process_first():  # others find the hub's files in the cache
        data = Data.read(options, tokenizer, models.context_length(name, options.revision, options.trust_remote_code))
    model = models.load(
        AutoModelForCausalLM, name, dtype=models.weight_dtype(options.dtype, precision, method),
        device=accelerator.device, quantized=models.quantization(options), revision=options.revision,
        trust_remote_code=options.trust_remote_code, attn_implementation=options.attn_implementation,
    )  # fmt: skip
    if options.packing:
        models.require_packable(model)
    adapter = vislora.attach(model, method, targets=options.target_words(), seed=options.seed)
    results.check_exportable(adapter, options)
    if options.dry_run:
        print(describe(adapter, data.line, of_causal_lm(options, adapter, model, tokenizer, data, accelerator)))
        return
    main_process = accelerator.is_main_process
    folder = RunFolder.create(options.output_dir, options.resume_from_checkpoint) if main_process else None
    (path,) = broadcast_object_list([str(folder.path) if folder else None])
    with folder or RunFolder(Path(path)) as folder:
        Run(options, adapter, accelerator, model, tokenizer, data, folder).go()


def parse(argv: list[str]) -> tuple[CausalLMOptions, vislora.Method]:
    """The options; those of the embedded world where neither a model nor data are named."""
    words = dict(
        prog="causal_lm.py", description=__doc__.splitlines()[0],
        methods={name: adapters.get(name) for name in vislora.methods()} | BASELINES,
    )  # fmt: skip
    options, method = config.parse(CausalLMOptions, argv, **words)
    if options.model_name_or_path is None and options.dataset_name is None:
        options, method = config.parse(CausalLMOptions, argv, base=world.defaults("causal_lm"), **words)
    options.require_both("dataset_name")
    optim.require_fit(options.optimizer, method)
    probe.require_fit(options.probe_steps, method)
    return options, method


class Run:
    """One training run, from the frozen model to the exported adapter."""

    def __init__(self, options, adapter, accelerator, model, tokenizer, data, folder):
        self.options, self.adapter, self.folder = options, adapter, folder
        self.accelerator, self.inner, self.tokenizer, self.data = accelerator, model, tokenizer, data
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.sharded = processes.is_sharding(accelerator)
        self.reads = self.main or self.sharded  # what reads the base's weights
        self.saves = self.reads or processes.is_zero(accelerator)
        self.trains = next(adapter.parameters(), None) is not None
        self.evaluation = Evaluation(options, data.held_out, tokenizer, folder.samples)
        self.mask_dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.plan = Plan([len(e) for e in data.examples], options.seed, options.packing, options.max_length)
        self.a_step = (
            options.per_device_train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes
        )
        self.total = options.max_train_steps or math.ceil(self.plan.rows(options.num_train_epochs) / self.a_step)
        if options.gradient_checkpointing:
            models.checkpointing(model)
        if options.compile:
            use_compiler(model)
        self.model = model
        if not self.trains:
            self.model = accelerator.prepare_model(model, evaluation_mode=True)
            return
        optimizer = optim.from_options(options, adapter, fused=accelerator.scaler is None)
        self.scheduler = get_scheduler(
            options.lr_scheduler_type, optimizer, num_warmup_steps=options.warmup(self.total),
            num_training_steps=self.total,
        )  # fmt: skip
        self.model, self.optimizer = processes.prepare(accelerator, model, optimizer, adapter.parameters())
        adapter.bind(self.optimizer, self.total, first_rate(self.scheduler, self.total))

    def go(self) -> None:
        """Train, from the start or a checkpoint, and leave the run's results in its folder."""
        o, start = self.options, 0 if self.options.resume_from_checkpoint is None else self.resume()
        if self.main:
            begin(self.folder, o, self.adapter)
        with telemetry.Log(self.folder, o.report_to if self.main else "none") as log, InterruptFlag() as stop:
            if start == 0:
                self.evaluate(0, log)
            if start == 0 and self.trains:
                steps = itertools.count()  # a data-driven start sees the run's first batches
                self.adapter.prepare(lambda: self.backward(next(steps))["loss"])
            if self.trains:
                self.train(start, log, stop)
            if not processes.stopping(self.accelerator, stop):
                values = self.evaluate(self.total, log) if self.trains else self.values
                self.finish(values)
        processes.leave(self.accelerator, stop, self.folder)

    def train(self, start: int, log: telemetry.Log, stop: InterruptFlag) -> None:
        """Optimizer steps start + 1 to the last; each goes by the numbers step and seed alone."""
        o = self.options
        bar = tqdm(total=self.total, initial=start, desc="training", disable=not self.main)
        meter, tokens, logged = Meter([self.optimizer], self.accelerator.scaler), 0, start
        most = math.inf if o.max_grad_norm is None else o.max_grad_norm
        if self.due(start):  # it comes after the checkpoint, and is made again
            self.evaluate(start, log)
        self.model.train()
        processes.begin_steps(self.optimizer)
        for step in range(start, self.total):
            parts = self.backward(step)
            own = self.adapter.parameters()
            parts["grad_norm"] = processes.clip_gradients(self.accelerator, self.optimizer, own, most)
            if o.penalty_unclipped and self.adapter.method.has_penalty():
                parts["penalty"] = self.adapter.penalty()
                self.accelerator.backward(parts["penalty"])
            meter.add(parts)
            rate = self.scheduler.get_last_lr()[0]  # of this step
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            tokens += sum(len(self.data.examples[i]) for q in self.window(step) for i in self.plan.row(q))
            done = step + 1
            bar.update()
            if done % o.logging_steps == 0 or done == self.total:
                values = meter.read(lambda value: distributed.mean(value, self.device)) | {"lr": rate}
                values["tokens_per_second"] = tokens / (values["seconds_per_step"] * (done - logged))
                values["epoch"] = done * self.a_step / self.plan.rows(1)
                values["memory_mib"] = models.memory_mib(self.device)
                by_site, largest = telemetry.layers(self.adapter) if self.reads else ({}, {})
                if self.main:
                    log.write(done, values | largest, by_site)
                    bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{values['lr']:.1e}")
                logged, tokens = done, 0
            if o.probe_steps and done % o.probe_steps == 0 and done < self.total:
                with meter.paused():
                    found = probe.cosines(self.adapter, partial(self.backward, done), o.gradient_accumulation_steps)
                    if self.main:
                        log.write(done, *telemetry.alignment(found))
            stopping = processes.ends_step(self.accelerator, stop, done == self.total)
            if self.saves and (done % o.save_steps == 0 or stopping):
                self.save(done)
            if self.due(done):
                with meter.paused():
                    self.evaluate(done, log)
            if stopping:
                break
        bar.close()
        self.model.eval()

    def due(self, done: int) -> bool:
        """Whether the run is evaluated on its way after so many steps."""
        return 0 < done < self.total and done % (self.options.eval_steps or self.total) == 0

    def window(self, step: int) -> range:
        """The rows of optimizer step `step`: of all its batches, on all processes."""
        return range(step * self.a_step, (step + 1) * self.a_step)

    def backward(self, step: int) -> dict[str, torch.Tensor]:
        """Forward and backward over optimizer step `step`'s batches. Returns this process's part of the mean loss."""
        o, total, micros = self.options, 0, self.options.gradient_accumulation_steps
        window = self.data.targets(i for q in self.window(step) for i in self.plan.row(q))
        penalty = self.adapter.penalty() if self.adapter.method.has_penalty() and not o.penalty_unclipped else None
        for micro in range(micros):
            position = first_position(
                step, micro, self.accelerator.process_index, batch=o.per_device_train_batch_size, accumulation=micros,
                world=self.accelerator.num_processes,
            )  # fmt: skip
            torch.manual_seed(generator(o.seed, "dropout", position).initial_seed())  # dropout knows no generators
            last = micro == micros - 1
            rows = [self.plan.row(q) for q in range(position, position + o.per_device_train_batch_size)]
            examples = [[self.data.examples[i] for i in row] for row in rows]
            batch = collate(examples, self.tokenizer.pad_token_id, self.mask_dtype, self.device, o.packing)
            labels, own = batch.pop("labels"), self.data.targets(i for row in rows for i in row)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = token_losses(self.model(**batch).logits, labels)
                loss = share(loss, own, window, o.loss_normalization, micros, self.accelerator.num_processes)
                total = total + loss.detach()
                # once an optimizer step, whatever the accumulation
                loss = loss if penalty is None or not last else loss + penalty
                processes.backward(self.accelerator, self.optimizer, loss, last)
        if self.sharded:
            distributed.average_gradients(self.adapter.parameters(), self.device)
        return {"loss": total} if penalty is None else {"loss": total, "penalty": penalty.detach()}

    def evaluate(self, step: int, log: telemetry.Log) -> dict[str, float]:
        """Loss, samples and answers of held-out data, logged and printed; chance in the run is left as it was."""
        state = torch.random.get_rng_state()
        self.values = self.evaluation.measure(self.model, self.inner, step, self.accelerator, self.main)
        torch.random.set_rng_state(state)
        if self.main and self.values:
            log.write(step, self.values, {})
            tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in self.values.items()))
        return self.values

    def about(self) -> dict:
        own = {"adapter_options": self.adapter.method.options()}
        return {"config": config.to_dict(self.options) | own, "data": self.data.digest}

    def save(self, step: int) -> None:
        with processes.written(self.folder, self.main) as folder, processes.whole(self.optimizer) as optimizer:
            save_state(
                folder.checkpoints, step, self.adapter, optimizer, self.scheduler,
                self.accelerator.scaler, self.about(), self.options.save_total_limit,
            )  # fmt: skip

    def resume(self) -> int:
        """Bring the run back to its checkpoint; returns the step to go on from."""
        if not self.trains:
            wrong = f"--adapter {self.adapter.method_name} makes no steps to go on with"
            raise InputError("--resume_from_checkpoint", wrong, "leave it out")
        saved = checkpoint.load(checkpoint.resolve(self.folder.checkpoints, self.options.resume_from_checkpoint))
        about = self.about()
        require_same_run(saved.state["config"], about["config"], FREE_ON_RESUME)
        if saved.state["data"] != about["data"]:
            wrong = "holds other rows than the run began with"
            raise InputError(self.options.dataset_name, wrong, "restore them, or start a new run")
        load_state(saved, self.adapter, self.optimizer.optimizer, self.scheduler, self.accelerator.scaler)
        if self.main:
            again = self.due(saved.step) or saved.step == self.total
            self.folder.rewind(saved.step, "eval_" if again else None)
            print(f"resumed {saved.path} at step {saved.step}")
        return saved.step

    def finish(self, values: dict[str, float]) -> None:
        """The adapter in our format and in PEFT's, the whole model where it is asked for, metrics, the card."""
        if self.reads:
            with processes.written(self.folder, self.main) as folder:
                results.conclude(
                    folder, self.options, self.adapter, self.inner, self.tokenizer, AutoModelForCausalLM,
                    self.total if self.trains else 0, values, self.device, self.main,
                )  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run_script(main)
