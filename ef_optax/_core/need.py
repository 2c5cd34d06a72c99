"""What rules, combinators and transports may require of a codec."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ef_optax._core.codec import Codec


@dataclasses.dataclass(frozen=True)
class Need:
    """A required property of a codec: its test, the reason for a refusal, and the remedy."""

    met: Callable[[Codec], bool]
    reason: str
    remedy: str

    def check(self, asked_by: str, codec: Codec, error: type[Exception] = ValueError) -> None:
        """Refuses a codec that lacks the property; ``asked_by`` names function and argument."""
        if not self.met(codec):
            raise error(f"{asked_by} {codec.name} {self.reason}; {self.remedy}.")


SELF_CONTAINED = Need(
    lambda codec: codec.self_contained,
    "is not a stateless compressor of single leaves whose message is encoded by one worker alone",
    "choose one such as top_k or qsgd, and put per_leaf, scheduled or a transport *around* the "
    "result",
)
