"""The least error within a number of bytes a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ef_optax.extend import Compressor, allocation, check


def within_bytes(
    gradients: Any, compressors: Sequence[Compressor], budget: int, *, parts: int = 4096
) -> Compressor:
    """The level of each leaf with the least total error, within a number of bytes a step.

    It is the counterpart of :func:`l_greco`, with bytes as the limit and the error as the cost, and
    holds the bytes of one worker's message. Solve it again at intervals.

    Args:
      gradients: example inputs of the compressor, a tree like the parameters.
      compressors: the levels.
      budget: bytes of one worker's message in a step, at least 1.
      parts: resolution of the budget.

    Returns:
      A :func:`ef_optax.per_leaf` compressor for these leaves.

    Raises:
      ValueError: if even the cheapest level of every leaf takes more bytes.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> x = {"spike": jnp.zeros(8).at[3].set(5.0), "flat": jnp.ones(8)}
      >>> levels = [ef.top_k(k=k) for k in (1, 4, 6)]
      >>> chosen = ef.policies.within_bytes(x, levels, budget=32)
      >>> like = jax.ShapeDtypeStruct((8,), jnp.float32)
      >>> [chosen.codec.for_leaf(path, like).k for path in ("spike", "flat")]
      [1, 6]
    """
    check.count("within_bytes", "budget", budget)
    check.count("within_bytes", "parts", parts)
    paths, errors, bits, _ = allocation.measured(gradients, compressors)
    picks = allocation.cheapest(errors, bits / 8, budget, parts)
    if not picks:
        raise ValueError(
            f"within_bytes: budget={budget} is too small: the cheapest levels take "
            f"{bits.min(1).sum() / 8:.0f} bytes; give more bytes or stronger compressors."
        )
    return allocation.assigned(paths, compressors, picks)
