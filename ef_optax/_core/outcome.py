"""The result of a protocol for its leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

from ef_optax._core.requests import Request


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a protocol; the last three are functions, so unused ones cost nothing.

    Attributes:
      aggregate: what every worker applies; for an additive codec, the weighted mean of ``sent``.
      state: the codec's next state (``()`` if it has none).
      sent: returns what the receivers decode from this worker's message, without its weight.
      residual: returns ``x - sent()``; a codec that streams also accepts a copy of x.
      support: returns the boolean mask of the coordinates that were sent.
    """

    aggregate: Any
    state: Any
    sent: Callable[[], Any]
    residual: Callable[..., Any]
    support: Callable[[], Any]


Protocol = Generator[Request, Any, Outcome]
