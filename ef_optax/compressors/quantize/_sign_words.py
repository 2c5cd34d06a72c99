"""Signs and mean magnitudes of leaves of whole words, which are decoded as one vector.

The words of all leaves follow each other, and one program decodes them, with a scale for each
block. Small leaves are encoded as one vector, too; large ones each in one pass, without a copy.
What is sent of each leaf is the same as without its neighbours.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bits import packing
from ef_optax._bits.fields import Packed
from ef_optax._bits.packing import WORD_BITS
from ef_optax._core.codec import Codec
from ef_optax._core.joinable import JointCodec
from ef_optax._core.once import traced_once
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Message
from ef_optax._core.traits import Traits
from ef_optax._core.transport import mean_of
from ef_optax._core.workers import Workers
from ef_optax._exchange.joined import as_vector
from ef_optax._exchange.stack import STACK_LIMIT
from ef_optax._numeric import offsets
from ef_optax._numeric.buffers import in_buffers
from ef_optax._numeric.dtypes import Array, scale_dtype
from ef_optax._numeric.shapes import Shape


@dataclasses.dataclass(frozen=True)
class SignWords(JointCodec):
    """``inner``, which is ``scaled_sign``, on each of a list of leaves in order of their size."""

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, streams=True)

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        codec, step = Words(tuple(leaf.size for leaf in x)), workers.step
        where = offsets.as_data(offsets.begins(codec.sizes), step)
        numbers = offsets.as_data(range(len(x)), step)
        small = sum(size <= STACK_LIMIT for size in codec.sizes)
        found = [traced_once(self.inner.encode, leaf) for leaf in x[small:]]
        if small:
            together = Words(codec.sizes[:small])
            vector = as_vector(x[:small], where[:small], together.sizes)
            found.insert(0, traced_once(together.encode, vector))
        words = jnp.concatenate([own["signs"].words for own in found])
        scales = jnp.concatenate([own["scale"] for own in found])
        message = {"signs": Packed(words, sum(codec.sizes)), "scale": scales}
        got: Gathered = yield Gather(message, jnp.all(jnp.isfinite(message["scale"])))
        like = jax.ShapeDtypeStruct((sum(codec.sizes),), x[0].dtype)

        def leaves(vector: Array) -> list[Array]:
            return offsets.pieces(vector, x, where)

        def sent() -> list[Array]:
            return leaves(in_buffers(lambda: traced_once(codec.decode, message, like), step))

        def residual(x: list[Array] = x) -> list[Array]:
            scales = [offsets.row(message["scale"], i) for i in numbers]
            return [minus_signs(leaf, scale) for leaf, scale in zip(x, scales, strict=True)]

        return Outcome(
            aggregate=leaves(mean_of(codec, got, like, workers)),
            state=state,
            sent=sent,
            residual=residual,
            support=lambda: [jnp.ones(leaf.shape, bool) for leaf in x],
        )


def minus_signs(x: Array, scale: Array) -> Array:
    """What is left of ``x`` when its signs have been sent with a scale, one number.

    >>> minus_signs(jnp.array([3.0, -1.0]), jnp.array(2.0)).tolist()
    [1.0, 1.0]
    """
    scale = scale.astype(x.dtype)
    return x - jnp.where(x >= 0, scale, -scale)


@dataclasses.dataclass(frozen=True)
class Words(Codec):
    """The signs of a vector of leaves, times the mean magnitude of each leaf.

    Attributes:
      sizes: the values of each leaf, multiples of 32, ascending.
    """

    sizes: tuple[int, ...]

    @property
    def traits(self) -> Traits:
        return Traits()

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        words, norms = packing.signs_and_norms(x.reshape(-1, WORD_BITS), scale_dtype(x.dtype))
        return {"signs": Packed(words, x.size), "scale": self._means(norms)}

    def _means(self, norms: Array) -> Array:
        """The mean magnitude of each leaf from the sums of every 32 values.

        Leaves that are rounded up to the same power of two are the rows of one sum, followed by
        zeros.
        """
        counts = [size // WORD_BITS for size in self.sizes]
        sums, start = [], 0
        for _, alike in itertools.groupby(counts, lambda count: (count - 1).bit_length()):
            own = list(alike)
            rows, width, total = len(own), own[-1], sum(own)
            part = lax.slice_in_dim(norms, start, start + total)
            if total < rows * width:
                place = np.full((rows, width), total, np.uint32)
                place[np.arange(width) < np.asarray(own)[:, None]] = np.arange(total)
                part = jnp.append(part, jnp.zeros((1,), norms.dtype))[place]
            sums.append(jnp.sum(part.reshape(rows, width), axis=1))
            start += total
        return jnp.concatenate(sums) / np.asarray(self.sizes, norms.dtype)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        block = math.gcd(*self.sizes)
        leaf = np.repeat(np.arange(len(self.sizes)), [size // block for size in self.sizes])
        scales = message["scale"].astype(like.dtype)[leaf.astype(np.uint32)]
        signs = packing.unpack_signs(message["signs"].words, like.shape[0], like.dtype)
        return (signs.reshape(-1, block) * scales[:, None]).reshape(-1)

    def bits(self, shape: Shape, dtype: Any = None) -> int:
        raise AssertionError("a vector is never asked for bits; its leaves' codec is")
