"""The model card: what the hub parses, what a reader copies, and what it claims."""

import ast
import re

import pytest
import yaml

from vislora.diffusion.card import Certificate, model_card

CERTIFICATE = Certificate("nb_lora", 1.0, 6.0, None, 5.98, "unet.mid_block.attentions.0.to_q", 0.9967)


def card(**changes) -> str:
    options = {
        "name": "run-0001",
        "base_model": "owner/model",
        "method": "nb_lora",
        "instance_prompt": "a photo of sks dog",
        "hyperparameters": {"rank": 16, "learning_rate": 1e-4},
        "certificate": CERTIFICATE,
        "grid": "samples/grid 1.png",
    }
    return model_card(**(options | changes))


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def code(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_front_matter():
    head = front(card(license="mit"))
    assert head["base_model"] == "owner/model"
    assert head["instance_prompt"] == "a photo of sks dog"
    assert head["license"] == "mit"
    assert {"text-to-image", "lora", "stable-diffusion", "vislora:nb_lora"} <= set(head["tags"])
    assert "widget" not in head


@pytest.mark.parametrize("base", ["/home/me/model", "./model", "name"])
def test_a_base_that_is_no_hub_id_stays_out_of_the_front_matter(base):
    text = card(base_model=base)
    assert "base_model" not in front(text) and base in text


def test_a_local_folder_of_two_names_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "assets" / "tiny-sd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front(card(base_model="assets/tiny-sd"))


@pytest.mark.parametrize("prompt", ['sks "dog"', "dog: 'x' # no", "a\n---\nlicense: other", "`dog` | cat", "犬"])
def test_any_prompt_survives(prompt):
    text = card(instance_prompt=prompt, name="a|b *c*")
    assert front(text)["instance_prompt"] == " ".join(prompt.split()) and "license" not in front(text)
    calls = [node for node in ast.walk(ast.parse(code(text)[0])) if isinstance(node, ast.Call)]
    assert prompt in [a.value for call in calls for a in call.args if isinstance(a, ast.Constant)]


def test_code_runs_as_python_and_names_the_folders():
    diffusers, vislora = code(card(example_prompt="sks dog on sand"))
    ast.parse(diffusers + vislora)
    assert "pipe.load_lora_weights('run-0001')" in diffusers and "pipe('sks dog on sand')" in diffusers
    assert "vislora.load(pipe, 'run-0001/adapter', weight=1.0)" in vislora


def test_grid_is_embedded_by_relative_path():
    assert "](samples/grid%201.png)" in card()
    assert "![" not in card(grid=None)


def test_hyperparameters_keep_their_order():
    assert card().index("| rank | 16 |") < card().index("| learning\\_rate | 0.0001 |")


def test_certificate():
    text = " ".join(card().split())
    for claim in (
        "Schatten 1-norm (nuclear norm), p = 1",
        "delta = 6 |",
        "5.98, in `unet.mid_block.attentions.0.to_q`",
        "99.67 %",
        "Scaling the adapter at inference scales the bound",
        "A bound on the weights is no bound on the output",
    ):
        assert claim in text
    ratio = card(certificate=Certificate("nb_lora", float("inf"), None, 0.1, 0.5, "x", 0.5))
    assert "spectral norm), p = inf" in ratio and "0.1 times the weight's own norm" in ratio
    assert "Schatten 1.5-norm, p = 1.5" in card(certificate=Certificate("nb_lora", 1.5, 1.0, None, 0.5, "x", 0.5))


def test_no_bound_is_said_so():
    text = card(certificate=None, method="lora")
    assert "has no bound" in text and "Scaling the adapter" not in text
