"""What every run's model card shares: its norm certificate in plain words, and text made safe for Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Certificate:
    """What was measured of a bounded adapter. Norms: Schatten p-norms of the change of one adapted block."""

    method: str
    p: float  # 1 to inf
    delta: float | None  # the bound, or None where it is a share of each weight's norm,
    delta_ratio: float | None  # which is this
    largest_norm: float
    module: str  # where it is largest
    largest_share: float  # of the bound in use, at most 1


def certified(certificate: Mapping) -> Certificate | None:
    """The card's part of `vislora.measure.certificate`; None for a method that promises no bound."""
    shares = {name: m["norm"] / m["bound"] for name, m in certificate["modules"].items() if m["bound"]}
    if not shares:
        return None
    module = max(shares, key=shares.get)
    own = certificate["options"]
    return Certificate(
        method=certificate["method"],
        p=float(certificate["modules"][module]["p"]),
        delta=own.get("delta"),
        delta_ratio=own.get("delta_ratio"),
        largest_norm=certificate["modules"][module]["norm"],
        module=module,
        largest_share=certificate["largest_share"],
    )


def bound_text(certificate: Certificate | None, caution: str) -> str:
    """The certificate as Markdown. caution: the sentence on what a bound on weights does not say."""
    if certificate is None:
        return "This adapter has no bound: nothing in its method limits the norm of its change of a weight."
    c = certificate
    norm = f"Schatten {c.p:g}-norm"
    if c.p in (1, 2, float("inf")):
        norm += f" ({ {1: 'nuclear', 2: 'Frobenius', float('inf'): 'spectral'}[c.p] } norm)"
    limit = f"delta = {c.delta:g}" if c.delta is not None else f"{c.delta_ratio:g} times the weight's own norm"
    return f"""| | |
|---|---|
| method | {cell(c.method)} |
| norm | {norm}, p = {c.p:g} |
| bound for each adapted block | {limit} |
| largest norm measured | {c.largest_norm:.6g}, in {code(c.module)} |
| largest share of a bound in use | {100 * c.largest_share:.2f} % |

Scaling the adapter at inference scales the bound: at a weight of 1.3 it is 1.3 times as large. Adapters added
together have at most the sum of their bounds. {caution}"""


def options_table(values: Mapping[str, object]) -> str:
    """The section on how it was trained; options without a value are left out."""
    rows = "\n".join(f"| {cell(key)} | {cell(value)} |" for key, value in values.items() if value is not None)
    return f"## Training\n\n| option | value |\n|---|---|\n{rows}"


def code(text: str) -> str:
    """`text` as inline code, fenced by more backticks than it holds."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def plain(text: str) -> str:
    """`text` on one line with Markdown's and HTML's own characters escaped."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def cell(value: object) -> str:
    return plain(str(value))
