"""Answers are found and compared as the papers' scripts do: cases by hand."""

from __future__ import annotations

import pytest

from vislora.language.scoring import (
    after_marker,
    boxed,
    choice_right,
    code_block,
    gsm8k_right,
    math_right,
    same_answer,
    same_latex,
)  # fmt: skip


@pytest.mark.parametrize("reply, gold, right", [
    ("5 + 3 = 8. The answer is: 8", "so\n#### 8", True),
    ("The answer is: 7 ... no. The answer is: 8.", "#### 8", True),
    ("The answer is: $1,234.00", "#### 1234", True),
    ("The answer is: 7.6", "#### 8", True),  # rounded
    ("The answer is: 16/2", "#### 8", True),
    ("8", "#### 8", False),  # no marker
    ("The answer is: eight", "#### 8", False),
    ("The answer is: -3", "The answer is: -3", True),
    ("The answer is: 5/0", "#### 5", False),
])  # fmt: skip
def test_gsm8k(reply, gold, right):
    assert gsm8k_right(reply, gold) == right


@pytest.mark.parametrize("reply, gold, right", [
    (r"The answer is: \frac{1}{2}", r"so $\boxed{\dfrac{1}{2}}$.", True),
    (r"The answer is: 1/2", r"\boxed{\frac12}", True),
    (r"The answer is: 0.5", r"\boxed{\frac{1}{2}}", True),
    (r"The answer is: x = 3", r"\boxed{3}", True),
    (r"The answer is: 12\text{ cm}", r"\boxed{12}", True),
    (r"The answer is: 50\%", r"\boxed{50}", True),
    (r"The answer is: \left(3, 4\right)", r"\boxed{(3,4)}", True),
    (r"The answer is: 90^\circ", r"\boxed{90}", True),
    (r"The answer is: \sqrt3", r"\boxed{\sqrt{3}}", True),
    (r"The answer is: 3", r"\boxed{4}", False),
    (r"\boxed{4}", r"\boxed{4}", False),  # no marker
    (r"The answer is: \frac{a}{b}", r"$\boxed{\frac{a}{\sqrt{b}}}$", False),
])  # fmt: skip
def test_math(reply, gold, right):
    assert math_right(reply, gold) == right


def test_boxes_are_matched_brace_by_brace():
    assert boxed(r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}} done") == r"\frac{1}{\sqrt{2}}"
    assert boxed(r"\fbox{7}") == "7" and boxed("none") is None and boxed(r"\boxed{1") is None
    assert same_latex(".5", "0.5") and not same_latex("1", "2")


@pytest.mark.parametrize("reply, gold, name, lower, right", [
    ("the correct answer is true", "true", "boolq", False, True),
    ("True", "true", "boolq", False, False), ("True", "true", "boolq", True, True),
    ("solution2, not solution1", "solution2", "piqa", False, True),
    ("answer6 or answer5", "answer5", "arc_easy", False, True),
    ("ending3", "ending4", "hellaswag", False, False), ("", "option1", "winogrande", False, False),
])  # fmt: skip
def test_commonsense(reply, gold, name, lower, right):
    assert choice_right(reply, gold, name, lower) == right


def test_answers_in_general():
    assert same_answer("so. The answer is: 12.", "x. The answer is: 12") and same_answer(" Paris\n", "Paris")
    assert same_answer("The answer is: 12.0", "The answer is: 12") and not same_answer("12", "The answer is: 12")
    assert not same_answer("Paris is it", "Paris") and after_marker("no") is None


def test_code_is_the_first_fenced_block():
    assert code_block("Sure:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1\n"
    assert code_block("'''python\nx = 2\n'''") == "x = 2\n" and code_block("x = 3") == "x = 3"
    assert code_block("```py\nx = 4") == "x = 4"
