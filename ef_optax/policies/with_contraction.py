"""The fewest bits with a given contraction of every leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ef_optax.extend import Compressor, allocation, check


def with_contraction(gradients: Any, compressors: Sequence[Compressor], alpha: float) -> Compressor:
    r"""The cheapest level of each leaf whose measured contraction is at least a given one.

    .. math:: 1 - \frac{\|C(x) - x\|^2}{\|x\|^2} \ge \alpha

    The declared alpha of a compressor is the worst case over all inputs, such as k/d for top-k; on
    gradients it is usually far better. A leaf that no level contracts enough gets the level with
    the least error. Measure again at intervals.

    Args:
      gradients: example inputs of the compressor, a tree like the parameters.
      compressors: the levels.
      alpha: the contraction to be held, in (0, 1].

    Returns:
      A :func:`ef_optax.per_leaf` compressor for these leaves.

    Raises:
      ValueError: for an ``alpha`` out of range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> x = {"spike": jnp.zeros(8).at[3].set(5.0), "flat": jnp.ones(8)}
      >>> levels = [ef.top_k(k=k) for k in (1, 4, 6)]
      >>> chosen = ef.policies.with_contraction(x, levels, alpha=0.5)
      >>> like = jax.ShapeDtypeStruct((8,), jnp.float32)
      >>> [chosen.codec.for_leaf(path, like).k for path in ("spike", "flat")]
      [1, 4]
    """
    check.static("with_contraction", "alpha", alpha, lambda x: 0 < x <= 1, "a number in (0, 1]")
    paths, errors, bits, norms = allocation.measured(gradients, compressors)
    enough = errors <= (1 - alpha) * norms[:, None]
    most = bits.max() + 1
    price = np.where(enough, bits, most + errors)
    return allocation.assigned(paths, compressors, [int(i) for i in price.argmin(1)])
