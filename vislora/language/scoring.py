"""Is a reply right? The papers' ways of finding the answer in a text, and of comparing it.

MetaMath's (Yu et al. 2023), for GSM8K and MATH: what stands after the last "The answer is: ". MATH's equality of LaTeX:
Hendrycks et al. 2021. LLM-Adapters' (Hu et al. 2023), for the commonsense sets: the first of the words that may stand.
"""

from __future__ import annotations

import re
from fractions import Fraction

MARKER = "The answer is:"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")
# The first hit counts. Longer runs of one word are what the sets have: answers of ARC and OpenBookQA go up to 5.
CHOICES = {
    "boolq": r"true|false",
    "piqa": r"solution[12]",
    "social_iqa": r"answer[1-5]",
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option[12]",
    "arc_easy": r"answer[1-5]",
    "arc_challenge": r"answer[1-5]",
    "openbookqa": r"answer[1-5]",
}


def after_marker(text: str) -> str | None:
    """What follows the last "The answer is:", without a final full stop; None where it is not said."""
    before, found, rest = text.rpartition(MARKER)
    if not found:
        return None
    rest = rest.split(".\n")[0].strip()
    return rest[:-1].rstrip() if rest.endswith(".") else rest


def number(text: str) -> Fraction | None:
    """The first number in a text: thousands may have commas, 3/4 is a fraction. None where there is none."""
    match = _NUMBER.search(text)
    if not match:
        return None
    try:
        return Fraction(match[0].replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def gsm8k_right(reply: str, gold: str) -> bool:
    """Whether the first number after the marker, rounded to a whole one, is the gold answer. No marker is wrong.

    gold: GSM8K's own solution ("#### 18"), one that has the marker, or the number.
    """
    said, wanted = after_marker(reply), number(_gold(gold))
    got = None if said is None else number(said)
    return got is not None and wanted is not None and round(got) == round(wanted)


def _gold(text: str) -> str:
    if "####" in text:
        return text.rpartition("####")[2]
    marked = after_marker(text)
    return text if marked is None else marked


def math_right(reply: str, gold: str) -> bool:
    """Whether what follows the marker equals the gold answer as LaTeX. No marker is wrong.

    gold: MATH's own solution (its last box), one that has the marker, or the answer.
    """
    said = after_marker(reply)
    wanted = boxed(gold)
    wanted = _gold(gold) if wanted is None else wanted
    return said is not None and same_latex(said, wanted)


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...}, or \fbox{...}, holds, braces matched; also \boxed followed by a space."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = text[start:].removeprefix(r"\boxed").removeprefix(r"\fbox")
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for at, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:at]
    return None


_SPELLINGS = (
    ("\n", ""), (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), (r"\left", ""), (r"\right", ""),
    (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", ""), (r"\%", ""), ("%", ""),
)  # fmt: skip


def same_latex(one: str, two: str) -> bool:
    """Equality of two answers after what writes the same thing in two ways is written in one."""
    return one.strip() == two.strip() or _normal(one) == _normal(two)


def _normal(text: str) -> str:
    for old, new in _SPELLINGS:
        text = text.replace(old, new)
    text = text.split(r"\text{ ")[0]  # a unit on the right
    text = re.sub(r"(^|[ {])\.(?=\d)", r"\g<1>0.", text)
    left, equals, right = text.partition("=")
    if equals and len(left.strip()) <= 2 and "=" not in right:  # "x = 3"
        text = right
    text = re.sub(r"\\sqrt\s*([^{\s\\])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})([^{\\])", r"\1{\2}", text)
    if text == "0.5":
        text = r"\frac{1}{2}"
    whole = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return rf"\frac{{{whole[1]}}}{{{whole[2]}}}" if whole else text


def choice_right(reply: str, gold: str, name: str, lower: bool = False) -> bool:
    """Whether the first of the words that set `name` of `CHOICES` knows is the gold one; lower: case does not count."""
    match = re.search(CHOICES[name], reply.lower() if lower else reply)
    return match is not None and match[0] == (gold.strip().lower() if lower else gold.strip())


def same_answer(reply: str, gold: str) -> bool:
    """Right in general: by what follows the marker where the gold text has it, else by the whole."""
    wanted = after_marker(gold)
    said = reply.strip() if wanted is None else after_marker(reply)
    wanted = gold.strip() if wanted is None else wanted
    if said is None:
        return False
    both = [_NUMBER.fullmatch(text) and number(text) for text in (said, wanted)]
    return both[0] == both[1] if None not in both else said == wanted


FENCE = re.compile(r"(?:```|''')[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|'''|\Z)", re.DOTALL | re.IGNORECASE)


def code_block(reply: str) -> str:
    """The first fenced block of a reply, or the reply itself where there is none."""
    match = FENCE.search(reply)
    return match[1] if match else reply
