"""Links between devices: bandwidth, latency, and how many devices share them."""

from __future__ import annotations

import dataclasses
import math
import re

_SIZES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_RATE = re.compile(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([kmgt]?)(bit|bps|b|B|byte|Bps)?(?:/s)?\s*", re.I)
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", re.I)

ETHERNET = 0.94
"""What TCP over Ethernet leaves of a link: 1,448 of the 1,538 bytes of a full frame."""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def bandwidth(value: float | str, option: str = "bandwidth") -> float:
    """Bits per second, from a number of them or from text with a unit.

    A capital B means bytes: ``"1GB/s"`` is ``"8gbit"``.

    Args:
      value: a number, or text such as ``"50mbit"``, ``"1gbit"``, ``"400Gbit/s"``, ``"12GB/s"``.
      option: the name of the option, for the error message.

    Raises:
      ValueError: if it is not a positive bandwidth.

    Example:
      >>> bandwidth("50mbit"), bandwidth("1GB/s"), bandwidth(2e9)
      (50000000.0, 8000000000.0, 2000000000.0)
    """
    result = math.nan
    if isinstance(value, str) and (match := _RATE.fullmatch(value)):
        number, size, unit = match.groups()
        result = _number(number) * _SIZES[size.lower()]
        if unit and (unit.startswith("B") or unit.lower() == "byte"):
            result *= 8
    elif isinstance(value, int | float) and not isinstance(value, bool):
        result = float(value)
    if not (math.isfinite(result) and result > 0):
        raise ValueError(
            f"{option}={value!r} is not a bandwidth; give a positive number of bits per second, or "
            "text such as '50mbit', '1gbit', '400Gbit/s' or '12GB/s'."
        )
    return result


def seconds(value: float | str, option: str = "seconds") -> float:
    """Seconds, from a number of them or from text with a unit.

    Args:
      value: a number, or text such as ``"20ms"``, ``"5us"``, ``"0.4s"``, ``"2min"``.
      option: the name of the option, for the error message.

    Raises:
      ValueError: if it is not a time of at least 0.

    Example:
      >>> seconds("20ms"), seconds("2min"), seconds(0.5)
      (0.02, 120.0, 0.5)
    """
    result = math.nan
    if isinstance(value, str) and (match := _TIME.fullmatch(value)):
        result = _number(match[1]) * _TIMES.get(match[2].lower(), math.nan)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        result = float(value)
    if not (math.isfinite(result) and result >= 0):
        raise ValueError(
            f"{option}={value!r} is not a time; give a number of seconds of at least 0, or text "
            "such as '20ms', '5us', '0.4s' or '2min'."
        )
    return result


@dataclasses.dataclass(frozen=True)
class Link:
    """How one device reaches the others: alpha and beta of the alpha-beta model.

    Attributes:
      bandwidth: bits per second in each direction, or text as for :func:`bandwidth`.
      latency: seconds for one message one way, or text as for :func:`seconds`; the software's time
        for a message belongs to it.
      sharing: how many devices share the link, as the devices of a host share its network card.
      efficiency: what the protocol leaves of the bandwidth, in (0, 1].
      software: bits per second at which the software moves a message where no link limits it, which
        copies, adds and asks the system; measured with one large collective between processes of
        one machine. Infinite if nothing is known of it.

    Raises:
      ValueError: for a value out of range; the message has the option and the remedy.

    Example:
      >>> Link("1gbit", "20ms", sharing=8, efficiency=1.0).bytes_per_second
      15625000.0
      >>> Link("100gbit", software="4gbit").bytes_per_second
      500000000.0
    """

    bandwidth: float | str
    latency: float | str = 0.0
    sharing: int = 1
    efficiency: float = ETHERNET
    software: float | str = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", bandwidth(self.bandwidth))
        object.__setattr__(self, "latency", seconds(self.latency, "latency"))
        if not isinstance(self.sharing, int) or isinstance(self.sharing, bool) or self.sharing < 1:
            raise ValueError(f"sharing={self.sharing!r} must be an integer of at least 1.")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency={self.efficiency!r} must be in (0, 1].")
        if self.software != math.inf:
            object.__setattr__(self, "software", bandwidth(self.software, "software"))

    @property
    def alpha(self) -> float:
        """Seconds that a message takes however short it is."""
        return seconds(self.latency)

    @property
    def bytes_per_second(self) -> float:
        """What one device can send, and receive at the same time."""
        wire = bandwidth(self.bandwidth) * self.efficiency / self.sharing
        return min(wire, float(self.software)) / 8

    def at(self, rate: float) -> Link:
        """The same link with another bandwidth."""
        return dataclasses.replace(self, bandwidth=rate)
