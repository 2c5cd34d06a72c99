"""The suite in parts of about one size, for runs that have no time for all of it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence


def chosen_part(names: Sequence[str], chosen: str) -> set[str]:
    """The names of the tests that belong to one part; ``"2/4"`` is the second of four.

    Every test function's cases are cut into contiguous pieces, because neighbours share programs.
    The piece that comes first depends on the function's name, so that functions of a single case
    are spread over the parts too.
    """
    part, parts = map(int, chosen.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(f"EF_OPTAX_PART={chosen!r} must be k/n with k from 1 to n.")
    functions: dict[str, list[str]] = {}
    for name in names:
        functions.setdefault(name.split("[")[0], []).append(name)
    return {
        case
        for function, cases in functions.items()
        for number, case in enumerate(cases)
        if (number * parts // len(cases) + zlib.crc32(function.encode())) % parts == part - 1
    }
