"""Muon's orthogonalisation (Jordan et al. 2024) as a transformation without momentum."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from ef_optax.extend import Array, check, from_thin_rows, like_of, resolve_k, thin_rows


def orthogonalise(
    *, nonzero: float = 1.0, parts: int = 1, batch_axes: int = 0
) -> optax.GradientTransformation:
    r"""Replaces every matrix by about the nearest one with orthonormal rows or columns.

    .. math:: U S V^T \to \text{about } U V^T

    It is Optax's Newton-Schulz iteration (``optax.contrib.scale_by_muon``) alone: five steps in
    float32, whose singular values end between about 0.7 and 1.2. A leaf is the matrix (all but the
    last axis) x (last axis).

    Rows of zeros stay zero and change nothing. If only some rows or columns along the shorter side
    are not zero, ``nonzero`` says how many, and the products are made of these alone.

    Args:
      nonzero: at most this share of the rows (or columns, if there are fewer of them or as many)
        differs from zero, in (0, 1]; as much as :func:`ef_optax.shared_rows` keeps.
      parts: the share is that of each of this many equal parts of the rows.
      batch_axes: number of leading axes that are not part of the matrix: 1 for layers that are
        stacked for a scan.

    Returns:
      The transformation, without state.

    Raises:
      ValueError: for an option out of range; at update for a leaf that is not a matrix.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> x = jnp.array([[3.0, 0.0], [0.0, 0.01]])
      >>> u, _ = ef.recipes.orthogonalise().update(x, optax.EmptyState())
      >>> bool(jnp.all(jnp.linalg.svd(u)[1] > 0.1))
      True

    References:
      Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    check.ratio("orthogonalise", "nonzero", nonzero)
    check.count("orthogonalise", "parts", parts)
    check.count("orthogonalise", "batch_axes", batch_axes, least=0)

    def one(x: Array) -> Array:
        if x.ndim < 2 + batch_axes:
            raise ValueError(
                f"orthogonalise: a leaf has shape {x.shape}, which is not a matrix; use "
                "ef_optax.extend.on_matrices for trees with other leaves."
            )
        if x.size == 0:
            return x
        rows = thin_rows(x, batch_axes)
        count = rows.shape[1]
        kept = parts * resolve_k(nonzero, None, count // parts) if count % parts == 0 else count
        rows = newton_schulz(rows) if kept == count else _of_largest(rows, kept)
        return from_thin_rows(rows, like_of(x), batch_axes)

    return optax.stateless(lambda updates, _: jax.tree.map(one, updates))


def spectral_scale(*, batch_axes: int = 0) -> optax.GradientTransformation:
    r"""Multiplies every matrix by :math:`\sqrt{d_\text{out}/d_\text{in}}`.

    With it an orthogonal matrix as a step changes the outputs of a layer as much in a wide model as
    in a narrow one, so that the rate need not be tuned for each width. d_in is the product of all
    axes but the last, d_out is the last axis, as Flax stores its kernels.

    Args:
      batch_axes: number of leading axes that are not part of the matrix.

    Returns:
      The transformation, without state.

    Raises:
      ValueError: for a bad ``batch_axes``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> ef.recipes.spectral_scale().update(jnp.ones((1, 4)), optax.EmptyState())[0].tolist()
      [[2.0, 2.0, 2.0, 2.0]]
    """
    check.count("spectral_scale", "batch_axes", batch_axes, least=0)

    def one(x: Array) -> Array:
        rows, columns = math.prod(x.shape[batch_axes:-1]), x.shape[-1]
        return x * jnp.asarray((columns / max(1, rows)) ** 0.5, x.dtype)

    return optax.stateless(lambda updates, _: jax.tree.map(one, updates))


def _of_largest(x: Array, count: int) -> Array:
    """The result for (matrices, rows, columns), of whose rows at most ``count`` are not zero."""
    _, chosen = jax.lax.top_k(jnp.sum(jnp.abs(x), axis=-1), count)
    parts = newton_schulz(jnp.take_along_axis(x, chosen[..., None], axis=1))
    return jnp.zeros_like(x).at[jnp.arange(len(x))[:, None], chosen].set(parts)


def newton_schulz(x: Array) -> Array:
    """Optax's iteration on (count, rows, columns)."""
    muon = scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=MuonDimensionNumbers(1, 2)
    )
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer's power
        updates: Any = muon.update(x, muon.init(x))[0]
    return updates
