"""The alpha-beta model: how long a round of an exchange takes.

With n workers that contribute m bytes each, and s = ceil(log2 n) steps of the algorithms of least
latency (n - 1 steps of a ring):

=============  ==================  =============================================================
round          steps               bytes that each device receives (and sends)
=============  ==================  =============================================================
gather         s                   (n - 1) m
reduce         2 s                 2 (n - 1)/n m
all_to_all     s                   (n - 1)/n m
permute        1                   m
=============  ==================  =============================================================

A link works in both directions at once, so a device's time is that of one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from ef_optax.measure.planner.links import Link

Kind = Literal["gather", "reduce", "all_to_all", "permute"]


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of an exchange.

    Attributes:
      kind: gather, reduce, all_to_all or permute.
      message_bytes: what one worker contributes.
    """

    kind: Kind
    message_bytes: float

    def steps(self, workers: int, ring: bool = False) -> int:
        """Messages that follow each other on the way of the last value."""
        if workers == 1:
            return 0
        once = workers - 1 if ring else (workers - 1).bit_length()
        return {"gather": once, "reduce": 2 * once, "all_to_all": once, "permute": 1}[self.kind]

    def received_bytes(self, workers: int) -> float:
        """What one device receives, which is half of ``wire_report(...).link_bytes``."""
        share = (workers - 1) / workers
        factor = {"gather": workers - 1, "reduce": 2 * share, "all_to_all": share}
        factor["permute"] = 1 if workers > 1 else 0
        return factor[self.kind] * self.message_bytes


def transfer_seconds(
    rounds: Iterable[Round], workers: int, link: Link, *, ring: bool = False
) -> float:
    """Seconds of the rounds of one exchange, one after the other.

    Args:
      rounds: the rounds.
      workers: n.
      link: the link of each device.
      ring: whether latency is that of a ring, n - 1 steps, and not of log2 n steps.

    Example:
      A dense all-reduce of 100 MB between 4 workers at 1 Gbit/s moves 150 MB in each direction:

      >>> link = Link("1gbit", "10ms", efficiency=1.0)
      >>> round(transfer_seconds([Round("reduce", 1e8)], 4, link), 6)
      1.24
    """
    return sum(
        one.steps(workers, ring) * link.alpha + one.received_bytes(workers) / link.bytes_per_second
        for one in rounds
    )
