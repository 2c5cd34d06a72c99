"""What the keys of random codecs depend on is the same in every process."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np

import ef_optax as ef
from ef_optax._exchange.exchange import Exchange


def test_the_hash_of_a_path_is_a_checksum() -> None:
    """Python's own hash of a text differs between processes; CRC-32 of "b" is 0x71beeff9."""
    seen = {}

    class Plain(ef.extend.Codec):
        def protocol(self, x, state, workers):
            seen[x.shape] = int(np.asarray(workers.path))
            return (yield from super().protocol(x, state, workers))

        def encode(self, x, key=None):
            return x.reshape(-1)

        def decode(self, message, like):
            return message.reshape(like.shape)

        def bits(self, shape, dtype=jnp.float32):
            return 32 * int(np.prod(shape))

    exchange = Exchange(Plain())
    tree = {"b": jnp.zeros(1), "layers": [jnp.zeros(2)]}
    jax.eval_shape(lambda tree: exchange(tree, exchange.init(tree)).aggregate, tree)
    assert seen == {(1,): 0x71BEEFF9, (2,): zlib.crc32(b"layers/0")}
