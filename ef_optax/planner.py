"""Whether compression pays, from a shell: ``python -m ef_optax.planner --help``.

Example::

    python -m ef_optax.planner --params=7e9 --workers=64 --bandwidth=1gbit --latency=20ms \
        --step_time=1.5s

The functions behind it are in ``ef_optax.measure.planner``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from ef_optax.measure.planner import Link, Method, Tier, methods, named, plan

_ABOUT = """\
The time of a training step with each method: exact bytes of every message, a model of the links
(latency and bandwidth), and the time of the codec. It says nothing about the loss that a method
reaches. Columns: message, what one worker contributes to an exchange; received, what a device
receives in a step; busy, the share of a step in which the model is computed; break-even, the
bandwidth below which the method beats the best dense one; state, bytes a device must hold for it.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ef_optax.planner",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    need = parser.add_argument_group("what must be given")
    need.add_argument("--params", required=True, help="number of parameters, such as 7e9")
    need.add_argument("--workers", required=True, help="workers that exchange with each other")
    need.add_argument("--bandwidth", required=True, help="of a link: 50mbit, 1gbit, 12GB/s")
    need.add_argument("--step_time", required=True, help="computation of a step alone: 0.4s, 300ms")
    link = parser.add_argument_group("the links")
    link.add_argument("--latency", default="0ms", help="of one message one way (default: 0ms)")
    link.add_argument("--sharing", default="1", help="devices that share a link (default: 1)")
    link.add_argument("--efficiency", default="0.94", help="what the protocol leaves of it (0.94)")
    link.add_argument("--software", help="rate of the software where no link limits it: 8gbit")
    link.add_argument("--ring", action="store_true", help="n - 1 latencies a round, not log2 n")
    link.add_argument("--devices", default="1", help="devices in a worker, each with a part (HSDP)")
    link.add_argument("--inside", help="bandwidth between the devices of a worker: 400GB/s")
    link.add_argument("--inside_latency", default="0ms", help="latency there (default: 0ms)")
    link.add_argument(
        "--tiers",
        help="several links inside of a worker, from the fastest: 8@400GB/s@2us,4@50GB/s@10us",
    )
    step = parser.add_argument_group("the step")
    step.add_argument("--overlap", default="0", help="share of the computation that hides transfer")
    step.add_argument("--steps", help="steps of an epoch, for its time")
    step.add_argument(
        "--methods",
        help="what to compare with dense means, as 'error_feedback(top_k(0.01)) | adamw(3e-4)'",
    )
    step.add_argument(
        "--codec",
        default="measured",
        help="measured (on this machine, once), free, or seconds per value such as 1e-10",
    )
    return parser


def _number(option: str, text: str, kind: type[int] | type[float]) -> float:
    """A number from the command line.

    Raises:
      ValueError: if it is not one, with the option and an example.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or (kind is int and value != int(value)):
        what = "a whole number, such as 64" if kind is int else "a number, such as 0.5"
        raise ValueError(f"{option}={text!r} is not {what}.")
    return kind(value)


def _tier(text: str) -> Tier:
    """A tier such as ``8@400GB/s@2us``; its latency may be left out."""
    devices, _, link = text.partition("@")
    rate, _, latency = link.partition("@")
    return Tier(int(_number("tiers", devices, int)), Link(rate, latency or "0ms"))


def _with_dense(text: str) -> tuple[Method, ...]:
    """The methods that are named, after those that send dense means."""
    return (*(method for method in methods() if method.dense), *named(text))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a plan; returns 2 after one line of explanation if an option is wrong."""
    given = _parser().parse_args(arguments)
    try:
        codec = given.codec
        if codec not in ("measured", "free"):
            codec = _number("codec", codec, float)
        whole = lambda option: int(_number(option, getattr(given, option), int))  # noqa: E731
        inside = None
        if given.tiers is not None:
            inside = [_tier(text) for text in given.tiers.split(",")]
        elif given.inside is not None:
            inside = Link(given.inside, given.inside_latency)
        result = plan(
            _number("params", given.params, float),
            whole("workers"),
            Link(
                given.bandwidth,
                given.latency,
                sharing=whole("sharing"),
                efficiency=_number("efficiency", given.efficiency, float),
                software=math.inf if given.software is None else given.software,
            ),
            given.step_time,
            methods=None if given.methods is None else _with_dense(given.methods),
            inside=inside,
            devices=whole("devices"),
            overlap=_number("overlap", given.overlap, float),
            codec=codec,
            ring=given.ring,
            steps=None if given.steps is None else whole("steps"),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
