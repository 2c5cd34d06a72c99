"""What a protocol returns for its leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

from ef_optax._core.requests import Request


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a protocol returns. The last three are functions: what nobody asks for costs nothing.

    Attributes:
      aggregate: what every worker applies; for an additive codec the weighted mean of ``sent``.
      state: the codec's next state (``()`` when it has none).
      sent: gives what the receivers decode from this worker's message, never weighted.
      residual: gives ``x - sent()``; for a codec that streams also of a copy of x, if given one.
      support: gives the boolean mask of the coordinates that were sent.
    """

    aggregate: Any
    state: Any
    sent: Callable[[], Any]
    residual: Callable[..., Any]
    support: Callable[[], Any]


Protocol = Generator[Request, Any, Outcome]
