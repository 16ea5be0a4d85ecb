"""What the fuzzers of tests/fuzz share: damage to JSON and to bytes, and the rule that every input must keep.

The rule: a reader either succeeds or raises a VisloraError of one line, within seconds of processor time, and with less
than MEMORY bytes more than it had. FUZZ_INPUTS in the environment says how many inputs all fuzzers take together.
"""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from vislora.errors import VisloraError

SECONDS, MEMORY = 10, 2**30
INPUTS = int(os.environ.get("FUZZ_INPUTS", 1200))


class Hang(BaseException):
    """No Exception, so that no reader's own handler takes it for a fault of the file."""


def inputs(share: float):
    """Hypothesis' settings for a fuzzer that takes `share` of all inputs; the same ones at every run of the suite."""
    campaign = "FUZZ_INPUTS" in os.environ
    return settings(max_examples=max(1, round(share * INPUTS)), deadline=None, database=None, derandomize=not campaign,
                    suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink],
                    print_blob=False)  # fmt: skip


def ends_well(read: Callable[[], object], seen: Counter) -> None:
    """Count how `read` ends; raise for an error that is none of ours, one of several lines, and a hang."""

    def stop(*_):
        raise Hang(f"no end after {SECONDS} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        read()
        seen["read"] += 1
    except VisloraError as error:
        line = str(error)
        assert "->" in line or line.endswith("…"), line
        assert line.isprintable() and len(line) <= 600, line
        seen["refused"] += 1
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Within it this process may take MEMORY bytes of address space more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def report(name: str, seen: Counter) -> None:
    """Print the figures, and require that inputs of both kinds came up: a fuzzer that only one end sees is none."""
    print(f"\n{name}: {seen.total()} inputs, {seen['read']} read, {seen['refused']} refused")
    assert seen["read"] and seen["refused"], seen


WORDS = st.sampled_from([
    "", "a", "\x1b[31mred", "a\nb", "\ud800", "é🎉", "x" * 5000, "inf", "1e999", "..", "(a+)+$", "(a|a)*b", "[",
    ".*.*.*", "none", "9" * 30,
])  # fmt: skip
NUMBERS = st.sampled_from([
    0, 1, -1, 2, 3, 6, 7, 2**31, 2**40, 2**63, 2**64, 10**400, 0.5, -0.5, 1e-300, 1e300, float("inf"), float("nan"),
])  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=8))
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=4), SCALARS, max_size=3),
    st.just([[]]), st.just([{"a": [None]}]),
)  # fmt: skip


def places(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every node of plain data below the root."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(tree[key], (*path, key))


@st.composite
def damaged(draw, tree: object, values: st.SearchStrategy = VALUES) -> object:
    """Plain data with one to three things put elsewhere, renamed, taken away or replaced by `values`."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            return draw(values)
        *way, last = found[draw(st.integers(0, len(found) - 1))]
        node = tree
        for key in way:
            node = node[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "another's"]))
        if kind == "replace":
            node[last] = copy.deepcopy(draw(values))
        elif kind == "remove":
            del node[last]
        elif kind == "rename" and isinstance(node, dict):
            node[draw(st.one_of(WORDS, st.text(max_size=8)))] = node.pop(last)
        else:
            other, source = found[draw(st.integers(0, len(found) - 1))], tree
            for key in other:
                source = source[key]
            node[last] = copy.deepcopy(source)
    return tree


@st.composite
def bitten(draw, content: bytes) -> bytes:
    """Bytes with one to three of them changed, or a piece cut out, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["flip", "cut", "remove", "insert", "double"]))
        if kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(max_size=12)) + content[at:]
        elif kind == "flip":
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        else:
            end = at + draw(st.integers(1, 40))
            content = content[:at] + (content[at:end] * 2 if kind == "double" else b"") + content[end:]
    return content
