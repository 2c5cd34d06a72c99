"""Induced compressor: a biased compressor, and an unbiased one for what it leaves out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits, common
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape
from ef_optax.compressors.combine._single import _split, single_codec
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Induced(Codec):
    """``C(x) + U(x - C(x))``: the unbiased codec sends what the biased one leaves out."""

    biased: Codec
    corrector: Codec

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(common(self.biased.traits, self.corrector.traits), unbiased=True)

    def step_key(self, workers: Workers) -> Array | None:
        random = self.corrector if self.biased.deterministic else self.biased
        return random.step_key(workers)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        first = self.biased.encode(x, _split(key, self.biased, 1))
        rest = self.biased.residual(x, first)
        return {"first": first, "rest": self.corrector.encode(rest, _split(key, self.corrector, 2))}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        first = self.biased.decode(message["first"], like)
        return first + self.corrector.decode(message["rest"], like)

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        first = self.biased.decode_mean(messages["first"], like, weights, total)
        return first + self.corrector.decode_mean(messages["rest"], like, weights, total)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return self.biased.bits(shape, dtype) + self.corrector.bits(shape, dtype)

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """omega_U (1 - alpha_C)."""
        alpha = self.biased.alpha(shape, num_workers)
        omega = self.corrector.omega(shape, num_workers)
        return None if alpha is None or omega is None else omega * (1 - alpha)


def induced(biased: Compressor, unbiased: Compressor) -> Compressor:
    """An unbiased compressor from a good biased one: ``C(x) + U(x - C(x))``.

    Its expectation is x, and its variance is that of U on what C leaves out:
    omega = omega_U (1 - alpha_C) (bound).

    Args:
      biased: any compressor of single leaves, for example ``top_k``.
      unbiased: an unbiased compressor, for example ``random_k(..., scaled=True)``.

    Returns:
      The compressor. Bits: those of both messages.

    Raises:
      TypeError: for compressors with state or an exchange of their own.
      ValueError: if the second is not unbiased.

    Example:
      >>> import ef_optax as ef
      >>> compressor = ef.induced(ef.top_k(0.5), ef.random_k(0.25, key=0, scaled=True))
      >>> compressor.codec.omega(8)
      1.5

    References:
      Horvath, Richtarik, A better alternative to error feedback, 2021, Definition 3 and Theorem 3.
    """
    first = single_codec(biased, "induced", "biased")
    second = single_codec(unbiased, "induced", "unbiased")
    if not second.unbiased:
        raise ValueError(f"induced: unbiased={second!r} is biased; the order is biased, unbiased.")
    return Compressor(Induced(first, second))
