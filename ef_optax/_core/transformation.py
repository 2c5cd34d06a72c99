"""How Optax transformations are made from their two functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax


def as_transformation(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation from its two functions, whose state may be of any class.

    Optax types the state of an update as a union of pytrees, and a function that names its own
    State class does not match it. The type is lost here and nowhere else.
    """
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
