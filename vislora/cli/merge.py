"""vislora merge: several adapters, weighted, as one; factors are put side by side, so nothing is lost."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import InputError
from ..export import CERTIFICATE
from ..formats import FORMATS, Base, Layer, LoraFile, read, save, written
from ..formats.shrink import squeezed
from ..formats.spectrum import certificate, spectrum, stated_bounds
from ._out import add_out, add_rank, check_rank, require_plain
from ._table import number, say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", help="adapters of one base, in any layouts")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each adapter (default: all 1)")
    parser.add_argument("--format", choices=tuple(FORMATS), help="the layout to write (default: the first adapter's)")
    parser.add_argument("--p", type=float, help="the norm that is bounded (default: the adapters' own, or 2)")
    parser.add_argument("--base", type=Path, metavar="MODEL", help="the base model's folder, for kohya's odd names")
    add_rank(parser)
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    """Write the sum, and state the bound that it keeps: that of a sum is at most the sum of weighted bounds."""
    weights = args.weights or [1.0] * len(args.files)
    if len(args.files) < 2:
        raise InputError("vislora merge", "got one adapter", "give two or more")
    if len(weights) != len(args.files) or not all(map(math.isfinite, weights)):
        raise InputError("--weights", f"got {weights} for {len(args.files)} adapters", "give one number for each")
    if args.p is not None and not args.p >= 1:
        raise InputError("--p", f"{args.p} is below 1", "take 1 (nuclear), 2 (Frobenius) up to inf (spectral)")
    check_rank(args.rank)
    base = Base(args.base) if args.base else None
    files = [read(path, base) for path in args.files]
    for file in files:
        require_plain(file, "merge")
    p, bounds = worst_case(files, weights, args.p)
    layers, lost = [], 0.0
    for layer in merged(files, weights):
        slim, less = squeezed(layer, args.rank) if args.rank else (layer, 0.0)
        layers.append(slim)
        lost = max(lost, less)
    spectra = {layer.name: spectrum(layer) for layer in layers}
    origin = {"method": "merge", "options": {"weights": weights, "rank": args.rank}}
    entry = {CERTIFICATE: certificate(spectra, p, bounds, origin, files[0].header)}
    header = {key: text for key, text in files[0].header.items() if not key.startswith(("ss_", "sshs_"))}
    format = args.format or files[0].format
    target, off = save(written(layers, format, header | entry, args.output), layers, base)
    top = max(bounds, key=bounds.get)
    rank = max(layer.rank for layer in layers)
    say(f"{len(layers)} layers of {len(files)} adapters, ranks up to {rank}, as {format}")
    say(f"Schatten {p:g}-norm at most {number(bounds[top])} in any layer ({top}); "
        f"measured {number(max(s.norm(p) for s in spectra.values()))}")  # fmt: skip
    if args.rank:
        say(f"rank {args.rank}: at most {number(lost)} of Frobenius norm lost in a layer")
    say(f"wrote {target}, read back to {off:.0e}")


def merged(files: list[LoraFile], weights: list[float]) -> list[Layer]:
    """The weighted sum, layer by layer: factors side by side, scales folded in, in float32 or wider.

    Raises InputError for a layer that has two shapes.
    """
    found: dict[str, list[Layer]] = {}
    for file, weight in zip(files, weights, strict=True):
        for layer in file.layers:
            if layer.name in found and found[layer.name][0].down.shape[1:] != layer.down.shape[1:]:
                wrong = f"{layer.name} takes {tuple(layer.down.shape[1:])}, in {files[0].path} another shape"
                raise InputError(str(file.path), wrong, "merge adapters of one base")
            if layer.name in found and found[layer.name][0].shape != layer.shape:
                wrong = f"{layer.name} is {layer.shape}, elsewhere {found[layer.name][0].shape}"
                raise InputError(str(file.path), wrong, "merge adapters of one base")
            found.setdefault(layer.name, []).append(replace(layer, scale=layer.scale * weight))
    return [_side_by_side(layers) for layers in found.values()]


def _side_by_side(layers: list[Layer]) -> Layer:
    up = torch.cat([(layer.up.double() * layer.scale).to(_wide(layer)) for layer in layers], 1)
    down = torch.cat([layer.down.to(_wide(layer)) for layer in layers])
    return replace(layers[0], up=up, down=down, scale=1.0, keys=None)


def _wide(layer: Layer) -> torch.dtype:
    return torch.float64 if layer.up.dtype == torch.float64 else torch.float32


def worst_case(files: list[LoraFile], weights: list[float], p: float | None) -> tuple[float, dict[str, float]]:
    """(p, {layer: sum of |weight| times the adapter's bound}); an adapter without a bound counts with its norm.

    p: None takes the one that all stated bounds share, else 2.
    """
    stated = [stated_bounds(file) for file in files]
    if p is None:
        shared = {q for of_file in stated for q, _ in of_file.values()}
        p = shared.pop() if len(shared) == 1 else 2.0
    bounds: dict[str, float] = {}
    for file, weight, of_file in zip(files, weights, stated, strict=True):
        for layer in file.layers:
            bounds[layer.name] = bounds.get(layer.name, 0.0) + abs(weight) * _bound(layer, of_file, p)
    return p, bounds


def _bound(layer: Layer, stated: Mapping[str, tuple[float, float]], p: float) -> float:
    q, delta = stated.get(layer.name, (None, 0.0))
    return delta if q == p else spectrum(layer).norm(p)
