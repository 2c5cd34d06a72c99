"""DGC's warm-up: the ratio falls in steps over the first epochs."""

from __future__ import annotations

from collections.abc import Callable

from ef_optax.compressors.combine.scheduled import scheduled
from ef_optax.compressors.sparse.top_k import top_k
from ef_optax.extend import Compressor, check


def dgc_warmup(
    ratio: float,
    steps_per_epoch: int,
    warmup_epochs: int = 4,
    compressor: Callable[[float], Compressor] = top_k,
) -> Compressor:
    """DGC's compressor: the kept ratio falls from epoch to epoch until it is ``ratio``.

    It is a :func:`scheduled` compressor, with ``compressor(dgc_warmup_ratio(e, ...))`` in epoch e,
    for :func:`dgc` or any other rule. The epochs are counted in exchanges.

    Args:
      ratio: the final kept / total in (0, 1].
      steps_per_epoch: exchanges in one epoch.
      warmup_epochs: epochs before the final ratio, at least 0; 0 is ``compressor(ratio)``.
      compressor: a function from a ratio to a compressor.

    Returns:
      The compressor.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import ef_optax as ef
      >>> warm = ef.policies.dgc_warmup(0.001, steps_per_epoch=100, warmup_epochs=4)
      >>> [round(warm.codec.at(step).ratio, 4) for step in (0, 99, 100, 300, 400)]
      [0.2512, 0.2512, 0.0631, 0.004, 0.001]

    References:
      Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", ICLR 2018; the ratios as in the
      official code, synxlin/deep-gradient-compression.
    """
    check.ratio("dgc_warmup", "ratio", ratio)
    check.count("dgc_warmup", "steps_per_epoch", steps_per_epoch)
    check.count("dgc_warmup", "warmup_epochs", warmup_epochs, least=0)
    ratios = [dgc_warmup_ratio(e, ratio, warmup_epochs) for e in range(warmup_epochs + 1)]
    boundaries = [e * steps_per_epoch for e in range(1, warmup_epochs + 1)]
    return scheduled(boundaries, [compressor(r) for r in ratios])


def dgc_warmup_ratio(epoch: int, ratio: float, warmup_epochs: int) -> float:
    """The kept ratio during DGC's warm-up: ``max(ratio^((epoch + 1)/(warmup_epochs + 1)), ratio)``.

    The final ratio is reached in the epoch after the warm-up; :func:`dgc_warmup` makes a compressor
    of these ratios.

    Args:
      epoch: counted from 0.
      ratio: the final ratio in (0, 1].
      warmup_epochs: length of the warm-up, at least 0.

    Returns:
      The ratio of this epoch.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> [round(dgc_warmup_ratio(e, 0.001, 5), 5) for e in range(6)]
      [0.31623, 0.1, 0.03162, 0.01, 0.00316, 0.001]

    References:
      synxlin/deep-gradient-compression, dgc/compression.py.
    """
    check.ratio("dgc_warmup_ratio", "ratio", ratio)
    check.count("dgc_warmup_ratio", "epoch", epoch, least=0)
    check.count("dgc_warmup_ratio", "warmup_epochs", warmup_epochs, least=0)
    return max(ratio ** ((epoch + 1) / (warmup_epochs + 1)), ratio)
