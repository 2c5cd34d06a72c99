"""Writes the table of every transport's traffic into ``docs/wire.md``: ``python -m docs.traffic``.

The bytes are read from programs that are compiled for 2 to 64 virtual devices of one CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # before JAX is imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"

import jax

import ef_optax as ef
from tests.programs import exchange_of

PAGE = Path(__file__).with_name("wire.md")
BEGIN, END = "<!-- traffic: python -m docs.traffic -->\n", "<!-- end of traffic -->\n"

SHAPES = {"kernel": (256, 256)}
WORKERS = (2, 4, 8, 16, 32, 64)

TRANSPORTS: dict[str, Callable[[], ef.Compressor]] = {
    "identity(), summed": ef.identity,
    "gather(scaled_sign())": ef.scaled_sign,
    "gather(top_k(0.01))": lambda: ef.top_k(0.01),
    "mean_of_senders(top_k(0.01))": lambda: ef.exchanges.mean_of_senders(ef.top_k(0.01)),
    "largest_of_sum(top_k(0.01))": lambda: ef.exchanges.largest_of_sum(ef.top_k(0.01)),
    "majority(scaled_sign())": lambda: ef.exchanges.majority(ef.scaled_sign()),
    "reduce(top_k(0.01))": lambda: ef.exchanges.reduce(ef.top_k(0.01)),
    "two_shot(scaled_sign())": lambda: ef.exchanges.two_shot(ef.scaled_sign()),
    "two_shot(block_quantize(4))": lambda: ef.exchanges.two_shot(ef.block_quantize(4)),
    "leader(top_k(0.01))": lambda: ef.exchanges.leader(ef.top_k(0.01)),
    "tree(top_k(0.01))": lambda: ef.exchanges.tree(ef.top_k(0.01)),
    "auto(top_k(0.01))": lambda: ef.exchanges.auto(ef.top_k(0.01)),
    "arc_top_k(0.01)": lambda: ef.arc_top_k(0.01),
    "power_sgd(2)": lambda: ef.power_sgd(2),
}


def link_bytes(name: str, workers: int) -> int:
    """What one device sends and receives in an exchange of the leaf, as compiled."""
    types = (jax.sharding.AxisType.Auto,)
    devices = jax.devices()[:workers]
    mesh = jax.make_mesh((workers,), ("data",), axis_types=types, devices=devices)
    return ef.wire_report(exchange_of(TRANSPORTS[name]().codec, SHAPES, mesh)).link_bytes


def row(name: str, cells: list[int]) -> str:
    return " | ".join([f"| `{name}`", *(f"{cell:,}" for cell in cells)]) + " |"


def table() -> str:
    head = " | ".join(["| link bytes of a device", *(f"n = {n}" for n in WORKERS)]) + " |"
    rows = [row(name, [link_bytes(name, n) for n in WORKERS]) for name in TRANSPORTS]
    return "\n".join([head, "|---" + "|--:" * len(WORKERS) + "|", *rows]) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n" + table() + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
