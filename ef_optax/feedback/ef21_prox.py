"""EF21-Prox (Fatkhullin et al. 2021): EF21 for f + r with a proximal step.

x = prox_{gamma r}(x - gamma g)      with g from EF21
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    AxisName,
    Compressor,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    difference,
    trees,
)
from ef_optax.feedback.ef21 import ef21

Prox = Callable[[Any, Any], Any]
"""``prox(params, step)``: the proximal operator of ``step * r``."""


class ProximalState(NamedTuple):
    """State of :func:`proximal`."""

    steps: Array  # int32 scalar: steps made, for a schedule of the step size


def l1_prox(strength: float) -> Prox:
    """The proximal operator of ``r(x) = strength ||x||_1``: soft thresholding.

    Args:
      strength: the weight of the 1-norm, at least 0.

    Returns:
      ``prox(params, step)`` with ``sign(x) max(|x| - step strength, 0)`` for every entry.

    Raises:
      ValueError: if ``strength`` is negative.

    Example:
      >>> l1_prox(0.5)(jnp.array([2.0, -0.1]), 1.0).tolist()
      [1.5, -0.0]
    """
    check.not_negative("l1_prox", "strength", strength)

    def prox(params: Any, step: Any) -> Any:
        def one(x: Array) -> Array:
            level = jnp.asarray(step * strength, x.dtype)
            return jnp.sign(x) * jnp.maximum(jnp.abs(x) - level, 0)

        return jax.tree.map(one, params)

    return prox


def proximal(
    prox: Prox, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Turns a step u into the proximal step ``prox(x + u, gamma) - x``; it must be last in a chain.

    Args:
      prox: ``prox(params, step)``, for example :func:`l1_prox`.
      learning_rate: the step gamma of the optimizer before it, a number or the same schedule.

    Returns:
      The transformation; its state is a :class:`ProximalState`.

    Raises:
      ValueError: at update, if no parameters are given.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.5), ef.proximal(ef.l1_prox(1.0), 0.5))
      >>> params = jnp.array([1.0])
      >>> tx.update(jnp.array([1.0]), tx.init(params), params)[0].tolist()  # 1 - 0.5 - 0.5
      [-1.0]
    """
    check.rate("proximal", "learning_rate", learning_rate)

    def init_fn(params: Any) -> ProximalState:
        del params
        return ProximalState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Any, state: ProximalState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ProximalState]:
        del extra_args
        params = arguments.require_params("proximal", params)
        gamma = arguments.value_at(learning_rate, state.steps)
        moved = prox(trees.add(params, updates), gamma)
        return trees.sub(moved, params), ProximalState(state.steps + 1)

    return as_transformation(init_fn, update_fn)


def gradient_mapping(prox: Prox, params: Any, grads: Any, step: float) -> Any:
    """``(x - prox(x - gamma grad f(x)))/gamma``: zero exactly at stationary points of f + r.

    Args:
      prox: ``prox(params, step)``.
      params: the point x.
      grads: the full gradient of f at x.
      step: gamma.

    Returns:
      A tree like ``params``; if r = 0, the gradient.

    Example:
      >>> gradient_mapping(l1_prox(1.0), jnp.array([0.0]), jnp.array([0.5]), 0.1).tolist()
      [0.0]
    """
    check.positive("gradient_mapping", "step", step)
    return trees.scale(1 / step, trees.sub(params, prox(trees.axpy(-step, grads, params), step)))


def ef21_prox(
    compressor: Compressor,
    prox: Prox,
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-Prox: the optimizer ``chain(ef21(...), scale_by_learning_rate, proximal(prox))``.

    .. math:: x' = \text{prox}_{\gamma r}(x - \gamma g)

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      prox: ``prox(params, step)``, for example :func:`l1_prox`.
      learning_rate: gamma, a number or a schedule.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`.
      memory: the dtype in which the estimates are stored, as in :func:`ef21`.

    Returns:
      The optimizer; no transformation after it may change the updates.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: as for :func:`ef21`.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21_prox(ef.top_k(k=1), ef.l1_prox(0.5), 0.5)
      >>> params = jnp.array([1.0, 1.0])
      >>> updates, state = tx.update(jnp.array([1.0, 0.5]), tx.init(params), params)
      >>> (params + updates).tolist()
      [0.25, 0.75]

    References:
      Fatkhullin, Sokolov, Gorbunov, Li, Richtarik, "EF21 with Bells & Whistles", 2021.
    """
    check.rate("ef21_prox", "learning_rate", learning_rate)
    check.word("ef21_prox", "init", init, difference.INITS)
    return optax.with_extra_args_support(
        optax.chain(
            ef21(compressor, axis_name=axis_name, init=init, memory=memory),
            optax.scale_by_learning_rate(learning_rate),
            proximal(prox, learning_rate),
        )
    )
