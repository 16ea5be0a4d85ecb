"""What an update amounts to, from its factors alone, and whether a file's certificate says the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..export import CERTIFICATE
from ..linalg import product_singular_values, schatten
from ..update import Update
from . import ours
from .lora import Layer, LoraFile, Names, split_component
from .vocabulary import component_of

_NORM_TOLERANCE = 1e-3  # a copy in half precision passes
_BOUND_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Spectrum:
    """Singular values (r,), float64, largest first, of one update, and what is said of them in the adapter's unit."""

    values: Tensor

    @property
    def spectral(self) -> float:
        return self.values.max().item()

    @property
    def frobenius(self) -> float:
        return schatten(self.values, 2).item()

    @property
    def nuclear(self) -> float:
        return self.values.sum().item()

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares of their sum (Roy and Vetterli 2007); 0 for no update."""
        total = self.values.sum()
        if not total:
            return 0.0
        return torch.special.entr(self.values / total).sum().exp().item()

    def norm(self, p: float) -> float:
        """Schatten p-norm."""
        return schatten(self.values, p).item()


@torch.no_grad()
def spectrum(layer: Layer, weight: Tensor | None = None) -> Spectrum:
    """Of a layer's update. DoRA's needs the base weight (m, n), and makes the dense matrix; without it the low-rank
    part alone is measured."""
    up, down = layer.factors()
    if layer.magnitude is None or weight is None:
        return Spectrum(product_singular_values(up, down))
    update = Update(up, down, magnitude=layer.magnitude.flatten().double())
    return Spectrum(torch.linalg.svdvals(update.with_row_scale(weight.double()).dense(weight.double())))


@dataclass(frozen=True)
class Verdict:
    """What came of a certificate: "absent", "holds", "unchecked" (DoRA without its base) or "broken", and why."""

    status: str
    why: str = ""


def check_certificate(file: LoraFile, spectra: Mapping[str, Spectrum], has_base: bool) -> Verdict:
    """Compare every norm and bound that the header states with the tensors."""
    if CERTIFICATE not in file.header:
        return Verdict("absent")
    try:
        stated = {
            _layer_name(name, spectra): (_number(m["p"]), float(m["norm"]), float(m["spectral"]), m["bound"])
            for name, m in dict(json.loads(file.header[CERTIFICATE])["modules"]).items()
        }
        bounds = {name: None if m[3] is None else _number(m[3]) for name, m in stated.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Verdict("broken", f"it cannot be read ({error!r})")
    if stated.keys() != spectra.keys():
        odd = sorted(stated.keys() ^ spectra.keys())
        return Verdict("broken", f"{len(odd)} layers are in the file or in the certificate alone: {odd[0]}")
    if file.has_magnitudes and not has_base:
        return Verdict("unchecked", "DoRA's norms need --base")
    for name, (p, norm, spectral, _) in stated.items():
        own = spectra[name]
        for word, measured, said in (("norm", own.norm(p), norm), ("spectral", own.spectral, spectral)):
            if not abs(measured - said) <= _NORM_TOLERANCE * said + 1e-12:
                return Verdict("broken", f"{name} has {word} {measured:.6g}, it says {said:.6g}")
        bound = bounds[name]
        if bound is not None and not spectra[name].norm(p) <= bound * (1 + _BOUND_TOLERANCE):
            return Verdict("broken", f"{name} has norm {spectra[name].norm(p):.6g} above its bound {bound:.6g}")
    return Verdict("holds")


def stated_base(file: LoraFile) -> dict[Names, float]:
    """{(component, path): Frobenius norm of its base weight} as our own header or a certificate says; {} elsewhere."""
    names = {layer.name: (layer.component, layer.path) for layer in file.layers}
    try:
        if ours.HEADER in file.header:
            norms = ours.header_of(file.path, next(iter(file.stored.values())))["norms"]
        else:
            norms = dict(json.loads(file.header[CERTIFICATE])["base"]["norms"])
        found = {_layer_name(name, names): float(norm) for name, norm in norms.items()}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {names[name]: norm for name, norm in found.items() if name in names}


def stated_bounds(file: LoraFile) -> dict[str, tuple[float, float]]:
    """{layer: (p, delta)} that a file promises: by its method, or by a certificate that its tensors bear out.

    Raises InputError for a certificate that they do not.
    """
    if file.bounds or CERTIFICATE not in file.header:
        return file.bounds
    spectra = {layer.name: spectrum(layer) for layer in file.layers}
    verdict = check_certificate(file, spectra, has_base=False)
    if verdict.status == "broken":
        raise InputError(f"{file.path}: certificate", verdict.why, "export it again, or bound it")
    modules = {_layer_name(name, spectra): m for name, m in json.loads(file.header[CERTIFICATE])["modules"].items()}
    return {name: (_number(m["p"]), _number(m["bound"])) for name, m in modules.items() if m["bound"] is not None}


def _number(value) -> float:
    return math.inf if value == "inf" else float(value)


def _layer_name(name: str, known: Mapping) -> str:
    """A certificate names modules as the model did: without text_model, or without a component for a bare module."""
    component, path = split_component(name)
    if not component:
        owners = [k for k in known if k.partition(".")[2] in (path, f"text_model.{path}")] if name not in known else []
        if component_of(path) == "unet":
            component = "unet"
        elif len(owners) == 1:
            return owners[0]
    return f"{component}.{path}" if component else path


def certificate(
    spectra: Mapping[str, Spectrum], p: float, bounds: Mapping[str, float], origin: Mapping, before: Mapping[str, str]
) -> str:
    """The JSON of a certificate in the shape of `vislora.measure.certificate`, measured on the tensors as stored.

    bounds: {layer: bound on its Schatten p-norm}. origin: "method" and "options", what was done. before: the header
    that is replaced; the base's fingerprint in its certificate is kept.
    """
    stated = {
        name: {"p": "inf" if p == math.inf else p, "norm": s.norm(p), "spectral": s.spectral, "bound": bounds[name]}
        for name, s in spectra.items()
    }
    try:
        base = json.loads(before[CERTIFICATE])["base"]
    except (ValueError, KeyError, TypeError, RecursionError):
        base = {}
    return json.dumps({
        **origin,
        "modules": stated,
        "largest_norm": max(m["norm"] for m in stated.values()),
        "largest_spectral": max(m["spectral"] for m in stated.values()),
        "largest_share": max(m["norm"] / m["bound"] if m["bound"] else 0.0 for m in stated.values()),
        "base": base,
    })
