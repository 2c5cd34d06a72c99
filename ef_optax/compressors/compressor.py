"""A compressor: an Optax transformation that maps updates to ``C(updates)``, with its codec."""

from __future__ import annotations

import inspect
from typing import Any

import optax

from ef_optax._core.codec import Codec
from ef_optax._exchange.exchange import Exchange, ExchangeState
from ef_optax._numeric.shapes import Shape


class Compressor(optax.GradientTransformationExtraArgs):
    """An Optax transformation whose update is ``C(updates)``, made from a codec.

    It is the usual pair ``(init, update)``, so every Optax combinator accepts it. Alone it shows
    what the receivers would decode. Inside :func:`ef_optax.error_feedback` and the other rules its
    ``codec`` decides what travels.

    Args:
      codec: the codec for each leaf.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.top_k(k=1)
      >>> state = compressor.init(jnp.zeros(3))
      >>> compressed, state = compressor.update(jnp.array([1.0, -3.0, 2.0]), state)
      >>> compressed.tolist()
      [0.0, -3.0, 0.0]
      >>> compressor.codec.bits((3,))  # one float32 value and one index of 2 bits
      34
    """

    codec: Codec

    def __new__(cls, codec: Codec) -> Compressor:
        if not isinstance(codec, Codec):
            raise TypeError(f"codec={codec!r} is not an ef_optax Codec; see ef_optax.extend.Codec.")
        exchange = Exchange(codec)

        def init_fn(params: Any) -> ExchangeState:
            return exchange.init(params)

        def update_fn(
            updates: Any, state: ExchangeState, params: Any = None, **extra_args: Any
        ) -> tuple[Any, ExchangeState]:
            del params, extra_args
            out = exchange(updates, state)
            return out.aggregate, out.state

        update: Any = update_fn  # Optax's type of a state is too narrow for a State class
        self = super().__new__(cls, init_fn, update)
        self.codec = codec
        return self

    def bits(self, shape: Shape, dtype: Any = "float32") -> int:
        """Exact bits of one worker's message for a leaf of this shape."""
        return self.codec.bits(shape, dtype)

    def __repr__(self) -> str:
        return f"Compressor({self.codec!r})"


def codec_of(compressor: Any, argument: str = "compressor") -> Codec:
    """The codec of a compressor; refuses anything that would silently send dense messages.

    Raises:
      TypeError: for plain Optax transformations and wrapped compressors, with the remedy.
    """
    if isinstance(compressor, Compressor):
        return compressor.codec
    if isinstance(compressor, Codec):
        raise TypeError(f"{argument}={compressor!r} is a codec; wrap it: Compressor(codec).")
    if inspect.isfunction(compressor):
        raise TypeError(
            f"{argument}={compressor.__name__} is a function and not yet a Compressor; call it "
            f"with its settings, {compressor.__name__}(...)."
        )
    raise TypeError(
        f"{argument}={type(compressor).__name__} is not a Compressor, so its output would travel "
        "dense. Combine compressors with ef_optax.compose(quantizer, sparsifier), choose one for "
        "each leaf with ef_optax.per_leaf(policy) instead of optax.masked, and wrap a plain Optax "
        "transformation with ef_optax.dense(tx) if a dense message is what you want."
    )
