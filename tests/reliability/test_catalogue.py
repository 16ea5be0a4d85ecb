"""Every number of the catalogue has a test, and every test's number is one of the catalogue."""

from __future__ import annotations

from reliability.catalogue import ON_PAPER, cases, marked, missing


def test_every_number_has_a_test():
    tests, known = marked(), cases()
    assert len(known) == 120 and [sum(n[0] == letter for n in known) for letter in "IPACF"] == [35, 11, 20, 14, 40]
    assert {outcome for outcome, _ in known.values()} == set("EWSR")
    assert not missing(tests)
    assert not tests.keys() - known.keys() and not ON_PAPER.keys() & tests.keys()


def test_numbers_are_found_in_decorators_parameters_and_tables(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "test_a.py").write_text(
        'import pytest\ncase = pytest.mark.case\nTABLE = {("x", case("I01")): 1}\n'
        '@pytest.mark.case("I02", "I03")\n@pytest.mark.parametrize("a", [pytest.param(1, marks=case("I04"))])\n'
        "def test_b(a):\n    pass\n"
    )
    found = {n: [place.split("::")[1] for place in places] for n, places in marked(tmp_path).items()}
    assert found == {"I01": ["TABLE"], "I02": ["test_b"], "I03": ["test_b"], "I04": ["test_b"]}


def test_a_case_that_loses_its_test_is_missed():
    tests = marked()
    for number in ("F12", "I05"):
        assert missing({n: places for n, places in tests.items() if n != number}) == [number]
