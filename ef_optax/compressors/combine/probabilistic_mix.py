"""One of several compressors, drawn at random in every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields, packing
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits, common
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, bits_for, like_of
from ef_optax.compressors.combine._single import _split, single_codec
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Mixture(Codec):
    """Codec j with probability p_j; the message is as long as the longest of all codecs."""

    codecs: tuple[Codec, ...]
    probabilities: tuple[float, ...]
    key: Array

    @property
    def traits(self) -> Traits:
        shared = common(*(codec.traits for codec in self.codecs))
        return dataclasses.replace(shared, deterministic=False)

    def _template(self, codec: Codec, like: jax.ShapeDtypeStruct) -> Any:
        """Shapes and dtypes of one codec's message."""
        key = None if codec.deterministic else self.key
        return jax.eval_shape(lambda x: codec.encode(x, key), like)

    def _longest(self, like: jax.ShapeDtypeStruct) -> int:
        """Bits of the longest message."""
        return max(fields.exact_bits(self._template(codec, like)) for codec in self.codecs)

    @property
    def _choice_bits(self) -> int:
        return bits_for(len(self.codecs))

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        bits = self._longest(like_of(x))
        length = packing.packed_words(bits, 1)
        draw = jax.random.uniform(key)
        thresholds = jnp.cumsum(jnp.asarray(self.probabilities, draw.dtype))[:-1]
        choice = jnp.sum(draw >= thresholds, dtype=jnp.int32)

        def branch(number: int, codec: Codec) -> Any:
            def run(x: Array) -> Array:
                words = fields.to_words(codec.encode(x, _split(key, codec, number + 1)))
                return jnp.pad(words, (0, length - words.size))

            return run

        words = jax.lax.switch(choice, [branch(i, c) for i, c in enumerate(self.codecs)], x)
        return {
            "choice": fields.pack(choice[None], self._choice_bits),
            "message": fields.Packed(words, bits),
        }

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        def branch(codec: Codec) -> Any:
            template = self._template(codec, like)
            return lambda words: codec.decode(fields.from_words(words, template), like)

        choice = fields.unpack(message["choice"], self._choice_bits, 1)[0].astype(jnp.int32)
        return jax.lax.switch(choice, [branch(c) for c in self.codecs], message["message"].words)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return self._choice_bits + self._longest(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """Sum p_j alpha_j."""
        return self._average([c.alpha(shape, num_workers) for c in self.codecs])

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """Sum p_j omega_j."""
        if not self.unbiased:
            return None
        return self._average([c.omega(shape, num_workers) for c in self.codecs])

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """Sum p_j noise_error_j."""
        own = [codec.noise_error(shape, num_workers) for codec in self.codecs]
        return sum(p * error for p, error in zip(self.probabilities, own, strict=True))

    def _average(self, constants: Sequence[float | None]) -> float | None:
        pairs = zip(self.probabilities, constants, strict=True)
        return None if None in constants else sum(p * c for p, c in pairs if c is not None)


def probabilistic_mix(
    compressors: Sequence[Compressor], probabilities: Sequence[float], key: Any = None
) -> Compressor:
    """One of several compressors, drawn at random for each leaf, worker and step.

    omega = sum p_j omega_j if all are unbiased, alpha = sum p_j alpha_j (bounds). The message is as
    long as the longest of theirs, because shapes are fixed; the information is shorter.

    Args:
      compressors: two or more compressors of single leaves.
      probabilities: one positive number for each; they add up to 1.
      key: a JAX random key or an int; step, leaf and worker are folded in.

    Returns:
      The compressor. Bits: ceil(log2 m) for m compressors, plus those of the longest message.

    Raises:
      ValueError: for bad probabilities. TypeError: without a key.

    Example:
      Top-k in half of the steps, and everything in the others:

      >>> import ef_optax as ef
      >>> both = [ef.top_k(0.5), ef.cast("float32")]
      >>> ef.probabilistic_mix(both, [0.5, 0.5], key=0).bits((10,))
      321

    References:
      Burlachenko, Horvath, Richtarik, FL_PyTorch, 2021 (probabilistic switching).
    """
    codecs = tuple(single_codec(c, "probabilistic_mix", "compressors") for c in compressors)
    chances = tuple(float(p) for p in probabilities)
    valid = len(codecs) == len(chances) >= 2 and all(p > 0 for p in chances)
    if not valid or abs(sum(chances) - 1) > 1e-6:
        raise ValueError(
            f"probabilistic_mix: probabilities={probabilities!r} must be positive, add up to 1, "
            f"and be one for each of the {len(codecs)} compressors (at least two)."
        )
    return Compressor(Mixture(codecs, chances, as_key(key, "probabilistic_mix")))
