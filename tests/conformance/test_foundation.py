"""Cases that other systems' tests assert, or that break in those systems, restated as facts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conformance.adapter import EfOptax


@pytest.fixture(scope="module")
def library() -> EfOptax:
    return EfOptax()


@pytest.mark.parametrize(("count", "size"), [(0, 0), (6, 9), (8, 12), (100, 150)])
def test_01_twelve_bit_indices(library: EfOptax, count: int, size: int) -> None:
    indices = np.arange(count) * 41 % 4096
    if count:
        indices[0], indices[-1] = 0, 4095
    data = library.pack_indices(indices, 12)
    assert len(data) == size
    np.testing.assert_array_equal(library.unpack_indices(data, 12, count), indices)


@pytest.mark.parametrize("indices", [[4096, 0], [1, 2, 3], [-1, 0]])
def test_01_what_does_not_fit_is_refused(library: EfOptax, indices: list[int]) -> None:
    with pytest.raises(ValueError, match="odd"):
        library.pack_indices(indices, 12)


def test_03_one_bit_values(library: EfOptax) -> None:
    assert library.sign_words([0.0, np.inf, -0.0, -np.inf, 1e-30, -1e-30]).tolist() == [0b010111]


def test_03_index_width_is_the_narrowest_that_fits(library: EfOptax) -> None:
    for bits, top in ((8, 255), (16, 65535), (32, 2**32 - 1)):
        data = library.pack_indices([0, top], bits)
        assert len(data) == 2 * bits // 8
        assert library.unpack_indices(data, bits, 2).tolist() == [0, top]


def test_15_top_half(library: EfOptax) -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    assert library.compress("top_k", x, ratio=0.5).tolist() == [0, 0, 3, 4]
    mean = library.mean_of_workers("top_k", [x, x[::-1]], ratio=0.5)
    assert (2 * mean).tolist() == [4, 3, 3, 4]


def test_16_top_half_is_by_magnitude(library: EfOptax) -> None:
    x = [1.0, 2, 3, 4, 5, 6, 7, -8]
    assert library.compress("top_k", x, ratio=0.5).tolist() == [0, 0, 0, 0, 5, 6, 7, -8]


def test_16_scaled_random_k_is_unbiased(library: EfOptax) -> None:
    x = np.asarray([1.0, 2, 3, 4, 5, 6, 7, -8])
    rows = np.tile(x, (1000, 1))  # a thousand workers, a thousand masks
    mean = library.mean_of_workers("random_k", rows, ratio=0.5, key=0, scaled=True)
    # the standard error of the mean of 1000 draws is |x| / sqrt(1000)
    assert (np.abs(mean - x) <= 5 * np.abs(x) / np.sqrt(1000)).all()
    assert np.abs(mean - x).mean() < 0.1 * np.abs(x).mean()


@pytest.mark.parametrize("step_units", [False, True])
def test_17_identity_takes_exactly_the_sgd_step(library: EfOptax, step_units: bool) -> None:
    tx = library.optimizer("identity", 0.5, step_units=step_units)
    g = jnp.asarray([2.0, -4.0])
    state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(g, state, jnp.zeros(2))
        assert updates.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("rule", ["ef21", "ef21_plus"])
def test_17_identity_takes_exactly_the_sgd_step_in_ef21_too(library: EfOptax, rule: str) -> None:
    """-lr g once, not lr twice, with the full first message, also when the gradient changes."""
    tx = library.rule(rule, 0.5, "identity", init="full")
    state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    for g in ([2.0, -4.0], [2.0, -4.0], [1.0, 8.0]):
        updates, state = update(jnp.asarray(g), state, jnp.zeros(2))
        assert updates.tolist() == [-0.5 * x for x in g]


def test_27_the_rate_drops_by_ten(library: EfOptax) -> None:
    """The residual is rescaled: the update is lr_t C(g + (lr_{t-1}/lr_t) e) at every step."""
    rates = [1.0, 1.0, 0.1, 0.1]
    tx = library.corrected("top_k", lambda t: jnp.asarray(rates)[t], k=1)
    state, update, e = tx.init(jnp.zeros(3)), jax.jit(tx.update), np.zeros(3)
    for t, rate in enumerate(rates):
        g = np.asarray([3.0, 2.0, 1.0]) * (t + 1)
        p = g + (rates[max(t - 1, 0)] / rate) * e
        sent = np.where(np.arange(3) == np.argmax(np.abs(p)), p, 0.0)
        e = p - sent
        updates, state = update(jnp.asarray(g, jnp.float32), state, jnp.zeros(3))
        np.testing.assert_allclose(updates, -rate * sent, rtol=1e-6)
    assert np.max(np.abs(e)) > 10  # the residual did grow tenfold when the rate fell


def test_19_the_first_step_in_step_units_is_already_scaled(library: EfOptax) -> None:
    tx = library.optimizer("scaled_sign", 0.25, step_units=True)
    update = jax.jit(tx.update)
    updates, _ = update(jnp.asarray([4.0, -4.0]), tx.init(jnp.zeros(2)), jnp.zeros(2))
    assert updates.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_21_one_bad_gradient_on_one_worker(library: EfOptax, bad: float) -> None:
    from ef_optax import error_feedback, top_k

    tx = library.workers(error_feedback(top_k(0.5), axis_name="w"), 2)
    x = jnp.zeros(4)
    good = [jnp.asarray([[1.0, 2, 3, 4], [4, 3, 2, 1]]) * s for s in (1.0, -0.5)]
    poison = good[0].at[1, 2].set(bad)
    clean, dirty = tx.init(x), tx.init(x)
    clean_updates, dirty_updates = [], []
    for g in (good[0], good[1]):
        u, clean = tx.update(g, clean, x)
        clean_updates.append(u)
    for g in (good[0], poison, good[1]):
        u, dirty = tx.update(g, dirty, x)
        dirty_updates.append(u)
    assert (np.asarray(dirty_updates[1]) == 0).all()
    np.testing.assert_array_equal([dirty_updates[0], dirty_updates[2]], clean_updates)
    np.testing.assert_array_equal(dirty.residual, clean.residual)


def test_22_selection_is_by_magnitude_on_negative_gradients(library: EfOptax) -> None:
    assert library.compress("top_k", [-1.0, -5, -2, -4], k=2).tolist() == [0, -5, 0, -4]
    kept = library.compress("threshold", [-1.0, -5, -2, -4], value=3.0, capacity=1.0)
    assert kept.tolist() == [0, -5, 0, -4]


def test_23_random_k_of_two_leaves(library: EfOptax) -> None:
    """Different indices for leaves "ab" and "ba"; no repeats; the global random state untouched."""
    from ef_optax import random_k

    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    compressor = random_k(0.25, 7)
    tree = {"ab": jnp.ones(64), "ba": jnp.ones(64)}
    update = jax.jit(compressor.update)
    out, state = update(tree, compressor.init(tree))
    chosen = {name: set(np.flatnonzero(v)) for name, v in out.items()}
    assert chosen["ab"] != chosen["ba"]
    assert len(chosen["ab"]) == len(chosen["ba"]) == 16
    again, _ = update(tree, state)
    assert set(np.flatnonzero(again["ab"])) != chosen["ab"]  # and different from step to step
    np.testing.assert_array_equal(np.random.get_state()[1], before)
