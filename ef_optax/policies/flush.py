"""A dense step now and then, after which nothing is left in the residual."""

from __future__ import annotations

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.combine.scheduled import scheduled
from ef_optax.extend import Compressor, check, codec_of


def flush(compressor: Compressor, period: int, *, by: Compressor | None = None) -> Compressor:
    r"""Every ``period``-th exchange sends everything: the memory begins again, and nothing is lost.

    .. math:: c^t = g^t + e^t, \quad e^{t+1} = 0 \qquad \text{for}\ t = H - 1, 2H - 1, \ldots

    In error feedback, gradient and residual travel dense in this exchange and the residual is zero
    after it. EF21's estimate becomes the gradient. It works in every rule, because it is a schedule
    of the compressor. With ``by``, the special exchange is compressed too, by a weaker compressor:
    this is the partial reset of CSER, here of gradient and residual together.

    A reset that drops the residual instead is :func:`reset_residual`.

    Args:
      compressor: what is sent in the other exchanges.
      period: H, at least 1; with 1 every exchange is special.
      by: the compressor of every ``period``-th exchange; None for the identity.

    Returns:
      The compressor.

    Raises:
      ValueError: for a period below 1. TypeError: if an argument is not a Compressor.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.error_feedback(ef.policies.flush(ef.top_k(k=1), period=2))
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.array([3.0, 2.0]), state)
      ...     print(updates.tolist(), state.residual.tolist())
      [3.0, 0.0] [0.0, 2.0]
      [3.0, 4.0] [0.0, 0.0]

    References:
      Xie, Zheng, Koyejo, Gupta, Li, Lin, "CSER: Communication-efficient SGD with Error Reset",
      NeurIPS 2020 (the reset).
    """
    check.count("flush", "period", period)
    codec_of(compressor)
    special = identity() if by is None else by
    if period == 1:
        codec_of(special, "by")
        return special
    return scheduled([period - 1], [compressor, special], period=period)
