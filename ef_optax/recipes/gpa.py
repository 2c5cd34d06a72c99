"""GPA, generalised primal averaging: DiLoCo's outer loop as a moving average, without the loop.

y = mu_y x + (1 - mu_y) z ;  g = grad f(y) ;  z = z + Inner(g) ;  x = mu_x x + (1 - mu_x) z
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    Memory,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    memory_for,
    trees,
)


class GPAState(NamedTuple):
    """State of :func:`gpa`."""

    fast: Any  # like the parameters: z - x
    inner: Any  # the state of the inner chain
    mu_y: Array  # scalar: the weight of x in y
    steps: Array  # int32 scalar

    def points(self, params: Any) -> dict[str, Any]:
        """y, at which gradients are taken; x needs none."""
        fast = trees.scale(1 - self.mu_y, Memory.read(self.fast))
        return {"params": trees.emit(trees.add(fast, params), params)}


def gpa(
    inner: optax.GradientTransformation,
    mu_x: float,
    mu_y: float = 0.7,
    *,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GPA: a fast model takes the steps, and the model to keep is its moving average.

    .. math:: y = \mu_y x + (1 - \mu_y) z, \quad z' = z + \text{Inner}(\nabla f(y)), \quad
              x' = \mu_x x + (1 - \mu_x) z'

    It replaces DiLoCo with a single worker, whose outer step averages over H steps and moves once,
    by an average that moves in every step. So it has no outer loop, and any chain with feedback can
    stand inside: ``gpa(optax.chain(error_feedback(C, axis_name=a), optax.adamw(1e-3)), mu_x)``.
    ``mu_x = 0.9 ** (1 / H)`` belongs to DiLoCo with H local steps: 0.9, 0.974, 0.9869, 0.9934,
    0.9967 for H = 1, 4, 8, 16, 32.

    The training loop's parameters are x, which is what to evaluate and to store. Gradients are
    taken at y (:func:`query_points`) and only there. Weight decay of ``inner`` applies to z.

    Args:
      inner: what turns gradients into steps of z, with its rate and its sign.
      mu_x: how much of x is kept in a step, in [0, 1); with 0, and for any ``mu_y``, it is
        ``inner`` alone.
      mu_y: the weight of x in the point of the gradient, in [0, 1]; with 1 and inner SGD it is
        heavy ball.
      memory: how z - x is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`GPAState`. Memory: one number per parameter, and the
      state of ``inner``. ``update`` takes gradients at ``query_points(state, params)["params"]``.

    Raises:
      TypeError: if ``inner`` is not an Optax transformation. ValueError: for a weight out of range,
        and at update without parameters.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.recipes.gpa(optax.sgd(1.0), mu_x=0.75, mu_y=0.5)
      >>> x, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> updates, state = tx.update(jnp.array([-4.0]), state, x)  # z = 4
      >>> x = optax.apply_updates(x, updates)
      >>> x.tolist(), ef.query_points(state, x)["params"].tolist()
      ([1.0], [2.5])

    References:
      "Smoothing DiLoCo with Primal Averaging", 2025, by its code, facebookresearch/optimizers:
      gpa/.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"gpa: inner={inner!r} is not an Optax transformation.")
    check.decay("gpa", "mu_x", mu_x)
    check.share("gpa", "mu_y", mu_y)
    inner, memory = optax.with_extra_args_support(inner), memory_for(memory)

    def init_fn(params: Any) -> GPAState:
        weight = jnp.asarray(mu_y, trees.widest(params))
        fast, steps = memory.zeros(params), jnp.zeros((), jnp.int32)
        return GPAState(fast, inner.init(params), weight, steps)

    def update_fn(
        updates: Any, state: GPAState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, GPAState]:
        params = arguments.require_params("gpa", params)
        z = memory.read(state.fast)  # relative to x, as everything here
        at = trees.emit(trees.add(z, params), params)
        step, after = inner.update(updates, state.inner, at, **extra_args)
        z = trees.add(z, step)
        moved = trees.emit(trees.scale(1 - mu_x, z), params)
        steps = state.steps + 1
        fast = memory.write(trees.sub(z, moved), state.fast, steps, shared=True)
        return trees.emit(moved, updates), GPAState(fast, after, state.mu_y, steps)

    return as_transformation(init_fn, update_fn)
