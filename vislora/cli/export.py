"""vislora export: an adapter in another layout, key by key, read back before it counts as written."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..export import CERTIFICATE
from ..formats import Base, Layer, LoraFile, read, save, written
from ..formats.into_model import folded_dora
from ..formats.lora import TEXT_ENCODERS
from ..formats.shrink import squeezed
from ..formats.spectrum import certificate, spectrum
from ._base import add_base, open_base
from ._out import add_out, add_rank, check_rank
from ._table import say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="an adapter: ours, diffusers', kohya's, or PEFT's folder")
    parser.add_argument("--format", choices=("diffusers", "kohya", "peft"), required=True, help="the layout to write")
    add_base(parser, "for kohya's names of other models than released ones, and to fold DoRA")
    add_rank(parser)
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    """Write it. Raises InputError for what the other layout cannot hold."""
    check_rank(args.rank)
    base = open_base(args.base)
    file = read(args.file, base)
    layers, header, worst = file.layers, {**_certified(file), **file.header}, 0.0
    if args.rank:
        slim = [_slim(layer, args, base) for layer in file.layers]
        layers, worst = [layer for layer, _ in slim], max(lost for _, lost in slim)
        if worst:
            header.pop(CERTIFICATE, None)  # it is of the whole
    files = written(layers, args.format, header, args.output)
    target, off = save(files, layers, base)
    say(f"{len(layers)} layers from {file.format} to {args.format}, scales folded into lora_B, alpha = rank")
    if args.rank:
        say(f"rank {args.rank}: at most {worst:.1%} of a layer's Frobenius norm lost")
    say(f"wrote {target}, read back to {off:.0e}")


def _slim(layer: Layer, args: argparse.Namespace, base: Base | None) -> tuple[Layer, float]:
    """The layer at no more than the rank, and the share of its Frobenius norm that is lost.

    DoRA becomes a plain product, the whole change of the base's weight, where the layout has no place for magnitudes.
    """
    keeps = args.format == "peft" or (args.format == "diffusers" and layer.component not in TEXT_ENCODERS)
    if layer.magnitude is not None and not keeps:
        if base is None:
            wrong = f"{layer.name} is DoRA, whose change of a weight is known beside the weight alone"
            raise InputError(str(args.file), wrong, "give the model as --base")
        layer = folded_dora(layer, base.weight(layer.component, layer.path))
    whole = spectrum(layer).frobenius
    slim, lost = squeezed(layer, args.rank)
    return slim, lost / whole if whole else 0.0


def _certified(file: LoraFile) -> dict[str, str]:
    """The certificate of a method that keeps a bound by construction, measured now."""
    if not file.bounds:
        return {}
    ((p, _), *_) = file.bounds.values()
    spectra = {layer.name: spectrum(layer) for layer in file.layers}
    bounds = {name: delta for name, (_, delta) in file.bounds.items()}
    return {CERTIFICATE: certificate(spectra, p, bounds, {"method": file.about, "options": {}}, file.header)}
