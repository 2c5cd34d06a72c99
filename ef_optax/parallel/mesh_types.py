"""Losses that compare types, which differ on a mesh where they are equal in a simulation.

On a mesh the type of an array also names the mesh, and that of a constant does not. So functions
that compare types (the ``State`` of Equinox, solvers that check what they iterate) fail there. They
are traced again, without the mesh.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from ef_optax.parallel.arguments import is_array


def removed_if_needed(fun: Callable[..., Any]) -> Callable[..., Any]:
    """``fun``, traced without the mesh in the types of its arguments if it fails with them.

    They are not removed at once because a function may need the mesh
    (``jax.lax.with_sharding_constraint``). If a function fails either way, its first error is
    raised.
    """

    @functools.wraps(fun)
    def run(*operands: Any) -> Any:
        try:
            return fun(*operands)
        except Exception:
            if not jax.sharding.get_abstract_mesh().empty:
                with contextlib.suppress(Exception):
                    return _without_types(fun, operands)
            raise

    return run


def _without_types(fun: Callable[..., Any], operands: Any) -> Any:
    """``fun(*operands)``, traced as it is outside of the mesh."""
    bare = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type), operands
    )
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        traced, results = jax.make_jaxpr(fun, return_shape=True)(*bare)
    leaves = jaxpr_as_fun(traced)(*jax.tree.leaves(operands))
    likes, treedef = jax.tree.flatten(results)
    # A result that is a constant comes back as a Python number.
    arrays = [
        x if is_array(x) else jnp.asarray(x, like.dtype)
        for x, like in zip(leaves, likes, strict=True)
    ]
    return treedef.unflatten(arrays)
