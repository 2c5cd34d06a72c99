"""FetchSGD: memories inside the server's sketch, against NumPy."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax.compressors.sparse.count_sketch import hashes
from tests.feedback.problem import AXIS, GAMMA, GRADS, LEAVES, SIZES, START, optimizer, run
from tests.oracles import iterates, two_sided

ROWS, COLUMNS, KEY = 3, 5, 4


def hash_tables(rows=ROWS, columns=COLUMNS):
    """Buckets and signs of the seven coordinates, as drawn for the two leaves."""
    drawn = [
        hashes(jax.random.fold_in(jax.random.key(KEY), zlib.crc32(name.encode())), rows, columns, d)
        for name, d in zip(LEAVES, SIZES, strict=True)
    ]
    buckets, signs = zip(*drawn, strict=True)
    return np.concatenate(buckets, axis=1), np.concatenate(signs, axis=1)


def rule(**options):
    return ef.fetch_sgd(ROWS, COLUMNS, key=KEY, axis_name=AXIS, **options)


@pytest.mark.parametrize("clear", ["zero", "subtract"])
def test_fetch_sgd(clear):
    """Five cells for seven coordinates: the collisions are part of what is compared."""
    made = rule(k=2, momentum=0.5, clear=clear)
    bucket, sign = hash_tables()
    assert any(len(np.unique(row)) < 7 for row in bucket)
    oracle = two_sided.fetch_sgd(GRADS, bucket, sign, COLUMNS, 2, START, GAMMA, 0.5, clear)
    got = run(optimizer(made))
    steps = [next(oracle) for _ in range(20)]
    np.testing.assert_allclose(got.x, [s.x for s in steps], rtol=1e-12, atol=1e-12)
    for field, name in (("momentum", "S_u"), ("error", "S_e")):
        value = getattr(got.state[0], field)
        np.testing.assert_allclose(value, [getattr(s, name) for s in steps], atol=1e-12)


def test_without_collisions_and_with_all_coordinates_it_is_gradient_descent():
    made = ef.fetch_sgd(5, 4096, 1.0, momentum=0.0, key=KEY, axis_name=AXIS)
    x, descent = START, []
    for _ in range(20):
        x = x - GAMMA * np.mean([g(x) for g in GRADS], axis=0)
        descent.append(x)
    np.testing.assert_allclose(run(optimizer(made)).x, descent, atol=1e-12)


def test_without_collisions_it_is_error_feedback_on_the_mean_gradient():
    """The virtual error is the mean of the workers' residuals: EF14 of one worker."""
    from tests.oracles import compress, ef14

    made = ef.fetch_sgd(5, 4096, k=2, momentum=0.0, clear="subtract", key=KEY, axis_name=AXIS)
    mean = [lambda x: np.mean([g(x) for g in GRADS], axis=0)]
    oracle = ef14.gradient_units(mean, compress.top_k(2), START, lambda t: GAMMA)
    np.testing.assert_allclose(run(optimizer(made)).x, iterates(oracle, 20), atol=1e-11)


def test_the_workers_remember_nothing():
    lifted = optimizer(rule(k=1))
    flags = lifted.worker_axes({"a": jnp.zeros(3), "b": jnp.zeros((2, 2))})
    assert not any(jax.tree.leaves(flags))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ef.fetch_sgd(0, 8, k=1), ValueError, "rows=0"),
        (lambda: ef.fetch_sgd(3, 0, k=1), ValueError, "columns=0"),
        (lambda: ef.fetch_sgd(3, 8), ValueError, "exactly one"),
        (lambda: ef.fetch_sgd(3, 8, k=1, momentum=1.0), ValueError, "momentum=1.0"),
        (lambda: ef.fetch_sgd(3, 8, k=1, clear="all"), ValueError, "clear='all'"),
        (lambda: ef.fetch_sgd(3, 8, k=1, key="no"), TypeError, "random key"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
