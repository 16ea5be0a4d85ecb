"""eval/language.py on a random Llama: tasks, tables, code in a cage; and the harness where it is installed."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from script_runs import REPOSITORY
from tiny_lm import folder, llama, sums, tokenizer, write_rows

import vislora
from vislora.errors import EnvironmentFault, InputError, run_script
from vislora.language import harness, tasks
from vislora.language.code_run import passes
from vislora.language.generate import log_likelihoods, reply

SCRIPT = REPOSITORY / "eval" / "language.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("language_eval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["language_eval"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def out(tmp_path):
    """A run's folder: the configuration and an adapter that changes what is said."""
    model = folder(tmp_path / "model")
    net = llama(len(tokenizer()))
    adapter = vislora.attach(net, "lora", rank=2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    adapter.save(tmp_path / "out/adapter")
    (tmp_path / "out/config.yaml").write_text(f"model_name_or_path: {model}\nadapter: lora\n")
    return tmp_path / "out"


def test_before_and_after_are_measured_and_written(script, out, tmp_path, capsys):
    file = write_rows(tmp_path / "sums.jsonl", sums(5))
    picks = [{"instruction": "a", "output": "b", "choices": ["b", "c b"]}, {"instruction": "b", "output": "c",
             "choices": ["b", "c"]}]  # fmt: skip
    more = write_rows(tmp_path / "picks.jsonl", picks)
    run_script(script.main, ["--run", str(out), "--tasks", f"answers={file}", f"choices={more}", "--limit", "4",
                             "--max_new_tokens", "5"])  # fmt: skip
    said = capsys.readouterr().out
    found = json.loads((out / "language.json").read_text())
    assert "answers sums" in said and "change" in said and "choices picks" in said
    for side in ("base", "adapted"):
        own = found[side]["tasks"]["answers sums"]
        assert own["rows"] == 4 == len(own["replies"]) and 0 <= own["percent"] <= 100
    both = [[r["reply"] for r in found[side]["tasks"]["answers sums"]["replies"]] for side in ("base", "adapted")]
    assert both[0] != both[1]
    prompts = [f"Question: {row['instruction']}\nAnswer:\n" for row in sums(5)[:4]]
    before = reply(llama(len(tokenizer())), tokenizer(), prompts, max_new_tokens=5)
    assert both[0] == before


def test_replies_do_not_depend_on_the_batch():
    net, tok = llama(len(tokenizer())), tokenizer()
    prompts = ["How many?", "Answer: 12", "a", "### Response: the answer is"]
    together = reply(net, tok, prompts, max_new_tokens=6, batch_size=4)
    assert together == [reply(net, tok, [p], max_new_tokens=6)[0] for p in prompts] and any(together)
    last = together[0][-1]
    assert reply(net, tok, prompts, max_new_tokens=6, stop=[last])[0] == together[0].split(last)[0]


def test_likelihoods_are_those_of_one_text_at_a_time():
    net, tok = llama(len(tokenizer())), tokenizer()
    pairs = [("How many?", " 12"), ("a", "bb ab apples"), ("Answer", ":")]
    found = log_likelihoods(net, tok, pairs, batch_size=3)
    for (prompt, more), value in zip(pairs, found, strict=True):
        ids = tok(prompt)["input_ids"] + tok(more, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores = net(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(tok(prompt)["input_ids"])
        assert abs(value - sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))) < 1e-4


def test_programs_run_in_a_cage(tmp_path):
    assert passes("assert 1 + 1 == 2")
    for bad in ("assert 1 + 1 == 3", "raise SystemExit(0)", "syntax error", "x = bytearray(4 * 2**30)",
                f"open({str(tmp_path / 'big')!r}, 'wb').write(bytes(2**22))", "import os; os._exit(0)"):  # fmt: skip
        assert not passes(bad, seconds=5), bad
    assert not passes("while True: pass", seconds=1)
    assert not passes("input()") and passes("import os; assert set(os.environ) <= {'PATH', 'LC_CTYPE'}")


def test_humaneval_and_mbpp_take_whole_functions_and_bodies():
    row = {"prompt": "from typing import List\n\ndef add(a: int, b: List[int]) -> int:\n    \"\"\"Sum.\"\"\"\n",
           "entry_point": "add", "test": "def check(f):\n    assert f(1, [2]) == 3\n"}  # fmt: skip
    whole = "Sure.\n```python\ndef add(a: int, b: List[int]) -> int:\n    return a + sum(b)\n```"
    assert tasks.TASKS["humaneval"].right(whole, row) and tasks.TASKS["humaneval"].right("    return a + sum(b)", row)
    assert not tasks.TASKS["humaneval"].right(whole.replace("+", "-"), row)
    problem = {"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": "import math"}
    assert tasks.TASKS["mbpp"].right("```\ndef add(a, b): return a + b\n```", problem)
    assert not tasks.TASKS["mbpp"].right("def add(a, b): return a", problem)
    assert "assert add(1, 2)" in tasks.TASKS["mbpp"].ask(problem)


def test_bad_tasks_are_refused_before_a_model_is_loaded(script, out, tmp_path, capsys):
    write_rows(tmp_path / "x.jsonl", [{"left": 1}])
    for flags, words in (
        (("--tasks", "gsm9k"), ("gsm9k", "gsm8k")), (("--tasks", "humaneval"), ("--allow_code",)),
        (("--tasks", "answers"), ("answers=FILE",)), (("--tasks", "boolq=gone.jsonl"), ("gone.jsonl",)),
        (("--tasks", f"answers={tmp_path / 'x.jsonl'}"), ("left",)),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            run_script(script.main, ["--run", str(out), *flags])
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and all(word in line for word in words), line
    with pytest.raises(InputError, match="choices"):
        tasks.run(tasks.TASKS["choices"], [{"instruction": "a", "output": "b"}], llama(len(tokenizer())), tokenizer())


def test_the_harness_leaves_chance_alone_or_says_that_it_is_missing():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with harness.same_chance():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(EnvironmentFault, match="harness"):
            harness.run(llama(len(tokenizer())), tokenizer(), ["arc_easy"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness")
def test_a_stock_task_on_local_rows_scores_as_likelihoods_do_and_leaves_chance_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    net, tok = llama(len(tokenizer())).train(), tokenizer()
    asked = [("How many?", ["12 apples", "7", "ab"], 1), ("ab ba", ["aab", "bba"], 0), ("Tom", ["has", "x", "12"], 2)]
    rows = [{"id": str(i), "question": question, "answerKey": "ABC"[right],
             "choices": {"text": words, "label": list("ABC")[: len(words)]}}
            for i, (question, words, right) in enumerate(asked)]  # fmt: skip
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    stock = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks/arc/arc_easy.yaml"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local_arc.yaml").write_text(
        f"include: {stock}\ntask: local_arc\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{train: {file}, validation: {file}, test: {file}}}}}\n"
    )
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = harness.run(net, tok, ["local_arc"], batch_size=2, include_path=str(tmp_path / "tasks"))
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2]) and net.training
    net.eval()
    rights = []
    for question, words, right in asked:
        pairs = [(f"Question: {question}\nAnswer:", f" {word}") for word in words]
        scores = log_likelihoods(net, tok, pairs, batch_size=3)
        rights.append(scores.index(max(scores)) == right)
    assert abs(found["local_arc"]["acc,none"] - sum(rights) / len(rights)) < 1e-9
    with pytest.raises(InputError, match="no such task"):
        harness.run(net, tok, ["no_task_of_this_name"], include_path=str(tmp_path / "tasks"))
