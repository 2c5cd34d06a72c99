"""The ways to run two workers: simulated, and on meshes of both kinds."""

from __future__ import annotations

import jax
from jax.sharding import AxisType

N = 2
WHERE = ["simulate", "auto", "explicit"]


def workers(where: str):
    if where == "simulate":
        return N
    kind = AxisType.Explicit if where == "explicit" else AxisType.Auto
    return jax.make_mesh((N,), ("data",), axis_types=(kind,), devices=jax.devices()[:N])
