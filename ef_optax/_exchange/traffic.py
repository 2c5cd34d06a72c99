"""The bits of an exchange, counted from its requests when it is traced."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ef_optax._bits.fields import exact_bits
from ef_optax._core.requests import AllToAll, Gather, Max, Mean, Permute, Request, Sum
from ef_optax._exchange.links import Kind, link_amount


class Bits(NamedTuple):
    """Bits of one worker."""

    message: int  # what it contributes
    link: int  # what it sends and receives, by ring or pairwise algorithms

    def plus(self, other: Bits) -> Bits:
        return Bits(self.message + other.message, self.link + other.link)


NOTHING = Bits(0, 0)

_KINDS: dict[type, Kind] = {
    Gather: "gather",
    Mean: "reduce",
    Sum: "reduce",
    Max: "reduce",
    AllToAll: "all_to_all",
    Permute: "permute",
}


def bits_of_request(request: Request, workers: int) -> Bits:
    """What one worker pays for a request, without padding and header."""
    carried = request.value if isinstance(request, Mean | Sum | Max) else request.message
    message = exact_bits(carried)
    return Bits(message, link_amount(_KINDS[type(request)], workers, message))


def divided(total: int, sizes: Sequence[int]) -> list[int]:
    """A total in parts that are proportional to the sizes, up to rounding, and sum to it.

    >>> divided(10, [1, 1, 2])
    [2, 3, 5]
    """
    whole = max(sum(sizes), 1)
    ends = [total * end // whole for end in itertools.accumulate(sizes)]
    return [b - a for a, b in itertools.pairwise([0, *ends])] if sum(sizes) else [0] * len(sizes)
