"""Public names of the library, found wherever its front door keeps them.

A record compares two states of the code, between which names may have moved to submodules.
"""

from __future__ import annotations

import inspect
from typing import Any

import ef_optax as ef

ROOMS = ("exchanges", "policies", "parallel", "local", "measure")


def public(name: str) -> Any:
    """The object of this name: at the front door, or in the first room that has it."""
    rooms = [ef, *(getattr(ef, room) for room in ROOMS if hasattr(ef, room))]
    return next(getattr(room, name) for room in rooms if hasattr(room, name))


def two_shot(axis_name: str, *compressors: ef.Compressor) -> ef.Compressor:
    """A compressor that travels in two shots, whether or not it must be told the axis."""
    make = public("two_shot")
    known = "axis_name" in inspect.signature(make).parameters
    return make(*compressors, **({"axis_name": axis_name} if known else {}))
