"""120 faults and bad inputs by number, what each must end in, and which tests say so.

    python tests/reliability/catalogue.py

prints number, outcome, case and tests. A test takes a number by `@pytest.mark.case("I05")`, also as the mark of a
parameter. E: refused before the first step, in one line, nothing written. W: a one-line warning, and the run goes on.
S: handled, and compared with a reference. R: resumes bit for bit, nothing older lost.
"""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

_LISTS = {
    "I": """E folder missing | E folder empty | E only other files | S hidden files, Thumbs.db, sub-folders | E no bytes
        E truncated JPEG | E text named .jpg | S PNG named .jpg | S EXIF orientations | S CMYK, inverted too
        S hidden colour below alpha | S palette with transparency | S grey with alpha | S 16-bit PNG
        S 12- and 16-bit TIFF | E float TIFF | S one bit | W animation | E HEIC, AVIF | W small, E below a quarter
        E longer than 1:8 | E decompression bomb | S large in bounded memory | E EPS, PDF, SVG | E link out or in a loop
        E unreadable | W the same file twice | S names of every kind | S 100,000 files | S Display P3, Adobe RGB
        W damaged EXIF or ICC block | E zip with ../ | E zip with links | E zip bomb | E tar with devices""",
    "P": """S UTF-8 with a mark | E UTF-16 | E CP1252 | S CRLF | E empty caption | W more tokens than are read
        E control characters | E photos without a caption | W captions without a photo | E bad line of JSON
        W the token in no prompt""",
    "A": """E truncated file | E empty file | E offsets overlap or leave the file | E header of 100 MB | E pickle
        E pickle named .safetensors | E renamed keys | E layers missing | E layers too many | E one factor of two
        E wrong width | E another base | E not finite | E whole numbers | E header contradicts tensors | E no tensors
        E wrong prefix | E newer format | E a part of the base missing | S hostile header""",
    "C": """E rank below 1 or above the layer's | E targets match nothing | E layer of an unsupported type
        E learning rate NaN or negative | E unknown flag | E resolution no multiple of the VAE's
        S batch larger than the data | E precision that the device lacks | E bound below 0, p below 1
        E output folder holds something | E output inside the data | E more processes than devices
        E resume with other settings | E YAML that builds objects""",
    "F": """R killed before the save's folder | R killed at its folder | R killed before a file | R killed in a file
        R killed at an fsync | R killed at the manifest | R killed at the rename | R killed while pruning
        R SIGTERM in the forward | R SIGTERM in the backward | R SIGTERM in the optimizer | R SIGTERM in a save
        R SIGINT | R SIGINT twice | R disk full at the adapter | R disk full at the optimizer's state
        R disk full at the manifest | R disk full at the rename | R output turns read-only | E photo deleted in the run
        E photo changed since the scan | R data lost after the rename | R bit flip | R file missing | E second run
        S lock of a dead process | R NaN loss | S overflow of fp16 | R memory runs out | R loader killed
        R another process dies | S processes with different data | E other number of processes | S clock jumps
        R resume at every step | R ten resumes in a chain | W tracker down | W log cannot be written
        S base vanishes after the start | S pickle put into the run""",
}  # fmt: skip

# Argued, not tested: number -> why.
ON_PAPER: dict[str, str] = {}


def cases() -> dict[str, tuple[str, str]]:
    """number -> (outcome, words). "W small, E below a quarter" has two outcomes; its first stands."""
    found = {}
    for letter, text in _LISTS.items():
        items = [item.strip() for line in text.split("\n") for item in line.split("|")]
        for number, item in enumerate(filter(None, items), 1):
            outcome, _, words = item.partition(" ")
            found[f"{letter}{number:02}"] = outcome, words
    return found


def marked(folder: Path = TESTS) -> dict[str, list[str]]:
    """number -> ["file::test or table"] of every `case("…")` in the test files, read without running them."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("test_*.py")):
        for top in ast.parse(file.read_text(encoding="utf-8")).body:
            name = top.name if hasattr(top, "name") else ast.unparse(top).partition(" ")[0]
            for node in ast.walk(top):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "case":
                    for argument in node.args:
                        places = found.setdefault(argument.value, [])
                        place = f"{file.relative_to(folder.parent)}::{name}"
                        if place not in places:
                            places.append(place)
    return found


def missing(tests: dict[str, list[str]]) -> list[str]:
    """The numbers that no test bears and no reason stands for."""
    return [number for number in cases() if number not in tests and number not in ON_PAPER]


def main() -> None:
    tests = marked()
    for number, (outcome, words) in cases().items():
        print(f"{number}  {outcome}  {words}")
        for place in tests.get(number, [f"on paper: {ON_PAPER.get(number, 'nowhere')}"]):
            print(f"        {place}")


if __name__ == "__main__":
    main()
