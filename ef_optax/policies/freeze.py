"""A part of an optimizer's state that no longer changes from a given step on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Literal

from ef_optax.extend import Array, as_transformation, check


class FreezeState(NamedTuple):
    """State of :func:`freeze`."""

    inner: Any  # the state of the frozen transformation
    step: Array  # int32 scalar: updates made


def freeze(
    tx: optax.GradientTransformation, fields: Sequence[str], step: int
) -> optax.GradientTransformationExtraArgs:
    """Keeps some fields of an optimizer's state as they are, from a given step on.

    A frozen field is also the one that the step itself uses: ``optax.scale_by_adam`` with a frozen
    ``"nu"`` divides by that variance, and not by one that has this step's gradient in it. For this,
    the update is traced, and where it computes the next value of a frozen field, the old value
    takes its place. Counts go on, so Adam still corrects the frozen variance for a bias that it no
    longer has less of; freeze it when ``b2 ** step`` is small, or use
    :func:`ef_optax.recipes.one_bit_adam`, which has no such correction. Use the same step as for
    :func:`delayed_start`.

    Args:
      tx: the transformation, such as ``optax.scale_by_adam()``.
      fields: the names of these fields in its state, such as ``["nu"]``.
      step: updates after which they stay as they are, at least 0.

    Returns:
      The transformation; its state is a :class:`FreezeState`.

    Raises:
      ValueError: for a step below 0, or at init if no state has a field of such a name.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.policies.freeze(optax.scale_by_adam(b2=0.5), ["nu"], step=1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (2.0, 8.0):
      ...     updates, state = tx.update(jnp.array([g]), state)
      >>> state.inner.nu.tolist()  # half of the first square
      [2.0]

    References:
      Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
      Speed", ICML 2021.
    """
    check.count("freeze", "step", step, least=0)
    if isinstance(fields, str) or not all(isinstance(field, str) for field in fields):
        raise TypeError(f"freeze: fields={fields!r} must be a list of names, such as ['nu'].")
    inner = optax.with_extra_args_support(tx)

    def own(x: Any) -> list[str]:
        return [field for field in fields if field in getattr(x, "_fields", ())]

    def has_any(x: Any) -> bool:
        return bool(own(x))

    def init_fn(params: Any) -> FreezeState:
        state = inner.init(params)
        found = {field for x in jax.tree.leaves(state, is_leaf=has_any) for field in own(x)}
        if missing := sorted(set(fields) - found):
            raise ValueError(
                f"freeze: fields={fields!r}: no state of tx has {', '.join(missing)}; give names "
                "of fields, such as 'nu' of optax.scale_by_adam()."
            )
        return FreezeState(state, jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Any, state: FreezeState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, FreezeState]:
        def step_of(updates: Any, inner_state: Any) -> tuple[Any, Any]:
            return inner.update(updates, inner_state, params, **extra_args)

        def olds(new: Any, old: Any) -> Any:
            """The old value of each frozen field in place of its new one; None for the others."""
            nothing = jax.tree.map(lambda _: None, new)
            pairs = {field: getattr(old, field) for field in own(new)}
            return nothing._replace(**pairs) if pairs else nothing

        traced, shapes = jax.make_jaxpr(step_of, return_shape=True)(updates, state.inner)
        kept = jax.tree.map(olds, shapes[1], state.inner, is_leaf=has_any)
        frozen = state.step >= step
        values = [None] * len(jax.tree.leaves(shapes[0]))
        values += jax.tree.leaves(kept, is_leaf=lambda x: x is None)
        pairs = zip(traced.jaxpr.outvars, values, strict=True)
        swaps = {var: value for var, value in pairs if value is not None}
        results = _evaluated(traced, jax.tree.leaves((updates, state.inner)), swaps, frozen)
        updates, after = jax.tree.unflatten(jax.tree.structure(shapes), results)
        return updates, FreezeState(after, state.step + 1)

    return as_transformation(init_fn, update_fn)


def _evaluated(
    traced: ClosedJaxpr, arguments: Sequence[Any], swaps: Mapping[Any, Any], frozen: Array
) -> list[Any]:
    """The results of a traced function in which some values are replaced if ``frozen``.

    Args:
      traced: the function.
      arguments: its arguments.
      swaps: what takes the place of a value, by its variable.
      frozen: bool scalar.
    """
    jaxpr = traced.jaxpr
    values = dict(zip(jaxpr.constvars, traced.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    for equation in jaxpr.eqns:
        operands = [read(x) for x in equation.invars]
        inside = equation.params.get("jaxpr")
        if equation.primitive.name in _CALLS and not swaps.keys().isdisjoint(equation.outvars):
            pairs = zip(inside.jaxpr.outvars, equation.outvars, strict=True)
            within = {
                inner: swaps[outer]
                for inner, outer in pairs
                if outer in swaps and not isinstance(inner, Literal)
            }
            results = _evaluated(inside, operands, within, frozen)
        else:
            params = equation.primitive.get_bind_params(equation.params)
            results = equation.primitive.bind(*operands, **params)
            results = results if equation.primitive.multiple_results else [results]
        for var, value in zip(equation.outvars, results, strict=True):
            values[var] = jnp.where(frozen, swaps[var], value) if var in swaps else value
    return [read(x) for x in jaxpr.outvars]


_CALLS = ("jit", "pjit")
"""The names that versions of JAX give to a call of a compiled function."""
