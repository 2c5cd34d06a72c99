"""Smoothness constants by power iteration, for losses without a closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax._numeric.random import as_key
from ef_optax.theory import _check
from ef_optax.theory.constants import Smoothness


def curvature(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    *args: Any,
    key: jax.Array | int = 0,
    iterations: int = 100,
) -> jax.Array:
    """Largest absolute eigenvalue of the Hessian of ``loss_fn(params, *args)`` at ``params``.

    Power iteration ``v <- H v/||H v||`` with Hessian-vector products ``jvp(grad f)``; the result is
    ``||H v||``, which never decreases for a symmetric H and never exceeds the true value. The
    curvature *at this point* is a lower bound of the smoothness constant, exact for a quadratic.

    Args:
      loss_fn: scalar loss, twice differentiable; its first argument is differentiated.
      params: the point, a pytree of floating arrays.
      *args: passed to ``loss_fn`` after ``params``.
      key: random key (or int) of the first direction.
      iterations: number of products; the error falls like (lambda_2/lambda_1)^(2 iterations).

    Returns:
      A scalar of the dtype of ``params``, traceable under jit and vmap.

    Raises:
      ValueError: if ``iterations`` is below 1. TypeError: if ``key`` is not a key.

    Example:
      >>> quadratic = lambda x: 0.5 * (x[0] ** 2 - 3 * x[1] ** 2)
      >>> print(f"{curvature(quadratic, jnp.ones(2)):.4f}")
      3.0000
    """
    _check.count("iterations", iterations)
    key = as_key(key, "curvature")
    grad = jax.grad(loss_fn)

    def product(v: Any) -> Any:
        return jax.jvp(lambda p: grad(p, *args), (params,), (v,))[1]

    def normalise(v: Any) -> tuple[Any, jax.Array]:
        norm = optax.tree.norm(v)
        # A zero product means a zero Hessian along v: keep zero instead of dividing by it.
        return optax.tree.scale(jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0), v), norm

    def step(v: Any, _: None) -> tuple[Any, jax.Array]:
        return normalise(product(v))

    start, _ = normalise(optax.tree.random_like(key, params, jax.random.normal))
    _, norms = jax.lax.scan(step, start, length=iterations)
    return norms[-1]


def estimate(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    data: Any,
    *,
    key: jax.Array | int = 0,
    iterations: int = 100,
) -> Smoothness:
    """Estimates the constants of ``f = mean_i loss_fn(x, data_i)`` at one point by power iteration.

    The result is exact for quadratics. Otherwise it is the curvature at ``params``, a lower bound
    of the constants that the theory asks for: take the largest over several points, or allow for a
    safety factor.

    Args:
      loss_fn: scalar loss ``loss_fn(params, data_i)`` of one worker.
      params: the point, a pytree of floating arrays.
      data: pytree whose leaves have a leading worker axis n.
      key: random key (or int) of the first directions.
      iterations: Hessian-vector products per constant.

    Returns:
      The :class:`Smoothness` seen at ``params``.

    Raises:
      ValueError: if ``iterations`` is below 1, or if a curvature is zero or not finite.

    Example:
      >>> loss = lambda x, a: 0.5 * a * jnp.sum(x**2)
      >>> c = estimate(loss, jnp.ones(3), jnp.array([1.0, 3.0]))
      >>> f"{c.L:.4f}", [f"{v:.4f}" for v in c.L_i]
      ('2.0000', ['1.0000', '3.0000'])
    """
    _check.count("iterations", iterations)
    key = as_key(key, "estimate")

    def mean_loss(p: Any) -> jax.Array:
        return jnp.mean(jax.vmap(lambda d: loss_fn(p, d))(data))

    def largest(f: Callable[..., jax.Array], *args: Any) -> jax.Array:
        return curvature(f, params, *args, key=key, iterations=iterations)

    L, L_i = jax.jit(lambda d: (largest(mean_loss), jax.vmap(lambda di: largest(loss_fn, di))(d)))(
        data
    )
    return Smoothness(float(L), tuple(float(v) for v in L_i))
