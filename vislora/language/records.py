"""From rows of any format to records: stretches of text, each either learned or only read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vislora.errors import InputError
from vislora.language.templates import template

Format = Literal["messages", "prompt_completion", "instruction", "text"]
# (prompt's column, response's column), in the order in which they are looked for
_PAIRS = (("instruction", "output"), ("query", "response"), ("query", "answer"), ("question", "answer"))
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Segment:
    """text, and whether the loss is taken on it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Record:
    """One example. special: the tokenizer's own start token goes before the first segment (a chat template writes its
    own)."""

    segments: tuple[Segment, ...]
    special: bool = True

    @property
    def prompt(self) -> str:
        """Everything before the last learned segment."""
        last = max(i for i, segment in enumerate(self.segments) if segment.learned)
        return "".join(segment.text for segment in self.segments[:last])

    @property
    def response(self) -> str:
        """The last learned segment."""
        return next(segment.text for segment in reversed(self.segments) if segment.learned)


def format_of(row: Mapping[str, Any], fields: Sequence[str], flag: str) -> tuple[Format, tuple[str, ...]]:
    """The format of a data set, from its first row's columns, and the columns that it is read from.

    fields: --dataset_field, the prompt's column and the response's, or one column of plain text. InputError for columns
    that are missing or tell nothing.
    """
    if fields:
        missing = [name for name in fields if name not in row]
        if missing or len(fields) > 2:
            wrong = f"{' '.join(missing or fields)}: the data has {', '.join(row)}"
            raise InputError("--dataset_field", wrong, "name the prompt's and the response's column, or one of text")
        return ("instruction" if len(fields) == 2 else "text"), tuple(fields)
    for name in ("messages", "conversations"):
        if name in row:
            return "messages", (name,)
    if {"prompt", "completion"} <= row.keys():
        both = isinstance(row["prompt"], list)
        return ("messages" if both else "prompt_completion"), ("prompt", "completion")
    for pair in _PAIRS:
        if set(pair) <= row.keys():
            return "instruction", pair
    if "text" in row:
        return "text", ("text",)
    wrong = f"has the columns {', '.join(row)}, which tell no format"
    raise InputError(flag, wrong, "name prompt and response by --dataset_field")


def records(
    rows: Sequence[Mapping[str, Any]],
    tokenizer,
    *,
    fields: Sequence[str] = (),
    prompt_template: str | None = None,
    train_on_prompt: bool = False,
    flag: str = "--dataset_name",
) -> list[Record]:
    """The records of a data set's rows, in order; all rows have the first one's format.

    prompt_template: a name of `TEMPLATES` or a text; None: alpaca for instructions alone.
    train_on_prompt: the loss is taken on everything. Raises InputError, with its number, for a row that does not fit.
    """
    kind, columns = format_of(rows[0], fields, flag)
    form = template(prompt_template or ("alpaca" if kind == "instruction" else "plain"))
    made = []
    for number, row in enumerate(rows):
        where = f"{flag}, row {number}"
        if kind == "messages":
            segments = chat_segments(_messages(row, columns, where), tokenizer, where)
            made.append(Record(_all(segments) if train_on_prompt else segments, special=False))
            continue
        texts = [_text(row, column, where) for column in columns]
        if kind == "text":
            segments = (Segment(texts[0], True),)
        else:
            more = row.get("input") if kind == "instruction" and "input" not in columns else None
            prompt = form.fill(texts[0], more.strip() if isinstance(more, str) else "")
            segments = (Segment(prompt, False), Segment(texts[1] + form.end, True))
        start = tokenizer.bos_token
        special = not (start and segments[0].text.startswith(start))  # no second one
        made.append(Record(_all(segments) if train_on_prompt else segments, special))
    return made


def _all(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    return tuple(Segment(segment.text, True) for segment in segments)


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        shown = "is missing" if value is None else f"is a {type(value).__name__}"
        raise InputError(where, f"{column} {shown}", "give text")
    return value


def _messages(row: Mapping[str, Any], columns: Sequence[str], where: str) -> list[dict[str, str]]:
    """[{"role", "content"}], also from ShareGPT's from and value. The last one is the assistant's."""
    parts = [row.get(column) for column in columns]
    if not all(isinstance(part, list) and part for part in parts):
        raise InputError(where, f"{columns[0]} is no list of messages", 'give [{"role": ..., "content": ...}]')
    found = []
    for message in (message for part in parts for message in part):
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(where, f"a message without role and content: {str(message)[:80]}", "give both, as text")
        found.append({"role": _ROLES.get(role, role), "content": content})
    while found and found[-1]["role"] != "assistant":
        found.pop()  # nothing is learned after the last answer
    if not found:
        raise InputError(where, "no message is the assistant's", "leave that row out")
    return found


def chat_segments(messages: Sequence[Mapping[str, str]], tokenizer, where: str) -> tuple[Segment, ...]:
    """A conversation in the tokenizer's chat template; what the assistant says, with the mark that ends it, is learned.

    Raises InputError if there is no template, or if it shows earlier turns otherwise once later ones are there.
    """
    if not tokenizer.chat_template:
        raise InputError(where, "the tokenizer has no chat template", "give one: --chat_template chatml, or a file")

    def show(count: int, ask: bool = False) -> str:
        if not count:
            return ""
        return tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=ask)

    whole, segments, at = show(len(messages)), [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = show(index), show(index + 1)
        if not whole.startswith(before) or not whole.startswith(through.rstrip()):
            wrong = "its chat template changes earlier turns when later ones follow"
            raise InputError(where, wrong, "give single exchanges, or another --chat_template")
        # some templates open the answer with more than every answer begins with
        start = max(len(os.path.commonprefix([show(index, True), whole])), len(before))
        stop = len(through.rstrip())
        segments += [Segment(whole[at:start], False), Segment(whole[start:stop], True)]
        at = stop
    return tuple(segments)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def use_chat_template(tokenizer, word: str | None) -> None:
    """Give the tokenizer the template that --chat_template names: "chatml", or a file of Jinja. None: its own stays."""
    if word is None:
        return
    if word == "chatml":
        tokenizer.chat_template = CHATML
        return
    try:
        tokenizer.chat_template = Path(word).read_text(encoding="utf-8")
    except OSError as error:
        wrong = f"{word}: cannot be read ({error.strerror})"
        raise InputError("--chat_template", wrong, "name a file, or chatml") from None
