"""A cut between stages of a pipeline: who sends to whom, and how messages of a batch cross it.

The first axis of an activation is that of the examples. Each example has a message of its own, so
what is sent of it does not depend on which others are in the microbatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._core.codec import Codec
from ef_optax._core.need import SELF_CONTAINED
from ef_optax._core.requests import Message
from ef_optax._core.workers import Workers
from ef_optax._exchange import collectives as coll
from ef_optax._exchange.transfer import permute_trees
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import like_of
from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.compressor import Compressor, codec_of

Pairs = Sequence[tuple[int, int]]
FORWARD, BACKWARD = 0, 1
"""The two streams of random numbers of a cut."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """The links of one cut, or of all cuts of a pipeline whose stages run the same program.

    Attributes:
      name: the public function that made it, for errors.
      axis: the mesh axis of the stages; None if all stages are in one process.
      pairs: (sender, receiver) of the forward pass; None for each stage to the next.
    """

    name: str
    axis: coll.AxisName
    pairs: tuple[tuple[int, int], ...] | None

    def links(self) -> tuple[tuple[int, int], ...]:
        """(sender, receiver) of all links; empty in one process."""
        if self.axis is None:
            return ()
        try:
            size = coll.axis_size(self.axis)
        except coll.UnboundAxisError as error:
            raise coll.UnboundAxisError(
                self.axis,
                f"{self.name}: axis_name={self.axis!r} is not the name of an axis here. Call it "
                "(and init) inside jax.shard_map over that axis; None is for one process.",
            ) from error
        if self.pairs is None:
            return tuple((stage, stage + 1) for stage in range(size - 1))
        if max(map(max, self.pairs)) >= size:
            raise ValueError(
                f"{self.name}: pairs={self.pairs!r} must be of stages below {size}, the size of "
                f"axis {self.axis!r}."
            )
        return self.pairs

    def batch(self, x: Any) -> Array:
        """The activations of a batch, refused unless they are a floating array of examples."""
        self.links()  # refuses an axis that is not bound
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
            raise TypeError(
                f"{self.name}: x={like_of(x)} must be a floating-point array whose first axis is "
                "that of the examples; call it once for each array that crosses."
            )
        return coll.to_varying(x, self.axis)

    def relays(self) -> bool:
        """Whether some stage both receives and sends."""
        links = self.links()
        return not {sender for sender, _ in links}.isdisjoint(receiver for _, receiver in links)

    def sends(self) -> Array | bool:
        """Whether this stage sends forward; in one process it does."""
        return self._among([source for source, _ in self.links()])

    def receives(self) -> Array | bool:
        """Whether this stage receives from the one before it."""
        return self._among([target for _, target in self.links()])

    def forward(self, message: Any) -> Any:
        """The message of the stage before this one; zeros if there is none."""
        return self._moved(message, self.links())

    def backward(self, message: Any) -> Any:
        """The message of the stage after this one; zeros if there is none."""
        return self._moved(message, [(target, source) for source, target in self.links()])

    def encode(self, codec: Codec, x: Array, step: Any, stream: int) -> Message:
        """A message for each example of a batch."""
        workers = Workers(1, coll.axis_index(self.axis), jnp.asarray(step, jnp.int32), stream)
        key = codec.step_key(workers)
        if key is None:
            return jax.vmap(codec.encode)(x)
        return jax.vmap(codec.encode)(x, jax.random.split(key, x.shape[0]))

    def gradient_path(self, codec: Codec) -> Callable[[Array, Array, Any], Array]:
        """The function ``(x, y, step) -> y`` whose gradient is sent back, from y to x.

        Gradients go through the compressor of the forward pass as if it were the identity.
        """

        @jax.custom_vjp
        def through(x: Array, y: Array, step: Array) -> Array:
            del x, step
            return y

        def fwd(x: Array, y: Array, step: Array) -> tuple[Array, Array]:
            del x
            return y, step

        def bwd(step: Array, gradient: Array) -> tuple[Array, None, None]:
            message = self.encode(codec, gradient, step, BACKWARD)
            received = decode(codec, self.backward(message), gradient)
            return jnp.where(self.sends(), received, jnp.zeros_like(received)), None, None

        through.defvjp(fwd, bwd)
        return through

    def _among(self, stages: list[int]) -> Array | bool:
        if self.axis is None:
            return True
        mask = np.isin(np.arange(coll.axis_size(self.axis)), stages)
        return jnp.asarray(mask)[coll.axis_index(self.axis)]

    def _moved(self, message: Any, pairs: Pairs) -> Any:
        if self.axis is None:
            return message
        (received,) = permute_trees([message], pairs, self.axis)
        return received


def cut_for(name: str, axis_name: Any, pairs: Any) -> Cut:
    """The cut of a public function from its options, which are checked."""
    check.axis(axis_name)
    if pairs is None:
        return Cut(name, axis_name, None)
    ends = [tuple(pair) for pair in pairs] if isinstance(pairs, Sequence) else []
    whole = all(
        len(pair) == 2 and all(isinstance(i, int) and i >= 0 for i in pair) for pair in ends
    )
    once = whole and all(len(set(side)) == len(ends) for side in zip(*ends, strict=True))
    if not (ends and once):
        raise ValueError(
            f"{name}: pairs={pairs!r} must be a list of (sender, receiver) in which no stage sends "
            "twice or receives twice, or None for each stage to the next."
        )
    return Cut(name, axis_name, tuple(ends))


def codec_for(name: str, option: str, compressor: Compressor | None) -> Codec:
    """The codec of one direction; None sends the values as they are."""
    codec = codec_of(identity() if compressor is None else compressor, option)
    SELF_CONTAINED.check(f"{name}: {option}", codec)
    return codec


def decode(codec: Codec, message: Message, like: Any) -> Array:
    """What is decoded of the messages of a batch; ``like`` has its shape and dtype."""
    example = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
    return jax.vmap(lambda one: codec.decode(one, example))(message)


def checked_step(name: str, step: Any, codecs: Sequence[Codec]) -> Any:
    """The step for random numbers, which must be given if a codec draws any."""
    if step is None and not all(codec.deterministic for codec in codecs):
        raise ValueError(
            f"{name}: step=None must be the number of the step, because a compressor rounds or "
            "chooses at random and would draw the same numbers every time."
        )
    return jnp.asarray(0 if step is None else step, jnp.int32)
