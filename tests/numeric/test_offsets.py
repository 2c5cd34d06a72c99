"""Pieces of equal size are cut out by one program, and the program does not grow with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from benchmarks.compile_time import kernels_of
from ef_optax._bits.fields import from_words, pack, to_words
from ef_optax._numeric.offsets import as_data, starts
from tests.programs import compiled


def different_kernels(fun, *arguments) -> int:
    return len(kernels_of(compiled(jax.jit(fun).lower(*arguments)).as_text()))


@pytest.mark.parametrize("runtime", [0, 1, -1, 7, 2**31 - 1])
def test_data_are_the_integers_whatever_the_scalar(runtime: int) -> None:
    values = [0, 5, 2**31 - 1]
    got = jax.jit(lambda w: as_data(values, w))(jnp.int32(runtime))
    assert [int(x) for x in got] == values
    assert all(x.dtype == jnp.int32 for x in got)


def test_starts_are_data_only_where_something_is_shared() -> None:
    known = []

    def run(runtime):
        where = starts([3, 4, 3, 0, 0], "abacc", runtime)
        known.append([isinstance(x, int) for x in where])
        return where

    assert [int(x) for x in jax.jit(run)(jnp.int32(3))] == [0, 3, 7, 10, 10]
    assert known == [[False, True, False, True, True]]
    too_large = jax.eval_shape(lambda w: jnp.zeros(len(set(starts([2**30] * 3, "aaa", w)))), 0)
    assert too_large.shape == (3,)
    for runtime in (None, jnp.int32(3)):  # outside jit nothing is compiled as a whole
        assert starts([3, 4, 3], "aba", runtime) == [0, 3, 7]


def test_pieces_of_equal_size_share_a_kernel() -> None:
    sizes = [5, 8, 5, 5, 8, 5, 5, 8]
    x = jnp.arange(float(sum(sizes)))

    def cut(x, runtime):
        where = starts(sizes, sizes, runtime)
        return [jax.lax.dynamic_slice_in_dim(x, w, s) for w, s in zip(where, sizes, strict=True)]

    wanted = np.split(np.asarray(x), np.cumsum(sizes)[:-1])
    jax.tree.map(np.testing.assert_array_equal, jax.jit(cut)(x, jnp.int32(0)), wanted)
    shared = different_kernels(cut, x, jnp.int32(0))
    assert shared <= 2 + 1  # one a size, and the condition's predicate
    assert different_kernels(lambda x: cut(x, None), x) == len(sizes)


def test_fields_are_read_back_with_a_run_time_scalar() -> None:
    message = [
        pack(jnp.arange(40) % 2, 1),
        jnp.arange(3.0),
        pack(jnp.arange(40) % 3 % 2, 1),
        jnp.arange(3.0) - 7,
        pack(jnp.arange(5), 3),
        jnp.arange(3, dtype=jnp.bfloat16),
        jnp.zeros((0,), jnp.float32),
    ]
    words = to_words(message)
    got = jax.jit(lambda w: from_words(w, message, w[0]))(words)
    jax.tree.map(np.testing.assert_array_equal, got, message)


def tree(layers: int):
    one = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(40)}
    return [one] * layers


@pytest.mark.parametrize(
    "make",
    [
        ef.scaled_sign,
        pytest.param(lambda: ef.power_sgd(2), marks=pytest.mark.slow),
        pytest.param(lambda: ef.top_k(0.1), marks=pytest.mark.slow),
    ],
    ids=["sign", "power_sgd", "top_k"],
)
def test_the_different_kernels_of_a_step_do_not_grow_with_the_layers(make) -> None:
    tx = ef.error_feedback(make())
    few, many = (different_kernels(tx.update, t, tx.init(t)) for t in (tree(4), tree(16)))
    assert many <= few + 3  # reductions over more leaves may take one more step
