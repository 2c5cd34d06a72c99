"""New name: what changes over time or from leaf to leaf, in one line."""

from __future__ import annotations

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.combine.per_leaf import per_leaf
from ef_optax.extend import Compressor, check


def new_name(compressor: Compressor, *, smallest: int = 1024) -> Compressor:
    """Sends leaves of fewer than ``smallest`` entries dense, the others by ``compressor``.

    Args:
      compressor: for the large leaves.
      smallest: the smallest number of entries of a large leaf, at least 0.

    Returns:
      The compressor: :func:`ef_optax.per_leaf` with a policy by size.

    Raises:
      TypeError: if ``compressor`` is not a Compressor or ``smallest`` not an int. ValueError: if
        ``smallest`` is negative.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.policies.new_name(ef.top_k(k=1), smallest=3)
      >>> params = {"w": jnp.ones(3), "b": jnp.ones(2)}
      >>> compressed, _ = compressor.update(params, compressor.init(params))
      >>> compressed["w"].tolist(), compressed["b"].tolist()
      ([1.0, 0.0, 0.0], [1.0, 1.0])
    """
    check.count("new_name", "smallest", smallest, least=0)
    return per_leaf(lambda path, like: compressor if like.size >= smallest else identity())
