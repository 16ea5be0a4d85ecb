"""eval/language.py on a random Llama: tasks, tables, code in a cage; and the harness where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from script_runs import REPOSITORY, opened
from tiny_lm import folder, llama, rwkv, sums, tokenizer, write_rows

import vislora
from vislora.errors import EnvironmentFault, InputError, run_script
from vislora.language import harness, plus_check, tasks
from vislora.language.code_run import passes
from vislora.language.generate import log_likelihoods, reply

SCRIPT = REPOSITORY / "eval" / "language.py"


@pytest.fixture(scope="module")
def script():
    return opened("eval/language.py")


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


@pytest.mark.parametrize("net", [llama(400), rwkv(400)], ids=["llama", "rwkv"])
def test_replies_do_not_depend_on_the_batch(net):
    tok = tokenizer()
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
    assert passes("assert 1 + 1 == 2") and passes("from __future__ import annotations\nx: Never = 1")
    for bad in ("assert 1 + 1 == 3", "raise SystemExit(0)", "syntax error", "x = bytearray(4 * 2**30)", "exit()",
                f"open({str(tmp_path / 'big')!r}, 'wb').write(bytes(2**22))", "import os; os._exit(0)"):  # fmt: skip
        assert not passes(bad, seconds=5), bad
    assert not passes("while True: pass", seconds=1)
    assert not passes("input()") and passes("import os; assert set(os.environ) <= {'PATH', 'LC_CTYPE'}")
    assert passes("import os; assert os.listdir() == ['program.py'] and os.getsid(0) == os.getpid()")
    assert not passes("import numpy")  # nothing that is installed here
    limits = "import resource\nassert resource.getrlimit(resource.RLIMIT_{})[1] == {}"
    for name, value in (("CPU", 7), ("AS", 2**28), ("FSIZE", 2**20), ("CORE", 0), ("NOFILE", 32), ("NPROC", 0)):
        assert passes(limits.format(name, value), seconds=7, memory_mib=256), name


@pytest.mark.skipif(os.getuid() == 0, reason="the limit on processes does not bind root")
def test_programs_start_no_processes():
    assert not passes("import os; os.fork()")


def test_what_a_program_prints_fills_no_memory_and_what_it_started_does_not_stay(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert passes("import sys\nfor _ in range(300): sys.stdout.write('x' * 2**20)", seconds=20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB; it printed 300 MiB
    mark = tmp_path / "alive"
    passes(f"import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    open({str(mark)!r}, 'w')", seconds=5)
    time.sleep(1.5)
    assert not mark.exists()


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


def test_humaneval_is_asked_as_sorsa_asks_it():
    row = {"prompt": "def f(x):\n    pass", "entry_point": "f", "test": ""}
    said = tasks.template("codefeedback").fill(tasks.TASKS["humaneval"].ask(row))
    start = "@@ Instruction\nHere is the given code to do completion:\n'''python\n"
    assert said.startswith(f"{start}def f(x):\n    pass\n'''\n")
    assert "You are not allowed to modify the given code and do the completion only." in said
    assert said.endswith("in the following format:\n'''python\n# Your codes here\n'''\n\n@@ Response\n")


def plus(entry: str, body: str, base: list, more: list, number: str = "HumanEval/0", atol: float = 0) -> dict:
    """A row as evalplus writes it: a function of x, its inputs as lists of arguments."""
    prompt, solution = f"def {entry}(x):\n    \"\"\"Say it.\"\"\"\n", f"    return {body}\n"
    return {"task_id": number, "prompt": prompt, "entry_point": entry, "contract": "", "canonical_solution": solution,
            "base_input": base, "plus_input": more, "atol": atol}  # fmt: skip


def test_base_and_plus_are_told_apart(monkeypatch):
    row = plus("twice", "[2 * v for v in x]", [[[1]], [[]]], [[[-3, 4]], [[2**70]]])
    answers = {"right": "    return [v + v for v in x]", "base": "    return [2 * abs(v) for v in x]",
               "wrong": "    return x", "late": "    while True: pass", "broken": "    return ("}  # fmt: skip
    monkeypatch.setattr(tasks, "reply", lambda model, tok, prompts, **_: [answers[p.split()[-1]] for p in prompts])
    rows, tok = [row | {"input": word} for word in answers], lambda text, **_: {"input_ids": [0]}
    scored = tasks.run(tasks.TASKS["humaneval_plus"], rows, None, tok, prompt_template="plain")
    assert scored.right == [True, True, False, False, False]
    assert scored.percent == 40 and scored.further == {"plus": 20}


@pytest.mark.parametrize("number, entry, body, found, calls, atol, good", [
    ("HumanEval/1", "f", "x / 3", "x * (1 / 3)", [[0.7], [5.0]], 0, True),  # floats are close to 1e-6
    ("HumanEval/1", "f", "x / 3", "x / 3 + 1e-5", [[0.7]], 0, False),
    ("HumanEval/1", "f", "[x / 3, 1.0]", "[x / 3 + 1e-5, 1.0]", [[0.7]], 1e-4, True),
    ("HumanEval/1", "f", "[x, 1.0]", "(x, 1.0)", [[0.7]], 1e-4, False),  # another type
    ("HumanEval/1", "f", "x", "float(x)", [[2]], 0, True),
    ("HumanEval/32", "find_zero", "2.0", "-2.0", [[[-4, 0, 1]]], 1e-4, True),  # any root
    ("HumanEval/32", "find_zero", "2.0", "1.9", [[[-4, 0, 1]]], 1e-4, False),
    ("HumanEval/2", "f", "sorted(x)", "x.sort() or x", [[[3, 1]]], 0, True),  # it may change what it is given
    ("Mbpp/2", "similar_elements", "x", "list(x[::-1])", [[[1, 2]]], 0, True),
    ("Mbpp/2", "similar_elements", "isinstance(x, tuple) and x", "x", [[[1, 2]]], 0, True),  # a tuple is meant
    ("Mbpp/794", "text_starta_endb", "object()", "True", [["ab"]], 0, True),
    ("Mbpp/794", "text_starta_endb", "None", "True", [["ab"]], 0, False),
    ("Mbpp/164", "are_equivalent", "1", "2", [[36]], 0, True),
    ("Mbpp/295", "sum_div", "x", "0", [[8]], 0, True),
    ("Mbpp/295", "sum_div", "x", "1", [[8]], 0, False),
])  # fmt: skip
def test_what_counts_as_equal_is_evalplus(number, entry, body, found, calls, atol, good):
    row = plus(entry, body, calls, [], number, atol)
    assert passes(tasks.plus_program(f"def {entry}(x):\n    return {found}", row, "base_input"), 10, 4096) == good


def test_pyramids_and_distances_have_two_readings():
    area, distance = ("Mbpp/581", "surface_Area", (3, 4)), ("Mbpp/558", "digit_distance_nums", (1, 20))
    assert [plus_check.right(*area, found, 33, 0) for found in (33, 34, 35)] == [True, False, True]
    assert [plus_check.right(*distance, found, 9, 0) for found in (9, 3, 4)] == [True, True, False]


@pytest.mark.parametrize("number, call, meant", [
    (2, [[1], [2]], [(1,), (2,)]), (63, [[[1, 2]]], [[(1, 2)]]), (75, [[[1, 2]], 3], [[(1, 2)], 3]),
    (106, [[1], [2]], [[1], (2,)]), (115, [[[1], []]], [[{1}, {}]]), (124, ["1", "2+1j"], [1.0, 2 + 1j]),
    (250, [[1], 2], [(1,), 2]), (307, [[1], 2, 3], [(1,), 2, 3]), (252, ["1j"], [1j]),
    (259, [[[1]], [[2]]], [((1,),), ((2,),)]),
    (278, [[1, [2]]], [(1, (2,))]), (580, [[1, [2, [3]]]], [(1, (2, (3,)))]), (722, [{"a": [1]}, 2], [{"a": (1,)}, 2]),
    (3, [[1]], [[1]]),
])  # fmt: skip
def test_tuples_sets_and_complex_numbers_come_back_from_json(number, call, meant):
    assert plus_check.arguments(f"Mbpp/{number}", call) == meant
    assert plus_check.arguments(f"HumanEval/{number}", call) == call


def test_calls_are_made_in_a_second_each(tmp_path):
    row = plus("f", "x", [[0], [1]], [])
    slow = "import time\ndef f(x):\n    time.sleep({})\n    return x"
    assert passes(tasks.plus_program(slow.format("0.7"), row, "base_input"), 10, 4096)
    assert not passes(tasks.plus_program(slow.format("1.3 * x"), row, "base_input"), 10, 4096)


def test_the_table_and_the_file_have_a_figure_for_each_set_of_tests(script, out, tmp_path, capsys):
    file = write_rows(tmp_path / "Plus.jsonl", [plus("f", "x", [[1]], [[2]])])
    run_script(script.main, ["--run", str(out), "--tasks", f"humaneval_plus={file}", "--allow_code", "--max_new_tokens",
                             "2", "--no_base"])  # fmt: skip
    said = capsys.readouterr().out
    own = json.loads((out / "language.json").read_text())["adapted"]["tasks"]["humaneval_plus Plus"]
    assert own["percent"] == own["plus"] == 0 and "humaneval_plus Plus, plus" in said
    write_rows(tmp_path / "Plus.jsonl", [{"prompt": "a"}])
    with pytest.raises(SystemExit):
        run_script(script.main, ["--run", str(out), "--tasks", f"humaneval_plus={file}", "--allow_code"])
    assert "has no task_id, entry_point, canonical_solution, base_input" in capsys.readouterr().err


def test_the_tokenizer_is_the_run_s(script, out, tmp_path):
    (tmp_path / "words").mkdir()
    tokenizer("prefix").save_pretrained(tmp_path / "words")
    (out / "config.yaml").write_text((out / "config.yaml").read_text() + f"tokenizer_name: {tmp_path / 'words'}\n")
    named = [script.base_of(script.Options(run=str(out), **more))[2] for more in (
        {}, {"tokenizer_name": "x"}, {"model_name_or_path": str(tmp_path / "model")})]  # fmt: skip
    assert named == [str(tmp_path / "words"), "x", str(tmp_path / "model")]


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
