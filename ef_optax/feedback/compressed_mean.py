"""The exchange without any memory, with which error feedback is compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from ef_optax.extend import (
    AxisName,
    Compressor,
    ExchangeState,
    as_transformation,
    exchange_for,
    wide_dtype,
)


class CompressedMeanState(NamedTuple):
    """State of :func:`compressed_mean`."""

    exchange: ExchangeState


def compressed_mean(
    compressor: Compressor, *, axis_name: AxisName = None, update_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The mean over workers of ``C(g_i)``; what compression drops is lost.

    It is the baseline that shows why error feedback is needed: with a biased compressor it stalls
    or diverges. With ``ef.identity()`` it is plain data parallelism.

    Args:
      compressor: what is sent.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      update_dtype: dtype of the emitted updates; by default that of the input.

    Returns:
      The transformation; its state is a :class:`CompressedMeanState`, the same on all workers.

    Raises:
      TypeError: if ``compressor`` is not a Compressor.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.simulate(ef.compressed_mean(ef.top_k(k=1), axis_name="w"), 2, "w")
      >>> grads = jnp.array([[1.0, 2.0], [4.0, 3.0]])  # one row a worker
      >>> tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2))[0].tolist()
      [2.0, 1.0]
    """
    exchange = exchange_for("compressed_mean", compressor, axis_name)

    def init_fn(params: Any) -> CompressedMeanState:
        return CompressedMeanState(exchange.init(params))

    def update_fn(
        updates: Any, state: CompressedMeanState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, CompressedMeanState]:
        del params, extra_args
        wide = jax.tree.map(lambda g: g.astype(wide_dtype(g.dtype)), updates)
        out = exchange(wide, state.exchange)
        emitted = jax.tree.map(
            lambda c, g: c.astype(update_dtype or g.dtype), out.aggregate, updates
        )
        return emitted, CompressedMeanState(out.state)

    return as_transformation(init_fn, update_fn)
