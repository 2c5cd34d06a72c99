"""The record of exchanges of every kind against NumPy, from what they take and give.

A twin without a monitor has a tape in its place: the arrays themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._exchange.exchange import Exchange
from ef_optax.measure._records import monitored_exchanges, sums
from ef_optax.parallel import exchange_states
from tests.feedback.rules import AXIS, RULES, N, side_by_side

ROUNDS = 2
SHAPES = {"w": (4, 3), "v": (3, 4), "b": (3,)}

KINDS = {
    "a residual": ("error_feedback", "dgc", "econtrol", "scheduled"),
    "a residual and two exchanges": ("double_squeeze",),
    "an estimate": ("ef21 zero", "ef21_double_momentum", "diana"),
    "no memory": ("compressed_mean", "neolithic"),
    "a protocol of its own": ("acp_sgd", "fetch_sgd", "global_top_k", "two_shot"),
}
"""The kinds of rules by what they want of an exchange, and of codecs by how they are called."""

NAMES = tuple(name for names in KINDS.values() for name in names)


class Tape(NamedTuple):
    """Stands where a monitored exchange has its record; no tree is like its ``size``."""

    size: None
    p: Any
    c: Any
    r: Any


def record(tape: pytest.MonkeyPatch) -> None:
    """Exchanges keep what went in and came out in the last step."""
    init, call = Exchange.init, Exchange.__call__

    def taped_init(self: Exchange, tree: Any) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)
        return init(self, tree)._replace(monitor=Tape(None, zeros, zeros, zeros))

    def taped_call(self: Exchange, tree: Any, state: Any, *, want: Any = (), **options: Any) -> Any:
        wanted = tuple(dict.fromkeys((*want, "sent", "residual")))
        out = call(self, tree, state, want=wanted, **options)
        if jax.tree.structure(tree) != jax.tree.structure(state.monitor.p):
            return out
        tape = Tape(None, tree, out.sent, out.residual)
        return out._replace(state=out.state._replace(monitor=tape))

    tape.setattr(Exchange, "init", taped_init)
    tape.setattr(Exchange, "__call__", taped_call)


def run(around: Any = lambda tx: tx) -> Any:
    tx = side_by_side({name: around(RULES[name]()) for name in NAMES})
    lifted = ef.simulate(tx, N, AXIS)
    params = {name: {leaf: jnp.ones(shape) for leaf, shape in SHAPES.items()} for name in NAMES}
    state, update = lifted.init(params), jax.jit(lifted.update)
    for step in range(ROUNDS):
        rng = np.random.default_rng(step)
        own = {k: jnp.asarray(rng.normal(size=(N, *s)), jnp.float32) for k, s in SHAPES.items()}
        _, state = update(dict.fromkeys(NAMES, own), state, params)
    return state


@pytest.mark.slow
def test_the_record_is_that_of_what_was_exchanged() -> None:
    with pytest.MonkeyPatch.context() as tape:
        record(tape)
        tapes = [x.monitor for x in exchange_states(run())]
    found = monitored_exchanges(run(ef.monitor))
    assert len(tapes) == len(found) > len(NAMES)
    for tape, one in zip(tapes, found, strict=True):
        rows = sums(one)
        for i, arrays in enumerate(zip(*(jax.tree.leaves(x) for x in tape[1:]), strict=True)):
            p, c, r = (np.asarray(x, np.float64) for x in arrays)
            total = lambda x, d=int(rows["size"][i]): d * np.mean(x)  # noqa: E731  # a worker's
            wanted = {
                "input": total(p * p),
                "input_magnitudes": total(np.abs(p)),
                "message": total(c * c),
                "product": total(p * c),
                "error": total(r * r),
                "message_nonzeros": total(c != 0),
                "error_zeros": total(r == 0),
            }
            for name, value in wanted.items():
                assert float(rows[name][i]) == pytest.approx(value, rel=2e-5, abs=1e-5), (
                    one.name,
                    name,
                )
