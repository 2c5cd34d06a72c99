"""Compressors made of compressors: unbiased from biased, contractive from unbiased, mixtures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _fields, _packing
from ef_optax._base import (
    Array,
    Codec,
    Message,
    Shape,
    Workers,
    as_key,
    like_of,
)
from ef_optax._compressor import Compressor, codec_of
from ef_optax.compressors._derived import DerivedCodec
from ef_optax.compressors.identity import Identity
from ef_optax.compressors.sparsify import RandomK


def single_codec(compressor: Any, name: str, argument: str) -> Codec:
    """The codec of a compressor that is all in one worker's encode and decode.

    Raises:
      TypeError: for codecs with state, of groups of leaves, or with an exchange of their own.
    """
    codec = codec_of(compressor, argument)
    alone = type(codec).protocol is Codec.protocol or isinstance(codec, Identity)
    alone = alone or (isinstance(codec, RandomK) and not codec.shared_mask)
    if codec.granularity != "leaf" or codec.stateful or not alone:
        raise TypeError(
            f"{name}: {argument}={codec!r} must be a stateless compressor of single leaves whose "
            "message is encoded by one worker alone."
        )
    return codec


def _split(key: Array | None, codec: Codec, number: int) -> Array | None:
    """A key of its own for one of several codecs."""
    return None if key is None or codec.deterministic else jax.random.fold_in(key, number)


@dataclasses.dataclass(frozen=True)
class Induced(DerivedCodec):
    """``C(x) + U(x - C(x))``: the unbiased codec sends what the biased one leaves."""

    biased: Codec
    corrector: Codec

    unbiased: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def components(self) -> tuple[Codec, ...]:
        return self.biased, self.corrector

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


@dataclasses.dataclass(frozen=True)
class Shrunk(DerivedCodec):
    """``U(x) / (1 + omega)``, omega of the leaf's shape."""

    inner: Codec

    unbiased: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def basis(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.basis

    @property
    def components(self) -> tuple[Codec, ...]:
        return (self.inner,)

    def step_key(self, workers: Workers) -> Array | None:
        return self.inner.step_key(workers)

    def factor(self, shape: Shape) -> float:
        """1/(1 + omega)."""
        omega = self.inner.omega(shape)
        if omega is None:
            raise ValueError(
                f"scale_to_contractive: {self.inner!r} has no variance constant for shape {shape}."
            )
        return 1 / (1 + omega)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        return self.inner.encode(x, key)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return self.inner.decode(message, like) * jnp.asarray(self.factor(like.shape), like.dtype)

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        mean = self.inner.decode_mean(messages, like, weights, total)
        return mean * jnp.asarray(self.factor(like.shape), like.dtype)

    def support(self, x: Array, message: Message) -> Array:
        return self.inner.support(x, message)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return self.inner.bits(shape, dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """1/(1 + omega)."""
        del num_workers
        return self.factor(shape)


@dataclasses.dataclass(frozen=True)
class Mixture(DerivedCodec):
    """Codec j with probability p_j; the message is as long as the longest of theirs."""

    codecs: tuple[Codec, ...]
    probabilities: tuple[float, ...]
    key: Array

    deterministic: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def components(self) -> tuple[Codec, ...]:
        return self.codecs

    def _template(self, codec: Codec, like: jax.ShapeDtypeStruct) -> Any:
        """Shapes and dtypes of one codec's message."""
        key = None if codec.deterministic else self.key
        return jax.eval_shape(lambda x: codec.encode(x, key), like)

    def _longest(self, like: jax.ShapeDtypeStruct) -> int:
        """Bits of the longest of the messages."""
        return max(_fields.exact_bits(self._template(codec, like)) for codec in self.codecs)

    @property
    def _choice_bits(self) -> int:
        return _packing.bits_for(len(self.codecs))

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        bits = self._longest(like_of(x))
        length = _packing.packed_words(bits, 1)
        thresholds = jnp.cumsum(jnp.asarray(self.probabilities, jnp.float32))[:-1]
        choice = jnp.sum(jax.random.uniform(key) >= thresholds, dtype=jnp.int32)

        def branch(number: int, codec: Codec) -> Any:
            def run(x: Array) -> Array:
                words = _fields.to_words(codec.encode(x, _split(key, codec, number + 1)))
                return jnp.pad(words, (0, length - words.size))

            return run

        words = jax.lax.switch(choice, [branch(i, c) for i, c in enumerate(self.codecs)], x)
        return {
            "choice": _fields.pack(choice[None], self._choice_bits),
            "message": _fields.Packed(words, bits),
        }

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        def branch(codec: Codec) -> Any:
            template = self._template(codec, like)
            return lambda words: codec.decode(_fields.from_words(words, template), like)

        choice = _fields.unpack(message["choice"], self._choice_bits, 1)[0].astype(jnp.int32)
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

    def least_error(self, shape: Shape, num_workers: int = 1) -> float:
        """Sum p_j least_error_j."""
        own = [codec.least_error(shape, num_workers) for codec in self.codecs]
        return sum(p * least for p, least in zip(self.probabilities, own, strict=True))

    def _average(self, constants: Sequence[float | None]) -> float | None:
        pairs = zip(self.probabilities, constants, strict=True)
        return None if None in constants else sum(p * c for p, c in pairs if c is not None)


def induced(biased: Compressor, unbiased: Compressor) -> Compressor:
    """An unbiased compressor from a good biased one: ``C(x) + U(x - C(x))``.

    The mean is x, and the variance that of U on what C leaves: omega = omega_U (1 - alpha_C)
    (bound).

    Args:
      biased: any compressor of single leaves, for example ``top_k``.
      unbiased: an unbiased compressor, for example ``random_k(..., scaled=True)``.

    Returns:
      The compressor. Bits: of both messages.

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


def scale_to_contractive(unbiased: Compressor) -> Compressor:
    """A contractive compressor from an unbiased one: ``U(x) / (1 + omega)``.

    alpha = 1/(1 + omega): use it to put an unbiased quantiser under error feedback.

    Args:
      unbiased: an unbiased compressor of single leaves with a variance constant.

    Returns:
      The compressor. Bits: as the one given.

    Raises:
      ValueError: if it is not unbiased or has no constant for a leaf.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.scale_to_contractive(ef.qsgd(1, key=0, norm="linf"))
      >>> x = jnp.array([3.0, 3.0, -3.0, 3.0])
      >>> compressor.update(x, compressor.init(x))[0].tolist(), compressor.codec.alpha(4)
      ([2.0, 2.0, -2.0, 2.0], 0.6666666666666666)

    References:
      Fatkhullin et al., EF21 with bells and whistles, 2021, equation 5.
    """
    codec = single_codec(unbiased, "scale_to_contractive", "unbiased")
    if not codec.unbiased or codec.omega((2,)) is None:
        raise ValueError(
            f"scale_to_contractive: {codec!r} is not unbiased with a known variance constant."
        )
    return Compressor(Shrunk(codec))


def probabilistic_mix(
    compressors: Sequence[Compressor], probabilities: Sequence[float], key: Any = None
) -> Compressor:
    """One of several compressors, drawn at random for each leaf, worker and step.

    omega = sum p_j omega_j if all are unbiased, alpha = sum p_j alpha_j (bounds). The message has
    room for the longest of them, because shapes are fixed; the information is shorter.

    Args:
      compressors: two or more compressors of single leaves.
      probabilities: one for each, positive, adding up to 1.
      key: a JAX random key or an int; step, leaf and worker are folded in.

    Returns:
      The compressor. Bits: ceil(log2 of how many) and those of the longest message.

    Raises:
      ValueError: for bad probabilities. TypeError: without a key.

    Example:
      Top-k half of the time, everything the other half:

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
