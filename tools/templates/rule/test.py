"""``ef.new_name`` against its algorithm box, in NumPy for three workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import ef_optax as ef
from tests.feedback.problem import AXIS, START, check, optimizer, per_leaf
from tests.oracles import Step, compress

TOP1 = per_leaf(compress.top_k(1))


def oracle(x: np.ndarray) -> Iterator[Step]:
    """The algorithm box, line by line, on GRADS of tests.feedback.problem, as in tests/oracles."""
    pytest.fail("write the algorithm of new_name here, in NumPy")
    yield


def test_new_name() -> None:
    check(optimizer(ef.new_name(ef.top_k(k=1), axis_name=AXIS)), oracle(START), residual="e")
