"""Parts of the suite."""

from __future__ import annotations

import pytest

from tests.parts import chosen_part

NAMES = [f"a.py::many[{i}]" for i in range(103)] + [f"b.py::single_{i}" for i in range(200)]


def test_parts_are_disjoint_and_together_all():
    parts = [chosen_part(NAMES, f"{k}/4") for k in (1, 2, 3, 4)]
    assert set().union(*parts) == set(NAMES)
    assert sum(map(len, parts)) == len(NAMES)
    assert all(60 < len(part) < 92 for part in parts)


def test_neighbours_stay_together():
    kept = [name in chosen_part(NAMES, "2/4") for name in NAMES[:103]]
    assert sum(x != y for x, y in zip(kept, kept[1:], strict=False)) <= 2


@pytest.mark.parametrize("wrong", ["0/4", "5/4"])
def test_a_part_that_does_not_exist_is_refused(wrong):
    with pytest.raises(ValueError, match="k from 1 to n"):
        chosen_part(NAMES, wrong)
