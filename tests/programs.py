"""Programs that tests look into, compiled as users compile them.

The root ``conftest.py`` asks XLA for little work, as most programs of the tests run for less time
than they take to compile. A test that counts kernels, passes or bytes compiles its program here.
"""

from __future__ import annotations

import os

import jax

FULL = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program with all optimisations, whatever the environment says."""
    reduced = os.environ["XLA_FLAGS"]
    return lowered.compile(compiler_options={k: v for k, v in FULL.items() if k in reduced})
