"""Compression from a given step on."""

from __future__ import annotations

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.combine.scheduled import scheduled
from ef_optax.extend import Compressor, check, codec_of


def delayed_start(compressor: Compressor, steps: int, *, steps_per_epoch: int = 1) -> Compressor:
    """Everything is sent dense for some steps, and compressed from then on.

    Until then the residual is zero and EF21's estimate is the gradient, so compression begins from
    an exact memory. To compress from the first step and only to remember later is another method,
    and harmful.

    Args:
      compressor: what is sent from then on.
      steps: exchanges before compression, at least 0; 0 is the compressor itself.
      steps_per_epoch: exchanges in one epoch, to give ``steps`` in epochs.

    Returns:
      The compressor.

    Raises:
      ValueError: if a count is out of range. TypeError: if ``compressor`` is not a Compressor.

    Example:
      >>> import ef_optax as ef
      >>> late = ef.policies.delayed_start(ef.top_k(0.01), 5, steps_per_epoch=100)
      >>> late.codec.at(499), late.codec.at(500)
      (Identity(), TopK(ratio=0.01, k=None))

    References:
      Tang et al., "1-bit Adam", ICML 2021 (``freeze_step``); Vogels, Karimireddy, Jaggi,
      "PowerSGD", NeurIPS 2019 (``start_powerSGD_iter`` of its public code).
    """
    check.count("delayed_start", "steps", steps, least=0)
    check.count("delayed_start", "steps_per_epoch", steps_per_epoch)
    codec_of(compressor)
    if steps == 0:
        return compressor
    return scheduled([steps * steps_per_epoch], [identity(), compressor])
