"""All-gather: everybody receives all messages, and averages what they decode to.

all_gather:   C(x_i) of every worker, to everybody
"""

from __future__ import annotations

from ef_optax._core.transport import AllGather
from ef_optax.compressors.compressor import Compressor
from ef_optax.exchanges.carried import carried


def gather(compressor: Compressor) -> Compressor:
    """Sends every worker's message to all workers: how nearly all compressors travel anyway.

    ``aggregate = (1/n) sum_i C(x_i)``, decoded from n messages without n dense arrays. A device
    receives n - 1 messages, so the traffic of a link grows with the number of workers: signs of n =
    64 workers are as much as the dense all-reduce.

    Args:
      compressor: a stateless compressor of single leaves. :func:`ef_optax.identity`, which travels
        by an all-reduce by itself, is gathered too.

    Returns:
      The compressor. Bits: those of the message.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message is
        encoded by one worker alone.

    Example:
      >>> import ef_optax as ef
      >>> ef.exchanges.gather(ef.top_k(k=10)).bits((1024,))
      420
    """
    return carried("gather", compressor, AllGather())
