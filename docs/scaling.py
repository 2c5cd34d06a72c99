"""Writes ``docs/scaling.md``: ``python -m docs.scaling``. The numbers are the planner's."""

from __future__ import annotations

import functools
from pathlib import Path

from ef_optax.measure import planner

PAGE = Path(__file__).with_name("scaling.md")

SIZES = {"1B": (1e9, 0.1), "7B": (7e9, 0.6), "70B": (70e9, 3.5)}
"""Parameters, and assumed seconds of the computation of a step."""

WORKERS = (2, 8, 64, 512, 4096)

LINKS = {
    "50 Mbit/s, 20 ms": ("50mbit", "20ms"),
    "200 Mbit/s, 20 ms": ("200mbit", "20ms"),
    "1 Gbit/s, 20 ms": ("1gbit", "20ms"),
    "10 Gbit/s, 1 ms": ("10gbit", "1ms"),
    "100 Gbit/s, 20 us": ("100gbit", "20us"),
    "400 Gbit/s, 10 us": ("400gbit", "10us"),
}

CODEC = 2e-11
"""Assumed seconds per value: 60 bytes of memory traffic at 3 TB/s."""

PUBLISHED = {
    # Douillard et al. 2025, table 4: parameters, step, Gbit/s for 50, 80, 90, 95, 99% utilisation
    "1B": (
        1e9,
        0.1,
        {
            "data parallel": (86.8, 152.6, 184.2, 222.3, 569),
            "DiLoCo": (1.4, 6.2, 13.3, 23.3, 86.8),
            "Streaming, overlapped, FP4": (0.4, 0.9, 1.7, 2, 3),
        },
    ),
    "10B": (
        10e9,
        0.8,
        {
            "data parallel": (104.8, 222.3, 222.3, 268.3, 471.5),
            "Streaming, overlapped, FP4": (0.4, 0.9, 1.4, 1.4, 1.7),
        },
    ),
    "100B": (
        100e9,
        4.9,
        {
            "data parallel": (184.2, 323.8, 390.7, 390.7, 471.5),
            "Streaming, overlapped, FP4": (0.5, 0.9, 1.1, 1.1, 1.4),
        },
    ),
}
UTILISATIONS = (0.5, 0.8, 0.9, 0.95, 0.99)

MEASURED = {
    # Adnan082/diloco-measured: 30.8M parameters, 4 workers, dense float32; utilisation in percent
    "50mbit": (0.07, 0.55, 2.41, 11.55),
    "200mbit": (0.32, 2.48, 10.0, 36.1),
    "1gbit": (1.74, 12.4, 36.0, 71.5),
    "5gbit": (7.8, 40.2, 68.1, 87.0),
}
PERIODS = (1, 8, 32, 128)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


MILD = ("scaled_sign, two_shot", "4 bits, two_shot")
"""Methods that send something of every value."""


def choice(plan: planner.Plan) -> str:
    """What the fastest step of all gains over the best dense one, and that of a mild method."""
    rows = [plan.best_every_step, min(map(plan.row, MILD), key=lambda row: row.seconds)]
    gains = [plan.dense.seconds / row.seconds for row in rows]
    if gains[0] < 1.05:
        return "do not compress"
    mild = "dense" if gains[1] < 1.05 else f"{rows[1].method.name.split(',')[0]} {gains[1]:.3g}x"
    return f"{rows[0].method.name} {gains[0]:.3g}x, {mild}"


def local(plan: planner.Plan) -> str:
    """The same for the methods with local steps."""
    row = min((r for r in plan.rows if r.method.period > 1), key=lambda r: r.seconds)
    gain = plan.dense.seconds / row.seconds
    return f"{gain:.3g}x ({100 * plan.utilisation(row):.2g}%)"


@functools.cache
def plan_of(size: str, workers: int, link: str) -> planner.Plan:
    params, step = SIZES[size]
    return planner.plan(params, workers, planner.Link(*LINKS[link]), step, codec=CODEC)


def recommended(size: str) -> str:
    rows = [
        [link, *(choice(plan_of(size, n, link)) for n in WORKERS), local(plan_of(size, 64, link))]
        for link in LINKS
    ]
    head = ["link", *(f"n = {n:,}" for n in WORKERS), "best with local steps, n = 64"]
    return table(head, rows)


def gbits(row: planner.Row, compute: float, share: float, workers: int, overlap: float) -> float:
    """Gbit/s at which a device is busy for this share of the time, without latency and codec."""
    time = compute * (1 / share - 1 + overlap)
    return 8 * row.received_bytes / time / 1e9


def beside_published() -> str:
    rows = []
    for size, (params, step, published) in PUBLISHED.items():
        link = planner.Link("1gbit", efficiency=1.0)
        plan = planner.plan(params, 2, link, step, codec="free")
        for name, values in published.items():
            rows.append([f"{size}, published: {name}", *(f"{v:g}" for v in values)])
        for name, overlap in (
            ("dense bfloat16", 0.0),
            ("dense bfloat16", 0.67),
            ("scaled_sign, two_shot", 0.0),
            ("power_sgd(4)", 0.0),
            ("DiLoCo, H = 100", 0.0),
        ):
            row = plan.row(name)
            note = f", {overlap:.0%} hidden" if overlap else ""
            values = [gbits(row, step, u, 2, overlap) for u in UTILISATIONS]
            rows.append([f"{size}, here: {name}{note}", *(f"{v:.3g}" for v in values)])
    return table(["Gbit/s for a utilisation of", *(f"{u:.0%}" for u in UTILISATIONS)], rows)


def beside_measured() -> str:
    params, workers, step = 30.8e6, 4, 0.030
    base = planner.methods()[0]
    rows = []
    for rate, measured in MEASURED.items():
        link = planner.Link(rate, "1ms")
        plan = planner.plan(params, workers, link, step, methods=[base], codec="free")
        transfer = plan.rows[0].transfer
        mine = [100 * step / (step + transfer / h) for h in PERIODS]
        cells = [f"{a:.3g} / {b:.3g}" for a, b in zip(mine, measured, strict=True)]
        rows.append([rate.replace("mbit", " Mbit/s").replace("gbit", " Gbit/s"), *cells])
    return table(["planner / measured, %", *(f"H = {h}" for h in PERIODS)], rows)


def page() -> str:
    link = planner.Link("1gbit", "20ms")
    example = planner.plan(7e9, 64, link, 0.6, codec=CODEC)
    tables = "\n\n".join(
        f"### {size} parameters, {SIZES[size][1]} s of computation a step\n\n{recommended(size)}"
        for size in SIZES
    )
    return TEXT.format(
        example=example, tables=tables, published=beside_published(), measured=beside_measured()
    )


TEXT = """\
# When compression pays

`python -m docs.scaling` writes this page with the planner. Ask it about your own cluster:

```
python -m ef_optax.planner --params=7e9 --workers=64 --bandwidth=1gbit --latency=20ms \\
    --step_time=0.6s
```

```
{example}
```

**What is in it.** Bytes are exact: the bits that each codec declares, which tests hold to compiled
programs, in the rounds of its own protocol. Links follow the alpha-beta model
(`help(ef.measure.planner.cost)`): a gather of m bytes makes each of n devices receive (n - 1) m, an
all-reduce 2 (n - 1)/n m, an all-to-all (n - 1)/n m; each round waits for log2 n latencies (twice
for an all-reduce; `--ring` for n - 1). TCP leaves 94% of a link. Nothing is hidden behind
computation unless `--overlap` says so. Inside of a worker there may be several tiers of links, as
`--tiers=8@400GB/s@2us,4@50GB/s@10us`: each moves what the faster ones have left of it. By default
the codec's time is measured on the machine that runs the planner; for this page it is an
*assumption*, 2e-11 s per value.

**What is not in it.** The loss. A message that is hundreds of times smaller reaches it later than
one that is 30 times smaller, and local steps need their own learning rates. Nor congestion,
stragglers, and the software's own time for a collective, which `--latency` and `--software` must
contain. Nothing in the first tables has been measured on a network: they are arithmetic.
[Steps over slow links](slow-network.md) has the planner's answers beside measured times.

## What to use

Each cell has the fastest step of all methods that exchange in every step, and how many times as
fast as the best dense mean (float32 or bfloat16) it is; then the same for the better of two mild
methods, `two_shot` of signs or of 4 bits. If no method is 5% faster than dense, the advice is not
to compress. Every worker holds the whole model. With HSDP, workers are the groups, and each device
exchanges its own part (`--devices`, `--inside`). The last column has the best method with local
steps, and the share of the time in which the model is computed.

{tables}

## Beside published numbers

The bandwidth needed for a utilisation, between two workers. Published: Douillard et al., "Streaming
DiLoCo", 2025, table 4, *simulated* there, with H = 100. Its numbers grow more slowly from 50% to
99%, because transfers are hidden behind the computation. Ours are without latency and codec, and
with nothing hidden unless the row says so.

{published}

The only measured curve known to us is Adnan082/diloco-measured: 30.8 million parameters, 4 workers,
DiLoCo with dense float32 drifts, on links shaped by `tc`. The time of a step of computation is not
given there; 30 ms is fitted to *one* cell (50 Mbit/s, H = 128). All other cells are predictions,
with a latency of 1 ms, and within a factor of 1.4. The planner is too optimistic where a step
exchanges often, and at 5 Gbit/s, where the software's own time is not small beside the link's.

{measured}
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
