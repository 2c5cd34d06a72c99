"""Optimizers for matrices, beside an ordinary one for all other leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax._core import context

IsMatrix = Callable[[str, jax.ShapeDtypeStruct], bool]
"""Says by name and shape whether a leaf is updated as a matrix."""


def on_matrices(
    matrices: optax.GradientTransformation,
    others: optax.GradientTransformation,
    is_matrix: IsMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One transformation for the matrices of a tree, and another one for all other leaves.

    Both must average what they get over the workers, if there are several.

    Args:
      matrices: for the leaves that are matrices.
      others: for all other leaves.
      is_matrix: ``is_matrix(path, leaf)`` from the leaf's name and shape; None for all leaves with
        two or more axes. Leaves without elements are never matrices.
    """

    def label(path: Any, leaf: Any) -> str:
        like = jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
        name = context.path_string(path)
        chosen = len(like.shape) >= 2 if is_matrix is None else is_matrix(name, like)
        return "matrix" if chosen and 0 not in like.shape else "other"

    return optax.partition(
        {"matrix": matrices, "other": others},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )
