"""A schema read from flags and from YAML gives the same, checked values; everything else is one line that helps."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml

from vislora.config import METHOD_ALIASES, option, parse, read_yaml, to_dict, to_yaml
from vislora.errors import InputError
from vislora.options import options


@dataclass(frozen=True)
class Script:
    instance_prompt: str  # what the photos show
    adapter: str = "lora"
    learning_rate: float = option(1e-4, "of the adapter", group="optimization", aliases=("lr",))
    max_train_steps: int | None = None
    center_crop: bool = True
    random_flip: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    targets: tuple[str, ...] | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    resolution: int | Literal["model"] = "model"
    scheduler: str = option("constant", choices=("constant", "cosine"))
    data: Path | None = None
    tf32: bool | None = None

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate {self.learning_rate} is not positive")


@dataclass(frozen=True)
class Lora:
    roles: ClassVar[dict] = {}
    rank: int = 16
    alpha: float | None = None  # None: equal to rank
    dropout: float = 0.0


@dataclass(frozen=True)
class NBLora:
    rank: int = 16
    p: float = 1.0  # which Schatten norm
    delta: float | None = None
    bounded: bool = True

    def check(self):
        if self.rank < 1:
            raise InputError("rank", f"{self.rank} is below 1", "take 1 or more")


@dataclass(frozen=True)
class Bare:
    """A word without options."""


METHODS = {"lora": Lora, "nb_lora": NBLora, "full": Bare, "none": Bare}


def read(line="", prompt=True):
    """`parse` of a command line as a shell would split it."""
    argv = (["--instance_prompt", "a dog"] if prompt else []) + shlex.split(line)
    about = {"prog": "dreambooth.py", "description": "Learn a subject."}
    return parse(Script, argv, **about, methods=METHODS)


def from_yaml(tmp_path, text, line=""):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return read(f"--config {file} {line}", prompt="instance_prompt" not in text)


def test_defaults_and_every_kind_of_flag():
    script, method = read()
    assert script == Script("a dog") and method == Lora()
    script, method = read(
        "--learning_rate 5e-5 --max_train_steps=7 --no_center_crop --random_flip --mixed_precision bf16 --targets to_q "
        "to_v --betas 0.5 --targets to_k --resolution 64 --data /x/y --scheduler cosine --adapter nb_lora --p inf "
        "--delta 6 --bounded false"
    )
    assert script == Script(
        "a dog", "nb_lora", 5e-5, 7, False, True, "bf16", ("to_q", "to_v", "to_k"), [0.5], 64, "cosine", Path("/x/y")
    )
    assert method == NBLora(p=float("inf"), delta=6.0, bounded=False)
    assert type(method.delta) is float and type(script.resolution) is int


@pytest.mark.parametrize(
    "line, values",
    [
        ("--random_flip", {"random_flip": True}),
        ("--random_flip true", {"random_flip": True}),
        ("--random_flip=no", {"random_flip": False}),
        ("--no_random_flip", {"random_flip": False}),
        ("--random-flip --lr 2", {"random_flip": True, "learning_rate": 2.0}),
        ("--max_train_steps none", {"max_train_steps": None}),
        ("--tf32 false", {"tf32": False}),
        ("--resolution model", {"resolution": "model"}),
        ("--lr 1 --learning_rate 3", {"learning_rate": 3.0}),
        ("--data -1", {"data": Path("-1")}),
        ("--debug", {}),
    ],
)
def test_spellings(line, values):
    assert read(line)[0] == Script("a dog", **values)


def test_aliases_of_method_options():
    assert read("--network_dim 8 --lora_alpha 4 --lora_dropout 0.1")[1] == Lora(8, 4.0, 0.1)
    assert read("--adapter nb_lora --lora_r 8")[1] == NBLora(rank=8)
    assert METHOD_ALIASES["rank"] == ("network_dim", "lora_r", "lora_rank")


@pytest.mark.parametrize(
    "line, words",
    [
        pytest.param(
            "--learning_rat 1", "--learning_rat: unknown flag .did you mean --learning_rate",
            marks=pytest.mark.case("C05"),
        ),
        ("--adapter nb_lora --alpha 4", "--alpha: nb_lora has no such option -> it has --rank --p --delta --bounded"),
        ("--adapter nb_lora --lora_alpha 4", "--lora_alpha: nb_lora has no such option"),
        ("--p 2", "--p: lora has no such option -> it has --rank --alpha --dropout"),
        ("--no_bounded", "--no_bounded: lora has no such option"),
        ("--adapter full --rank 4", "--rank: full has no such option -> it has no options"),
        (
            "--adapter nblora",
            "--adapter: 'nblora' is no method .did you mean nb_lora.* one of lora, nb_lora, full, none",
        ),
        ("--max_train_steps 1e3", "--max_train_steps: got '1e3' -> it takes a whole number or none"),
        ("--learning_rate fast", "--learning_rate: got 'fast' -> it takes a number"),
        ("--mixed_precision bf61", "got 'bf61' .did you mean bf16.* -> it takes one of no, fp16, bf16"),
        ("--scheduler linear", "it takes one of constant, cosine"),
        ("--random_flip maybe", "--random_flip: got 'maybe' -> it takes true or false"),
        ("--no_random_flip true", "--no_random_flip: unknown flag"),
        ("--no_learning_rate", "--no_learning_rate: unknown flag"),
        ("--max_train_steps", "--max_train_steps: got 0 values"),
        ("--instance_prompt a dog", "got 2 values -> it takes text, in quotes if it has spaces"),
        ("--targets", "--targets: got 0 values -> it takes a list of: text"),
        pytest.param("--learning_rate -1", "learning_rate -1.0 is not positive", marks=pytest.mark.case("C04")),
        pytest.param("--learning_rate nan", "learning_rate nan is not positive", marks=pytest.mark.case("C04")),
        ("--adapter nb_lora --rank 0", "rank: 0 is below 1"),
        ("--max_train_steps " + "9" * 5000, "99' -> it takes a whole number|9 -> it takes a whole"),
    ],
)
def test_wrong_flags_are_one_line_that_helps(line, words):
    with pytest.raises(InputError, match=words) as caught:
        read(line)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_missing_and_stray():
    with pytest.raises(InputError, match="--instance_prompt: is required"):
        read(prompt=False)
    with pytest.raises(InputError, match="dog: stands before any flag"):
        read("dog", prompt=False)


def test_yaml_gives_what_flags_give_and_flags_win(tmp_path):
    text = """
instance_prompt: "a dog"
lr: 1e-4
max_train_steps: 7
center_crop: no
random_flip: true
mixed_precision: no
targets: [to_q, to_v]
betas: 0.5
resolution: 64
adapter: nb_lora
p: inf
adapter_options:
  delta: 6
  network_dim: 8
"""
    script, method = from_yaml(tmp_path, text)
    assert script == Script("a dog", "nb_lora", 1e-4, 7, False, True, "no", ("to_q", "to_v"), [0.5], 64)
    assert method == NBLora(8, float("inf"), 6.0)
    script, method = from_yaml(tmp_path, text, "--learning_rate 2 --targets x --center_crop --delta none")
    assert (script.learning_rate, script.targets, script.center_crop, method.delta) == (2.0, ("x",), True, None)


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", "0.0001", "'1e-4'", "1"])
def test_yaml_numbers_of_every_form(tmp_path, number):
    script, _ = from_yaml(tmp_path, f"learning_rate: {number}")
    assert script.learning_rate == float(number.strip("'")) and type(script.learning_rate) is float


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1", "c.yaml: learning_rat: unknown key .did you mean learning_rate"),
        ("adapter: nb_lora\nalpha: 4", "c.yaml: alpha: nb_lora has no such option -> it has rank p delta bounded"),
        ("adapter: nb_lora\nadapter_options: {alpha: 4}", "c.yaml: alpha: nb_lora has no such option"),
        ("max_train_steps: '7'", "c.yaml: max_train_steps: got '7' -> it takes a whole number or none"),
        ("max_train_steps: 7.5", "got 7.5"),
        ("max_train_steps: true\nlearning_rate: 1", "max_train_steps: got True"),
        ("learning_rate: [1]", "learning_rate: got a list"),
        ("center_crop: 1", "center_crop: got 1 -> it takes true or false"),
        ("instance_prompt: 3", "instance_prompt: got 3 -> it takes text, in quotes"),
        ("instance_prompt: 2024-01-01", "instance_prompt: got a date"),
        ("center_crop: null", "got a NoneType"),
        ("targets: [a, [b]]", "targets: got a list"),
        ("learning_rate: 1\nlearning_rate: 2", "c.yaml:2: is not plain YAML .learning_rate is given twice"),
        ("learning_rate: 1\nlr: 2", "lr: is given twice, also as learning_rate"),
        ("rank: 1\nadapter_options: {rank: 2}", "rank: is given twice, also under adapter_options"),
        ("adapter_options: [rank]", "adapter_options: is not a mapping"),
        ("3: a", "is not a mapping of names"),
        ("learning_rate: [", "c.yaml:1: is not plain YAML"),
        ("a: " + "[" * 400, "is not plain YAML"),
        ("a: 2024-13-45", "is not plain YAML"),
        ("a: &a [x,x,x,x,x]\nlearning_rate: [*a,*a,*a,*a]", "learning_rate: got a list"),
        ("debug: true", "debug: unknown key"),
    ],
)
def test_wrong_yaml_is_one_line_that_helps(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as caught:
        from_yaml(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.case("C14")
@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/name:os.system ''", "!custom 1"])
def test_yaml_tags_are_refused_and_run_nothing(tmp_path, tag):
    made = tmp_path / "made"
    with pytest.raises(InputError, match="c.yaml:1: is not plain YAML .could not determine a constructor"):
        from_yaml(tmp_path, "learning_rate: " + tag.format(made))
    assert not made.exists()


def test_config_file_missing_twice_or_empty(tmp_path):
    with pytest.raises(InputError, match="--config .*none.yaml: cannot be read .No such file"):
        read(f"--config {tmp_path}/none.yaml")
    with pytest.raises(InputError, match="--config: got .'a', 'b'. -> it takes one YAML file, once"):
        read("--config a --config b")
    (tmp_path / "utf16.yaml").write_text("lr: 1", encoding="utf-16")
    with pytest.raises(InputError, match="is not plain YAML"):
        read(f"--config {tmp_path}/utf16.yaml")
    (tmp_path / "empty.yaml").write_text("\ufeff# nothing\n", encoding="utf-8")
    assert read(f"--config {tmp_path}/empty.yaml")[0] == Script("a dog")


def test_the_resolved_config_runs_again(tmp_path):
    line = """--instance_prompt "no: #1 'é' \n" --learning_rate 1e-7 --adapter nb_lora --p inf --delta 0.1"""
    script, method = read(line + " --targets yes 1e5 --data x --tf32 false", prompt=False)
    text = to_yaml(script, method)
    assert from_yaml(tmp_path, text) == (script, method)
    assert yaml.safe_load(text) == to_dict(script, method)  # plain for any other reader too
    full = read("--adapter full")
    assert full[1] == Bare() and from_yaml(tmp_path, to_yaml(*full)) == full
    assert read_yaml(tmp_path / "c.yaml")["adapter"] == "full"


def test_a_file_for_one_method_does_not_pass_for_another(tmp_path):
    text = to_yaml(*read("--alpha 8"))
    with pytest.raises(InputError, match="c.yaml: alpha: nb_lora has no such option"):
        from_yaml(tmp_path, text, "--adapter nb_lora")


def test_help_shows_groups_defaults_comments_and_every_method(capsys):
    with pytest.raises(SystemExit) as done:
        read("-h --no_such_flag")
    shown = capsys.readouterr().out
    assert done.value.code == 0 and shown.startswith("usage: dreambooth.py") and "Learn a subject." in shown
    for words in (
        "optimization:\n  --learning_rate\n      of the adapter (a number; default: 0.0001; also --lr)",
        "  --instance_prompt\n      what the photos show (text; required)",
        "--adapter lora:",
        "--adapter nb_lora:",
        "  --p\n      which Schatten norm (a number; default: 1.0)",
        "  --alpha\n      None: equal to rank (a number or none; default: None; also --lora_alpha --network_alpha)",
        "(a list of: a number; default: [0.9, 0.999])",
    ):
        assert words in shown


def test_one_name_for_two_things_is_a_programming_error():
    @dataclass(frozen=True)
    class Clash:
        learning_rate: float = 1.0

    @dataclass(frozen=True)
    class Alias:
        other: int = option(1, aliases=("lr",))

    @dataclass(frozen=True)
    class Twice:
        adapter: str = "a"
        b: int = option(1, aliases=("adapter",))

    for methods in ({"lora": Clash}, {"lora": Alias}):
        with pytest.raises(AssertionError, match="share the flags"):
            parse(Script, [], prog="x", methods=methods)
    with pytest.raises(AssertionError, match="a flag twice"):
        parse(Twice, [], prog="x")


def test_a_type_without_a_flag_is_a_programming_error():
    @dataclass(frozen=True)
    class Odd:
        table: dict[str, int] = field(default_factory=dict)

    with pytest.raises(TypeError, match="Odd.table: no flag for"):
        options(Odd)
