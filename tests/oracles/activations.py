"""AQ-SGD in NumPy, example by example, from the listing in the paper's words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def nearest(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Signed multiples of largest/(2^(bits-1) - 1), rounded to the nearest."""
    steps = 2 ** (bits - 1) - 1

    def quantize(a: np.ndarray) -> np.ndarray:
        largest = np.abs(a).max(initial=np.float32(0))
        codes = np.round(a / (largest or 1) * steps)
        return (codes * (largest / np.float32(steps))).astype(a.dtype)

    return quantize


class AQSGD:
    """One cut: both ends have the same memory, so there is one here.

    Args:
      quantize: Q, of one example's activations.
      store: what is left of m(s) after it was stored.
    """

    def __init__(
        self,
        quantize: Callable[[np.ndarray], np.ndarray],
        store: Callable[[np.ndarray], np.ndarray] = lambda m: m,
    ) -> None:
        self.quantize, self.store = quantize, store
        self.m: dict[int, np.ndarray] = {}

    def forward(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """What the receiver goes on with; a batch with a new example crosses dense."""
        first = any(s not in self.m for s in index)
        y = np.empty_like(x)
        for i, (a, s) in enumerate(zip(x, index, strict=True)):
            y[i] = a if first else self.m[s] + self.quantize(a - self.m[s])
            self.m[s] = self.store(y[i])
        return y
