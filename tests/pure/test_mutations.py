"""The list of one-line changes fits the code: `python tests/mutations/run.py` can make each of them."""

from collections import Counter
from pathlib import Path

from mutations.changes import CHANGES, Change, misplaced

ROOT = Path(__file__).resolve().parents[2]


def test_each_change_has_one_place_and_tests_that_exist() -> None:
    assert misplaced(CHANGES, ROOT) == []
    assert [name for name, count in Counter(change.id for change in CHANGES).items() if count > 1] == []
    assert not [change.id for change in CHANGES if change.old == change.new]


def test_a_change_without_a_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def test_a():\n    pass\n")
    (tmp_path / "code.py").write_text("once\ntwice\ntwice\n")
    for old, test, wrong in [("once", "a", 0), ("twice", "a", 1), ("gone", "a", 1), ("once", "b", 1)]:
        assert len(misplaced([Change("id", "code.py", old, "", f"test_a.py::test_{test}")], tmp_path)) == wrong
