"""L-GreCo (Alimohammadi et al. 2024): a level for each layer, under an error budget for all.

minimise sum_l bits(l, c_l)
subject to sum_l ||C_{c_l}(x_l) - x_l||^2 <= that of one level for all
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ef_optax.extend import Compressor, allocation, check


def l_greco(
    gradients: Any, compressors: Sequence[Compressor], baseline: int, *, parts: int = 4096
) -> Compressor:
    r"""The fewest bits whose total error is at most that of one compressor for all leaves.

    .. math:: \min_c \sum_l \text{bits}(l, c_l) \quad \text{subject to}\quad
              \sum_l \|C_{c_l}(x_l) - x_l\|^2 \le \sum_l \|C_b(x_l) - x_l\|^2

    It is solved by dynamic programming over the error in ``parts`` equal parts, on the host. Leaves
    differ in how well they compress: a ratio that is too strong for one is wasteful for another.
    Solve again at intervals, for instance each epoch; every new choice is compiled anew, and the
    memories of the rule stay.

    Args:
      gradients: example inputs of the compressor, a tree like the parameters: the gradient of one
        worker, or better its gradient plus its residual.
      compressors: the levels, such as ``[ef.top_k(r) for r in (0.001, 0.01, 0.1)]``.
      baseline: the index of the level whose total error must not be exceeded.
      parts: resolution of the error budget.

    Returns:
      A :func:`ef_optax.per_leaf` compressor for these leaves.

    Raises:
      ValueError: if ``baseline`` is not an index into ``compressors``.

    Example:
      A leaf with one large value needs few, a flat one needs many:

      >>> import ef_optax as ef, jax, numpy as np
      >>> x = {"spike": 5 * np.eye(8, dtype="f4")[3], "flat": np.ones(8, "f4")}
      >>> levels = [ef.top_k(k=k) for k in (1, 4, 6)]
      >>> chosen = ef.policies.l_greco(x, levels, baseline=1)
      >>> like = jax.ShapeDtypeStruct((8,), "float32")
      >>> [chosen.codec.for_leaf(path, like).k for path in ("spike", "flat")]
      [1, 4]

    References:
      Alimohammadi, Markov, Frantar, Alistarh, "L-GreCo: Layerwise-Adaptive Gradient Compression for
      Efficient and Accurate Deep Learning", MLSys 2024.
    """
    check.count("l_greco", "baseline", baseline, least=0, most=len(compressors) - 1)
    check.count("l_greco", "parts", parts)
    paths, errors, bits, _ = allocation.measured(gradients, compressors)
    picks = allocation.cheapest(bits, errors, errors[:, baseline].sum(), parts)
    everywhere = [baseline] * len(paths)
    rows = range(len(paths))
    if not picks or bits[rows, picks].sum() > bits[rows, everywhere].sum():
        picks = everywhere  # the rounding of the budget left nothing better
    return allocation.assigned(paths, compressors, picks)
