"""The papers' own tasks: how a row is asked, how long the reply may be, and whether it is right.

Their numbers are not those of lm-evaluation-harness's tasks of the same names, whose prompts and answers are others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vislora.errors import InputError, near
from vislora.language import plus_check, scoring
from vislora.language.code_run import passes
from vislora.language.generate import log_likelihoods, reply
from vislora.language.templates import template

Row = Mapping[str, Any]
_QUESTIONS = ("question", "query", "instruction", "problem", "text", "prompt")
_GOLDS = ("answer", "output", "response", "solution")


@dataclass(frozen=True)
class Task:
    """right(reply, row): is it? prompt: a template's name. tokens: of a reply at most.

    hub: (id, configuration, split) where the rows are looked for when no source is named. stop: words that end a reply.
    choices: the row's `choices` are weighed by their likelihood, and nothing is generated. further: {name: a harder
    test}, for replies that are right; each has a figure of its own.
    """

    prompt: str
    right: Callable[[str, Row], bool]
    tokens: int
    hub: tuple[str, str | None, str] | None = None
    stop: tuple[str, ...] = ()
    runs_code: bool = False
    choices: bool = False
    ask: Callable[[Row], str] = field(default=lambda row: first(row, _QUESTIONS))
    further: Mapping[str, Callable[[str, Row], bool]] = field(default_factory=dict)


def first(row: Row, names: Sequence[str]) -> str:
    """The first of the named columns that the row has, as text. InputError if it has none."""
    for name in names:
        if isinstance(row.get(name), str | int | float):
            return str(row[name])
    raise InputError("--tasks", f"a row with the columns {', '.join(row)}", f"it needs one of {', '.join(names)}")


def _gold(row: Row) -> str:
    return first(row, _GOLDS)


def _choice(name: str) -> Task:
    right = lambda text, row: scoring.choice_right(text, _gold(row), name)  # noqa: E731
    return Task("commonsense", right, 32)


def _function(row: Row) -> str:
    """SORSA's Listing 2, its first version's; the fences are as it prints them."""
    return (
        f"Here is the given code to do completion:\n'''python\n{first(row, ('prompt',))}\n'''\n\n"
        "Please continue to complete the function with python programming language. You are not allowed to modify the "
        "given code and do the completion only.\n\n"
        "Please return all completed codes in one code block.\nThis code block should be in the following format:\n"
        "'''python\n# Your codes here\n'''"
    )


def _problem(row: Row) -> str:
    tests = "\n".join(_tests(row))
    return f"{first(row, ('text', 'prompt'))} Your code should pass these tests:\n\n{tests}"


def _tests(row: Row) -> list[str]:
    if not isinstance(row.get("test_list"), list):
        raise InputError("--tasks mbpp", f"a row with the columns {', '.join(row)}", "MBPP's rows have a test_list")
    return row["test_list"]


def _described(row: Row) -> str:
    """MBPP+'s problem, which is a docstring with one of its tests."""
    _calls(row, "base_input")
    return first(row, ("prompt",)).strip().strip('"').strip()


def whole_function(text: str, row: Row) -> str:
    """The function of a reply to a HumanEval row; a reply that is a function's body goes on from the row's prompt."""
    code = scoring.code_block(text)
    if f"def {row['entry_point']}" in code:
        return f"{row['prompt'].partition('def ')[0]}\n{code}"  # imports, which replies leave out
    return row["prompt"] + code


def humaneval_program(text: str, row: Row) -> str:
    """What is run for a reply to a HumanEval row."""
    return f"{whole_function(text, row)}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def mbpp_program(text: str, row: Row) -> str:
    """What is run for a reply to an MBPP row."""
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    return "\n".join([scoring.code_block(text), setup, *_tests(row)])


def _calls(row: Row, column: str) -> list:
    names = ("task_id", "entry_point", "canonical_solution", column)
    missing = [name for name in names if name not in row]
    if missing:
        wrong = f"a row has no {', '.join(missing)}"
        raise InputError("--tasks", wrong, "name evalplus' own file, HumanEvalPlus.jsonl or MbppPlus.jsonl")
    return row[column]


def plus_program(code: str, row: Row, column: str) -> str:
    """What is run for a function on the inputs in a column of an evalplus row: base_input or plus_input."""
    calls = json.dumps(_calls(row, column))
    told = (code, row["prompt"] + row["canonical_solution"], row["task_id"], row["entry_point"], calls, row["atol"])
    return f"{Path(plus_check.__file__).read_text(encoding='utf-8')}\n\nverify(*{told!r})\n"


def _plus(ask: Callable[[Row], str], code: Callable[[str, Row], str], tokens: int) -> Task:
    def on(column: str) -> Callable[[str, Row], bool]:
        return lambda text, row: passes(plus_program(code(text, row), row, column), seconds=60, memory_mib=4096)

    return Task("codefeedback", on("base_input"), tokens, stop=("@@ Instruction",), runs_code=True, ask=ask,
                further={"plus": on("plus_input")})  # fmt: skip


TASKS: dict[str, Task] = {
    "gsm8k": Task("metamath_cot", lambda text, row: scoring.gsm8k_right(text, _gold(row)), 512,
                  ("openai/gsm8k", "main", "test"), ("### Instruction",)),
    "math": Task("metamath_cot", lambda text, row: scoring.math_right(text, first(row, ("solution", *_GOLDS))), 2048,
                 ("HuggingFaceH4/MATH-500", None, "test"), ("### Instruction",)),
    **{name: _choice(name) for name in scoring.CHOICES},
    "humaneval": Task("codefeedback", lambda text, row: passes(humaneval_program(text, row)), 1024,
                      ("openai/openai_humaneval", None, "test"), ("@@ Instruction",), runs_code=True, ask=_function),
    "mbpp": Task("codefeedback", lambda text, row: passes(mbpp_program(text, row)), 1024,
                 ("google-research-datasets/mbpp", "full", "test"), ("@@ Instruction",), runs_code=True, ask=_problem),
    "humaneval_plus": _plus(lambda row: _calls(row, "base_input") and _function(row), whole_function, 1024),
    "mbpp_plus": _plus(_described, lambda text, row: scoring.code_block(text), 1024),
    "answers": Task("qa", lambda text, row: scoring.same_answer(text, _gold(row)), 128),
    "choices": Task("qa", lambda text, row: text == _gold(row), 0, choices=True),
}  # fmt: skip


def task(name: str) -> Task:
    """The task of a name. InputError, with near ones, for none."""
    if name not in TASKS:
        raise InputError("--tasks", f"{name!r} is no task{near(name, TASKS)}", f"take some of {', '.join(TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class Scored:
    """One task's result: the share of right replies in percent, every reply, and how many reached the token limit.

    further: {name: percent of all replies} that a task's harder tests let pass too.
    """

    percent: float
    replies: list[str]
    right: list[bool]
    unfinished: int
    further: dict[str, float]


def run(
    one: Task, rows: Sequence[Row], model: nn.Module, tokenizer, *, prompt_template: str | None = None,
    max_new_tokens: int | None = None, batch_size: int = 8,
) -> Scored:  # fmt: skip
    """Ask every row, greedily, and count. prompt_template and max_new_tokens override the task's own.

    A reply that the token limit cut is counted in `unfinished`: truncation alone moves MATH's numbers.
    """
    fill = template(prompt_template or one.prompt, "--prompt_template").fill
    prompts = [fill(one.ask(row), row["input"] if isinstance(row.get("input"), str) else "") for row in rows]
    limit = max_new_tokens or one.tokens
    if one.choices:
        replies = _most_likely(model, tokenizer, prompts, rows, batch_size)
    else:
        replies = reply(model, tokenizer, prompts, max_new_tokens=limit, batch_size=batch_size, stop=one.stop)
    right = [one.right(text, row) for text, row in zip(replies, rows, strict=True)]
    count = partial(tokenizer, add_special_tokens=False)
    unfinished = 0 if one.choices else sum(len(count(text)["input_ids"]) >= limit for text in replies)
    both = list(zip(right, replies, rows, strict=True))
    further = {name: 100 * sum(ok and test(text, row) for ok, text, row in both) / len(rows)
               for name, test in one.further.items()}  # fmt: skip
    return Scored(100 * sum(right) / len(right), replies, right, unfinished, further)


def _most_likely(model, tokenizer, prompts: Sequence[str], rows: Sequence[Row], batch_size: int) -> list[str]:
    """Of each row's `choices` the one with the largest log-likelihood a token."""
    for row in rows:
        if not isinstance(row.get("choices"), list) or len(row["choices"]) < 2:
            raise InputError("--tasks choices", "a row has no list of choices", 'give {"choices": [...]} in every row')
    pairs = [(prompt, choice) for prompt, row in zip(prompts, rows, strict=True) for choice in row["choices"]]
    scores = iter(log_likelihoods(model, tokenizer, pairs, batch_size))
    found = []
    for row in rows:
        own = [next(scores) / max(1, len(tokenizer(c, add_special_tokens=False)["input_ids"])) for c in row["choices"]]
        found.append(row["choices"][own.index(max(own))])
    return found
