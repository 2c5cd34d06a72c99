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


@dataclasses.dataclass(frozen=True)
class Tier:
    """Devices or groups that a link joins inside of a worker.

    Attributes:
      devices: how many are joined.
      link: the link of each of them.

    Raises:
      ValueError: if ``devices`` is not an integer of at least 1.
    """

    devices: int
    link: Link

    def __post_init__(self) -> None:
        if not isinstance(self.devices, int) or isinstance(self.devices, bool) or self.devices < 1:
            raise ValueError(f"devices={self.devices!r} must be an integer of at least 1.")


def inside_seconds(size: float, tiers: Iterable[Tier], *, ring: bool = False) -> float:
    """Seconds of the dense mean inside of a worker, from its fastest tier outwards.

    Each tier scatters a sum over its devices, and each of them goes on with its own part: of n_1
    devices that share a tier the next one moves a message n_1 times shorter. On the way back the
    parts are gathered, so a tier takes the time of an all-reduce.

    Args:
      size: bytes of the gradient of a worker.
      tiers: from the fastest outwards.
      ring: as for :func:`transfer_seconds`.

    Example:
      8 devices at 100 GB/s, and 4 hosts of them at 10 GB/s that move an eighth each:

      >>> link = lambda rate: Link(rate, efficiency=1.0)
      >>> tiers = [Tier(8, link("100GB/s")), Tier(4, link("10GB/s"))]
      >>> round(inside_seconds(4e9, tiers), 6)
      0.145
    """
    seconds = 0.0
    for tier in tiers:
        rounds = [Round("reduce", size)]
        seconds += transfer_seconds(rounds, tier.devices, tier.link, ring=ring)
        size /= tier.devices
    return seconds
