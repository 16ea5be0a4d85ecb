"""Language tasks before and after fine-tuning: what a run learned, and what it forgot.

    python eval/language.py --run runs/0001
    python eval/language.py --run OUT --tasks gsm8k=data/gsm8k_test.jsonl math humaneval --allow_code
    python eval/language.py --run OUT --tasks humaneval_plus=HumanEvalPlus.jsonl --allow_code
    python eval/language.py --run OUT --tasks gsm8k --harness arc_easy hellaswag

Tasks are the papers' own (vislora/language/tasks.py): a name, with =FILE, =FOLDER or =HUB_ID for its rows, or the
hub's by default. --harness runs stock tasks of lm-evaluation-harness, in a table of their own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

import vislora
from vislora import config, world
from vislora.errors import InputError, run_script
from vislora.language import harness, models
from vislora.language.rows import read_rows
from vislora.language.tasks import Scored, Task, run, task
from vislora.options import option


@dataclass(frozen=True)
class Options:
    """What is measured, of what."""

    run: str | None = option(None, "a run's folder; none: the model of --model_name_or_path, as it is")
    model_name_or_path: str | None = option(None, "none: the run's own")
    revision: str | None = option(None, "of a hub model")
    tokenizer_name: str | None = option(None, "none: the run's own, or the model's")
    trust_remote_code: bool = option(False, "run code that a hub model brings")
    tasks: tuple[str, ...] = option((), "names, each with =SOURCE for its rows; none: the embedded world's")
    prompt_template: str | None = option(None, "for all tasks, a name or a text with {instruction}; none: each its own")
    max_new_tokens: int | None = option(None, "of a reply; none: each task's own")
    limit: int | None = option(None, "the first so many rows of every task")
    batch_size: int = option(8, "prompts at a time")
    base: bool = option(True, "measure the base too, and what changed")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the model")
    allow_code: bool = option(False, "run programs that the model writes, for humaneval, mbpp and their _plus")
    harness: tuple[str, ...] = option((), "stock tasks of lm-evaluation-harness")
    harness_include_path: str | None = option(None, "a folder of task YAMLs for it")
    output: str | None = option(None, "file for the results; none: language.json in the run, or only printed")
    cpu_threads: int | None = option(None, "threads to compute with; none: torch's choice")


def main(argv: list[str]) -> None:
    words = dict(prog="language.py", description=__doc__.splitlines()[0])
    options, _ = config.parse(Options, argv, **words)
    if not options.tasks and not options.harness:
        options, _ = config.parse(Options, argv, base=world.defaults("language_eval"), **words)
    models.quiet()
    if options.cpu_threads:
        torch.set_num_threads(options.cpu_threads)
    asked = [gather(spec, options) for spec in options.tasks]
    name, revision, tokenizer = base_of(options)
    more = {"revision": revision, "trust_remote_code": options.trust_remote_code}
    tokenizer = models.load_tokenizer(tokenizer, **more)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    model = models.load(AutoModelForCausalLM, name, dtype=dtype, device=device, **more)
    adapter = None if options.run is None else load(options, model)
    results: dict[str, Any] = {"model": name, "run": options.run}
    if adapter is None or options.base:
        with contextlib.nullcontext() if adapter is None else adapter.disabled():
            results["base"] = measure(options, asked, model, tokenizer, "base")
    if adapter is not None:
        results["adapted"] = measure(options, asked, model, tokenizer, adapter.method_name)
    print("\n".join(table(results)))
    place = Path(options.output) if options.output else Path(options.run) / "language.json" if options.run else None
    if place:
        place.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nwritten    {place}")


def base_of(options: Options) -> tuple[str, str | None, str]:
    """(the model's name, its revision, the tokenizer's name), from the flags or from the run's config.yaml."""
    if options.run is None:
        if options.model_name_or_path is None:
            raise InputError("--run", "no run and no model is named", "give one of --run and --model_name_or_path")
        return options.model_name_or_path, options.revision, options.tokenizer_name or options.model_name_or_path
    saved = config.read_yaml(Path(options.run) / "config.yaml", "--run")
    name = options.model_name_or_path or saved.get("model_name_or_path")
    if not isinstance(name, str):
        raise InputError("--run", f"{options.run} is no run of a language model", "name the --model_name_or_path")
    own = saved.get("tokenizer_name") if options.model_name_or_path is None else None
    return name, options.revision or saved.get("revision"), options.tokenizer_name or own or name


def load(options: Options, model: torch.nn.Module) -> vislora.Adapter:
    """The run's adapter on the model; of a quantized base, on the whole one."""
    saved = config.read_yaml(Path(options.run) / "config.yaml", "--run")
    quantized = bool(saved.get("load_in_4bit") or saved.get("load_in_8bit"))
    return vislora.load(model, Path(options.run) / "adapter", allow_other_base=quantized)


def gather(spec: str, options: Options) -> tuple[str, Task, list[dict]]:
    """(label, task, rows) of NAME or NAME=SOURCE. InputError for code that may not run, before anything is loaded."""
    name, named, source = spec.partition("=")
    one = task(name)
    if one.runs_code and not options.allow_code:
        wrong = "runs programs that the model writes"
        raise InputError(f"--tasks {name}", wrong, "give --allow_code, on a machine where nothing is lost")
    if named:
        path = world.ROOT / source
        inside = source.startswith("assets/") and not Path(source).exists() and path.exists()
        rows, label = read_rows(str(path) if inside else source, "test", flag="--tasks"), f"{name} {Path(source).stem}"
    elif one.hub is None:
        raise InputError(f"--tasks {name}", "has no data of its own", f"give {name}=FILE")
    else:
        rows, label = read_rows(one.hub[0], one.hub[2], one.hub[1], "--tasks"), name
    one.ask(rows[0])  # refuses columns that it does not know
    return label, one, rows[: options.limit]


def measure(
    options: Options, asked: list[tuple[str, Task, list[dict]]], model: torch.nn.Module, tokenizer, who: str
) -> dict[str, Any]:
    """{"tasks": {label: figures and replies}, "harness": {task: figures}} of the model as it is now."""
    found: dict[str, Any] = {"tasks": {}, "harness": {}}
    for label, one, rows in asked:
        began = time.perf_counter()
        scored: Scored = run(
            one, rows, model, tokenizer, prompt_template=options.prompt_template,
            max_new_tokens=options.max_new_tokens, batch_size=options.batch_size,
        )  # fmt: skip
        replies = [{"reply": text, "right": right} for text, right in zip(scored.replies, scored.right, strict=True)]
        found["tasks"][label] = {"percent": scored.percent, **scored.further, "rows": len(rows),
                                 "unfinished": scored.unfinished, "replies": replies}  # fmt: skip
        took, more = time.perf_counter() - began, "".join(f", {k} {v:.1f} %" for k, v in scored.further.items())
        print(f"{who}: {label} {scored.percent:.1f} %{more} of {len(rows)} ({took:.0f} s)", file=sys.stderr)
    if options.harness:
        found["harness"] = harness.run(
            model, tokenizer, options.harness, batch_size=options.batch_size, limit=options.limit,
            include_path=options.harness_include_path, allow_code=options.allow_code,
        )  # fmt: skip
    return found


def table(results: dict[str, Any]) -> list[str]:
    """Two tables, apart: the papers' tasks in percent, and the harness's own figures; before, after, the change."""
    sides = [side for side in ("base", "adapted") if side in results]
    first = results[sides[0]]
    rows = [(label if key == "percent" else f"{label}, {key}", *(results[s]["tasks"][label][key] for s in sides))
            for label, own in first["tasks"].items() for key in own if isinstance(own[key], float)]  # fmt: skip
    lines = _table("task, %", sides, rows)
    stock = [(f"{name} {metric}", *(results[s]["harness"][name][metric] for s in sides))
             for name, own in first["harness"].items() for metric in own]  # fmt: skip
    return lines + ([""] if lines and stock else []) + _table("lm-evaluation-harness", sides, stock)


def _table(title: str, sides: list[str], rows: list[tuple]) -> list[str]:
    if not rows:
        return []
    wide = max(len(title), *(len(row[0]) for row in rows))
    heads = [*sides, *(["change"] if len(sides) > 1 else [])]
    lines = [" ".join([title.ljust(wide), *(f"{head:>9}" for head in heads)])]
    for label, *values in rows:
        change = [f"{values[1] - values[0]:+9.3g}"] if len(values) > 1 else []
        lines.append(" ".join([label.ljust(wide), *(f"{value:9.4g}" for value in values), *change]))
    return lines


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run_script(main)
