"""Normalised EF21 (Sadiev et al. 2025): parameter-agnostic steps with any gradient estimator.

v_i = estimator ;  c_i = C(v_i - g_i) ;  g_i = g_i + c_i ;  g = g + mean_i c_i
emit g/||g|| ;  gamma_t = gamma_0 (t + 1)^-p ,  eta_t = (t + 1)^-q
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from ef_optax.estimators.hessian_momentum import hessian_momentum
from ef_optax.estimators.igt import igt
from ef_optax.estimators.storm import storm
from ef_optax.extend import (
    Array,
    AxisName,
    Compressor,
    MemoryLike,
    as_key,
    check,
    difference,
    safe_divisor,
    trees,
    wide_dtype,
)
from ef_optax.feedback.ef21 import ef21
from ef_optax.feedback.ef21_momentum import ef21_momentum

Estimator = Literal["sgdm", "igt", "mvr", "hm", "rhm"]
POWERS = {"sgdm": 0.5, "igt": 0.57, "mvr": 0.67, "hm": 0.67, "rhm": 0.67}
"""The q of eta_t, as tuned in the authors' runs."""


def power_decay(scale: float, power: float) -> Callable[[Any], Array]:
    """The schedule ``scale (t + 1)^-power`` of parameter-agnostic methods.

    Args:
      scale: the value at t = 0, positive.
      power: at least 0.

    Returns:
      A schedule of the step t.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> [round(float(power_decay(1.0, 0.5)(t)), 3) for t in (0, 3, 99)]
      [1.0, 0.5, 0.1]
    """
    check.positive("power_decay", "scale", scale)
    check.not_negative("power_decay", "power", power)

    def schedule(count: Any) -> Array:
        t = jnp.asarray(count).astype(jnp.result_type(float))
        return scale * (t + 1) ** -power

    return schedule


def normalise(*, per_leaf: bool = True) -> optax.GradientTransformation:
    """Scales updates to norm 1; zero stays zero.

    Args:
      per_leaf: True if every leaf gets norm 1 (as in the authors' code), False if all leaves
        together do.

    Returns:
      The transformation, without state.

    Example:
      >>> tx = normalise()
      >>> tx.update(jnp.array([3.0, 4.0]), tx.init(None))[0].round(3).tolist()
      [0.6000000238418579, 0.800000011920929]
    """
    check.flag("normalise", "per_leaf", per_leaf)

    def update(updates: Any, params: Any = None) -> Any:
        del params
        if per_leaf:
            return jax.tree.map(lambda x: _of_norm_one([x])[0], updates)
        leaves, treedef = jax.tree.flatten(updates)
        return treedef.unflatten(_of_norm_one(leaves))

    return optax.stateless(update)


def _of_norm_one(leaves: list[Array]) -> list[Array]:
    """The leaves, divided by the norm of all of them together."""
    if not leaves:
        return []
    wide = [x.astype(wide_dtype(x.dtype)) for x in leaves]
    # They are first divided by the largest magnitude, so that no square overflows or underflows.
    each = [jnp.max(jnp.abs(x), initial=0) for x in wide]
    largest = safe_divisor(functools.reduce(jnp.maximum, each))
    scaled = [x / largest.astype(x.dtype) for x in wide]
    norm = safe_divisor(jnp.sqrt(trees.squared_norm(scaled)))
    return [(x / norm.astype(x.dtype)).astype(y.dtype) for x, y in zip(scaled, leaves, strict=True)]


def ef21_normalised(
    compressor: Compressor,
    estimator: Estimator = "sgdm",
    fresh_weight: optax.ScalarOrSchedule | None = None,
    *,
    key: Any = None,
    per_leaf: bool = True,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Normalised EF21: the step can be chosen without knowing a smoothness constant.

    .. math:: c_i = C(v_i - g_i), \quad g_i' = g_i + c_i, \quad g' = g + \text{mean}_i\,c_i, \quad
              \text{emit}\ g'/\|g'\|

    =========== =========================================================== ====================
    estimator   v_i                                                         gradients needed at
    =========== =========================================================== ====================
    ``"sgdm"``  an average, as in :func:`ef21_momentum`                     x
    ``"igt"``   :func:`igt`, implicit gradient transport                    one point ahead
    ``"mvr"``   :func:`storm`, momentum-based variance reduction            x and the last x
    ``"hm"``    :func:`hessian_momentum` at x                               x, and H times a step
    ``"rhm"``   :func:`hessian_momentum` at a random point of the segment   x, and H times a step
    =========== =========================================================== ====================

    Put ``optax.sgd(power_decay(gamma_0, p))`` after it.

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      estimator: a row of the table.
      fresh_weight: eta in (0, 1], or a schedule; by default ``power_decay(1, q)`` with the authors'
        tuned q: 0.5 for sgdm, 0.57 for igt, 0.67 for the others.
      key: for ``"rhm"`` only: a JAX random key or an int, the same on all workers.
      per_leaf: whether to normalise every leaf (the authors' code) or all leaves together.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`.
      memory: the dtype in which average and estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation. With an estimator other than ``"sgdm"`` call
      ``update(grads["params"], state, params, grads=grads)`` with gradients at all query points.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for an unknown estimator or
        ``init``, a weight outside (0, 1], a compressor that is not additive, or a key that is
        missing or not used.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21_normalised(ef.top_k(k=1))
      >>> tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)), jnp.zeros(2))[0].tolist()
      [0.0, 1.0]

    References:
      Sadiev et al., "Improved Convergence in Parameter-Agnostic Error Feedback through Momentum",
      2025; normalisation and exponents as in the authors' code,
      IgorSokoloff/Parameter-Agnostic-Error-Feedback-through-Momentum.
    """
    check.word("ef21_normalised", "estimator", estimator, POWERS)
    check.word("ef21_normalised", "init", init, difference.INITS)
    check.flag("ef21_normalised", "per_leaf", per_leaf)
    if fresh_weight is not None:
        check.weight("ef21_normalised", "fresh_weight", fresh_weight, schedule=True)
    if (key is not None) != (estimator == "rhm"):
        raise ValueError(f'ef21_normalised: key={key!r}; "rhm" needs a key, the others none.')
    if key is not None:
        key = as_key(key, "ef21_normalised")
    eta = power_decay(1.0, POWERS[estimator]) if fresh_weight is None else fresh_weight
    options: dict[str, Any] = {"axis_name": axis_name, "init": init, "memory": memory}
    if estimator == "sgdm":
        rule = ef21_momentum(compressor, eta, **options)
    else:
        own = {
            "igt": lambda: igt(eta, memory=memory),
            "mvr": lambda: storm(eta, memory=memory),
            "hm": lambda: hessian_momentum(eta, memory=memory),
            "rhm": lambda: hessian_momentum(eta, key, memory=memory),
        }[estimator]()
        rule = optax.chain(own, ef21(compressor, **options))
    return optax.with_extra_args_support(optax.chain(rule, normalise(per_leaf=per_leaf)))
