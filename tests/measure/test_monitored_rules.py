"""The statistics of every rule against NumPy, from what its exchanges take and give.

Beside the record, an exchange keeps the arrays themselves on a tape.
"""

from __future__ import annotations

import collections
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._exchange import monitored
from ef_optax.measure._records import monitored_exchanges
from tests.feedback.rules import AXIS, RULES, N, together

ROUNDS = 2
SHAPES = {"w": (4, 3), "b": (3,)}
GROUPS = 4
Taped = collections.namedtuple("Taped", (*ef.states.MonitorState._fields, "tape"))
Look = collections.namedtuple("Look", (*monitored.Look._fields, "tape"))


def record(patch: pytest.MonkeyPatch) -> None:
    """Exchanges keep the input, what was sent and the residual of their last step."""
    begin, look, seen, after = (
        getattr(monitored, name) for name in ("begin", "look", "seen", "after")
    )

    def taped_begin(tree: Any) -> Any:
        zeros = [jnp.zeros(x.shape, jnp.float32) for x in jax.tree.leaves(tree)]
        monitor = begin(tree)
        return Taped(*monitor, tape=(zeros, zeros, zeros)) if monitor else monitor

    def taped_seen(before: Any, leaves: Any, result: Any, known: Any, *rest: Any) -> Any:
        made = seen(before, leaves, result, known, *rest)
        results = (known[name] if name in known else result(name) for name in ("sent", "residual"))
        return made._replace(tape=(list(leaves), *results))

    def taped_after(monitor: Any, recorded: Any, *rest: Any, **options: Any) -> Any:
        return after(monitor, recorded, *rest, **options)._replace(tape=recorded[0].tape)

    patch.setattr(monitored, "begin", taped_begin)
    patch.setattr(monitored, "look", lambda m, step: Look(*look(m, step), tape=m.tape))
    patch.setattr(monitored, "seen", taped_seen)
    patch.setattr(monitored, "after", taped_after)


def gradients(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    return {k: jnp.asarray(rng.normal(size=(N, *s)), jnp.float32) for k, s in SHAPES.items()}


def run(names: tuple[str, ...]) -> Any:
    """The states of monitored rules after the last round, all in one program."""
    around = lambda tx: ef.monitor(tx, conservation=True)  # noqa: E731
    lifted = ef.simulate(together(names, around=around), N, AXIS)
    params = {name: {leaf: jnp.ones(shape) for leaf, shape in SHAPES.items()} for name in names}
    state, update = lifted.init(params), jax.jit(lifted.update)
    for step in range(ROUNDS):
        _, state = update(dict.fromkeys(names, gradients(step)), state, params)
    return jax.device_get(state)


def expected(tape: Any, size: Any, residual: Any) -> dict[str, float]:
    """The statistics by their definitions; sums are means over the workers.

    ``size`` has the entries of a leaf, which are fewer than those of a parameter for shards.
    """
    trees = [[np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in tape]
    sizes = [int(np.max(x)) for x in jax.tree.leaves(size)]

    def total(function: Any, *arrays: Any) -> float:
        rows = zip(sizes, *(arrays or trees), strict=True)
        return sum(d * float(np.mean(function(*xs))) for d, *xs in rows)

    p, c, error = (total(lambda *xs, i=i: xs[i] ** 2) for i in range(3))
    found = {
        "input_norm": math.sqrt(p),
        "message_norm": math.sqrt(c),
        "values_ratio": sum(sizes) / max(total(lambda _, c, r: c != 0), 1e-9),
    }
    if p:
        found |= {
            "relative_error": math.sqrt(error / p),
            "alpha_hat": 1 - error / p,
            "phi": total(lambda p, *_: np.abs(p)) ** 2 / (sum(sizes) * p),
            "conservation_error": math.sqrt(total(lambda p, c, r: (p - c - r) ** 2) / p),
        }
    if p and c:
        found["message_cosine"] = total(lambda p, c, r: p * c) / math.sqrt(p * c)
    memory = jax.tree.leaves(residual)
    if [x.size for x in memory] in ([N * d for d in sizes], sizes):  # plain arrays like the input
        found["residual_norm"] = math.sqrt(total(np.square, memory))
        found["residual_zeros"] = total(lambda x: x == 0, memory) / sum(sizes)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_the_statistics_are_those_of_what_was_exchanged(group: int) -> None:
    names = tuple(sorted(RULES))[group::GROUPS]
    with pytest.MonkeyPatch.context() as patch:
        record(patch)
        states = run(names)
    norm = math.sqrt(sum(float(np.sum(np.square(x))) for x in gradients(ROUNDS - 1).values()) / N)
    wrong, compared = [], 0
    for name in names:
        found = ef.measure.summary(states[name])
        exchanges = monitored_exchanges(states[name])
        assert exchanges, name
        for one in exchanges:
            monitor = one.state.monitor
            wanted = expected(monitor.tape, monitor.size, one.residual)
            later = re.match("[1-9]/", one.name)  # in a chain, this rule gets no gradient
            if not later and len(jax.tree.leaves(monitor.size)) == len(SHAPES):
                wanted["gradient_norm"] = norm
            for key, value in wanted.items():
                full = f"{one.name}/{key}" if one.name else key
                if key == "values_ratio" and full not in found:
                    assert not wanted["message_norm"]
                    continue
                compared += 1
                if found[full] != pytest.approx(value, rel=2e-5, abs=1e-5):
                    wrong.append(f"{name}: {full} is {found[full]}, not {value}")
    assert not wrong, "\n".join(wrong)
    assert compared > 8 * len(names)
