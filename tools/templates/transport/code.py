"""New name: how the messages travel, in one line.

all_reduce:   (1/n) sum_i C(x_i), dense
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Mean
from ef_optax._core.transport import Transport
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, like_of, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.exchanges.carried import carried


@dataclasses.dataclass(frozen=True)
class NewName(Transport):
    """Every worker decodes its own message; the network averages the dense arrays."""

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        message = codec.encode(x, codec.step_key(workers))
        sent = codec.decode(message, like_of(x))
        mean = yield Mean(sent)
        return Outcome(
            aggregate=mean,
            state=state,
            sent=lambda: sent,
            residual=lambda x=x: codec.residual(x, message),
            support=lambda: codec.support(x, message),
        )

    def traffic(self, codec: Codec, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """All values of the leaf, in one round."""
        del codec, num_workers
        return (size_of(shape) * bits_of(dtype),)


def new_name(compressor: Compressor) -> Compressor:
    """How the messages travel, in one line.

    What a link carries, and how that grows with the number of workers n.

    Args:
      compressor: a stateless compressor of single leaves.

    Returns:
      The compressor. Bits: 32 d for float32.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message is
        encoded by one worker alone.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.compressed_mean(ef.exchanges.new_name(ef.top_k(k=1)), axis_name="w")
      >>> tx = ef.simulate(tx, 2, "w")
      >>> grads = jnp.array([[3.0, 1.0], [0.0, 5.0]])
      >>> tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2))[0].tolist()
      [1.5, 2.5]

    References:
      Authors, Title, year, section.
    """
    return carried("new_name", compressor, NewName())
