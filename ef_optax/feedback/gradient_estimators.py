"""Gradient estimators with less noise than a minibatch: PAGE, STORM/MVR, Hessian momentum, IGT.

Local transformations for the target of a rule that compresses differences, for example
``chain(ef.storm(0.1), ef.ef21(compressor, axis_name=...))``; each keeps an estimate v_i of its own
worker's gradient and needs gradients at further points of the *same* minibatch.

    page:               v = grad f_i(x) when exact, else v + grad(x; xi) - grad(x_last; xi)
    storm:              v = (1 - eta)(v + grad(x; xi) - grad(x_last; xi)) + eta grad(x; xi)
    hessian_momentum:   v = (1 - eta)(v + H(x; xi)(x - x_last)) + eta grad(x; xi)
    igt:                v = (1 - eta) v + eta grad(x + ((1 - eta)/eta)(x - x_last); xi)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax import _check
from ef_optax._base import Array, as_key
from ef_optax._transformation import as_transformation
from ef_optax.feedback import _rule
from ef_optax.parallel.points import HessianVector


class PageState(NamedTuple):
    """State of :func:`page`."""

    estimate: Any  # per worker, like the parameters: v
    last: Any  # the parameters of the last step
    steps: Array  # int32 scalar

    def points(self, params: Any) -> dict[str, Any]:
        """Where gradients are needed besides the parameters: at the last iterate."""
        del params
        return {"page": self.last}


class StormState(NamedTuple):
    """State of :func:`storm`."""

    estimate: Any  # per worker, like the parameters: v
    last: Any  # the parameters of the last step
    steps: Array  # int32 scalar

    def points(self, params: Any) -> dict[str, Any]:
        """Where gradients are needed besides the parameters: at the last iterate."""
        del params
        return {"storm": self.last}


class HessianMomentumState(NamedTuple):
    """State of :func:`hessian_momentum`."""

    estimate: Any  # per worker, like the parameters: v
    last: Any  # the parameters of the last step
    fraction: Array  # float32 scalar: where on the segment the Hessian is taken, 1 at its end
    steps: Array  # int32 scalar

    def points(self, params: Any) -> dict[str, Any]:
        """The product of the Hessian with the last step."""
        step = _rule.sub(params, self.last)
        return {"hessian_momentum": HessianVector(_rule.axpy(self.fraction, step, self.last), step)}


class IGTState(NamedTuple):
    """State of :func:`igt`."""

    estimate: Any  # per worker, like the parameters: v
    last: Any  # the parameters of the last step
    reach: Array  # float32 scalar: (1 - eta)/eta of the next step
    steps: Array  # int32 scalar

    def points(self, params: Any) -> dict[str, Any]:
        """A point ahead of the parameters, along the last step."""
        return {"igt": _rule.axpy(self.reach, _rule.sub(params, self.last), params)}


def page() -> optax.GradientTransformationExtraArgs:
    r"""PAGE: a full gradient now and then, gradient differences of minibatches in between.

    .. math:: v' = \nabla f_i(x)\ \text{when exact, else}\
              v + \nabla f_i(x; \xi) - \nabla f_i(x^{\text{last}}; \xi)

    The caller draws the coin, because it decides which batch to load: pass ``exact=True`` (or a
    boolean scalar, the same for all workers) to ``update`` when the gradients are those of the full
    local data. The first step counts as exact. EF21-PAGE is ``chain(page(), ef21(...))``.

    Returns:
      The transformation; its state is a :class:`PageState`. Call
      ``update(grads["params"], state, params, grads=grads, exact=...)``.

    Raises:
      ValueError: at update, if parameters or gradients are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = page()
      >>> params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> grads = {"params": jnp.array([4.0]), "page": jnp.array([3.0])}
      >>> _, state = tx.update(grads["params"], state, params, grads=grads)
      >>> tx.update(grads["params"], state, params, grads=grads)[0].tolist()  # 4 + 4 - 3
      [5.0]

    References:
      Li, Bao, Zhang, Richtarik, "PAGE", ICML 2021; with EF21: Fatkhullin et al., "EF21 with Bells &
      Whistles", 2021.
    """

    def init_fn(params: Any) -> PageState:
        return PageState(_rule.zeros(params), _copy(params), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Any,
        state: PageState,
        params: Any = None,
        *,
        exact: Array | bool = False,
        **extra_args: Any,
    ) -> tuple[Any, PageState]:
        params = _rule.require_params("page", params)
        now = _rule.wide(updates)
        before = _rule.gradient_at("page", "page", extra_args)
        v = _rule.add(state.estimate, _rule.sub(now, before))
        v = _rule.where((state.steps == 0) | jnp.asarray(exact), now, v)
        return _rule.emit(v, updates), PageState(v, params, state.steps + 1)

    return as_transformation(init_fn, update_fn)


def storm(fresh_weight: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""STORM (momentum-based variance reduction): an average that is moved along with the iterate.

    .. math:: v' = (1 - \eta)\,(v + \nabla f_i(x; \xi) - \nabla f_i(x^{\text{last}}; \xi))
              + \eta\,\nabla f_i(x; \xi)

    Args:
      fresh_weight: eta in (0, 1], or a schedule of it; 1 is the plain minibatch gradient.

    Returns:
      The transformation; its state is a :class:`StormState`. Call
      ``update(grads["params"], state, params, grads=grads)``.

    Raises:
      ValueError: for a weight outside (0, 1], and at update if parameters or gradients are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = storm(0.5)
      >>> params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> grads = {"params": jnp.array([4.0]), "storm": jnp.array([2.0])}
      >>> _, state = tx.update(grads["params"], state, params, grads=grads)
      >>> tx.update(grads["params"], state, params, grads=grads)[0].tolist()  # (4 + 2)/2 + 4/2
      [5.0]

    References:
      Cutkosky, Orabona, "Momentum-Based Variance Reduction in Non-Convex SGD", NeurIPS 2019; with
      EF21: Fatkhullin, Tyurin, Richtarik, 2023, and Sadiev et al., 2025.
    """
    _check.weight("storm", "fresh_weight", fresh_weight, schedule=True)

    def init_fn(params: Any) -> StormState:
        return StormState(_rule.zeros(params), _copy(params), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Any, state: StormState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, StormState]:
        params = _rule.require_params("storm", params)
        now = _rule.wide(updates)
        before = _rule.gradient_at("storm", "storm", extra_args)
        moved = _rule.add(state.estimate, _rule.sub(now, before))
        v = _average(fresh_weight, state.steps, moved, now)
        return _rule.emit(v, updates), StormState(v, params, state.steps + 1)

    return as_transformation(init_fn, update_fn)


def hessian_momentum(
    fresh_weight: optax.ScalarOrSchedule, key: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-corrected momentum: the average is moved by a Hessian-vector product.

    .. math:: v' = (1 - \eta)\,(v + \nabla^2 f_i(y; \xi)(x - x^{\text{last}}))
              + \eta\,\nabla f_i(x; \xi)

    with y = x (HM), or a uniformly random point of the last step's segment (RHM) if a key is given.

    Args:
      fresh_weight: eta in (0, 1], or a schedule of it; 1 is the plain minibatch gradient.
      key: None, or a JAX random key or an int for RHM's point, the same on all workers.

    Returns:
      The transformation; its state is a :class:`HessianMomentumState`. Call
      ``update(grads["params"], state, params, grads=grads)``.

    Raises:
      TypeError: if ``key`` is not a key. ValueError: for a weight outside (0, 1], and at update if
        parameters or gradients are missing.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> state = hessian_momentum(0.5).init(jnp.zeros(1))
      >>> query = ef.query_points(state, jnp.ones(1))["hessian_momentum"]
      >>> query.point.tolist(), query.tangent.tolist()
      ([1.0], [1.0])

    References:
      Sadiev et al., "Improved Convergence in Parameter-Agnostic Error Feedback through Momentum",
      2025; update as in the authors' code.
    """
    _check.weight("hessian_momentum", "fresh_weight", fresh_weight, schedule=True)
    key = None if key is None else as_key(key, "hessian_momentum")

    def fraction(steps: Array) -> Array:
        """Where the next step's product is taken."""
        if key is None:
            return jnp.ones((), jnp.float32)
        return jax.random.uniform(jax.random.fold_in(key, steps), dtype=jnp.float32)

    def init_fn(params: Any) -> HessianMomentumState:
        steps = jnp.zeros((), jnp.int32)
        return HessianMomentumState(_rule.zeros(params), _copy(params), fraction(steps), steps)

    def update_fn(
        updates: Any, state: HessianMomentumState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, HessianMomentumState]:
        params = _rule.require_params("hessian_momentum", params)
        product = _rule.gradient_at("hessian_momentum", "hessian_momentum", extra_args)
        moved = _rule.add(state.estimate, product)
        v = _average(fresh_weight, state.steps, moved, _rule.wide(updates))
        steps = state.steps + 1
        return _rule.emit(v, updates), HessianMomentumState(v, params, fraction(steps), steps)

    return as_transformation(init_fn, update_fn)


def igt(fresh_weight: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Implicit gradient transport: gradients are taken ahead, so that their average is up to date.

    .. math:: v' = (1 - \eta) v + \eta\,\nabla f_i\left(x + \tfrac{1 - \eta}{\eta}
              (x - x^{\text{last}}); \xi\right)

    Args:
      fresh_weight: eta in (0, 1], or a schedule of it; 1 is the plain minibatch gradient.

    Returns:
      The transformation; its state is an :class:`IGTState`. Call
      ``update(grads["params"], state, params, grads=grads)``.

    Raises:
      ValueError: for a weight outside (0, 1], and at update if parameters or gradients are missing.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> state = igt(0.25).init(jnp.zeros(1))._replace(reach=jnp.float32(3))
      >>> ef.query_points(state, jnp.ones(1))["igt"].tolist()
      [4.0]

    References:
      Cutkosky, Mehta, "Momentum Improves Normalized SGD", ICML 2020; with EF21: Sadiev et al.,
      2025.
    """
    _check.weight("igt", "fresh_weight", fresh_weight, schedule=True)

    def reach(steps: Array) -> Array:
        """The factor of the next step's query; 0 at first, where there is no last step."""
        eta = jnp.asarray(_rule.value_at(fresh_weight, steps), jnp.float32)
        return (1 - eta) / eta

    def init_fn(params: Any) -> IGTState:
        steps = jnp.zeros((), jnp.int32)
        return IGTState(_rule.zeros(params), _copy(params), jnp.zeros((), jnp.float32), steps)

    def update_fn(
        updates: Any, state: IGTState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, IGTState]:
        params = _rule.require_params("igt", params)
        ahead = _rule.wide(_rule.gradient_at("igt", "igt", extra_args))
        v = _average(fresh_weight, state.steps, state.estimate, ahead)
        steps = state.steps + 1
        return _rule.emit(v, updates), IGTState(v, params, reach(steps), steps)

    return as_transformation(init_fn, update_fn)


def _average(fresh_weight: optax.ScalarOrSchedule, steps: Array, moved: Any, fresh: Any) -> Any:
    """``(1 - eta) moved + eta fresh``; the first average is the fresh value."""
    eta = jnp.asarray(_rule.value_at(fresh_weight, steps))
    eta = jnp.where(steps == 0, jnp.ones_like(eta), eta)
    return _rule.add(_rule.scale(1 - eta, moved), _rule.scale(eta, fresh))


def _copy(params: Any) -> Any:
    """A copy: the caller may donate the parameters and the state together."""
    return jax.tree.map(jnp.array, params)
