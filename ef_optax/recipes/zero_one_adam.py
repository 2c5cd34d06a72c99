"""0/1 Adam (Lu et al. 2022): the variance is rarely updated, then local steps of frozen Adam.

at first:         g = mean of the g_i, dense in some steps, else with compression and feedback
                  m = b1 m + (1 - b1) g ;  v = b2 v + (1 - b2) g^2 in the dense steps
                  x = x - lr (m / (sqrt(v) + eps) + w x)
v frozen:         m_i = b1 m_i + (1 - b1) g_i ;  u_i = m_i / (sqrt(v) + eps) + w x_i
                  x_i = x_i - lr u_i ;  s = s + lr                   (x_i - x sums the -lr u_i)
every H steps:    z = mean of the (x_i - x)(sqrt(v) + eps), with compression and feedback
                  m_i = -z / s ;  x = x + z / (sqrt(v) + eps) ;  x_i = x ;  s = 0
"""

from __future__ import annotations

import dataclasses
import functools
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
    Memory,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    collectives,
    memory_for,
    own_models,
    safe_divisor,
    trees,
)
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.policies.dense_steps import dense_steps


class ZeroOneAdamState(NamedTuple):
    """State of :func:`zero_one_adam`."""

    step: Array  # int32 scalar: steps made
    ahead: Any  # per worker, like the parameters: x_i - x, zero before v is frozen
    momentum: Any  # like the parameters: m of the last synchronisation, the same on all workers
    own: Any  # per worker: m_i - m, zero before v is frozen
    variance: Any  # like the parameters: v, the same on all workers
    rates: Array  # scalar: s, the sum of the rates since the last synchronisation
    feedback: Any  # a DenseStepsState: what is not yet sent, per worker

    def points(self, params: Any) -> dict[str, Any]:
        """Each worker's own model, at which its gradient is taken."""
        return own_models.own_model("params", self.ahead, params)


def zero_one_adam(
    learning_rate: optax.ScalarOrSchedule,
    var_freeze_step: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    var_update_scaler: int = 16,
    local_step_scaler: int = 32678,
    local_step_clipper: int = 16,
    compressor: Compressor | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""0/1 Adam: a variance that is updated more and more rarely, then local steps.

    Compressed is what every worker sends: by default signs, as in :func:`one_bit_adam`. Until
    ``var_freeze_step`` the gradient is sent densely only when the variance is updated: in
    every step at first, and at half the frequency after every ``var_update_scaler`` of these steps.
    In between it is compressed, with a residual that waits during the dense steps
    (:func:`ef_optax.policies.dense_steps`). Then v is frozen, the residuals begin again, and the
    workers take local steps of Adam with momentum alone; what they have gone ahead is exchanged
    every H steps, in the units of the momentum, from which all of them take their new one. H is 1
    at first, and doubles every ``local_step_scaler`` steps up to ``local_step_clipper``.

    Weight decay is decoupled, but the momentum after a synchronisation contains it, as in the
    official code. There is no bias correction. A coordinate whose v is zero does not move by what
    was compressed (see :func:`one_bit_adam`). Gradients are taken at each worker's own model
    (:func:`query_points`); the training loop's parameters x are what to evaluate. It is a complete
    optimizer, so no transformation after it may change the updates. After the freeze, a worker with
    a bad gradient leaves out its own step; before, all workers skip together.

    Args:
      learning_rate: a number or a schedule of the steps.
      var_freeze_step: how many steps the variance may be updated, at least 1; usually those in
        which the rate warms up.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the variance, in [0, 1).
      eps: added to the square root of the variance, above 0.
      weight_decay: w, decoupled.
      var_update_scaler: updates of the variance before they become half as frequent.
      local_step_scaler: steps before H doubles.
      local_step_clipper: the largest H.
      compressor: what is sent; None is ``ef.exchanges.two_shot(ef.rms_sign())``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how drift and residual are stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`ZeroOneAdamState`. Memory per worker: drift, momentum
      and residual; a momentum and the variance are common. Bits: those of ``compressor`` in a step
      that sends, 32 for each value in a dense one.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for an option out of range, and
        at update without parameters.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.zero_one_adam(0.1, 1, b1=0.0, b2=0.75, compressor=ef.scaled_sign())
      >>> params, update = jnp.zeros(2), jax.jit(tx.update)
      >>> _, state = update(jnp.array([2.0, 4.0]), tx.init(params), params)
      >>> state.variance.tolist()
      [1.0, 4.0]
      >>> updates, _ = update(jnp.array([1.0, -3.0]), state, params)  # 2 and -2 are sent
      >>> [round(u, 6) for u in updates.tolist()]
      [-0.2, 0.1]

    References:
      Lu, Li, Zhang, De Sa, He, "Maximizing Communication Efficiency for Large-scale Training via
      0/1 Adam", 2022 (ICLR 2023); the schedules are those of DeepSpeed,
      runtime/fp16/onebit/zoadam.py.
    """
    name = "zero_one_adam"
    check.rate(name, "learning_rate", learning_rate)
    check.count(name, "var_freeze_step", var_freeze_step)
    for option, value in (("b1", b1), ("b2", b2)):
        check.decay(name, option, value)
    check.positive(name, "eps", eps)
    check.not_negative(name, "weight_decay", weight_decay)
    check.count(name, "var_update_scaler", var_update_scaler)
    check.count(name, "local_step_scaler", local_step_scaler)
    check.count(name, "local_step_clipper", local_step_clipper)
    compressor = two_shot(rms_sign()) if compressor is None else compressor
    phases = _Phases(
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        freeze=var_freeze_step,
        variance_steps=_variance_steps(var_freeze_step, var_update_scaler),
        scaler=local_step_scaler,
        clipper=local_step_clipper,
        axis_name=axis_name,
        drifts=memory_for(memory, axis_name),
        feedback=error_feedback(compressor, axis_name=axis_name, memory=memory),
    )
    shared = memory_for(None)

    def init_fn(params: Any) -> ZeroOneAdamState:
        m, own, v = (shared.zeros(params) for _ in range(3))
        return ZeroOneAdamState(
            step=jnp.zeros((), jnp.int32),
            ahead=phases.drifts.zeros(params),
            momentum=m,
            own=own,
            variance=v,
            rates=jnp.zeros((), trees.widest(params)),
            feedback=phases.rule.init(m),
        )

    def update_fn(
        updates: Any, state: ZeroOneAdamState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ZeroOneAdamState]:
        del extra_args
        g, x = trees.wide(updates), trees.wide(arguments.require_params(name, params))
        rate = jnp.asarray(arguments.value_at(learning_rate, state.step), state.rates.dtype)
        step, after = collectives.agreed_cond(
            state.step < var_freeze_step,
            lambda: phases.explore(g, state, x, rate),
            lambda: phases.exploit(g, state, x, rate),
            axis=axis_name,
        )
        return trees.emit(step, updates), after._replace(step=state.step + 1)

    return as_transformation(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Phases:
    """The step before v is frozen, and the step after it."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    freeze: int
    variance_steps: tuple[int, ...]
    scaler: int
    clipper: int
    axis_name: AxisName
    drifts: Memory
    feedback: optax.GradientTransformationExtraArgs

    @functools.cached_property
    def rule(self) -> optax.GradientTransformationExtraArgs:
        return dense_steps(self.feedback, self.is_dense, axis_name=self.axis_name)

    def is_dense(self, step: Array) -> Array:
        return jnp.any(step == jnp.asarray(self.variance_steps, jnp.int32))

    def interval(self, step: Array) -> Array:
        """H in this step."""
        doublings = jnp.clip((step - self.freeze) // self.scaler, 0, 30)
        return jnp.minimum(self.clipper, 1 << doublings)

    def units(self, v: Any) -> Any:
        """``sqrt(v) + eps``."""
        return jax.tree.map(lambda v: jnp.sqrt(v) + self.eps, v)

    def direction(self, m: Any, v: Any, x: Any) -> Any:
        return trees.axpy(self.weight_decay, x, jax.tree.map(jnp.divide, m, self.units(v)))

    def average(self, m: Any, g: Any) -> Any:
        return trees.axpy(1 - self.b1, g, trees.scale(self.b1, m))

    def explore(
        self, g: Any, state: ZeroOneAdamState, x: Any, rate: Array
    ) -> tuple[Any, ZeroOneAdamState]:
        """V follows the gradients of dense steps, m those of all steps."""
        exact = self.is_dense(state.step)
        g, feedback = self.rule.update(g, state.feedback)
        g = trees.where(exact, g, _seen(g, state.variance))
        m = self.average(state.momentum, g)
        square = lambda v, g: jnp.where(exact, self.b2 * v + (1 - self.b2) * g**2, v)  # noqa: E731
        v = jax.tree.map(square, state.variance, g)
        step = trees.scale(-rate, self.direction(m, v, x))
        return step, state._replace(momentum=m, variance=v, feedback=feedback)

    def exploit(
        self, g: Any, state: ZeroOneAdamState, x: Any, rate: Array
    ) -> tuple[Any, ZeroOneAdamState]:
        """A local step under the frozen v, and a synchronisation in every H-th step."""
        m, v, good = state.momentum, state.variance, own_models.usable(g)
        drift, before = self.drifts.read(state.ahead), trees.add(state.own, m)
        m_i = trees.where(good, self.average(before, g), before)
        u_i = self.direction(m_i, v, trees.add(drift, x))
        drift = trees.where(good, trees.axpy(-rate, u_i, drift), drift)
        rates = state.rates + rate

        def synchronise() -> Any:
            units = self.units(v)
            z_i = jax.tree.map(jnp.multiply, drift, units)
            begun = _begun_again(self.rule, m, state, state.step == self.freeze)
            with own_models.unwatched():
                z, feedback = self.rule.update(z_i, begun)
            z = _seen(z, v)
            step, mean = (
                jax.tree.map(jnp.divide, z, units),
                trees.scale(-1 / safe_divisor(rates), z),
            )
            none = jax.tree.map(jnp.zeros_like, drift)
            return step, none, mean, none, jnp.zeros_like(rates), feedback

        def go_on() -> Any:
            still = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), x)
            return still, drift, m, trees.sub(m_i, m), rates, state.feedback

        now = (state.step + 1) % self.interval(state.step) == 0
        step, ahead, m, own, rates, feedback = collectives.agreed_cond(
            now, synchronise, go_on, axis=self.axis_name
        )
        return step, state._replace(
            ahead=self.drifts.write(ahead, state.ahead, state.step),
            momentum=m,
            own=own,
            rates=rates,
            feedback=feedback,
        )


def _seen(c: Any, v: Any) -> Any:
    """What was compressed, without the coordinates that have no variance."""
    return jax.tree.map(lambda c, v: jnp.where(v == 0, 0, c), c, v)


def _variance_steps(freeze: int, scaler: int) -> tuple[int, ...]:
    """The steps, counted from 0, in which the variance is updated: ever more rarely.

    >>> _variance_steps(12, 2)
    (0, 1, 3, 5, 7, 11)
    """
    found: list[int] = []
    interval, step = 1, 0
    while (step := interval * (step // interval + 1)) <= freeze:
        found.append(step - 1)
        if len(found) % scaler == 0:
            interval *= 2
    return tuple(found)


def _begun_again(rule: Any, like: Any, state: ZeroOneAdamState, now: Array) -> Any:
    """The state of the feedback, without what it remembers if ``now``; its steps go on."""
    old, fresh = state.feedback, rule.init(like).rule
    exchange = old.rule.exchange._replace(codec=fresh.exchange.codec)
    return old._replace(rule=trees.where(now, fresh._replace(exchange=exchange), old.rule))
