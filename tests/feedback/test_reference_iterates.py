"""Iterates worked out by hand in exact arithmetic, for one worker: the library on every row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from tests.oracles.test_oracles import REFERENCE

RATE, CURVATURE = 0.1, np.array([1.0, 2.0, 3.0])  # f = (x1^2 + 2 x2^2 + 3 x3^2)/2 from (1, 1, 1)
STEPPED = np.array([0.1, 0.1, 0.05, 0.05])
TOP, SIGN, EXACT = ef.top_k(k=1), ef.scaled_sign(), ef.identity()


def stepped(count):
    return jnp.asarray(STEPPED)[jnp.minimum(count, 3)]


def before(rule):
    """A rule in gradient units."""
    return optax.chain(rule, optax.sgd(RATE))


RULES = {
    "ef14 u2 top-1": lambda: optax.chain(optax.sgd(RATE), ef.error_feedback(TOP)),
    "ef14 u2 scaled sign": lambda: optax.chain(optax.sgd(RATE), ef.error_feedback(SIGN)),
    "ef14 u2 scheduled": lambda: optax.chain(optax.sgd(stepped), ef.error_feedback(TOP)),
    "ef14 u3 scheduled": lambda: optax.chain(
        ef.error_feedback(TOP, learning_rate=stepped), optax.sgd(stepped)
    ),
    "ef14 u1 scheduled": lambda: optax.chain(ef.error_feedback(TOP), optax.sgd(stepped)),
    "ef_momentum": lambda: before(ef.ef_momentum(TOP, 0.5)),
    "dist-ef-sgdm": lambda: before(ef.dist_ef_sgdm(SIGN, RATE, momentum=0.5, server=EXACT)),
    "ef21": lambda: before(ef.ef21(TOP)),
    "ef21-hb": lambda: before(ef.ef21_heavy_ball(TOP, 0.5)),
    "ef21-sgdm": lambda: before(ef.ef21_momentum(TOP, 0.5)),
    "ef21-sgd2m": lambda: before(ef.ef21_double_momentum(TOP, 0.5)),
    "ef21-prox": lambda: ef.ef21_prox(TOP, ef.l1_prox(0.5), RATE),
    "dgc": lambda: before(ef.dgc(TOP, momentum=0.5)),
    "dgc without masking": lambda: before(ef.dgc(TOP, momentum=0.5, masking=False)),
    "dgc nesterov": lambda: before(ef.dgc(TOP, momentum=0.5, nesterov=True)),
    "ef21-p": lambda: optax.chain(optax.sgd(RATE), ef.ef21_p(TOP)),
    "injection 1/2": lambda: before(ef.error_feedback(TOP, injection=0.5)),
    "retention .9": lambda: before(ef.error_feedback(TOP, decay=0.9)),
    "ecq": lambda: before(ef.ecq_sgd(TOP, 0.5, 0.9)),
    "ef-bv": lambda: before(ef.ef_bv(TOP, 0.5, 1.0)),
}


def test_every_row_is_here():
    assert RULES.keys() == REFERENCE.keys()


@pytest.mark.parametrize("name", RULES)
def test_first_iterates(name):
    with jax.enable_x64(True):
        tx, x = RULES[name](), jnp.ones(3)
        state, got = tx.init(x), []
        for _ in REFERENCE[name][1]:
            updates, state = tx.update(jnp.asarray(CURVATURE) * x, state, x)
            x = optax.apply_updates(x, updates)
            # EF21-P's parameters are w; its row lists the server's model.
            got.append(x + state[1].behind if name == "ef21-p" else x)
    # The corrected form keeps the ratio of the rates in float32.
    tolerance = 2e-7 if name == "ef14 u3 scheduled" else 1e-12
    np.testing.assert_allclose(got, REFERENCE[name][1], rtol=tolerance, atol=tolerance)
