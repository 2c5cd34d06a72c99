"""Calls are traced once for equal objects and arguments, and never mixed up with others."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._core.once import traced_once

X = np.arange(4, dtype=np.float32)
traces: list[str] = []


@dataclasses.dataclass(frozen=True)
class Affine:
    """Says when it is traced."""

    factor: Any
    shift: Any = 0.0
    then: Callable[[Any], Any] | None = None

    def of(self, x):
        traces.append(type(self).__name__)
        y = self.factor * x + self.shift
        return y if self.then is None else self.then(y)

    def negative(self, x):
        return -self.of(x)


class Other(Affine):
    pass


@pytest.fixture(autouse=True)
def nothing_traced() -> None:
    traces.clear()


def test_equal_objects_share_a_trace_and_others_do_not() -> None:
    cases = [Affine(2.0, 3.0), Affine(3.0, 2.0), Other(2.0, 3.0), Affine(2, 3.0)]
    for _ in range(2):
        for one in cases:
            expected = np.float32(one.factor) * X + np.float32(one.shift)
            np.testing.assert_array_equal(traced_once(one.of, X), expected)
            np.testing.assert_array_equal(traced_once(one.negative, X), -expected)
    assert len(traces) == 2 * len(cases)
    traced_once(dataclasses.replace(cases[0]).of, X)
    assert len(traces) == 2 * len(cases)


def test_other_shapes_dtypes_and_precisions_are_other_traces() -> None:
    of = Affine(0.1).of
    for x in (X, X[:2], X.astype(np.float16)):
        assert traced_once(of, x).dtype == x.dtype
    with jax.enable_x64(True):
        double = traced_once(of, X.astype(np.float64))
    assert double.dtype == np.float64 and float(double[1]) == 0.1


def test_arrays_and_functions_of_an_object_are_its_own() -> None:
    """They are compared by identity, so one that is gone may not be taken for a later one."""

    @jax.jit
    def several(x):
        results = []
        for i in range(60):
            own = np.full(4, i, np.float32)
            results.append(traced_once(Affine(own, then=lambda y, i=i: y + i).of, x))
            del own
            gc.collect(0)
        return jnp.stack(results)

    i = np.arange(60, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(several(X), i * X + i)


def test_a_value_of_one_trace_is_not_kept_for_another() -> None:
    scaled = jax.jit(lambda x, factor: traced_once(Affine(factor).of, x))
    for factor in (2.0, 3.0):
        np.testing.assert_array_equal(scaled(X, factor), factor * X)
    assert len(traces) == 1, "the outer program is traced once"
    np.testing.assert_array_equal(jax.vmap(scaled, (None, 0))(X, X), X[:, None] * X)
    with jax.checking_leaks():
        jax.jit(lambda x, factor: traced_once(Affine(factor).of, x))(X, 4.0)


def test_compressors_of_different_settings_in_one_program() -> None:
    """As users do: equal leaves, sent by compressors that differ in one number or in the key."""
    x = np.random.default_rng(0).normal(size=40).astype(np.float32)

    def sent(compressor: ef.Compressor) -> np.ndarray:
        tx = ef.compressed_mean(compressor)
        return np.asarray(jax.jit(tx.update)(x, tx.init(x))[0])

    for k in (1, 2, 7):
        assert np.count_nonzero(sent(ef.top_k(k=k))) == k
    masks = [sent(ef.random_k(k=20, key=key)) != 0 for key in (0, 1, 0)]
    assert (masks[0] == masks[2]).all() and (masks[0] != masks[1]).any()
