"""What the rules share: arithmetic on trees, differences, the first step, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from ef_optax import _collectives as coll
from ef_optax._base import Array, wide_dtype
from ef_optax._exchange import Exchange, ExchangeState
from ef_optax.compressors.identity import Identity

Init = Literal["compressed", "full", "zero"]
INITS = ("compressed", "full", "zero")


# ---------------------------------------------------------------------------- trees


def zeros(params: Any) -> Any:
    """Zeros like ``params``, in float32 at the least: the memories of a rule."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(jnp.result_type(p))), params)


def several_zeros(params: Any, count: int) -> list[Any]:
    """Several :func:`zeros`, each with buffers of its own, so that a state may be donated."""
    return [zeros(params) for _ in range(count)]


def wide(tree: Any) -> Any:
    """The tree in float32 at the least: what the arithmetic of a rule is done in."""
    return jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), tree)


def add(a: Any, b: Any) -> Any:
    """``a + b``, in the dtype of a."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), a, b)


def sub(a: Any, b: Any) -> Any:
    """``a - b``, in the dtype of a."""
    return jax.tree.map(lambda x, y: x - y.astype(x.dtype), a, b)


def scale(factor: Any, a: Any) -> Any:
    """``factor * a`` for a Python number or a scalar array, in the dtype of a."""
    return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, a)


def axpy(factor: Any, a: Any, b: Any) -> Any:
    """``factor * a + b``, in the dtype of b."""
    return add(b, scale(factor, a))


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the scalar condition holds, else ``b``."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y.astype(x.dtype)), a, b)


def squared_norm(a: Any) -> Array:
    """The sum of squares over all leaves."""
    return optax.tree.norm(a, squared=True)


def emit(aggregate: Any, updates: Any) -> Any:
    """The aggregate in the dtype of the updates that came in."""
    return jax.tree.map(lambda c, g: c.astype(g.dtype), aggregate, updates)


def value_at(rate: optax.ScalarOrSchedule, count: Array) -> Any:
    """A number, or a schedule's value at this step."""
    return rate(count) if callable(rate) else rate


# ---------------------------------------------------------------------------- differences


def track(
    exchange: Exchange,
    target: Any,
    estimate: Any,
    mean: Any,
    state: ExchangeState,
    *,
    share: Array | None = None,
    present: Array | None = None,
) -> tuple[Any, Any, ExchangeState]:
    """``c_i = C(target_i - g_i)``; ``g_i <- g_i + c_i``; ``g <- g + mean_i c_i``.

    Args:
      exchange: how the differences travel.
      target: what this worker's estimate is to follow.
      estimate: g_i.
      mean: g.
      state: the exchange's state.
      share: this worker's weight in the mean (None: one).
      present: 1 if this worker takes part in this step, else 0 (None: it does).

    Returns:
      The next g_i, the next g, the next state of the exchange.
    """
    weight = _product(share, present)
    out = exchange(sub(target, estimate), state, weight=weight, want=("sent",))
    own = out.sent if present is None else scale(present, out.sent)
    return add(estimate, own), add(mean, out.aggregate), out.state


def start(
    init: Init,
    exchange: Exchange,
    target: Any,
    estimate: Any,
    mean: Any,
    state: ExchangeState,
    *,
    share: Array | None = None,
    present: Array | None = None,
    later: Callable[[], tuple[Any, Any, ExchangeState]] | None = None,
) -> tuple[Any, Any, ExchangeState]:
    """:func:`track` (or ``later``), with another first step if ``init`` asks for one.

    ``"compressed"`` starts from ``g_i = 0``, so that ``g_i^0 = C(target)``; ``"full"`` sends the
    first target dense; ``"zero"`` sends nothing at first (but one number that tells whether all is
    finite) and keeps ``g_i^0 = 0``.
    """

    def ordinary() -> tuple[Any, Any, ExchangeState]:
        if later is not None:
            return later()
        return track(exchange, target, estimate, mean, state, share=share, present=present)

    def full() -> tuple[Any, Any, ExchangeState]:
        dense = Exchange(Identity(), exchange.axis_name)
        bare = state._replace(codec=())
        own, aggregate, after = track(
            dense, target, estimate, mean, bare, share=share, present=present
        )
        return own, aggregate, after._replace(codec=state.codec)

    def zero() -> tuple[Any, Any, ExchangeState]:
        _, after = silent(exchange, target, state._replace(codec=()))
        return estimate, mean, after._replace(codec=state.codec)

    if init == "compressed":
        return ordinary()
    return first_step(exchange, state, full if init == "full" else zero, ordinary)


def _product(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a * b


def send_dense(exchange: Exchange, tree: Any, state: ExchangeState) -> tuple[Any, ExchangeState]:
    """The mean of the trees themselves, over the same workers and with the same state."""
    out = Exchange(Identity(), exchange.axis_name)(tree, state._replace(codec=()))
    return out.aggregate, out.state._replace(codec=state.codec)


LONE = "(alone)"
"""The path of an array that travels for itself; no parameter has this name."""


def lone(x: Array) -> dict[str, Array]:
    """An array that is not a leaf of the parameters, as a tree to exchange."""
    return {LONE: x}


def silent_init(exchange: Exchange) -> ExchangeState:
    """The state of :func:`silent`."""
    return Exchange(Identity(), exchange.axis_name).init(lone(jnp.zeros((), jnp.float32)))


def silent(exchange: Exchange, tree: Any, state: ExchangeState) -> tuple[Any, ExchangeState]:
    """Sends nothing of ``tree`` but one number, so that all workers skip a bad step together.

    Returns:
      Zeros like ``tree`` that are the same on all workers (by type too), and the next state.
    """
    beat = sum(jnp.sum(x * 0).astype(jnp.float32) for x in jax.tree.leaves(tree))
    out = Exchange(Identity(), exchange.axis_name)(lone(jnp.asarray(beat, jnp.float32)), state)
    zero = out.aggregate[LONE]
    return jax.tree.map(lambda x: jnp.broadcast_to(zero.astype(x.dtype), x.shape), tree), out.state


def first_step(
    exchange: Exchange, state: ExchangeState, first: Callable[[], Any], later: Callable[[], Any]
) -> Any:
    """``first()`` at the first exchange, ``later()`` at all others; only one of them is paid."""
    return coll.agreed_cond(state.count == 0, first, later, axis=exchange.axis_name)


# ---------------------------------------------------------------------------- workers


def own_share(rule: str, weights: Sequence[float], axis_name: coll.AxisName) -> Array:
    """``n w_i`` of this worker, in float32: the number that travels with its message."""
    n = coll.axis_size(axis_name)
    if len(weights) != n:
        raise ValueError(
            f"{rule}: weights has {len(weights)} numbers, but axis {axis_name!r} has {n} workers; "
            "give one weight for each."
        )
    return jnp.asarray([n * w for w in weights], jnp.float32)[coll.axis_index(axis_name)]


def draw(key: Array, count: Array, axis_name: coll.AxisName, *, shared: bool = False) -> Array:
    """This step's key; the same on all workers if ``shared``, else each worker's own."""
    key = jax.random.fold_in(key, count)
    return key if shared else jax.random.fold_in(key, coll.axis_index(axis_name))


# ---------------------------------------------------------------------------- refusals


def check_shares(rule: str, weights: Sequence[float]) -> None:
    """Refuses weights that are not positive or do not sum to 1."""
    total = math.fsum(weights)
    if not all(w > 0 for w in weights) or abs(total - 1) > 1e-6:
        raise ValueError(
            f"{rule}: weights={tuple(weights)!r} must be positive and sum to 1 (they sum to "
            f"{total}); ef_optax.theory.weights(constants) makes them from smoothness constants."
        )


def require_params(rule: str, params: Any) -> Any:
    """Refuses an update without parameters."""
    if params is None:
        raise ValueError(f"{rule}: params=None; pass the parameters: update(grads, state, params).")
    return params


def gradient_at(rule: str, name: str, extra_args: Any) -> Any:
    """The gradient at one of the rule's own points, from the extra argument ``grads``."""
    grads = extra_args.get("grads")
    if not isinstance(grads, dict) or name not in grads:
        raise ValueError(
            f"{rule}: needs the gradient at {name!r} on this step's batch. Take gradients at "
            "ef_optax.query_points(opt_state, params) and call "
            "update(grads['params'], state, params, grads=grads)."
        )
    return grads[name]
