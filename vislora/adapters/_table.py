"""README's table of methods, from their docstrings: python -m vislora.adapters._table README.md writes it there."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from . import get, names

START, END = "<!-- methods: from the docstrings -->", "<!-- end of methods -->"


def table() -> str:
    """A Markdown table: method, equation, trainable parameters per layer (m outputs, n inputs), export rank, paper."""
    rows = ["| method | update | parameters per layer | export rank | paper |", "|---|---|---|---|---|"]
    for name in names():
        cls = get(name)
        text = inspect.getdoc(cls)
        fields = r"^(Equation|Parameters per layer|Export rank): (.+?)\.\n(?=Parameters|Export|Differs)"
        said = {key: " ".join(value.split()) for key, value in re.findall(fields, text, re.M | re.S)}
        module = inspect.getmodule(cls).__doc__
        arxiv = re.search(r"arXiv (\d{4}\.\d{4,5})", module)
        link = f"[{arxiv[1]}](https://arxiv.org/abs/{arxiv[1]})" if arxiv else "under review"
        columns = (said[k].replace("|", "\\|") for k in ("Equation", "Parameters per layer", "Export rank"))
        cells = [f"`{name}`", *columns]
        rows.append("| " + " | ".join([*cells, link]) + " |")
    return "\n".join(rows)


def fill(text: str) -> str:
    """`text` with the table between its two marks."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(fill(file.read_text(encoding="utf-8")), encoding="utf-8")
