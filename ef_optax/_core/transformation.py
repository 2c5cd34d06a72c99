"""The one place where Optax's pair of functions is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax


def as_transformation(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation from its two functions, whose state may be of any class.

    Optax types the state of an update as its union of pytrees, which no function that names its own
    State class matches; the loss of type is confined to this line.
    """
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
