"""Variance-based compression (Tsuzuku et al. 2018): ambiguous coordinates are sent later.

r = r + g ;  v = v + sum_z (g_z / B)^2        over the B samples of this worker's batch
if r^2 > alpha v:  send r ;  r = 0 ;  v = 0
else:              v = zeta v
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    AxisName,
    Exchange,
    ExchangeState,
    MemoryLike,
    ThresholdCodec,
    as_transformation,
    check,
    magnitude_order,
    memory_for,
    resolve_k,
    trees,
)


class VarianceBasedState(NamedTuple):
    """State of :func:`variance_based`."""

    residual: Any  # per worker, like the parameters: r
    variance: Any  # per worker, like the parameters: v
    exchange: ExchangeState


@dataclasses.dataclass(frozen=True)
class NonZero(ThresholdCodec):
    """The entries that are not zero; at most the share ``capacity``, then the largest ones."""

    capacity: float

    def count(self, size: int) -> int:
        return resolve_k(self.capacity, None, size)

    def border(self, flat: Array) -> Array:
        return jnp.ones((), magnitude_order(flat[:0]).dtype)


def variance_based(
    alpha: float,
    *,
    capacity: float,
    decay: float = 0.999,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sends a coordinate once its accumulated gradient is large compared to its variance.

    .. math:: r' = r + g, \quad v' = v + \sum_{z=1}^{B} (g_z / B)^2, \quad
              c = r' \odot [r'^2 > \alpha v'], \quad r'' = r' - c, \quad
              v'' = \zeta\, v' \odot [\text{not sent}], \quad \text{emit mean}_i\,c_i

    Here g is the mean of the gradients g_z of the samples of this worker's batch. Nothing is lost:
    the sum of all c plus r is the sum of all g. A gradient transformation does not see single
    samples, so the update takes one more argument, ``squares``: for each leaf the sum of
    ``(g_z / B)^2``. With several workers every worker has its own,
    ``squares=ef.PerWorker(squares)``, and the lift needs an example of one worker's:
    ``data_parallel(..., extra_args={"squares": params})``.

    The data decide how many coordinates pass, and how long the published message is. Here the
    message has a fixed capacity: if more than c = ceil(capacity d) coordinates pass, the c largest
    are sent. The others wait, with their variance, as if they had not passed. Values travel
    unchanged. (The publication rounds them to powers of two in four bits, which is not part of
    this rule.)

    Args:
      alpha: how unambiguous a coordinate must be, > 0; with a larger one less is sent.
      capacity: the most values that a message holds, as a share of the leaf in (0, 1].
      decay: zeta in (0, 1], the factor of the unsent coordinates' variance in each step; 0.999 in
        public code, not verified against the publication.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which residual and variance are stored, as in :func:`error_feedback`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is a
      :class:`VarianceBasedState`. Bits: 32 + c (32 + ceil(log2 d)), where the first word is the
      number of values that passed.

    Raises:
      ValueError: for an argument out of range; at update, if ``squares`` is missing.

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> samples = np.float32([[3.0, 4.0], [3.0, -2.0]])  # gradients of two samples
      >>> squares, g = np.sum((samples / len(samples)) ** 2, axis=0), samples.mean(0)
      >>> tx = ef.variance_based(1.0, capacity=0.5, decay=0.5)
      >>> updates, state = jax.jit(tx.update)(g, tx.init(g), squares=squares)
      >>> updates.tolist()  # 3^2 > 4.5, but 1^2 < 5
      [3.0, 0.0]
      >>> state.residual.tolist(), state.variance.tolist()
      ([0.0, 1.0], [0.0, 2.5])

    References:
      Tsuzuku, Imachi, Akiba, "Variance-based gradient compression for efficient distributed deep
      learning", 2018 (of which only the introduction was read: see docs/definitions.md).
    """
    check.positive("variance_based", "alpha", alpha)
    check.ratio("variance_based", "capacity", capacity)
    check.weight("variance_based", "decay", decay)
    exchange = Exchange(NonZero(float(capacity)), axis_name)
    memory = memory_for(memory, axis_name)

    def unambiguous(r: Array, v: Array) -> Array:
        ambiguous = r * r <= jnp.asarray(alpha, r.dtype) * v
        # Zero times v is NaN if the variance is not finite, so that all workers see it in the sum.
        return jnp.where(ambiguous, 0, r) + 0 * v

    def init_fn(params: Any) -> VarianceBasedState:
        r, v = memory.zeros(params), memory.zeros(params)
        return VarianceBasedState(residual=r, variance=v, exchange=exchange.init(memory.read(r)))

    def update_fn(
        updates: Any,
        state: VarianceBasedState,
        params: Any = None,
        *,
        squares: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, VarianceBasedState]:
        del params, extra_args
        _check_squares(squares, updates)
        r, v = memory.read((state.residual, state.variance))
        r, v = trees.add(r, updates), trees.add(v, squares)
        levels = jax.tree.map(unambiguous, r, v)
        out = exchange(levels, state.exchange, want=("support",))
        waiting = jax.tree.map(lambda x, sent: jnp.where(sent, 0, x), r, out.support)
        forgotten = trees.scale(decay, v)
        kept = jax.tree.map(lambda x, sent: jnp.where(sent, 0, x), forgotten, out.support)
        after = VarianceBasedState(
            residual=memory.write(waiting, state.residual, out.state.step),
            variance=memory.write(kept, state.variance, out.state.step),
            exchange=out.state,
        )
        return trees.emit(out.aggregate, updates), after

    return as_transformation(init_fn, update_fn)


def _check_squares(squares: Any, updates: Any) -> None:
    """Refuses an update without the samples' squares, or with squares of other shapes."""
    remedy = (
        "give, for each leaf, the sum over the B samples of (gradient of the sample / B)^2: "
        "update(grads, state, params, squares=squares), or squares=ef.PerWorker(squares) to a "
        "lifted transformation."
    )
    if squares is None:
        raise ValueError(f"variance_based: squares=None; {remedy}")
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (squares, updates)]
    # Leaves are compared, because the nodes that Optax substitutes for parameters are never equal.
    if [*map(jnp.shape, jax.tree.leaves(squares))] != [*map(jnp.shape, jax.tree.leaves(updates))]:
        raise ValueError(
            f"variance_based: squares has shapes {shapes[0]}, but the updates {shapes[1]}; {remedy}"
        )
