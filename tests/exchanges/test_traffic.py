"""What a device sends and receives with every transport, between 2, 4 and 8 workers."""

from __future__ import annotations

import pytest

from docs import traffic
from ef_optax.measure import planner

FEW = ("two_shot(scaled_sign())", "arc_top_k(0.01)")


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FEW else (pytest.mark.slow,)) for n in traffic.TRANSPORTS],
)
def test_link_bytes_of_every_transport(name: str, workers: int) -> None:
    """The compiled program, the declared bits by the planner, and the table in the docs agree."""
    compiled = traffic.link_bytes(name, workers)
    method = planner.Method(name, traffic.TRANSPORTS[name]())
    leaves = tuple(planner.Leaf(path, shape) for path, shape in traffic.SHAPES.items())
    declared = sum(
        2 * one.received_bytes(workers) for one in planner.rounds_of(method, leaves, workers)
    )
    assert declared == pytest.approx(compiled, abs=8)
    page = traffic.PAGE.read_text(encoding="utf-8")
    written = page.partition(traffic.BEGIN)[2].partition(traffic.END)[0]
    (line,) = (line for line in written.splitlines() if line.startswith(f"| `{name}` |"))
    assert line.split(" | ")[1 + traffic.WORKERS.index(workers)].rstrip(" |") == f"{compiled:,}"
