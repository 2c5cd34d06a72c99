"""Majority vote: workers send signs, everybody applies the sign of their sum."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ef_optax._core.outcome import Protocol
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize.sign import Sign


@dataclasses.dataclass(frozen=True)
class MajorityVote(Sign):
    """Signs as in :class:`Sign`; the aggregate is the sign of their weighted sum, 0 for a tie."""

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, additive=False)

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        outcome = yield from super().protocol(x, state, workers)
        return dataclasses.replace(outcome, aggregate=jnp.sign(outcome.aggregate))


def majority_vote() -> Compressor:
    """SignSGD with majority vote: the aggregate is ``sign(sum_i sign(x_i))``.

    Each worker sends d signs (sign(0) = +1); a worker whose leaf is all zero does not vote; a tie
    gives 0. With weights the vote is weighted. The aggregate is not the mean of what was sent
    (``additive`` is False), so rules that keep an estimate of that mean refuse it.

    Returns:
      The compressor. Bits: d + 32 for each worker.

    Example:
      Three workers, of whom two agree on each coordinate:

      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.compressed_mean(ef.exchanges.majority_vote(), axis_name="data")
      >>> tx = ef.simulate(tx, num_workers=3, axis_name="data")
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[5.0, -1.0], [-0.1, -1.0], [0.2, 3.0]])
      >>> tx.update(grads, tx.init(params), params)[0].tolist()
      [1.0, -1.0]

    References:
      Bernstein, Zhao, Azizzadenesheli, Anandkumar, signSGD with majority vote, 2019, Algorithm 1.
    """
    return Compressor(MajorityVote())
