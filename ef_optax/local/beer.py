"""BEER (Zhao et al. 2022): compressed gossip with gradient tracking, which differing data allow.

every step:   V_i = V_i + gamma sum_j w_ij (G_j - G_i) + grad f_i(x_i) - grad f_i(x_i before)
              G_i = G_i + C(V_i - G_i)                       to the neighbours
              x_i = x_i + gamma sum_j w_ij (H_j - H_i) + Inner(V_i)
              H_i = H_i + C(x_i - H_i)                       to the neighbours
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    CONTRACTIVE,
    Array,
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


class BeerState(NamedTuple):
    """State of :func:`beer`. Models are stored relative to the training loop's."""

    ahead: Any  # per worker, like the parameters: x_i
    last: Any  # per worker: x_i at the last gradient
    estimate: Any  # per worker: H_i, what the neighbours know of x_i
    mixed: Any  # per worker: the weighted sum of the neighbours' H_j
    tracked: Any  # per worker: V_i, which follows the mean gradient
    estimate_of_tracked: Any  # per worker: G_i, what the neighbours know of V_i
    mixed_tracked: Any  # per worker: the weighted sum of the neighbours' G_j
    begun: Array  # per worker, bool scalar: whether V_i has a gradient
    inner: Any  # per worker: the state of the inner optimizer
    models: ExchangeState
    gradients: ExchangeState

    roles = {
        "inner": "optimizer",
        # V_i follows the gradients of these workers at these models, so it starts again on others.
        **dict.fromkeys(("estimate", "mixed", "tracked", "last", "begun"), "fresh"),
        **dict.fromkeys(("estimate_of_tracked", "mixed_tracked"), "fresh"),
    }

    def points(self, params: Any) -> dict[str, Any]:
        """Each worker's own model, now and at the last gradient."""
        last = own_models.own_model("beer", self.last, params)
        return own_models.own_model("params", self.ahead, params) | last


MEMORIES = BeerState._fields[:7]
"""The fields that are stored as the option ``memory`` says."""


def beer(
    inner: optax.GradientTransformation,
    compressor: Compressor,
    consensus_rate: float = 0.1,
    *,
    graph: GraphLike = ring,
    mean_every: int | None = 100,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""BEER: compressed gossip of models and of tracked gradients.

    .. math:: V_i' &= V_i + \gamma \sum_j w_{ij} (G_j - G_i) + \nabla f_i(x_i) -
              \nabla f_i(x_i^{\text{last}}), & G_i' &= G_i + C(V_i' - G_i) \\
              x_i' &= x_i + \gamma \sum_j w_{ij} (H_j - H_i) + \text{Inner}(V_i'), &
              H_i' &= H_i + C(x_i' - H_i)

    Both gradients are of the same minibatch. The mean of the V_i is the mean gradient in every
    step, so every worker follows all data, and the models reach the optimum at a constant rate
    however much the workers' data differ, where :func:`choco_sgd` stops at a distance. It costs a
    second gradient, a second message and more memory. Without compression and with gamma = 1 it is
    gradient tracking.

    Parameters of the training loop, bad gradients and the graph are as in :func:`choco_sgd`: x
    becomes the mean of the models every ``mean_every`` steps, and a worker with a bad gradient
    leaves it out and takes the difference to the last good one later.

    Args:
      inner: the optimizer that turns V into a step: ``optax.sgd(0.1)`` in the publication.
      compressor: C, which must be a contraction that one worker computes alone.
      consensus_rate: gamma in (0, 1]; 0.1 in the authors' code.
      graph: the mixing weights, as in :func:`choco_sgd`.
      mean_every: after how many steps x becomes the mean of the models; None for never.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how models, gradients and estimates are stored, as in :func:`ef_optax.ef21`.

    Returns:
      The optimizer; its state is a :class:`BeerState`. Call
      ``update(grads["params"], state, params, grads=grads)`` with gradients at all query points.
      Memory: seven numbers per parameter and worker, and the state of ``inner``. Bits: two messages
      of ``compressor`` for each neighbour.

    Raises:
      TypeError: if ``inner`` is not an Optax transformation, or ``compressor`` not a Compressor.
        ValueError: as :func:`choco_sgd`, and at update if a gradient is missing.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.local.beer(optax.sgd(0.25), ef.identity(), 1.0, axis_name="w")
      >>> tx = ef.simulate(tx, 2, "w")
      >>> x, b = jnp.zeros(1), jnp.array([[0.0], [8.0]])
      >>> state = tx.init(x)
      >>> for _ in range(30):
      ...     grads = {name: y - b for name, y in ef.query_points(state, x).items()}
      ...     _, state = tx.update(grads["params"], state, x, grads=grads)
      >>> ef.query_points(state, x)["params"].round(2).tolist()
      [[4.0], [4.0]]

    References:
      Zhao, Li, Li, Richtarik, Chi, "BEER: Fast O(1/T) Rate for Decentralized Nonconvex Optimization
      with Communication Compression", NeurIPS 2022; the order of the lines is that of the code,
      liboyue/beer: beer/optim/BEER.py. (That code's ``gsgd`` draws normal numbers where the
      definition has uniform ones.)
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"beer: inner={inner!r} is not an Optax transformation.")
    check.weight("beer", "consensus_rate", consensus_rate)
    check.count("beer", "mean_every", mean_every, optional=True)
    exchange = exchange_with_neighbours("beer", compressor, graph, axis_name, needs=(CONTRACTIVE,))
    inner, memory = optax.with_extra_args_support(inner), memory_for(memory, axis_name)

    def init_fn(params: Any) -> BeerState:
        return BeerState(
            **{name: memory.zeros(params) for name in MEMORIES},
            begun=jnp.zeros((), bool),
            inner=inner.init(params),
            models=exchange.init(trees.wide(params)),
            gradients=exchange.init(trees.wide(params)),
        )

    def update_fn(
        updates: Any, state: BeerState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, BeerState]:
        params = arguments.require_params("beer", params)
        before = arguments.gradient_at("beer", "beer", extra_args)
        x, last, H, WH = memory.read((state.ahead, state.last, state.estimate, state.mixed))
        V, G, WG = memory.read((state.tracked, state.estimate_of_tracked, state.mixed_tracked))

        good = own_models.usable(updates, before)

        def change(now: Array, before: Array) -> Array:
            first = jnp.where(state.begun, before, jnp.zeros_like(before))
            return jnp.where(good, now - first, jnp.zeros_like(now))

        news = jax.tree.map(change, trees.wide(updates), trees.wide(before))
        V = trees.add(trees.axpy(consensus_rate, trees.sub(WG, G), V), news)
        G, WG, gradients = difference.track(exchange, V, G, WG, state.gradients)
        last = trees.where(good, x, last)

        own = state.points(params)["params"]
        pulled = trees.axpy(consensus_rate, trees.sub(WH, H), x)
        x, own_state = own_models.inner_step(inner, V, state.inner, pulled, own, extra_args)
        H, WH, models = difference.track(exchange, x, H, WH, state.models)
        step, x, (last, H, WH) = own_models.renewed(
            mean_every, models.step, params, x, (last, H, WH), axis_name
        )
        kept = {
            name: memory.write(new, getattr(state, name), models.step)
            for name, new in zip(MEMORIES, (x, last, H, WH, V, G, WG), strict=True)
        }
        after = state._replace(
            **kept, begun=state.begun | good, inner=own_state, models=models, gradients=gradients
        )
        return trees.emit(step, updates), after

    return as_transformation(init_fn, update_fn)
