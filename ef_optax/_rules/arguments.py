"""What a rule's update receives besides the gradient."""

from __future__ import annotations

from typing import Any

import optax

from ef_optax._numeric.dtypes import Array


def value_at(rate: optax.ScalarOrSchedule, count: Array) -> Any:
    """A number, or a schedule's value at this step."""
    return rate(count) if callable(rate) else rate


def require_params(rule: str, params: Any) -> Any:
    """Refuses an update without parameters."""
    if params is None:
        raise ValueError(f"{rule}: params=None; pass the parameters: update(grads, state, params).")
    return params


def gradient_at(rule: str, name: str, extra_args: Any) -> Any:
    """The gradient at one of the rule's query points, from the extra argument ``grads``."""
    grads = extra_args.get("grads")
    if not isinstance(grads, dict) or name not in grads:
        raise ValueError(
            f"{rule}: needs the gradient at {name!r} on this step's batch. Take gradients at "
            "ef_optax.query_points(opt_state, params) and call "
            "update(grads['params'], state, params, grads=grads)."
        )
    return grads[name]
