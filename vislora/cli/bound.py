"""vislora bound: the nearest adapter whose every update keeps within a Schatten norm."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from ..errors import InputError
from ..export import CERTIFICATE
from ..formats import Base, Layer, LoraFile, read, rewritten, save, written
from ..formats.norm_bounded import as_nb_lora
from ..formats.shrink import bounded, squeezed
from ..formats.spectrum import certificate, spectrum, stated_base
from ..linalg import product_singular_values, schatten
from ._base import add_base, open_base
from ._out import add_out, add_rank, check_rank, require_plain
from ._table import number, say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="an adapter: ours, diffusers', kohya's, or PEFT's folder")
    parser.add_argument("--p", type=float, default=1.0, help="the norm: 1 nuclear (default), 2 Frobenius, inf spectral")
    parser.add_argument("--delta", type=float, help="the bound, in the norm's own unit")
    parser.add_argument("--delta_ratio", type=float, help="the bound as a share of each base weight's norm")
    add_base(parser, "for --delta_ratio")
    parser.add_argument("--how", choices=("nearest", "shrink"), default="nearest",
                        help="the nearest update inside (default), or the same one scaled down")  # fmt: skip
    parser.add_argument("--as_nb_lora", action="store_true",
                        help="write NB-LoRA's parameters in our own format, to train on under the bound")  # fmt: skip
    add_rank(parser)
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    """Write the bounded adapter and say what changed. Raises InputError for flags that contradict, DoRA, bad files."""
    _check(args)
    base = open_base(args.base)
    file = read(args.file, base)
    require_plain(file, "bound")
    norms = stated_base(file)
    if base:
        base.require(file.path, file.layers, norms)
        norms = norms or base.norms(file.layers)
    bounds = {layer.name: _delta(args, base, layer) for layer in file.layers}
    layers, lost = [], 0.0
    for layer in file.layers:
        delta = bounds[layer.name]
        # NB-LoRA's map is smooth inside its ball and not on the sphere.
        near = bounded(layer, args.p, delta * (1 - 1e-3) if args.as_nb_lora else delta, args.how)
        if args.rank:
            near, less = squeezed(near, args.rank)
            lost = max(lost, less)
        layers.append(near)
    options = {"p": "inf" if args.p == math.inf else args.p, "delta": args.delta, "delta_ratio": args.delta_ratio}
    if args.as_nb_lora:
        files = as_nb_lora(layers, args.p, args.delta, args.delta_ratio, bounds, norms, args.rank, args.output)
    else:
        layers = _inside(layers, args.p, bounds)
        spectra = {layer.name: spectrum(layer) for layer in layers}
        origin = {"method": f"bound, {args.how}", "options": options | {"rank": args.rank}}
        entry = {CERTIFICATE: certificate(spectra, args.p, bounds, origin, file.header)}
        files = _files(file, layers, entry, args)
    target, off = save(files, layers, base)
    _tell(args, file, layers, bounds, lost)
    say(f"wrote {target}, read back to {off:.0e}")


def _check(args: argparse.Namespace) -> None:
    if (args.delta is None) == (args.delta_ratio is None):
        given = "neither" if args.delta is None else "both"
        raise InputError("--delta", f"{given} of --delta and --delta_ratio given", "give one of the two")
    if args.delta_ratio is not None and args.base is None:
        raise InputError("--delta_ratio", "is a share of weights not at hand", "give their folder as --base")
    if not args.p >= 1:
        raise InputError("--p", f"{args.p} is below 1", "take 1 (nuclear), 2 (Frobenius) up to inf (spectral)")
    for name in ("delta", "delta_ratio"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name}", f"{value} is not a positive number", "take a positive one, such as 6 or 0.1")
    check_rank(args.rank)


def _delta(args: argparse.Namespace, base: Base | None, layer: Layer) -> float:
    if args.delta is not None:
        return args.delta
    weight = base.weight(layer.component, layer.path)
    norm = schatten(weight.flatten() if args.p == 2 else torch.linalg.svdvals(weight), args.p).item()
    if not 0 < norm < math.inf:
        raise InputError("--delta_ratio", f"the norm of {layer.name}'s weight is {norm}", "give an absolute --delta")
    return args.delta_ratio * norm


def _inside(layers: list[Layer], p: float, bounds: dict[str, float]) -> list[Layer]:
    """Truncation does not raise a norm, but rounding of its factors to a half precision may."""
    return [bounded(layer, p, bounds[layer.name], "shrink") for layer in layers]


def _files(file: LoraFile, layers: list[Layer], entry: dict[str, str], args: argparse.Namespace):
    changed = {new.name: new for new, old in zip(layers, file.layers, strict=True) if new is not old}
    if all(new.rank == old.rank and old.keys for new, old in zip(layers, file.layers, strict=True)):
        return rewritten(file, changed, entry, args.output)
    return written(layers, file.format, {**file.header, **entry}, args.output)


def _tell(args: argparse.Namespace, file: LoraFile, layers: list[Layer], bounds: dict[str, float], lost: float) -> None:
    before = {layer.name: spectrum(layer).norm(args.p) for layer in file.layers}
    moved = {}
    for old, new in zip(file.layers, layers, strict=True):
        if new is not old:
            (up, down), (up2, down2) = old.factors(), new.factors()
            off = product_singular_values(torch.cat([up, -up2], 1), torch.cat([down, down2]))
            whole = spectrum(old).frobenius
            moved[old.name] = torch.linalg.vector_norm(off).item() / whole if whole else 0.0
    outside = sum(before[name] > delta for name, delta in bounds.items())
    after = max(spectrum(layer).norm(args.p) / bounds[layer.name] for layer in layers)
    was = max(before[name] / delta for name, delta in bounds.items())
    say(f"{outside} of {len(layers)} layers were outside; largest norm over its bound {number(was)}, now {after:.6g}")
    if moved:
        worst = max(moved, key=moved.get)
        say(f"{len(moved)} layers changed, by at most {number(moved[worst])} of their Frobenius norm ({worst})")
    if args.rank:
        say(f"rank {args.rank}: at most {number(lost)} of Frobenius norm lost in a layer")
