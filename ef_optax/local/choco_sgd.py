"""CHOCO-SGD (Koloskova et al. 2019): compressed gossip, each worker with a model of its own.

every step:   x_i = x_i + Inner(grad f_i(x_i))
              q_i = C(x_i - xh_i)                          to the neighbours
              xh_j = xh_j + q_j                            kept as xh_i and s_i = sum_j w_ij xh_j
              x_i = x_i + gamma sum_j w_ij (xh_j - xh_i)   = x_i + gamma (s_i - xh_i)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.extend import (
    CONTRACTIVE,
    AxisName,
    Compressor,
    ExchangeState,
    GraphLike,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    difference,
    exchange_with_neighbours,
    memory_for,
    own_models,
    trees,
)
from ef_optax.local.graphs import ring


class ChocoState(NamedTuple):
    """State of :func:`choco_sgd`. Models are stored relative to the training loop's."""

    ahead: Any  # per worker, like the parameters: x_i
    estimate: Any  # per worker: xh_i, what the neighbours know of x_i
    mixed: Any  # per worker: s_i, the weighted sum of the neighbours' estimates
    inner: Any  # per worker: the state of the inner optimizer
    exchange: ExchangeState

    roles = {"inner": "optimizer", "estimate": "fresh", "mixed": "fresh"}

    def points(self, params: Any) -> dict[str, Any]:
        """Each worker's own model, at which its gradient is taken."""
        return own_models.own_model("params", self.ahead, params)


def choco_sgd(
    inner: optax.GradientTransformation,
    compressor: Compressor,
    consensus_rate: float,
    *,
    graph: GraphLike = ring,
    mean_every: int | None = 100,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""CHOCO-SGD: workers exchange compressed differences of their models with neighbours only.

    .. math:: q_i = C(x_i - \hat x_i), \quad \hat x_j' = \hat x_j + q_j, \quad
              x_i' = x_i + \gamma \sum_j w_{ij} (\hat x_j' - \hat x_i')

    after each worker's own step of ``inner``. There is no server and no all-reduce: a worker sends
    one packed message to each of its neighbours, so the traffic of a worker does not grow with
    their number. If the workers' data differ and the rate of ``inner`` is constant, the models stop
    at a distance from the optimum that is proportional to the rate; :func:`beer` does not.

    The training loop's parameters x are not a worker's model. Every ``mean_every`` steps they
    become the mean of all models, to be evaluated and stored, by one all-reduce that does not
    change the method. Gradients are taken at each worker's own x_i (:func:`query_points`). It is a
    complete optimizer, so no transformation after it may change the updates.

    Nothing is common to the workers, so a worker whose gradient has a NaN, an infinity or a norm
    above 1.8e19 leaves out its own step of ``inner``, and the others go on. On another number of
    workers, the models keep their mean and the estimates start again.

    Args:
      inner: the optimizer of the workers, with its rate and its sign: ``optax.sgd(0.1)``.
      compressor: C, which must be a contraction that one worker computes alone.
      consensus_rate: gamma in (0, 1]; the stronger the compression, the smaller. 1 without.
      graph: the mixing weights w, a doubly stochastic matrix (n, n) or a function that makes it
        from n: :func:`ring`, :func:`complete`, :func:`metropolis` of any graph. It need not be
        symmetric. A graph of D neighbours takes D permutations of the devices.
      mean_every: after how many steps x becomes the mean of the models; None for never.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how models and estimates are stored, as in :func:`ef_optax.ef21`.

    Returns:
      The optimizer; its state is a :class:`ChocoState`. Memory: three numbers per parameter and
      worker, and the state of ``inner``. Bits: one message of ``compressor`` for each neighbour.

    Raises:
      TypeError: if ``inner`` is not an Optax transformation, or ``compressor`` not a Compressor.
        ValueError: for an option out of range, a compressor that needs all workers or is no
        contraction, and a matrix that is not doubly stochastic or does not join all workers.

    Example:
      Two workers with the optima 0 and 8 take one step each and then meet halfway:

      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.local.choco_sgd(optax.sgd(0.5), ef.identity(), 1.0, mean_every=1, axis_name="w")
      >>> tx = ef.simulate(tx, 2, "w")
      >>> x, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> g = ef.query_points(state, x)["params"] - jnp.array([[0.0], [8.0]])
      >>> updates, state = tx.update(g, state, x)
      >>> updates.tolist(), state.ahead.tolist()
      ([2.0], [[0.0], [0.0]])

    References:
      Koloskova, Stich, Jaggi, "Decentralized Stochastic Optimization and Gossip Algorithms with
      Compressed Communication", ICML 2019, Algorithm 2 (with the memory-efficient sum s_i of its
      appendix).
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"choco_sgd: inner={inner!r} is not an Optax transformation.")
    check.weight("choco_sgd", "consensus_rate", consensus_rate)
    check.count("choco_sgd", "mean_every", mean_every, optional=True)
    exchange = exchange_with_neighbours(
        "choco_sgd", compressor, graph, axis_name, needs=(CONTRACTIVE,)
    )
    inner, memory = optax.with_extra_args_support(inner), memory_for(memory, axis_name)

    def init_fn(params: Any) -> ChocoState:
        x, xh, s = (memory.zeros(params) for _ in range(3))
        return ChocoState(x, xh, s, inner.init(params), exchange.init(memory.read(xh)))

    def update_fn(
        updates: Any, state: ChocoState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ChocoState]:
        params = arguments.require_params("choco_sgd", params)
        own = state.points(params)["params"]
        x, xh, s = memory.read((state.ahead, state.estimate, state.mixed))
        x, after = own_models.inner_step(inner, updates, state.inner, x, own, extra_args)
        xh, s, sent = difference.track(exchange, x, xh, s, state.exchange)
        x = trees.axpy(consensus_rate, trees.sub(s, xh), x)
        step, x, (xh, s) = own_models.renewed(mean_every, sent.step, params, x, (xh, s), axis_name)
        return trees.emit(step, updates), ChocoState(
            ahead=memory.write(x, state.ahead, sent.step),
            estimate=memory.write(xh, state.estimate, sent.step),
            mixed=memory.write(s, state.mixed, sent.step),
            inner=after,
            exchange=sent,
        )

    return as_transformation(init_fn, update_fn)
