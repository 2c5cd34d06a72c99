"""When compression pays: time of a step for each method, from exact bytes and a model of the links.

>>> import ef_optax as ef
>>> planner = ef.measure.planner
>>> link = planner.Link("100mbit", "20ms")
>>> plan = planner.plan(1e8, workers=8, link=link, step_time="0.5s", codec="free")
>>> plan.best.method.name, plan.row("dense bfloat16").seconds > 20 * plan.best.seconds
('SparseLoCo, H = 30', True)

``python -m ef_optax.planner`` is the same from a shell, and ``docs/scaling.md`` what it says about
models of 1 to 70 billion parameters. It says nothing about the loss that a method reaches.
"""

from ef_optax.measure.planner.cost import Round, Tier, inside_seconds, transfer_seconds
from ef_optax.measure.planner.links import Link, bandwidth, seconds
from ef_optax.measure.planner.methods import Method, methods, rounds_of, state_bytes
from ef_optax.measure.planner.named import named
from ef_optax.measure.planner.plan import Plan, Row, plan
from ef_optax.measure.planner.shapes import Leaf, leaves_of
from ef_optax.measure.planner.timing import CodecSeconds, codec_seconds

__all__ = [
    "CodecSeconds",
    "Leaf",
    "Link",
    "Method",
    "Plan",
    "Round",
    "Row",
    "Tier",
    "bandwidth",
    "codec_seconds",
    "inside_seconds",
    "leaves_of",
    "methods",
    "named",
    "plan",
    "rounds_of",
    "seconds",
    "state_bytes",
    "transfer_seconds",
]
