"""Reference implementations in NumPy float64, written from the definitions, line by line.

They share nothing with ``ef_optax``: no packing, no selection, no trees, no JAX. Each is a
generator that yields a :class:`Step` after every round: the iterate ``x`` and the memories by their
letters, as copies that later rounds do not touch. ``grads`` is a list of one gradient function per
worker, ``C`` a function on vectors (a list of functions if workers differ), ``gamma`` a step
size or, if a schedule matters, a function of the round.
"""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np


class Step(types.SimpleNamespace):
    """One round's iterate and memories."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**copy.deepcopy(fields))


def run(oracle: Iterator[Step], rounds: int) -> list[Step]:
    """The first ``rounds`` steps."""
    return list(itertools.islice(oracle, rounds))


def iterates(oracle: Iterator[Step], rounds: int) -> np.ndarray:
    """The first ``rounds`` iterates, one a row."""
    return np.array([step.x for step in run(oracle, rounds)])
