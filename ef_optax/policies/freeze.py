"""A part of an optimizer's state that no longer changes from a given step on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import Array, as_transformation, check


class FreezeState(NamedTuple):
    """State of :func:`freeze`."""

    inner: Any  # the state of the frozen transformation
    step: Array  # int32 scalar: updates made


def freeze(
    tx: optax.GradientTransformation, fields: Sequence[str], step: int
) -> optax.GradientTransformationExtraArgs:
    """Puts back some fields of an optimizer's state after every step, from a given step on.

    Within a step the transformation goes by its own rule: ``optax.scale_by_adam`` with a frozen
    ``"nu"`` divides by ``b2 nu + (1 - b2) g^2`` of this step's gradient, corrected for its bias,
    and then forgets that gradient. So single steps still follow large gradients, while compressed
    gradients leave nothing in the variance. 1-bit Adam divides by the frozen variance itself:
    :func:`ef_optax.recipes.one_bit_adam`. Use the same step as for :func:`delayed_start`.

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
      ...     _, state = tx.update(jnp.array([g]), state)
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
        def given(new: Any, old: Any) -> Any:
            """The new state with the old fields, once they are frozen."""
            pairs = {field: (getattr(new, field), getattr(old, field)) for field in own(new)}
            keep = lambda a, b: jnp.where(frozen, b, a)  # noqa: E731
            kept = {field: jax.tree.map(keep, *pair) for field, pair in pairs.items()}
            return new._replace(**kept) if kept else new

        frozen = state.step >= step
        updates, after = inner.update(updates, state.inner, params, **extra_args)
        after = jax.tree.map(given, after, state.inner, is_leaf=has_any)
        return updates, FreezeState(after, state.step + 1)

    return as_transformation(init_fn, update_fn)
