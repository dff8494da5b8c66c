"""docs/contract.md is the table of the points and of their tests."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "contract.md"

#: how many points each section has
POINTS = {"A": 9, "B": 14, "C": 12, "D": 13, "E": 6, "F": 6, "G": 16, "H": 8, "I": 6, "J": 10, "K": 5, "L": 6}


def table():
    """Rows of the table: point -> (what, status, names of tests)."""
    rows = re.findall(r"^\| ([A-Z]\d+) \| (.+) \| (.+?) \| (.+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return {point: (what, status, re.findall(r"`(test_\w+)`", tests)) for point, what, status, tests in rows}


def names_in(folder):
    """Names of the tests in a folder and below."""
    files = [path.read_text(encoding="utf-8") for path in folder.rglob("test_*.py") if path.name != Path(__file__).name]
    return {name for text in files for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


def test_every_point_has_its_row():
    assert list(table()) == [f"{section}{i + 1}" for section, n in POINTS.items() for i in range(n)]
    for what, status, _ in table().values():
        assert what
        assert status.split(",")[0] in ("supported", "refused", "as with SAC")


def test_every_test_of_the_table_exists():
    named = {name for _, _, tests in table().values() for name in tests}
    assert named - names_in(TESTS) == set()


def test_every_test_of_the_contract_stands_at_its_point():
    for point, (_, _, tests) in table().items():
        prefix = f"test_{point.lower()}_"
        assert {name for name in tests if name.startswith(prefix)} == {
            name for name in names_in(TESTS / "contract") if name.startswith(prefix)
        }, point
        assert any(name.startswith(prefix) for name in tests), point
    named = {name for _, _, tests in table().values() for name in tests}
    assert names_in(TESTS / "contract") - named == set()
