"""What a codec costs on this machine: measured once, then read from a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._exchange.exchange import Exchange
from ef_optax._numeric.shapes import like_of
from ef_optax.exchanges.carried import Carried
from ef_optax.exchanges.two_shot import TwoShot
from ef_optax.measure.planner.methods import Method

Statistic = Callable[[Iterable[float]], float]

SIDE = 1024
"""Codecs are measured on two matrices of this many rows and columns."""

REPEATS = 5
GATHERED = 9  # messages that are decoded at once, to learn what each costs


@dataclasses.dataclass(frozen=True)
class CodecSeconds:
    """What one exchange computes, for each value of the model.

    Attributes:
      own: seconds to encode and decode a worker's own message and to make its residual.
      other: seconds to decode each further message that is gathered.
    """

    own: float
    other: float = 0.0

    def of(self, size: int, workers: int) -> float:
        """Seconds of one exchange of this many values between this many workers.

        >>> CodecSeconds(1e-9, 1e-10).of(10**9, 11)
        2.0
        """
        return size * (self.own + self.other * (workers - 1))


def cache_file() -> Path:
    """Where measured costs are kept: in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "ef_optax" / "codec_seconds.json"


def codec_seconds(method: Method, *, fresh: bool = False) -> CodecSeconds:
    """Seconds per value of a method's codec on JAX's default device.

    The first call measures for some seconds and keeps the result in :func:`cache_file`, under the
    method, the device and the versions of JAX and of this library. Sending values as they are costs
    nothing. Half of the values are in each of two matrices; small leaves cost more.

    Args:
      method: the method.
      fresh: whether to measure again.
    """
    if method.dense or type(method.compressor.codec).__name__ == "Identity":
        return CodecSeconds(0.0)
    device = jax.devices()[0].device_kind
    versions = f"jax {jax.__version__}, ef_optax {_version()}"
    key = f"{method.name} | {method.compressor!r} | {device} | {versions}"
    path, known = cache_file(), {}
    with contextlib.suppress(OSError, ValueError):  # no file yet, or a damaged one
        known = json.loads(path.read_text(encoding="utf-8"))
    with contextlib.suppress(KeyError, TypeError):
        if not fresh:
            return CodecSeconds(*(float(x) for x in known[key]))
    result = measure(method)
    known = {**(known if isinstance(known, dict) else {}), key: [result.own, result.other]}
    with contextlib.suppress(OSError):  # a folder that cannot be written: measured again next time
        _write(path, json.dumps(known, indent=1))
    return result


def _version() -> str:
    """The version of this library; a tree that is used without being installed has none."""
    try:
        return metadata.version("ef-optax")
    except metadata.PackageNotFoundError:
        return "not installed"


def _write(path: Path, text: str) -> None:
    """Replaces the file at once, so that no other process reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(name, path)


def measure(method: Method, statistic: Statistic = min) -> CodecSeconds:
    """Seconds per value of a method's codec, measured now and not kept.

    Args:
      method: the method.
      statistic: of the times of a call. Other work on the machine only makes calls longer, so it is
        the shortest; where that work belongs to a step, as that of other workers on the same cores,
        ``statistics.median`` is right.
    """
    codec = method.compressor.codec
    exchange = Exchange(codec)
    key = jax.random.key(0)
    tree = {
        name: jax.random.normal(jax.random.fold_in(key, i), (SIDE, SIDE))
        for i, name in enumerate("ab")
    }
    state, size = exchange.init(tree), 2 * SIDE * SIDE

    def once(tree: Any, state: Any) -> Any:
        out = exchange(tree, state, want=() if method.dense else ("residual",))
        return out.aggregate, out.residual

    own = _seconds(statistic, jax.jit(once), tree, state) / size
    inner = codec.inner if isinstance(codec, Carried) else codec
    if not inner.self_contained or (isinstance(codec, Carried) and isinstance(codec.via, TwoShot)):
        return CodecSeconds(own)  # sums arrive decoded, and of each shard there is one message
    x = tree["a"]

    def decoded(count: int) -> float:
        step_key = key if not inner.deterministic else None
        message = jax.jit(inner.encode)(x, step_key)
        copies = jax.tree.map(lambda m: jnp.stack([m] * count), message)
        decode = jax.jit(lambda m: inner.decode_mean(m, like_of(x)))
        return _seconds(statistic, decode, copies) / x.size

    other = max(0.0, decoded(GATHERED) - decoded(1)) / (GATHERED - 1)
    return CodecSeconds(own, other)


def _seconds(statistic: Statistic, function: Callable[..., Any], *args: Any) -> float:
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return statistic(times)
