"""Label masks on awkward tokenizers, against a reference that builds each example token by token."""

from __future__ import annotations

import pytest
import torch
from tiny_lm import tokenizer

from vislora.errors import InputError
from vislora.language.encode import encode, prompt_ids
from vislora.language.records import CHATML, records

KINDS = ("bytes", "merging", "prefix", "closing", "bare")
ROWS = [
    {"prompt": "### Response:", "completion": "ab"},  # a merge reaches across the join of both texts
    {"prompt": "How many?\nAnswer: ", "completion": " 12 apples "},
    {"prompt": "ab", "completion": ""},  # the end token alone is learned
    {"prompt": "", "completion": "ba"},
    {"prompt": "ä</s>", "completion": "x</s>y"},
]


def reference(tok, prompt: str, response: str) -> tuple[list[int], list[bool]]:
    """One id after another: the start token if the tokenizer has one in front, then each part's own ids."""
    ids, learned = [], []
    start = tok.bos_token_id
    if start is not None and tok("x")["input_ids"][0] == start:
        ids, learned = [start], [False]
    for text, on in ((prompt, False), (response, True)):
        own = tok(text, add_special_tokens=False)["input_ids"] if text else []
        for token in own:
            ids.append(token)
            learned.append(on)
    if not (response and ids[-1] == tok.eos_token_id):
        ids.append(tok.eos_token_id)
        learned.append(True)
    return ids, learned


@pytest.mark.parametrize("kind", KINDS)
def test_masks_equal_the_slow_reference(kind):
    tok = tokenizer(kind)
    rows = ROWS if tok.bos_token else [row for row in ROWS if row["prompt"]]  # nothing comes before a first token
    encoded = encode(records(rows, tok), tok, 64)
    assert encoded.cut == encoded.dropped == 0
    for row, example in zip(rows, encoded.examples, strict=True):
        ids, learned = reference(tok, row["prompt"], row["completion"])
        assert example.ids.tolist() == ids and example.learned.tolist() == learned, row
        assert example.targets == sum(learned[1:])
        said = tok.decode(example.ids[example.learned], skip_special_tokens=False)
        assert said.replace(" ", "") == (row["completion"] + tok.eos_token).replace(" ", "")
        start = example.learned.tolist().index(True)
        assert prompt_ids(tok, row["prompt"]) == ids[:start]  # what a generation begins with


def test_the_join_would_be_merged_if_it_were_one_text():
    tok = tokenizer("merging")
    apart, whole = (tok(text, add_special_tokens=False)["input_ids"] for text in ("### Response:", "### Response:ab"))
    assert whole[: len(apart)] != apart  # so that a mask by the prompt's length would be wrong
    (example,) = encode(records([{"prompt": "### Response:", "completion": "ab"}], tok), tok, 64).examples
    assert tok.decode(example.ids[example.learned]) == "ab</s>"


def test_padding_that_is_the_end_token_hides_nothing():
    tok = tokenizer("bare")
    assert tok.pad_token_id == tok.eos_token_id
    (example,) = encode(records([{"prompt": "ab", "completion": "ba"}], tok), tok, 64).examples
    assert example.learned[-1] and example.ids[-1] == tok.eos_token_id


def test_no_second_start_token():
    tok = tokenizer()
    (example,) = encode(records([{"prompt": "<s>ab", "completion": "b"}], tok), tok, 64).examples
    assert example.ids.tolist().count(tok.bos_token_id) == 1 and prompt_ids(tok, "<s>ab")[0] == tok.bos_token_id


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
@pytest.mark.parametrize("kind", ["bytes", "prefix"])
def test_conversations_learn_every_answer_and_its_end(kind, end):
    tok = tokenizer(kind)
    tok.chat_template = CHATML.replace("<|im_end|>", end)
    turns = [("system", "be kind"), ("user", "how many?"), ("assistant", "7 apples"), ("user", "sure?"),
             ("assistant", "yes"), ("user", "thanks")]  # fmt: skip
    row = {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text}
                             for role, text in turns]}  # fmt: skip
    (record,) = records([row], tok)
    learned = [segment.text for segment in record.segments if segment.learned]
    assert learned == [f"7 apples{end}", f"yes{end}"]
    whole = "".join(segment.text for segment in record.segments)
    assert whole == tok.apply_chat_template([{"role": r, "content": t} for r, t in turns[:-1]], tokenize=False).rstrip()
    assert record.prompt.endswith("assistant\n") and record.response == f"yes{end}"
    (example,) = encode([record], tok, 256).examples
    assert example.ids[-1] == tok.eos_token_id and example.ids[-2] != tok.eos_token_id
    assert not example.learned[0] and example.learned[-1]


def test_prompts_as_lists_of_messages_are_conversations():
    tok = tokenizer()
    tok.chat_template = CHATML
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    assert records([row], tok)[0].response == "b<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tok = tokenizer()
    tok.chat_template = "{% for m in messages %}{{ loop.revindex ~ m['content'] }}{% endfor %}"
    row = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]}
    with pytest.raises(InputError, match="earlier turns"):
        records([row], tok)


def test_train_on_prompt_and_plain_text():
    tok = tokenizer()
    (example,) = encode(records([{"prompt": "ab", "completion": "b"}], tok, train_on_prompt=True), tok, 64).examples
    assert example.targets == len(example) - 1  # all but the first
    (example,) = encode(records([{"text": "ab ba"}], tok), tok, 64).examples
    assert example.targets == len(example) - 1 and example.ids[-1] == tok.eos_token_id


def test_truncation_counts_and_drops():
    tok = tokenizer()
    rows = [{"prompt": "ab " * 20, "completion": "b"}, {"prompt": "a", "completion": "ab " * 20}]
    encoded = encode(records(rows, tok), tok, 10)
    assert (encoded.cut, encoded.dropped, len(encoded.examples)) == (2, 1, 1) and len(encoded.examples[0]) == 10
    parts = encode(records(rows, tok), tok, 10, "parts")
    assert (parts.cut, parts.dropped) == (2, 0) and len(parts.examples[0]) > 10
    with pytest.raises(InputError, match="max_length"):
        encode(records(rows[:1], tok), tok, 4)


def test_encoding_draws_from_no_global_state():
    tok, state = tokenizer(), torch.random.get_rng_state()
    encode(records(ROWS, tok), tok, 64)
    assert torch.equal(state, torch.random.get_rng_state())
