"""All-gather: all workers receive all messages, decode them and average the results.

all_gather:   C(x_i) of every worker, to all workers
"""

from __future__ import annotations

from ef_optax._core.transport import AllGather
from ef_optax.compressors.compressor import Compressor
from ef_optax.exchanges.carried import carried


def gather(compressor: Compressor) -> Compressor:
    """Sends every worker's message to all workers, as nearly all compressors do by default.

    ``aggregate = (1/n) sum_i C(x_i)``, decoded from n messages without n dense arrays. A device
    receives n - 1 messages, so the traffic of a link grows with the number of workers: the signs of
    64 workers take as much as a dense all-reduce.

    Args:
      compressor: a stateless compressor of single leaves. This includes :func:`ef_optax.identity`,
        whose default is an all-reduce.

    Returns:
      The compressor. Bits: those of the message.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message one
        worker encodes alone.

    Example:
      >>> import ef_optax as ef
      >>> ef.exchanges.gather(ef.top_k(k=10)).bits((1024,))
      420
    """
    return carried("gather", compressor, AllGather())
