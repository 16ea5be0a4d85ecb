"""The data of a causal LM run: rows read, told apart into training and held out, and encoded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from vislora.errors import InputError
from vislora.language.encode import Encoded, Example, encode
from vislora.language.options import CausalLMOptions
from vislora.language.records import Record, records, use_chat_template
from vislora.language.rows import holdout, read_rows

log = logging.getLogger("vislora")


@dataclass(frozen=True)
class Data:
    """examples to train on, records that are held out, and a digest of the former."""

    examples: list[Example]
    held_out: list[Record]
    digest: str
    line: str  # on the data, in words

    @classmethod
    def read(cls, options: CausalLMOptions, tokenizer, context: int | None) -> Data:
        """What the options name. context: the longest sequence of the model, None where it has no limit.

        Raises InputError for rows that do not fit together, and for a max_length beyond the model's.
        """
        o = options
        if context is not None and o.max_length > context:
            wrong = f"{o.max_length} tokens, and the model was made for {context}"
            raise InputError("--max_length", wrong, f"give {context} or less")
        use_chat_template(tokenizer, o.chat_template)
        rows = read_rows(o.dataset_name, o.dataset_split, o.dataset_config_name)[: o.max_train_samples]
        held: list = []
        if o.eval_dataset_name is not None:
            flag = "--eval_dataset_name"
            held = read_rows(o.eval_dataset_name, o.eval_dataset_split, o.dataset_config_name, flag)
            held = held[: o.max_eval_samples]
        elif o.validation_split_percentage:
            rows, held = holdout(rows, o.validation_split_percentage, o.max_eval_samples)
        words = dict(fields=o.dataset_field, prompt_template=o.prompt_template, train_on_prompt=o.train_on_prompt)
        encoded = encode(records(rows, tokenizer, **words), tokenizer, o.max_length, o.truncation)
        kept = records(held, tokenizer, **words, flag="--eval_dataset_name") if held else []
        line = _line(encoded, len(held))
        if encoded.cut or encoded.dropped:
            log.warning("--max_length %d: %s", o.max_length, line)
        return cls(encoded.examples, kept, _digest(encoded.examples), line)

    def targets(self, indices: Iterable[int]) -> int:
        """How many tokens of these examples are predicted."""
        return sum(self.examples[i].targets for i in indices)


def _line(encoded: Encoded, held: int) -> str:
    examples = encoded.examples
    total, learned = sum(map(len, examples)), sum(example.targets for example in examples)
    text = f"{len(examples)} examples, {total:,} tokens, {learned:,} of them learned"
    text += f"; {encoded.cut} were cut" if encoded.cut else ""
    text += f"; {encoded.dropped} had nothing left to learn and are left out" if encoded.dropped else ""
    return text + (f"; {held} rows are held out" if held else "")


def _digest(examples: list[Example]) -> str:
    """sha256 over ids and marks of all examples, in order."""
    total = hashlib.sha256()
    for example in examples:
        total.update(len(example).to_bytes(4, "little"))
        total.update(example.ids.numpy().tobytes())
        total.update(example.learned.numpy().tobytes())
    return total.hexdigest()
