"""DRIVE: the signs of the randomly rotated leaf, with one scale."""

from __future__ import annotations

from typing import Any

from ef_optax._numeric import check
from ef_optax._numeric.random import as_key
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize.eden import SCALES, Eden


def drive(key: Any = None, *, scale: str = "unbiased") -> Compressor:
    """DRIVE: signs of the randomly rotated leaf, with a fitted scale.

    Let y be the leaf after random signs and the Walsh-Hadamard transform. ``C(x)`` is sign(y)
    rotated back, times ||y||_1/D (``"mse"``) or ||y||_2^2/||y||_1 (``"unbiased"``). For long
    vectors the squared error is 1 - 2/pi = .363 or pi/2 - 1 = .571 of ||x||^2 (asymptotic). The
    second is unbiased under a uniformly random rotation, but only nearly so under this one, so it
    is not declared unbiased. alpha = 1/D for ``"mse"`` (bound).

    Args:
      key: a JAX random key or an int; step, leaf and worker are folded in.
      scale: ``"unbiased"`` or ``"mse"``; use ``"mse"`` under error feedback.

    Returns:
      The compressor. Bits: D + 64, with D the next power of two.

    Raises:
      ValueError: for another scale. TypeError: without a key.

    Example:
      >>> import ef_optax as ef
      >>> ef.drive(key=0).bits((1000,))
      1088

    References:
      Vargaftik et al., DRIVE: one-bit distributed mean estimation, 2021, Algorithm 1 and Theorems
      1 and 3.
    """
    check.word("drive", "scale", scale, SCALES)
    return Compressor(Eden(1, as_key(key, "drive"), scale))
