"""The ways to run two workers: simulated, and on meshes of both kinds."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

N = 2
# Explicit axes are JAX's default; on a mesh with Auto axes the lift runs the same code.
WHERE = ["simulate", pytest.param("auto", marks=pytest.mark.slow), "explicit"]


def workers(where: str):
    if where == "simulate":
        return N
    kind = AxisType.Explicit if where == "explicit" else AxisType.Auto
    return jax.make_mesh((N,), ("data",), axis_types=(kind,), devices=jax.devices()[:N])
