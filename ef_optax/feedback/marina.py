"""MARINA (Gorbunov et al. 2021): compressed gradient differences with random exact rounds.

with probability p:  g = mean_i grad f_i(x)
else:                g = g + mean_i Q(grad f_i(x) - grad f_i(x_last))    on the same minibatch
PP-MARINA, else:     g = g + (1/r) sum_{i in S} Q(grad f_i(x) - grad f_i(x_last)),  |S| = r
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    ADDITIVE,
    UNBIASED,
    Array,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    arguments,
    as_key,
    as_transformation,
    check,
    collectives,
    exchange_for,
    memory_for,
    shares,
    steps,
    trees,
)


class MarinaState(NamedTuple):
    """State of :func:`marina`."""

    mean: Any  # like the parameters: g
    last: Any  # the parameters of the last step
    exact: Array  # bool scalar: whether the last round sent full gradients
    present: Array  # float32 scalar, per worker with participants: 1 if it took part, else 0
    exchange: ExchangeState

    def points(self, params: Any) -> dict[str, Any]:
        """The last iterate, at which gradients are needed besides the parameters."""
        del params
        return {"marina": self.last}


def marina(
    compressor: Compressor,
    probability: float,
    key: Any,
    *,
    participants: int | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MARINA: compressed differences of one minibatch's gradients at two points.

    .. math:: g' = \begin{cases} \text{mean}_i\,\nabla f_i(x) & \text{with probability } p \\
              g + \text{mean}_i\,Q(\nabla f_i(x) - \nabla f_i(x^{\text{last}})) & \text{else}
              \end{cases}

    All workers draw the same rounds to be exact; the first round always is. Gradients at the last
    iterate come from :func:`query_points`; with the stored minibatch gradient of the last step it
    would be another method. Step size: :func:`ef_optax.theory.marina_step`.

    PP-MARINA: with ``participants=r`` only r workers send a difference, and the mean is over these.
    Each round draws them uniformly without replacement; in an exact round all workers take part. In
    the paper's accounting an absent worker sends nothing; in this program a message of the same
    size still travels.

    Args:
      compressor: Q, unbiased, such as ``ef.random_k(0.1, key=0, scaled=True)``.
      probability: p in (0, 1]; k/d balances the two kinds of rounds for rand-k.
      key: a JAX random key or an int, with which the exact rounds and the participants are drawn.
      participants: r, the number of workers that take part in a compressed round; None for all.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which g is stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is a :class:`MarinaState`. Call
      ``update(grads["params"], state, params, grads=grads)`` with gradients at all query points.

    Raises:
      TypeError: if ``compressor`` is not a Compressor or ``key`` is not a key. ValueError: for a
        probability outside (0, 1], a compressor that is biased or not additive, participants below
        1, and at update if parameters or gradients are missing or there are fewer workers than
        participants.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.marina(ef.identity(), 0.1, key=0)
      >>> grad = jax.grad(lambda x: jnp.sum(x**2))
      >>> params, state = jnp.array([1.0]), tx.init(jnp.array([1.0]))
      >>> points = ef.query_points(state, params)
      >>> grads = {name: grad(x) for name, x in points.items()}
      >>> tx.update(grads["params"], state, params, grads=grads)[0].tolist()
      [2.0]

    References:
      Gorbunov, Burlachenko, Li, Richtarik, "MARINA: Faster Non-Convex Distributed Learning with
      Compression", ICML 2021; participants without replacement as in burlachenkok/flpytorch.
    """
    check.weight("marina", "probability", probability)
    if participants is not None:
        check.count("marina", "participants", participants)
    key = as_key(key, "marina")
    exchange = exchange_for("marina", compressor, axis_name, needs=(ADDITIVE, UNBIASED))
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> MarinaState:
        g = memory.zeros(params)
        last = trees.copy(params)  # the caller may donate the parameters
        present = jnp.ones((), jnp.float32)
        sent = exchange.init(memory.read(g))
        return MarinaState(g, last, jnp.ones((), bool), present, sent)

    def takes_part(draw: Array) -> Array:
        """1 if this worker is one of the r, whom all workers draw with the same key, else 0."""
        n = collectives.axis_size(axis_name)
        if participants is None:
            return jnp.ones((), jnp.float32)
        if participants > n:
            raise ValueError(f"marina: participants={participants} must be at most {n} workers.")
        S = jax.random.permutation(jax.random.fold_in(draw, 1), jnp.arange(n, dtype=jnp.int32))
        return jnp.any(S[:participants] == collectives.axis_index(axis_name)).astype(jnp.float32)

    def update_fn(
        updates: Any, state: MarinaState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MarinaState]:
        params = arguments.require_params("marina", params)
        now = trees.wide(updates)
        before = trees.wide(arguments.gradient_at("marina", "marina", extra_args))
        count = state.exchange.step
        draw = shares.draw(key, count, axis_name, shared=True)
        exact = (count == 0) | (jax.random.uniform(draw) < probability)
        present, weight = takes_part(draw), None
        if participants is not None:  # the mean over the r
            weight = present * collectives.axis_size(axis_name) / participants

        def compressed() -> tuple[Any, ExchangeState]:
            out = exchange(trees.sub(now, before), state.exchange, weight=weight)
            return trees.add(memory.read(state.mean), out.aggregate), out.state

        def full() -> tuple[Any, ExchangeState]:
            return steps.send_dense(exchange, now, state.exchange)

        g, sent = collectives.agreed_cond(exact, full, compressed, axis=axis_name)
        present = jnp.where(exact, 1, present).astype(jnp.float32)
        mean = memory.write(g, state.mean, sent.step, shared=True)
        return trees.emit(g, updates), MarinaState(mean, params, exact, present, sent)

    return as_transformation(init_fn, update_fn)
