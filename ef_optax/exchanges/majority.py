"""Majority: all workers apply the sign of the sum of the messages.

all_gather:   C(x_i) of every worker, to all workers
then          sign(sum_i C(x_i)), 0 for a tie
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Protocol
from ef_optax._core.traits import Traits
from ef_optax._core.transport import AllGather, Transport
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize.sign import Sign
from ef_optax.exchanges.carried import Carried, carried


@dataclasses.dataclass(frozen=True)
class Majority(Transport):
    """Gathers the messages; the aggregate is the sign of their weighted sum, 0 for a tie."""

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        outcome = yield from AllGather().run(codec, x, state, workers)
        return dataclasses.replace(outcome, aggregate=jnp.sign(outcome.aggregate))

    def traits(self, codec: Codec) -> Traits:
        own = codec.traits
        return dataclasses.replace(
            own, unbiased=False, linear=False, homogeneous=False, additive=False
        )


def majority(compressor: Compressor) -> Compressor:
    """Applies the sign of the sum of the workers' messages: ``sign(sum_i C(x_i))``.

    The workers vote on each coordinate with the value that they send for it. With signs every vote
    counts the same (:func:`majority_vote`); with :func:`ef_optax.top_k` only those workers vote for
    which the coordinate is large. With weights the vote is weighted; a tie gives 0. The aggregate
    is not the mean of what was sent (``additive`` is False), so rules that keep an estimate of that
    mean refuse it.

    Args:
      compressor: a stateless compressor of single leaves.

    Returns:
      The compressor. Bits: those of the message.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message one
        worker encodes alone.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.compressed_mean(ef.exchanges.majority(ef.top_k(k=1)), axis_name="data")
      >>> tx = ef.simulate(tx, num_workers=2, axis_name="data")
      >>> grads = jnp.array([[5.0, -1.0], [1.0, -2.0]])
      >>> tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2))[0].tolist()
      [1.0, -1.0]

    References:
      Bernstein, Zhao, Azizzadenesheli, Anandkumar, signSGD with majority vote, 2019, Algorithm 1,
      for signs.
    """
    return carried("majority", compressor, Majority())


def majority_vote() -> Compressor:
    """SignSGD with majority vote: the aggregate is ``sign(sum_i sign(x_i))``.

    It is :func:`majority` of :func:`ef_optax.sign`. Each worker sends d signs (sign(0) = +1); a
    worker whose leaf is all zero does not vote; a tie gives 0. With weights the vote is weighted.
    The aggregate is not the mean of what was sent (``additive`` is False), so rules that keep an
    estimate of that mean refuse it.

    Returns:
      The compressor. Bits: d + 32 per worker.

    Example:
      Two of three workers agree on each coordinate:

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
    return Compressor(Carried(Sign(), Majority()))
