"""vislora export: an adapter in another layout, key by key, read back before it counts as written."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..export import CERTIFICATE
from ..formats import Base, LoraFile, read, save, written
from ..formats.spectrum import certificate, spectrum
from ._out import add_out
from ._table import say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="an adapter: ours, diffusers', kohya's, or PEFT's folder")
    parser.add_argument("--format", choices=("diffusers", "kohya", "peft"), required=True, help="the layout to write")
    parser.add_argument("--base", type=Path, metavar="MODEL",
                        help="the base model's folder, where kohya's names are of no SD 1.x, 2.x or XL")  # fmt: skip
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    """Write it. Raises InputError for what the other layout cannot hold."""
    base = Base(args.base) if args.base else None
    file = read(args.file, base)
    files = written(file.layers, args.format, {**_certified(file), **file.header}, args.output)
    target, off = save(files, file.layers, base)
    say(f"{len(file.layers)} layers from {file.format} to {args.format}, scales folded into lora_B, alpha = rank")
    say(f"wrote {target}, read back to {off:.0e}")


def _certified(file: LoraFile) -> dict[str, str]:
    """The certificate of a method that keeps a bound by construction, measured now."""
    if not file.bounds:
        return {}
    ((p, _), *_) = file.bounds.values()
    spectra = {layer.name: spectrum(layer) for layer in file.layers}
    bounds = {name: delta for name, (_, delta) in file.bounds.items()}
    return {CERTIFICATE: certificate(spectra, p, bounds, {"method": file.about, "options": {}}, file.header)}
