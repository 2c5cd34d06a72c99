"""What a transfer costs a device on its links."""

from __future__ import annotations

from typing import Literal

Kind = Literal["gather", "reduce", "reduce_scatter", "all_to_all", "permute", "broadcast"]


def link_amount(kind: Kind, size: int, message: int) -> int:
    """What one of ``size`` devices sends and receives, in the unit of ``message``.

    Gathers and reductions run around a ring, the others between pairs.

    Args:
      kind: the kind of the collective.
      size: the number of devices in its group.
      message: what one device contributes.

    >>> [link_amount(kind, 4, 100) for kind in ("gather", "reduce", "all_to_all", "permute")]
    [600, 300, 150, 200]
    """
    if kind == "gather":
        return 2 * (size - 1) * message
    if kind == "reduce":
        return 4 * (size - 1) * message // size
    if kind in ("permute", "broadcast"):
        return 2 * message
    return 2 * (size - 1) * message // size
