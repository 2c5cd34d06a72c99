"""Modules of ``flax.nnx`` as parameters: split before the call, and merged on every worker.

Such a module changes itself while it computes (the averages of BatchNorm, the counters of Dropout).
Changes to the copy that JAX makes for a trace would be lost, so the new state is returned as a
result and written into the module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax

from ef_optax._numeric.random import is_key


def is_module(x: Any) -> bool:
    """Whether this is a module of ``flax.nnx``; if it is, ``flax.nnx`` is already imported."""
    nnx: Any = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Module)


def split(module: Any) -> tuple[Any, Any, Any]:
    """The structure of a module, its parameters, and the rest of its state."""
    nnx: Any = sys.modules["flax.nnx"]
    return nnx.split(module, nnx.Param, ...)


def of_parts(loss_fn: Callable[..., Any], structure: Any, has_aux: bool) -> Callable[..., Any]:
    """The loss as a function of the parts, ``(params, batch, rest) -> (loss, (aux, rest))``."""
    nnx: Any = sys.modules["flax.nnx"]

    def of_params(params: Any, batch: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        module = nnx.merge(structure, params, rest)
        result = loss_fn(module, batch, *args, **kwargs)
        loss, aux = result if has_aux else (result, ())
        return loss, (aux, split(module)[2])

    return of_params


def write_back(module: Any, before: Any, after: Any) -> None:
    """Writes the rest of the state into the module, except its random keys."""
    nnx: Any = sys.modules["flax.nnx"]
    nnx.update(module, jax.tree.map(lambda x, y: x if is_key(x) else y, before, after))
