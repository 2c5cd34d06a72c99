"""NoLoCo (2025): local steps, then the mean with one random partner in place of all workers.

every step:     x_i = x_i + Inner(grad f_i(x_i))
every H steps:  m_i = mu m_i + a (mean of pair(x_j) - p_i) ;  p_i = p_i + m_i ;  x_i = p_i
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    AxisName,
    ExchangeState,
    MemoryLike,
    arguments,
    as_key,
    as_transformation,
    check,
    collectives,
    gossip,
    memory_for,
    own_models,
    shares,
    trees,
)


class NoLoCoState(NamedTuple):
    """State of :func:`noloco`. Models are stored relative to the training loop's."""

    step: Array  # int32 scalar: steps made
    ahead: Any  # per worker, like the parameters: x_i
    anchor: Any  # per worker: p_i, where x_i was after the last synchronisation
    momentum: Any  # per worker: m_i
    inner: Any  # per worker: the state of the inner optimizer
    exchange: ExchangeState

    roles = {"inner": "optimizer"}

    def points(self, params: Any) -> dict[str, Any]:
        """Each worker's own model, at which its gradient is taken."""
        return own_models.own_model("params", self.ahead, params)


def noloco(
    inner: optax.GradientTransformation,
    period: int,
    key: Any,
    learning_rate: float = 0.7,
    momentum: float = 0.5,
    *,
    mean_every: int | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NoLoCo: H local steps, then each worker averages with one partner; nothing is all-reduced.

    .. math:: m_i' = \mu\,m_i + a\,\big(\tfrac12 (x_i + x_j) - p_i\big), \quad p_i' = p_i + m_i',
              \quad x_i' = p_i'

    with the partner j of worker i in this round. The rounds are those of a tournament in which
    every two workers meet once, drawn at random, the same for all workers; with an odd number of
    them one stays alone. A worker sends its model to one other and receives one, so a round does
    not wait for all workers and its traffic does not grow with their number. With two workers it is
    DiLoCo with heavy ball in place of Nesterov's momentum.

    The models differ between the workers for ever. The training loop's parameters become the mean
    of the p_i every ``mean_every`` steps, by an all-reduce that is not part of the method; bad
    gradients are left out as in :func:`local_steps`.

    Args:
      inner: the optimizer of the local steps, ``optax.adamw(...)`` in the publication.
      period: H; 50 in the publication.
      key: a JAX random key or an int, for the pairs.
      learning_rate: a.
      momentum: mu in [0, 1).
      mean_every: after how many steps the training loop's parameters become the mean of the p_i;
        None for twenty synchronisations. It should be a multiple of ``period``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how models and momentum are stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`NoLoCoState`. Memory: three numbers per parameter and
      worker, and the state of ``inner``. Bits: the model once every H steps.

    Raises:
      TypeError: if ``inner`` is not an Optax transformation, or without a key. ValueError: for an
        option out of range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.local.noloco(optax.sgd(1.0), 1, 0, 1.0, 0.0, mean_every=1, axis_name="w")
      >>> tx = ef.simulate(tx, 2, "w")
      >>> grads, params = jnp.array([[1.0], [3.0]]), jnp.zeros(1)
      >>> tx.update(grads, tx.init(params), params)[0].tolist()
      [-2.0]

    References:
      "NoLoCo: No-all-reduce Low Communication Training Method for Large Models", 2025, in the form
      of its code, gensyn-ai/noloco: src/noloco, which draws any pairing, not one of a tournament.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"noloco: inner={inner!r} is not an Optax transformation.")
    check.count("noloco", "period", period)
    check.not_negative("noloco", "learning_rate", learning_rate)
    check.decay("noloco", "momentum", momentum)
    check.count("noloco", "mean_every", mean_every, optional=True)
    check.axis(axis_name)
    key = as_key(key, "noloco")
    inner, memory = optax.with_extra_args_support(inner), memory_for(memory, axis_name)
    renewal = 20 * period if mean_every is None else mean_every

    def init_fn(params: Any) -> NoLoCoState:
        x, p, m = (memory.zeros(params) for _ in range(3))
        begun = gossip.begin_pairs(memory.read(x), axis_name)
        return NoLoCoState(jnp.zeros((), jnp.int32), x, p, m, inner.init(params), begun)

    def update_fn(
        updates: Any, state: NoLoCoState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, NoLoCoState]:
        params = arguments.require_params("noloco", params)
        own, count = state.points(params)["params"], state.step + 1
        x, p, m = memory.read((state.ahead, state.anchor, state.momentum))
        x, after = own_models.inner_step(inner, updates, state.inner, x, own, extra_args)

        def meet() -> tuple[Any, Any, Any, ExchangeState]:
            rounds = len(gossip.pairings(collectives.axis_size(axis_name)))
            drawn = shares.draw(key, state.exchange.step, axis_name, shared=True)
            number = jax.random.randint(drawn, (), 0, rounds, jnp.int32)
            mean, sent = gossip.mean_of_pairs(x, state.exchange, number, axis_name)
            moved = trees.axpy(momentum, m, trees.scale(learning_rate, trees.sub(mean, p)))
            anchor = trees.add(p, moved)
            return anchor, anchor, moved, sent

        def go_on() -> tuple[Any, Any, Any, ExchangeState]:
            return x, p, m, state.exchange

        x, p, m, sent = own_models.every(period, count, meet, go_on, axis_name)
        step, p, (x,) = own_models.renewed(renewal, count, params, p, (x,), axis_name)
        return trees.emit(step, updates), NoLoCoState(
            step=count,
            ahead=memory.write(x, state.ahead, count),
            anchor=memory.write(p, state.anchor, count),
            momentum=memory.write(m, state.momentum, count),
            inner=after,
            exchange=sent,
        )

    return as_transformation(init_fn, update_fn)
