"""Prompt templates by name, those of the papers among them. What they say is format, and must match to the letter."""

from __future__ import annotations

from dataclasses import dataclass

from vislora.errors import InputError, near

_TASK = "Below is an instruction that describes a task"
_DO = "Write a response that appropriately completes the request."
_INPUT = f"{_TASK}, paired with an input that provides further context. {_DO}"


@dataclass(frozen=True)
class Template:
    """prompt: with {instruction}; with_input: with {instruction} and {input}, for rows that have one, or None.

    end: what stands between the response and the end token.
    """

    prompt: str
    with_input: str | None = None
    end: str = ""

    def fill(self, instruction: str, input: str = "") -> str:
        """The prompt's text; an input that the template has no place for follows the instruction on a new line."""
        if input and self.with_input is None:
            instruction = f"{instruction}\n{input}"
        pattern = self.with_input if input and self.with_input else self.prompt
        # not str.format: instructions hold braces
        before, _, rest = pattern.partition("{instruction}")
        middle, found, after = rest.partition("{input}")
        return before + instruction + middle + (input if found else "") + after


_SHORT = f"{_TASK}. {_DO}\n\n### Instruction:\n{{instruction}}\n\n### Response:"
_PAIRED = f"{_INPUT}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:"

TEMPLATES = {
    # Alpaca's (Taori et al. 2023), as SORSA, LoRA-SB and NB-LoRA train on MetaMathQA
    "alpaca": Template(_SHORT, _PAIRED),
    # the same as PiSSA's code has it: a new line before the end token
    "alpaca_newline": Template(_SHORT, _PAIRED, end="\n"),
    # Commonsense-170K (LLM-Adapters, Hu et al. 2023), without that code's indentation
    "commonsense": Template(_SHORT + "\n", _PAIRED + "\n"),
    # how GSM8K and MATH are asked after MetaMathQA
    "metamath_cot": Template(_SHORT + " Let's think step by step."),
    # SORSA on CodeFeedback
    "codefeedback": Template("@@ Instruction\n{instruction}\n\n@@ Response\n"),
    # PEFT's benchmark on MetaMathQA
    "peft_benchmark": Template("Question: {instruction} Think step by step.\nAnswer:"),
    # the embedded world's tiny-llama
    "qa": Template("Question: {instruction}\nAnswer:\n"),
    "plain": Template("{instruction}"),
}


def template(name: str, flag: str = "--prompt_template") -> Template:
    """The template of a name, or the one that is written out: any text with {instruction}. InputError otherwise."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{instruction}" not in name:
        wrong = f"{name!r} is no template{near(name, TEMPLATES)}"
        raise InputError(flag, wrong, f"take one of {', '.join(TEMPLATES)}, or write one with {{instruction}}")
    return Template(name, name if "{input}" in name else None)
