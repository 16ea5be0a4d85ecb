"""Every option of the language scripts reaches what it is about: a run is built and looked at before its first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from script_runs import lines, opened, state
from tiny_lm import folder, sums, tokenizer, write_rows

from vislora.errors import run_script
from vislora.io import read
from vislora.language import classification, evaluation, models, rows
from vislora.language.batches import IGNORED

PAIRS = [{"sentence1": f"{a} is", "sentence2": f"{a * 7 % 5} " * (1 + a % 3), "label": a % 2} for a in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", sums())
    (tmp_path / "pairs").mkdir()
    for split, part in (("train", PAIRS), ("validation", PAIRS[:8]), ("odd", PAIRS[:5])):
        write_rows(tmp_path / "pairs" / f"{split}.jsonl", part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(name):
    return opened(f"train_scripts/{name}.py")


SCRIPTS = {name: load(name) for name in ("causal_lm", "sequence_classification")}
USUAL = {
    "causal_lm": ("--dataset_name", "rows.jsonl", "--prompt_template", "qa", "--max_length", "128"),
    "sequence_classification": ("--train_file", "pairs", "--task_name", "rte", "--max_length", "64"),
}
both = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture
def run(model, place):
    """Run a script in this process; later flags stand for the usual ones before them."""

    def call(name: str, *flags: str) -> None:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        kept = torch.random.get_rng_state()
        usual = ("--model_name_or_path", str(model), *USUAL[name], "--per_device_train_batch_size", "2", "--report_to",
                 "none", "--logging_steps", "1", "--adapter", "lora", "--rank", "2", "--learning_rate",
                 "0.01")  # fmt: skip
        try:
            run_script(SCRIPTS[name].main, [*usual, *flags])
        finally:
            torch.random.set_rng_state(kept)

    return call


@pytest.fixture
def built(run, monkeypatch):
    """The Run of a script that was given these flags, before its first step."""

    def call(name: str, *flags: str):
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(SCRIPTS[name].Run, "go", lambda self: found.append(self))
            run(name, *flags)
        return found[0]

    return call


@both
def test_adam_takes_its_numbers(built, name):
    numbers = ("--adam_beta1", "0.5", "--adam_beta2", "0.7", "--adam_epsilon", "1e-5", "--weight_decay", "0.3")
    for group in built(name, *numbers).optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.7), 1e-5, 0.3)


@both
@pytest.mark.parametrize("flags, expected", [
    (("scaled_adamw", "--optimizer_damping", "0.25"), {"damping": 0.25}),
    (("lora_pro", "--lora_pro_moments", "factors"), {"moments": "factors", "damping": 1e-6}),
    (("alt_lora", "--no_alt_lora_plus", "--alt_lora_alternate"), {"plus": False, "alternate": True}),
])  # fmt: skip
def test_other_optimizers_take_theirs(built, name, flags, expected):
    optimizer = built(name, "--optimizer", *flags).optimizer.optimizer
    assert {key: getattr(optimizer, key) for key in expected} == expected


@both
@pytest.mark.parametrize("flags, rates", [
    (("--lr_scheduler_type", "linear", "--warmup_ratio", "0.3"), (0, 0.005, 0.01, 0.005)),  # rounded up to 2 steps
    (("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "3"), (0, 0.01 / 3, 0.02 / 3, 0.01)),
    (("--lr_scheduler", "constant",), (0.01,) * 4),
])  # fmt: skip
def test_schedules(built, name, flags, rates):
    schedule, found = built(name, "--max_train_steps", "4", *flags).scheduler, []
    for _ in range(4):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates)


@both
def test_epochs_are_counted_in_steps(built, name):
    assert built(name, "--num_train_epochs", "1.5", "--gradient_accumulation_steps", "2").total == 5  # of 18 rows
    assert built(name, "--max_steps", "7").total == 7


@both
def test_seeds_order_rows_and_draw_factors(built, name):
    runs = [built(name, "--seed", seed) for seed in ("0", "0", "1")]
    orders = [[run.plan.row(q) for q in range(12)] for run in runs]
    factors = [next(t for _, t in run.adapter.named_tensors() if t.any()).clone() for run in runs]
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(factors[0], factors[1]) and not torch.equal(factors[0], factors[2])


@both
def test_types_of_weights_and_attention(built, name):
    net = built(name, "--dtype", "bfloat16", "--attn_implementation", "eager", "--tf32")
    assert {p.dtype for p in net.adapter.parameters()} == {torch.float32} and torch.backends.cuda.matmul.allow_tf32
    assert net.inner.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert net.inner.config._attn_implementation == "eager"
    net = built(name, "--gradient_checkpointing")
    assert models.is_checkpointed(net.inner) and net.inner.config._attn_implementation == "sdpa"
    assert net.inner.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert not torch.backends.cuda.matmul.allow_tf32


@both
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_bases(built, name):
    bnb = pytest.importorskip("bitsandbytes")
    flags = ("--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--no_use_bnb_nested_quant", "--bnb_4bit_compute_dtype",
             "float32")  # fmt: skip
    layer = built(name, *flags).inner.model.layers[0].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit) and layer.compute_dtype == torch.float32
    assert layer.weight.quant_type == "fp4" and not layer.weight.compress_statistics
    layer = built(name, "--load_in_4bit").inner.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.bfloat16
    assert layer.weight.quant_type == "nf4" and layer.weight.compress_statistics
    assert isinstance(built(name, "--load_in_8bit").inner.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)


@both
def test_hub_words_and_the_tokenizer_reach_transformers(built, name, place, monkeypatch):
    tokenizer("prefix").save_pretrained(place / "words")
    autos = [models.AutoTokenizer, SCRIPTS[name].AutoModelForCausalLM if name == "causal_lm" else SCRIPTS[name].AUTO]
    seen = []
    for auto in autos:
        original = auto.from_pretrained

        def spy(source, *, original=original, **words):
            seen.append((Path(source).name, words.pop("revision"), words.pop("trust_remote_code")))
            return original(source, **words)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    net = built(name, "--tokenizer_name", "words", "--revision", "v2", "--trust_remote_code")
    assert [words[1:] for words in seen] == [("v2", True)] * 2 and seen[0][0] == "words" != seen[1][0]
    assert any("▁" in token for token in net.tokenizer.convert_ids_to_tokens(net.tokenizer("a b")["input_ids"]))


@both
def test_old_checkpoints_go_and_exports_are_squeezed(run, name):
    run(name, "--max_train_steps", "3", "--save_steps", "1", "--save_total_limit", "2", "--export_rank", "1",
        "--output_dir", "out")  # fmt: skip
    assert {p.name for p in Path("out/checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    tensors = read(Path("out/export/peft/adapter_model.safetensors"))[0]
    assert {min(t.shape) for key, t in tensors.items() if "lora_" in key} == {1}


def test_rows_of_a_language_model(built, place):
    assert len(built("causal_lm", "--dataset_split", "train[2:8]").data.examples) == 6
    (place / "held").mkdir()
    write_rows(place / "held" / "test.jsonl", sums(5))
    write_rows(place / "held" / "dev.jsonl", sums(9))
    net = built("causal_lm", "--max_train_samples", "5", "--eval_dataset_name", "held")
    assert (len(net.data.examples), len(net.data.held_out), len(net.evaluation.asked)) == (5, 5, 3)
    flags = ("--eval_dataset_name", "held", "--eval_dataset_split", "dev[1:]", "--max_eval_samples", "7")
    net = built("causal_lm", *flags, "--num_samples", "0")
    assert len(net.data.held_out) == 7 and net.evaluation.asked == []
    net = built("causal_lm", "--validation_split_percentage", "25")
    assert (len(net.data.examples), len(net.data.held_out)) == (9, 3)


def test_what_of_a_row_is_learned(built, place):
    plain, whole = (built("causal_lm", *more).data.examples for more in ((), ("--train_on_inputs",)))
    assert all(len(a) == len(b) and a.targets < b.targets == len(b) - 1 for a, b in zip(plain, whole, strict=True))
    parts, sequence = (built("causal_lm", "--max_length", "30", "--truncation", word).data.examples
                       for word in ("parts", "sequence"))  # fmt: skip
    assert max(map(len, sequence)) == 30 < max(map(len, parts))
    swapped = built("causal_lm", "--dataset_field", "output", "instruction").data.examples[1]
    said = tokenizer().decode(swapped.ids[swapped.learned], skip_special_tokens=True)
    assert said.strip() == sums()[1]["instruction"].strip()


def test_names_of_hub_data_reach_datasets(built, monkeypatch):
    asked = []

    def hub(source, split, config, flag):
        asked.append((source, split, config))
        return PAIRS if source in ("us/pairs", "nyu-mll/glue") else sums()

    monkeypatch.setattr(rows, "_read_hub", hub)
    built("causal_lm", "--dataset_name", "us/sums", "--dataset_config_name", "main", "--eval_dataset_name", "us/more")
    flags = ("--train_file", "us/pairs", "--train_split", "train[:6]", "--validation_split", "dev")
    assert len(built("sequence_classification", *flags).data.train) == 6
    assert asked == [("us/sums", "train", "main"), ("us/more", "test", "main"), ("us/pairs", "train", None),
                     ("us/pairs", "dev", None)]  # fmt: skip


@pytest.mark.parametrize("task, split", [("rte", "validation"), ("mnli", "validation_matched")])
def test_glue_s_own_splits(monkeypatch, task, split):
    asked = []
    monkeypatch.setattr(classification, "read_rows", lambda *words: asked.append(words[:3]))
    with pytest.raises(TypeError):  # no rows to slice
        classification._rows(classification.ClassificationOptions(task_name=task))
    assert asked == [("nyu-mll/glue", "train", task), ("nyu-mll/glue", split, task)]


def test_rows_of_a_classifier(built):
    net = built("sequence_classification", "--train_split", "train[2:9]", "--validation_split", "odd")
    assert (len(net.data.train), len(net.data.held)) == (7, 5)
    net = built("sequence_classification", "--max_train_samples", "4", "--max_eval_samples", "3")
    assert (len(net.data.train), len(net.data.held)) == (4, 3)
    net = built("sequence_classification", "--validation_split_percentage", "50", "--text_columns", "sentence2")
    assert (len(net.data.train), len(net.data.held)) == (6, 6)
    whole = built("sequence_classification").data.train
    assert all(len(one) < len(two) for one, two in zip(net.data.train, whole, strict=False))
    short = built("sequence_classification", "--max_length", "4").data
    assert max(map(len, short.train)) == 4 and short.cut > 0
    net = built("sequence_classification", "--head_learning_rate", "0.5", "--warmup_steps", "0")
    assert [(group["lr"], group["name"] == "head") for group in net.optimizer.param_groups] == [
        (0.01, False), (0.5, True)]  # fmt: skip


@both
def test_how_often_and_how_many_rows_are_evaluated(run, name, monkeypatch):
    sizes = []
    home = evaluation if name == "causal_lm" else SCRIPTS[name]
    original = home.collate

    def spy(batch, *more):
        sizes.append(len(batch))
        return original(batch, *more)

    flags = ("--validation_split_percentage", "50", "--num_samples", "0") if name == "causal_lm" else ()
    monkeypatch.setattr(home, "collate", spy)
    run(name, "--max_train_steps", "3", "--eval_steps", "2", "--per_device_eval_batch_size", "4", "--output_dir", "out",
        "--per_device_train_batch_size", "1", *flags)  # fmt: skip
    found = [line["step"] for line in lines("out") if any(key.startswith("eval_") for key in line)]
    held = {"causal_lm": [4, 2], "sequence_classification": [4, 4]}[name]
    assert found == ([0, 2, 3] if name == "causal_lm" else [2, 3])
    assert [size for size in sizes if size > 1] == held * len(found)


@both
def test_a_resumed_run_has_the_evaluations_of_its_last_step(run, name, monkeypatch):
    """A kill right after the checkpoint of a step that is evaluated too loses neither its line nor the best so far."""
    figures = iter((0.9, 0.2, 0.2, 0.2, 0.2, 0.2))
    flags = ("--max_train_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--output_dir", "out")
    if name == "causal_lm":
        flags += ("--validation_split_percentage", "25", "--num_samples", "0")
    else:
        monkeypatch.setitem(SCRIPTS[name].METRICS, "accuracy", lambda found, wanted: next(figures))
    original = SCRIPTS[name].Run.save

    def killed(self, step):
        original(self, step)
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(SCRIPTS[name].Run, "save", killed)
        run(name, *flags)
    run(name, *flags, "--resume_from_checkpoint", "latest")
    found = [line["step"] for line in lines("out") if any(key.startswith("eval_") for key in line)]
    assert found == ([0, 2, 4] if name == "causal_lm" else [2, 4])
    if name == "sequence_classification":
        metrics = json.loads(Path("out/metrics.json").read_text())
        assert (metrics["eval_accuracy"], metrics["best_eval_accuracy"]) == (0.2, 0.9)
    assert state("out", 4)


def test_answers_of_conversations_are_counted_without_the_mark_that_ends_them(run, place, monkeypatch):
    talk = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": word}]}
            for word in ("yes", "no", "The answer is: 12", "yes")]  # fmt: skip
    write_rows(place / "talk.jsonl", talk)
    turn = "{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    ask = "{% if add_generation_prompt %}assistant: {% endif %}"
    (place / "form.jinja").write_text("{% for m in messages %}" + turn + "{% endfor %}" + ask)
    said = []

    def reply(model, tok, prompts, **_):
        said.extend(prompts)
        return ["yes", "yes", "so. The answer is: 12"]

    monkeypatch.setattr(evaluation, "reply", reply)
    run("causal_lm", *("--dataset_name", "talk.jsonl", "--eval_dataset_name", "talk.jsonl"), "--chat_template",
        "form.jinja", "--eval_answers", "3", "--num_samples", "0", "--max_train_steps", "1", "--output_dir",
        "out")  # fmt: skip
    found = [line["eval_answers"] for line in lines("out") if "eval_answers" in line]
    assert found == [pytest.approx(2 / 3)] * 2 and said == ["user: hiassistant: "] * 6


def test_padding_and_other_examples_give_no_loss(built):
    net = built("causal_lm", "--packing", "--max_length", "100")
    packed = next(row for row in map(net.plan.row, range(9)) if len(row) > 1)
    batch = SCRIPTS["causal_lm"].collate([[net.data.examples[i] for i in packed]], net.tokenizer.pad_token_id,
                                         torch.float32, torch.device("cpu"), True)  # fmt: skip
    ends = torch.tensor([len(net.data.examples[i]) for i in packed]).cumsum(0) - 1
    assert (batch["labels"][0, ends] == IGNORED).all()
    assert (batch["labels"] != IGNORED).sum() == net.data.targets(packed)
