"""The memories of a rule: how they begin."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._numeric.dtypes import wide_dtype


def zeros(params: Any) -> Any:
    """Zeros like ``params``, in float32 at the least: the memories of a rule."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(jnp.result_type(p))), params)


def several_zeros(params: Any, count: int) -> list[Any]:
    """Several :func:`zeros`, each with buffers of its own, so that a state may be donated."""
    return [zeros(params) for _ in range(count)]
