"""1-bit LAMB (Li et al. 2021): LAMB at first, then one fused 1-bit all-reduce of all momenta.

at first:      m = b1 m + (1 - b1) mean g_i ;  v = b2 v + (1 - b2) (mean g_i)^2
               c = norm(x) / norm(u) in [low, high], 1 if a norm is 0 ;  cf = .9 cf + .1 c if c != 1
then v frozen: m = decoded mean of the s (b1 m + (1 - b1) g_i), all layers in one message, over s
               vf = b2 vf + (1 - b2) g^2    with g = (m - b1 m before) / (1 - b1)
               f = max of (sqrt(v) + eps) / (sqrt(vf) + eps)
               f = r f + 1 - r  with r = norm(u0) / norm(u)
               f in [.5, 4] and within 10% of the last f ;  c = cf f
always:        u0 = m / (sqrt(v) + eps) ;  u = u0 + w x ;  x = x - lr c u
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.compressors.quantize.rms_sign import rms_sign
from ef_optax.exchanges.two_shot import two_shot
from ef_optax.extend import (
    Array,
    AxisName,
    Compressor,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    leaf_norm,
    memory_for,
    safe_divisor,
    trees,
)
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.policies.delayed_start import delayed_start


class OneBitLambState(NamedTuple):
    """State of the scaling inside :func:`one_bit_lamb`; trees like the parameters."""

    step: Array  # int32 scalar: steps made
    momentum: Any  # m, the same on all workers
    variance: Any  # v, the same on all workers
    fresh: Any  # vf, which goes on when v is frozen
    coefficient: Any  # a scalar per leaf: cf, the average of LAMB's coefficient in the warm-up
    factor: Any  # a scalar per leaf: f of the last step
    scale: Any  # a scalar per leaf: s, by which the momentum is multiplied before it is sent
    feedback: Any  # an ErrorFeedbackState of the vector of all momenta: its residual, per worker


class _Layer(NamedTuple):
    """What a step makes of one leaf."""

    update: Array
    variance: Array
    fresh: Array
    coefficient: Array
    factor: Array


def one_bit_lamb(
    learning_rate: optax.ScalarOrSchedule,
    freeze_step: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    coefficients: tuple[float, float] = (0.01, 10.0),
    coefficient_decay: float = 0.9,
    factors: tuple[float, float] = (0.5, 4.0),
    factor_change: float = 0.1,
    compressor: Compressor | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""1-bit LAMB: after a dense warm-up, signs of all momenta travel in one fused message.

    .. math:: u = m/(\sqrt{v} + \epsilon) + w\,x, \quad x' = x - \eta\,c\,u

    with m as in :func:`one_bit_adam` and a coefficient c for each layer. In the warm-up it is
    LAMB's, ``||x||/||u||``, kept between the two ``coefficients``. Afterwards LAMB's would follow
    the noise of the compressed momentum, so c is its average over the warm-up times a factor: the
    largest ratio of the frozen standard deviation and one that goes on, which is rebuilt from the
    decoded momenta. The factor stays between the two ``factors`` and changes by at most
    ``factor_change`` in a step.

    All leaves share one message and one scale (``optax.flatten``). So that layers of small momenta
    are not lost in it, every layer is multiplied by a constant before and divided by it after: the
    mean over the layers of their root mean squares at the end of the warm-up, over its own.

    A coordinate whose v is zero at the end of the warm-up does not move by momentum (see
    :func:`one_bit_adam`). There is no bias correction, as in the official code, which also
    applies no update in its first step. Parameters that are split over mesh axes are joined by
    ``optax.flatten``; use :func:`one_bit_adam` for them.

    Args:
      learning_rate: eta, a number or a schedule.
      freeze_step: dense steps before compression, at least 1.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the variance, in [0, 1).
      eps: added to the square root of the variance, above 0.
      weight_decay: w, inside the norm of u as in LAMB.
      coefficients: the smallest and the largest coefficient in the warm-up.
      coefficient_decay: what the average of the coefficient keeps of itself, in [0, 1).
      factors: the smallest and the largest factor after it.
      factor_change: by which share of itself the factor may change in a step, in (0, 1].
      compressor: what is sent of the vector; None is ``ef.exchanges.two_shot(ef.rms_sign())``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the residual is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: momentum and two variances, which are common, and a residual of each
      worker. Bits by default: d for the model of d parameters and d/n for the server's part, with
      32 for each scale.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for an option out of range, and
        at update without parameters.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.one_bit_lamb(0.5, 1, b1=0.0, b2=0.0)
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, _ = jax.jit(tx.update)(jnp.array([2.0, -8.0]), tx.init(params), params)
      >>> [round(u, 4) for u in updates.tolist()]  # u = (1, -1), c = 5/sqrt 2
      [-1.7678, 1.7678]

    References:
      Li, Awan, Li, Rajbhandari, He, "1-bit LAMB: Communication Efficient Large-Scale Large-Batch
      Training with LAMB's Convergence Speed", 2021, Algorithm 1; details as in DeepSpeed,
      runtime/fp16/onebit/lamb.py.
    """
    name = "one_bit_lamb"
    check.rate(name, "learning_rate", learning_rate)
    check.count(name, "freeze_step", freeze_step)
    for option, value in (("b1", b1), ("b2", b2), ("coefficient_decay", coefficient_decay)):
        check.decay(name, option, value)
    check.positive(name, "eps", eps)
    check.not_negative(name, "weight_decay", weight_decay)
    check.weight(name, "factor_change", factor_change)
    for option, pair in (("coefficients", coefficients), ("factors", factors)):
        _check_range(name, option, pair)
    compressor = two_shot(rms_sign()) if compressor is None else compressor
    rule = optax.flatten(
        error_feedback(delayed_start(compressor, freeze_step), axis_name=axis_name, memory=memory)
    )
    layers = _Layers(
        b1, b2, eps, weight_decay, coefficients, coefficient_decay, factors, factor_change
    )
    shared = memory_for(None)

    def init_fn(params: Any) -> OneBitLambState:
        m, v, fresh = (shared.zeros(params) for _ in range(3))
        scalars = lambda value: jax.tree.map(lambda x: jnp.full((), value, x.dtype), m)  # noqa: E731
        step = jnp.zeros((), jnp.int32)
        return OneBitLambState(
            step=step,
            momentum=m,
            variance=v,
            fresh=fresh,
            coefficient=scalars(0.0),
            factor=scalars(1.0),
            scale=scalars(1.0),
            feedback=rule.init(m),
        )

    def update_fn(
        updates: Any, state: OneBitLambState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, OneBitLambState]:
        del extra_args
        x = trees.wide(arguments.require_params(name, params))
        warm, m = state.step < freeze_step, state.momentum
        ready = trees.where(state.step == freeze_step, _scales(m), state.scale)
        past = trees.scale(b1, m)
        m_i = trees.axpy(1 - b1, trees.wide(updates), past)
        sent, feedback = rule.update(jax.tree.map(jnp.multiply, m_i, ready), state.feedback)
        held = lambda m, s, v: jnp.where(warm | (v != 0), m / s, 0)  # noqa: E731
        m = jax.tree.map(held, sent, ready, state.variance)
        before = (past, state.variance, state.fresh, state.coefficient, state.factor, x)
        made = jax.tree.map(lambda *leaf: layers.layer(leaf, warm), m, *before)
        update, variance, fresh, coefficient, factor = _columns(made)
        return trees.emit(update, updates), OneBitLambState(
            step=state.step + 1,
            momentum=m,
            variance=variance,
            fresh=fresh,
            coefficient=coefficient,
            factor=factor,
            scale=ready,
            feedback=feedback,
        )

    return optax.chain(
        as_transformation(init_fn, update_fn), optax.scale_by_learning_rate(learning_rate)
    )


@dataclasses.dataclass(frozen=True)
class _Layers:
    """LAMB's step of one layer, in both stages."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    coefficients: tuple[float, float]
    coefficient_decay: float
    factors: tuple[float, float]
    factor_change: float

    def layer(self, leaf: tuple[Any, ...], warm: Array) -> _Layer:
        """From m, b1 times the last m, v, vf, cf, the last f, and x."""
        m, past, v, fresh, average, last, x = leaf
        g = (m - past) / (1 - self.b1)
        fresh = self.b2 * fresh + (1 - self.b2) * g**2
        v = jnp.where(warm, fresh, v)
        units = jnp.sqrt(v) + self.eps
        u0 = m / units
        u = u0 + self.weight_decay * x
        size, length = leaf_norm(x, "l2"), leaf_norm(u, "l2")
        c = jnp.clip(size / safe_divisor(length), *self.coefficients)
        c = jnp.where((size == 0) | (length == 0), 1, c)
        after = self.coefficient_decay * average + (1 - self.coefficient_decay) * c
        average = jnp.where(warm & (c != 1), after, average)

        f = jnp.max(units / (jnp.sqrt(fresh) + self.eps), initial=0)
        share = jnp.minimum(1, leaf_norm(u0, "l2") / safe_divisor(length))
        f = share * f + 1 - share
        f = jnp.clip(f, *self.factors)
        f = jnp.clip(f, last * (1 - self.factor_change), last * (1 + self.factor_change))
        f = jnp.where(warm, last, f)
        return _Layer(jnp.where(warm, c, average * f) * u, v, fresh, average, f)


def _columns(made: Any) -> list[Any]:
    """A tree of layers as one tree for each of their fields."""
    is_layer = lambda x: isinstance(x, _Layer)  # noqa: E731
    field = lambda i: jax.tree.map(lambda one: one[i], made, is_leaf=is_layer)  # noqa: E731
    return [field(i) for i in range(len(_Layer._fields))]


def _scales(momentum: Any) -> Any:
    """For each layer the mean of all layers' root mean squares over its own; 1 for a zero layer."""
    rms = [leaf_norm(m, "l2") / max(1, m.size) ** 0.5 for m in jax.tree.leaves(momentum)]
    mean = sum(rms) / max(1, len(rms))
    one = lambda own: jnp.where(own == 0, 1, mean / safe_divisor(own))  # noqa: E731
    return jax.tree.unflatten(jax.tree.structure(momentum), [one(own) for own in rms])


def _check_range(name: str, option: str, pair: Any) -> None:
    """Refuses anything but two positive numbers that increase."""
    numbers = isinstance(pair, tuple) and len(pair) == 2 and all(map(check.is_number, pair))
    if not (numbers and 0 < pair[0] <= pair[1]):
        raise ValueError(f"{name}: {option}={pair!r} must be (least, largest), both positive.")
