"""Programs that tests look into, compiled as users compile them.

The root ``conftest.py`` asks XLA for little work, as most programs of the tests run for less time
than they take to compile. A test that counts kernels, passes or bytes compiles its program here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ef_optax._core.codec import Codec
from ef_optax._exchange.exchange import Exchange

FULL = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT",
    "xla_cpu_use_fusion_emitters": True,
}


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program with all optimisations, whatever the environment says."""
    reduced = os.environ["XLA_FLAGS"]
    return lowered.compile(compiler_options={k: v for k, v in FULL.items() if k in reduced})


def exchange_of(
    codec: Codec, shapes: Mapping[str, tuple[int, ...]], mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """The compiled exchange of leaves of these shapes between the workers of a mesh."""
    exchange = Exchange(codec, "data")
    leaves = {name: jnp.zeros((mesh.size, *shape)) for name, shape in shapes.items()}

    def one(tree):
        tree = jax.tree.map(lambda x: x[0], tree)
        return exchange(tree, exchange.init(tree)).aggregate

    mapped = jax.shard_map(
        one, mesh=mesh, in_specs=P("data"), out_specs=P(), axis_names={"data"}, check_vma=False
    )
    return jax.jit(mapped).lower(leaves).compile()
