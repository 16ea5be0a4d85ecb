"""vislora merge: adapters, weighted, folded into a model's own files; or several as one adapter, nothing lost."""

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
from ..formats.into_model import delta_of, merge_into
from ..formats.shrink import squeezed
from ..formats.spectrum import Spectrum, certificate, spectrum, stated_base, stated_bounds
from ._base import add_base, open_base
from ._out import add_out, add_rank, check_rank, require_plain
from ._table import number, say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="ADAPTER[=WEIGHT]",
                        help="adapters of one base, in any layouts, each with a weight (default 1)")  # fmt: skip
    parser.add_argument("--weights", type=float, nargs="+", help="the weights, in the adapters' order")
    parser.add_argument("--format", choices=tuple(FORMATS), help="the layout of one adapter (default: the first one's)")
    parser.add_argument("--p", type=float, help="the norm that is bounded (default: the adapters' own, or 2)")
    add_base(parser, "write it whole with the adapters in it; with --format only for kohya's odd names")
    add_rank(parser)
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    """Write the sum, and state the bound that it keeps: that of a sum is at most the sum of weighted bounds."""
    paths, weights = _weighted(args)
    if args.p is not None and not args.p >= 1:
        raise InputError("--p", f"{args.p} is below 1", "take 1 (nuclear), 2 (Frobenius) up to inf (spectral)")
    check_rank(args.rank)
    into_model = args.base is not None and args.format is None
    if into_model and args.rank is not None:
        raise InputError("--rank", "is of adapters, and a model is written", "leave it out, or give --format")
    if len(paths) < 2 and not into_model:
        raise InputError("vislora merge", "got one adapter", "give two or more, or the model as --base")
    base = open_base(args.base)
    files = [read(path, base) for path in paths]
    if into_model:
        return _into_model(args, base, files, weights)
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
    rank = max(layer.rank for layer in layers)
    say(f"{len(layers)} layers of {len(files)} adapters, ranks up to {rank}, as {format}")
    _say_bound(p, bounds, max(s.norm(p) for s in spectra.values()))
    if args.rank:
        say(f"rank {args.rank}: at most {number(lost)} of Frobenius norm lost in a layer")
    say(f"wrote {target}, read back to {off:.0e}")


def _weighted(args: argparse.Namespace) -> tuple[list[Path], list[float]]:
    """Paths and weights; what follows the last "=" is a weight unless a file bears the whole name."""
    paths, own = [], []
    for word in args.files:
        name, equals, weight = word.rpartition("=")
        if not equals or Path(word).exists():
            paths.append(Path(word))
            continue
        try:
            own.append(float(weight))
        except ValueError:
            raise InputError(word, f"{weight!r} is no weight", "write ADAPTER=0.7") from None
        paths.append(Path(name))
    if own and (args.weights or len(own) < len(paths)):
        wrong = "stands beside --weights" if args.weights else f"stands at {len(own)} of {len(paths)} adapters"
        raise InputError("=WEIGHT", wrong, "give each adapter one, or --weights alone")
    weights = own or args.weights or [1.0] * len(paths)
    if len(weights) != len(paths) or not all(map(math.isfinite, weights)):
        raise InputError("--weights", f"got {weights} for {len(paths)} adapters", "give one number for each")
    return paths, weights


def _into_model(args: argparse.Namespace, base: Base, files: list[LoraFile], weights: list[float]) -> None:
    for file in files:
        base.require(file.path, file.layers, stated_base(file))
    p, bounds = worst_case(files, weights, args.p, base)
    done = merge_into(base, files, weights, args.output)
    say(f"{done.weights} weights of {base.label} hold {len(files)} adapter{'s' if len(files) > 1 else ''}, "
        f"at weights {', '.join(f'{weight:g}' for weight in weights)}")  # fmt: skip
    _say_bound(p, bounds, None)
    if done.lost > 1e-3:
        say(f"the weights' precision took {done.lost:.1%} of {done.layer}'s change, at most")
    say(f"wrote {args.output}")


def _say_bound(p: float, bounds: Mapping[str, float], measured: float | None) -> None:
    top = max(bounds, key=bounds.get)
    also = "" if measured is None else f"; measured {number(measured)}"
    say(f"Schatten {p:g}-norm at most {number(bounds[top])} in any layer ({top}){also}")


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


def worst_case(
    files: list[LoraFile], weights: list[float], p: float | None, base: Base | None = None
) -> tuple[float, dict[str, float]]:
    """(p, {layer: sum of |weight| times the adapter's bound}); an adapter without a bound counts with its norm.

    p: None takes the one that all stated bounds share, else 2. base: what DoRA's norms need.
    """
    stated = [stated_bounds(file) for file in files]
    if p is None:
        shared = {q for of_file in stated for q, _ in of_file.values()}
        p = shared.pop() if len(shared) == 1 else 2.0
    bounds: dict[str, float] = {}
    for file, weight, of_file in zip(files, weights, stated, strict=True):
        for layer in file.layers:
            bounds[layer.name] = bounds.get(layer.name, 0.0) + abs(weight) * _bound(layer, of_file, p, base)
    return p, bounds


def _bound(layer: Layer, stated: Mapping[str, tuple[float, float]], p: float, base: Base | None) -> float:
    q, delta = stated.get(layer.name, (None, 0.0))
    if q == p:
        return delta
    if layer.magnitude is None:
        return spectrum(layer).norm(p)
    return Spectrum(torch.linalg.svdvals(delta_of(layer, base.weight(layer.component, layer.path)))).norm(p)
