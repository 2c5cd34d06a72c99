"""All-reduce: each worker decodes its own message, and the dense arrays are averaged on the way.

all_reduce:   (1/n) sum_i C(x_i), dense
"""

from __future__ import annotations

from ef_optax._core.transport import AllReduce
from ef_optax.compressors.compressor import Compressor
from ef_optax.exchanges.carried import carried


def reduce(compressor: Compressor) -> Compressor:
    """Averages the decoded messages by a dense all-reduce.

    ``aggregate = (1/n) sum_i C(x_i)``, as with :func:`gather`, but about two dense arrays cross a
    link, whatever the number of workers. That is less than n gathered messages once n exceeds twice
    the compression factor. The effect of compression on training is the same, so it can be studied
    this way even if only dense collectives are fast.

    It is the default transport of :func:`ef_optax.identity`. Compressors that send the same
    positions on all workers (``random_k(shared_mask=True)``, ``random_block``) have their own
    protocol, which sums only the values.

    Args:
      compressor: a stateless compressor of single leaves.

    Returns:
      The compressor. Bits: 32 d for float32.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message one
        worker encodes alone.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.compressed_mean(ef.exchanges.reduce(ef.top_k(k=1)), axis_name="w")
      >>> tx = ef.simulate(tx, 2, "w")
      >>> grads = jnp.array([[3.0, 1.0], [0.0, 5.0]])
      >>> tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2))[0].tolist()
      [1.5, 2.5]

    References:
      Sergeev, Del Balso, "Horovod", 2018 (the option ``sparse_as_dense``).
    """
    return carried("reduce", compressor, AllReduce())
