"""Codecs that other codecs can be made of."""

from __future__ import annotations

from typing import Any

import jax

from ef_optax._core.codec import Codec
from ef_optax._core.need import SELF_CONTAINED
from ef_optax._numeric.dtypes import Array
from ef_optax.compressors.compressor import codec_of


def single_codec(compressor: Any, name: str, argument: str) -> Codec:
    """The codec of a compressor that consists of ``encode`` and ``decode`` on one worker.

    Raises:
      TypeError: for codecs with state, of groups of leaves, or with an exchange of their own.
    """
    codec = codec_of(compressor, argument)
    SELF_CONTAINED.check(f"{name}: {argument}", codec, TypeError)
    return codec


def _split(key: Array | None, codec: Codec, number: int) -> Array | None:
    """A separate key for one of several codecs."""
    return None if key is None or codec.deterministic else jax.random.fold_in(key, number)
