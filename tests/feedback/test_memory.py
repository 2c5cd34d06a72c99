"""How memories are kept is no business of a rule: every rule works with every storage.

The rules under test are made as always; what stands behind ``memory=None`` is replaced for them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._exchange import collectives
from ef_optax._rules import memory as module
from ef_optax.extend import Kept, Memory
from tests.feedback.rules import AXIS, EVERY, N, thinned, together
from tests.feedback.test_modes import by_hand, gradients, parameters

NOTHING = {"compressed_mean", "neolithic"}
"""Rules that remember nothing."""

PARAMETERS = {
    "MarinaState": {"last"},
    "PageState": {"last"},
    "StormState": {"last"},
    "IGTState": {"last"},
    "HessianMomentumState": {"last"},
    "ShardedOptimizerState": {"behind", "inner"},
}
"""Fields of states that are no memories: parameters, in their own dtype, and an optimizer's."""


@dataclasses.dataclass(frozen=True)
class Narrow(Memory):
    """What ``memory="bfloat16"`` gives."""

    dtype: Any = jnp.bfloat16


@functools.partial(jax.tree_util.register_dataclass, data_fields=["high", "low"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Halves(Kept):
    """A float32 as the sum of two bfloat16: the second is what the first rounds off."""

    high: jax.Array
    low: jax.Array

    def wide(self) -> jax.Array:
        return self.high.astype(jnp.float32) + self.low.astype(jnp.float32)

    def replaced(self, value: jax.Array, step: Any, worker: Any) -> Halves:
        return halves(value)


def halves(x: jax.Array) -> Halves:
    high = x.astype(jnp.bfloat16)
    return Halves(high, (x - high.astype(x.dtype)).astype(jnp.bfloat16))


class Split(Memory):
    """Keeps leaves that are no arrays."""

    def zeros(self, params: Any) -> Any:
        return jax.tree.map(halves, super().zeros(params))


class Uneven(Memory):
    """Adds to what is each worker's own something that differs between the workers."""

    def write(self, value: Any, kept: Any, step: Any, *, shared: bool = False) -> Any:
        assert step.dtype == jnp.int32 and step.shape == ()
        own = 0 if shared else collectives.axis_index(self.axis_name) * step
        return jax.tree.map(lambda x: x + jnp.asarray(own, x.dtype), value)


PLAIN = sorted(set(EVERY) - {"on_host"})
"""The rules whose memory is arrays; that of "on_host" is messages, which these storages replace."""


def use(monkeypatch: pytest.MonkeyPatch, storage: type[Memory]) -> None:
    monkeypatch.setattr(module, "Memory", storage)


def memories(state: Any) -> Iterator[tuple[str, Any]]:
    """Name and dtype of what the rules in a chain remember of one worker: exchanges are others'."""
    rules = tuple({getattr(ef.states, n) for n in ef.states.__all__} - {ef.states.ExchangeState})
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, rules)):
        if isinstance(node, rules):
            own = node._asdict()
            roles = getattr(node, "roles", {})
            optimizers = {field for field, role in roles.items() if role == "optimizer"}
            for field in optimizers | PARAMETERS.get(type(node).__name__, set()):
                own.pop(field)
            yield from memories(own.pop("outer", ()))  # a chain of its own
            exchange = lambda x: isinstance(x, ef.states.ExchangeState)  # noqa: E731
            for path, x in jax.tree_util.tree_leaves_with_path(own, is_leaf=exchange):
                if not exchange(x) and x.ndim and jnp.issubdtype(x.dtype, jnp.floating):
                    yield type(node).__name__ + jax.tree_util.keystr(path), x.dtype


@pytest.mark.parametrize("name", thinned(PLAIN))
def test_every_memory_is_kept_as_it_was_asked(name, monkeypatch) -> None:
    """In the state before the first step, and in the one after it, in a checked map."""
    use(monkeypatch, Narrow)
    params = {name: {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)}}
    tx = together([name])
    update, flags = by_hand(tx, params, check=True)
    own = jax.vmap(lambda _: EVERY[name]().init(params[name]), axis_name=AXIS, axis_size=N)
    made = dict(memories(jax.tree.map(first, jax.eval_shape(own, jnp.zeros(N)))))
    assert bool(made) != (name in NOTHING)
    assert set(made.values()) <= {jnp.dtype(jnp.bfloat16)}, made
    init = jax.vmap(lambda _: tx.init(params), axis_name=AXIS, axis_size=N)
    state = jax.tree.map(
        lambda x, own: x if own else first(x), jax.eval_shape(init, jnp.zeros(N)), flags
    )
    lead = lambda x: jax.ShapeDtypeStruct((N, *x.shape), x.dtype)  # noqa: E731
    _, after = jax.eval_shape(update, jax.tree.map(lead, params), state, params)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def first(x: Any) -> jax.ShapeDtypeStruct:
    """One worker's part of what all of them have."""
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


@pytest.mark.parametrize("name", thinned(PLAIN))
def test_what_all_workers_hold_alike_is_kept_alike(name, monkeypatch) -> None:
    """A storage that adds noise of each worker's own changes nothing of what is shared."""
    params = {name: {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)}}
    flags = ef.parallel.worker_axes(together([name]), params, AXIS, N)
    use(monkeypatch, Uneven)
    noisy = ef.parallel.worker_axes(together([name]), params, AXIS, N)
    assert jax.tree.leaves(noisy) == jax.tree.leaves(flags)


FEW = ["ef21", "error_feedback corrected"]


@pytest.mark.parametrize(
    ("storage", "rounding"),
    [(Narrow, 2**-8), pytest.param(Split, 2**-15, marks=pytest.mark.slow)],
    ids=["Narrow", "Split"],
)
@pytest.mark.parametrize(
    "names",
    [FEW, pytest.param(sorted(set(PLAIN) - set(FEW)), marks=pytest.mark.slow)],
    ids=["few", "others"],
)
def test_a_step_is_that_of_float32_but_for_what_is_rounded(
    names, storage, rounding, monkeypatch
) -> None:
    """From the same memories: equal updates, and new memories equal up to their rounding."""
    params = parameters(names)
    state, exact_step = in_float32(tuple(names))
    use(monkeypatch, storage)
    tested = ef.simulate(together(names), N, AXIS)
    kept, step = tested.init(params), jax.jit(tested.update)
    assert jax.tree.structure(kept) == jax.tree.structure(state) or storage is Split
    for t in range(3):
        grads = gradients(params, t)
        expected, state = exact_step(grads, state, params)
        updates, kept = step(grads, kept, params)
        close(updates, expected, 1e-5)
        read = jax.tree.map(opened, kept, state, is_leaf=is_kept)
        close(read, state, rounding)
        state = read


@functools.cache
def in_float32(names: tuple[str, ...]) -> tuple[Any, Any]:
    """The state and the compiled update of these rules, for all storages."""
    tx = ef.simulate(together(names), N, AXIS)
    return tx.init(parameters(names)), jax.jit(tx.update)


def is_kept(x: Any) -> bool:
    return isinstance(x, Kept)


def opened(kept: Any, exact: jax.Array) -> Any:
    return kept.wide() if is_kept(kept) else kept.astype(exact.dtype)


def close(found: Any, expected: Any, rounding: float) -> None:
    def one(path: Any, x: Any, y: Any) -> None:
        if jnp.issubdtype(y.dtype, jnp.floating):
            x, y, name = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
            np.testing.assert_allclose(x, y, rtol=rounding, atol=1e-6, err_msg=name)

    jax.tree_util.tree_map_with_path(one, found, expected)
