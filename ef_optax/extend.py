"""The author's kit, with which compressors, feedback rules, transports and policies are written.

The rules of this library import only from here, and public functions from each other.
``docs/write-your-own.md`` explains each part with a working example.

- **A compressor** is a :class:`Codec` (``encode``, ``decode``, ``bits``) in a :class:`Compressor`.
  If one gather is not enough, its ``protocol`` yields requests (:class:`Mean`, :class:`Gather`,
  ...) and returns an :class:`Outcome`.
- **A transport** is a :class:`Transport`: its ``run`` exchanges the messages of any codec, and
  ``ef_optax.exchanges.carried`` makes a compressor from the two.
- **A rule** is an Optax transformation with an :class:`Exchange` inside. :func:`exchange_for` makes
  the exchange and checks that the compressor has what the rule needs; :func:`memory_for` makes its
  :class:`Memory`. ``difference`` has the estimates of EF21 and related rules, ``own_models`` has
  several steps between two exchanges, ``owned`` has trees that are split over the workers, and
  ``steps`` has first, dense and silent steps. In gossip,
  :func:`exchange_with_neighbours` takes the place of ``exchange_for``.
- ``check`` refuses bad options by name, ``trees`` has arithmetic on trees, and ``collectives`` has
  the collectives over the worker axis that rules may use besides an exchange.

>>> import jax.numpy as jnp
>>> from ef_optax.extend import exchange_for
>>> from ef_optax import top_k
>>> exchange = exchange_for("ef21", top_k(k=1))
>>> tree = {"w": jnp.array([3.0, 2.0])}
>>> exchange(tree, exchange.init(tree), want=("residual",)).residual["w"].tolist()
[0.0, 2.0]
"""

from ef_optax._bits.fields import Packed, pack, unpack
from ef_optax._core.codec import Codec
from ef_optax._core.context import path_string
from ef_optax._core.control import Controller
from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.need import Need
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.policy import LeafPolicy, Stage, Stages, StepPolicy, for_leaf, stages_of
from ef_optax._core.requests import AllToAll, Gather, Gathered, Max, Mean, Message, Permute, Sum
from ef_optax._core.timeline import Timeline
from ef_optax._core.traits import Traits, common
from ef_optax._core.transport import AllGather, AllReduce, Transport
from ef_optax._core.workers import Workers
from ef_optax._exchange import collectives
from ef_optax._exchange.collectives import AxisName
from ef_optax._exchange.exchange import Exchange, ExchangeState
from ef_optax._numeric import check, trees
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.linear import einsum
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax._numeric.matrix import from_thin_rows, orthonormal, thin_rows
from ef_optax._numeric.norms import leaf_norm
from ef_optax._numeric.random import as_key
from ef_optax._numeric.rounding import rounded
from ef_optax._numeric.shapes import Shape, like_of, size_of
from ef_optax._rules import (
    allocation,
    arguments,
    difference,
    gossip,
    own_models,
    owned,
    residuals,
    shares,
    steps,
)
from ef_optax._rules.average import moving_average
from ef_optax._rules.gossip import GraphLike, exchange_with_neighbours
from ef_optax._rules.matrices import IsMatrix, on_matrices
from ef_optax._rules.memory import Memory, MemoryLike, memory_for
from ef_optax._rules.needs import (
    ADDITIVE,
    BROADCAST,
    CONTRACTIVE,
    DETERMINISTIC,
    INDEPENDENT,
    UNBIASED,
    Recurrence,
    exchange_for,
)
from ef_optax._rules.stored import Kept, Stored
from ef_optax._rules.transformation import as_transformation, plus
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors._ratio import check_ratio_or_k, resolve_k
from ef_optax.compressors.combine.controlled import Controlled
from ef_optax.compressors.combine.identity import Identity
from ef_optax.compressors.compressor import Compressor, codec_of
from ef_optax.compressors.sparse._sparse import Followable, SparseCodec
from ef_optax.compressors.sparse._threshold import ThresholdCodec
from ef_optax.compressors.sparse.count_sketch import sketch, sketch_estimates
from ef_optax.compressors.sparse.dct_top_k import dct_matrix
from ef_optax.exchanges.shards import GatherShards, ReduceScatter

__all__ = [
    # A compressor: one operator for one leaf, and its message
    "Codec",
    "Compressor",
    "Message",
    "Packed",
    "Traits",
    "codec_of",
    "common",
    "pack",
    "unpack",
    # Parts of compressors: sparse messages, the k largest, count sketches
    "Followable",
    "SparseCodec",
    "ThresholdCodec",
    "check_ratio_or_k",
    "magnitude_order",
    "resolve_k",
    "sketch",
    "sketch_estimates",
    "top_k_indices",
    # A protocol of several rounds: its requests to the workers, and its outcome
    "AllToAll",
    "Gather",
    "Gathered",
    "Max",
    "Mean",
    "MessagelessCodec",
    "Outcome",
    "Permute",
    "Protocol",
    "Sum",
    "Workers",
    # A policy: codecs that depend on the leaf, the step, or both, or on what was measured
    "Controlled",
    "Controller",
    "LeafPolicy",
    "Stage",
    "Stages",
    "StepPolicy",
    "Timeline",
    "for_leaf",
    "stages_of",
    # A transport: how any codec's messages travel
    "AllGather",
    "AllReduce",
    "GatherShards",
    "ReduceScatter",
    "Transport",
    # A rule: its exchange, its memory, and what rules share
    "Exchange",
    "ExchangeState",
    "GraphLike",
    "Identity",
    "IsMatrix",
    "Kept",
    "Memory",
    "MemoryLike",
    "Stored",
    "allocation",
    "arguments",
    "as_transformation",
    "collectives",
    "difference",
    "exchange_for",
    "on_matrices",
    "exchange_with_neighbours",
    "gossip",
    "own_models",
    "owned",
    "memory_for",
    "moving_average",
    "plus",
    "residuals",
    "shares",
    "steps",
    # What a rule or a transport may need of a compressor
    "ADDITIVE",
    "BROADCAST",
    "CONTRACTIVE",
    "DETERMINISTIC",
    "INDEPENDENT",
    "UNBIASED",
    "Need",
    "Recurrence",
    # Options, trees, dtypes and shapes
    "Array",
    "AxisName",
    "Shape",
    "as_key",
    "bits_of",
    "check",
    "dct_matrix",
    "einsum",
    "from_thin_rows",
    "leaf_norm",
    "like_of",
    "orthonormal",
    "path_string",
    "rounded",
    "safe_divisor",
    "size_of",
    "thin_rows",
    "trees",
    "wide_dtype",
]
