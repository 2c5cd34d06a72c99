"""Policies of the residual: what happens to it between two steps of a rule, whatever the rule is.

A policy is wrapped around a rule. It finds the residual in the rule's state, may change it before
the rule sees it and after the rule has made the next one, and stores it in the rule's own format.
In between the rule has it in float32 or wider, so that it is rounded once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax._exchange.collectives import AxisName
from ef_optax._exchange.exchange import ExchangeState
from ef_optax._numeric import check, trees
from ef_optax._numeric.dtypes import Array
from ef_optax._rules.memory import Memory
from ef_optax._rules.transformation import as_transformation


class ResidualPolicyState(NamedTuple):
    """State of a policy of the residual, around the state of a rule."""

    rule: Any  # the state of the rule
    step: Array  # int32 scalar: updates made
    dropped: (
        Any  # per worker, a float32 scalar for each leaf: the 1-norm of what was dropped so far
    )
    extra: Any  # what the policy itself remembers


class Step(NamedTuple):
    """What a policy may look at."""

    number: Array  # int32 scalar: updates made before this one
    updates: Any  # what the rule received: this worker's gradient
    emitted: Any  # what the rule emitted, the same on all workers; None before the rule
    extra: Any  # what the policy remembers
    extra_args: dict[str, Any]  # further arguments of the update


def around(
    name: str,
    rule: optax.GradientTransformation,
    *,
    after: Callable[[Any, Any, Step], tuple[Any, Any, Any]],
    before: Callable[[Any, Step], Any] | None = None,
    begin: Callable[[Any], Any] | None = None,
    axis_name: AxisName = None,
    alone: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A rule whose residual a policy changes.

    Args:
      name: of the policy, for error messages.
      rule: a rule with one residual, or a chain with one such rule.
      after: ``after(new, old, step)``, from the rule's new residual and the old one in the same
        units: the whole residual, how much of it to keep, and the policy's next ``extra``. The
        difference is counted.
      before: ``before(old, step)`` is what the rule gets in place of its old residual.
      begin: ``begin(params)`` is the policy's first ``extra``; () without it.
      axis_name: the worker axis, so that workers round a stored residual with noise of their own.
      alone: whether to refuse rules that remember something else as well.

    Raises:
      TypeError: if ``rule`` is not a transformation. ValueError: for a bad axis name, and at init
        unless the rule has exactly one residual.
    """
    check.axis(axis_name)
    if not isinstance(rule, optax.GradientTransformation):
        raise TypeError(
            f"{name}: rule={rule!r} must be a rule, such as error_feedback(top_k(0.1))."
        )
    inner, memory = optax.with_extra_args_support(rule), Memory(axis_name=axis_name)

    def init_fn(params: Any) -> ResidualPolicyState:
        state = inner.init(params)
        if alone:
            _require_no_others(name, _rule(name, state))
        residual = memory.read(_rule(name, state).residual)
        dropped = jax.tree.map(lambda _: jnp.zeros((), jnp.float32), residual)
        extra = () if begin is None else begin(params)
        return ResidualPolicyState(state, jnp.zeros((), jnp.int32), dropped, extra)

    def update_fn(
        updates: Any, state: ResidualPolicyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ResidualPolicyState]:
        kept = _rule(name, state.rule).residual
        old, step = memory.read(kept), Step(state.step, updates, None, state.extra, extra_args)
        given = old if before is None else before(old, step)
        emitted, after_rule = inner.update(
            updates, _with_residual(state.rule, given), params, **extra_args
        )
        new = _rule(name, after_rule)
        old = trees.scale(_change_of_units(_rule(name, state.rule), new), old)
        whole, final, extra = after(memory.read(new.residual), old, step._replace(emitted=emitted))
        dropped = jax.tree.map(
            lambda count, x, y: count + jnp.sum(jnp.abs(x - y)).astype(jnp.float32),
            state.dropped,
            whole,
            final,
        )
        new_state = _with_residual(after_rule, memory.write(final, kept, state.step))
        return emitted, ResidualPolicyState(new_state, state.step + 1, dropped, extra)

    return as_transformation(init_fn, update_fn)


def _is_rule(x: Any) -> bool:
    """Whether this is the state of a rule with a residual; local steps have one of another kind."""
    fields = getattr(x, "_fields", ())
    return "residual" in fields and "ahead" not in fields


def _is_end(x: Any) -> bool:
    """For ``is_leaf``: transports may have a residual of their own, which is not the rule's."""
    return _is_rule(x) or isinstance(x, ExchangeState)


def _rule(name: str, state: Any) -> Any:
    """The state of the one rule with a residual."""
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_end) if _is_rule(x)]
    if len(found) != 1:
        raise ValueError(
            f"{name}: the state of rule has {len(found)} residuals, but one is needed; put the "
            "policy around a rule that has one, such as error_feedback, dgc or econtrol. For rules "
            "with estimates (ef21) use ef_optax.policies.flush, which is a schedule of the "
            "compressor and works in every rule."
        )
    return found[0]


def _require_no_others(name: str, state: Any) -> None:
    others = [
        field
        for field, value in state._asdict().items()
        if field not in ("residual", "last_rate") and not isinstance(value, ExchangeState)
    ]
    if others:
        raise ValueError(
            f"{name}: rule also remembers {', '.join(others)}, which would have to follow; use "
            "error_feedback, or undo the scaling before the rule."
        )


def _change_of_units(old: Any, new: Any) -> Any:
    """By what a rule with ``learning_rate=`` multiplied its residual in this step."""
    before: Any = getattr(old, "last_rate", ())
    after: Any = getattr(new, "last_rate", ())
    if isinstance(before, tuple):
        return 1
    return jnp.where(after != 0, before / jnp.where(after != 0, after, 1), 1)


def _with_residual(state: Any, residual: Any) -> Any:
    def one(x: Any) -> Any:
        return x._replace(residual=residual) if _is_rule(x) else x

    return jax.tree.map(one, state, is_leaf=_is_end)
