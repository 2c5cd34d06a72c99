"""What an error-feedback step costs on a GPU or TPU, by the kernels and by the XLA form.

First the compiled kernels are checked against NumPy on vectors made to break them. Then steps are
timed at several sizes, each against the floor ``e <- g + e``: a step adds the residual to the
gradient, makes the packed message and writes the new residual over the old one. Parts of a step
are also timed alone. A figure is the median over interleaved rounds; a round dispatches many
steps and waits once. Every part runs in a separate process, so the failure of one does not
affect the others, and results are written after each part.

    python -m benchmarks.accelerator [--out DIR] [--sizes 25000000 4194304 268435456]

writes ``DIR/accelerator.json`` and prints tables. On a CPU it runs small sizes in interpret mode,
only to show that it works: those times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 4096
RATIO = 0.01
K = 41
FLOOR = "floor: e <- g + e"
SIZES = [25_000_000, 1 << 22, 1 << 28]
# Bytes that a whole step must move for each value, and a part that only reads.
STEP_BYTES, READ_BYTES = 12, 4

Step = Callable[..., Any]


def on_cpu() -> bool:
    """Whether there is no accelerator to measure."""
    return jax.default_backend() == "cpu"


@contextlib.contextmanager
def form(kernels: bool) -> Iterator[None]:
    """Programs traced inside use the kernels (interpreted on a CPU), or the XLA form."""
    from ef_optax._kernels import dispatch

    def interpreted(step: str, function: str) -> dict[str, Step]:
        return {"cpu": partial(real(step, function)["cuda"], interpret=True)}

    real = dispatch._kernels
    if not kernels:
        replacement = lambda step, function: {}  # noqa: E731
    elif on_cpu():
        replacement = interpreted
    else:
        replacement = real
    with mock.patch.object(dispatch, "_kernels", replacement):
        yield


# ---------------------------------------------------------------------------- checks


def check(flags: argparse.Namespace) -> dict[str, Any]:
    """Compiled kernels and XLA forms against NumPy; an empty string is a pass."""
    from benchmarks.adversaries import adversaries, block_top_k, sign_words
    from ef_optax import _kernels

    del flags
    results: dict[str, str] = {}
    for kernels in (True, False):
        for dtype in (jnp.float32, jnp.bfloat16):
            for size in (1 << 17, 17 * BLOCK + 1501, 17 * BLOCK + 1504)[: 3 if kernels else 1]:
                name = f"{'kernel' if kernels else 'XLA'} {jnp.dtype(dtype).name} {size}"
                wrong = []
                try:
                    with form(kernels):
                        signs = jax.jit(lambda x: _kernels.pack_signs_and_norm(x))
                        select = jax.jit(lambda x: _kernels.block_top_k_indices(x, BLOCK, K))
                        for case, x in adversaries(size, dtype).items():
                            words, norm = signs(x)
                            exact = np.sum(np.abs(np.asarray(x, np.float64)))
                            close = np.allclose(norm, exact, rtol=1e-5, equal_nan=True)
                            if not np.array_equal(words, sign_words(x)):
                                wrong.append(f"{case}: words")
                            if not close and case != "denormal":
                                wrong.append(f"{case}: norm {norm} for {exact}")
                            if not np.array_equal(select(x), block_top_k(x, BLOCK, K)):
                                wrong.append(f"{case}: indices")
                except Exception:
                    traceback.print_exc()
                    wrong.append(traceback.format_exc(limit=1))
                results[name] = "; ".join(wrong)
                print(f"check {name:32} {results[name] or 'ok'}", flush=True)
    return results


# ---------------------------------------------------------------------------- steps


def codec_step(codec: Any, again: bool = False, key: int | None = None) -> Step:
    """Message and new residual; ``again`` forms the sum a second time for the residual."""

    def step(g: jax.Array, e: jax.Array) -> Any:
        p = g + e
        message = codec.encode(p) if key is None else codec.encode(p, jax.random.key(key))
        if again:
            g, e = jax.lax.optimization_barrier((g, e))
            p = g + e
        return codec.residual(p, message), message

    return step


def swapped(step: Step) -> Step:
    """The peers give the message first."""
    return lambda g, e: step(g, e)[::-1]


def reader(function: Step) -> Step:
    """A part that only reads: it returns the vector unchanged, in its own buffer."""
    return lambda x: (x, function(x))


def contenders(size: int) -> list[tuple[str, Step, bool, int]]:
    """(name, step, by the kernels or not, bytes a value) of everything that is timed."""
    import ef_optax as ef
    from benchmarks import peers
    from ef_optax import _kernels

    def signs(x: jax.Array) -> Any:
        return _kernels.pack_signs_and_norm(x)

    def select(x: jax.Array) -> Any:
        return _kernels.block_top_k_indices(x, BLOCK, K)

    def partial_sort(x: jax.Array) -> Any:
        blocks = x[: size // BLOCK * BLOCK].reshape(-1, BLOCK)
        return jax.lax.top_k(jnp.abs(blocks), K)[1]

    sign, block = ef.scaled_sign().codec, ef.block_top_k(RATIO, block=BLOCK).codec
    qsgd = ef.qsgd(7, key=0, bucket=512).codec
    k = int(np.ceil(RATIO * size))
    whole = STEP_BYTES
    return [  # the most important first: the last are left out if time runs out
        (FLOOR, lambda g, e: (g + e, ()), False, whole),
        ("scaled_sign step, XLA", codec_step(sign), False, whole),
        ("scaled_sign step, kernel", codec_step(sign), True, whole),
        ("block_top_k step, kernel", codec_step(block), True, whole),
        ("block_top_k step, XLA", codec_step(block), False, whole),
        ("block step by lax.top_k", swapped(peers.obvious_block_top_k(K)), False, whole),
        ("signs and norm alone, kernel", reader(signs), True, READ_BYTES),
        ("signs and norm alone, XLA", reader(signs), False, READ_BYTES),
        ("block selection alone, kernel", reader(select), True, READ_BYTES),
        ("block selection by lax.top_k", reader(partial_sort), False, READ_BYTES),
        ("top_k(0.01) step", codec_step(ef.top_k(RATIO).codec), False, whole),
        ("top_k(0.01) step by lax.top_k", swapped(peers.obvious_top_k(k)), False, whole),
        ("qsgd(7) step, buckets of 512", codec_step(qsgd, key=0), False, whole),
        ("scaled_sign step, XLA, sum twice", codec_step(sign, again=True), False, whole),
        ("scaled_sign step, kernel, sum twice", codec_step(sign, again=True), True, whole),
        ("block selection alone, XLA", reader(select), False, READ_BYTES),
        *(other_warps() if jax.default_backend() == "gpu" else []),
    ]


def other_warps() -> list[tuple[str, Step, bool, int]]:
    """The kernels alone with other numbers of threads than the library uses."""
    from ef_optax._kernels import block_top_k_triton, signs_triton

    found = []
    for warps in (2, 8):
        signs = partial(signs_triton.pack_signs_and_norm, warps=warps)
        select = partial(block_top_k_triton.block_top_k_indices, length=BLOCK, k=K, warps=warps)
        name = f"alone, kernel, {warps} warps"
        found.append((f"signs and norm {name}", reader(signs), True, READ_BYTES))
        found.append((f"block selection {name}", reader(select), True, READ_BYTES))
    return found


class Runner:
    """One compiled contender, called with its own output: the vector that it writes over."""

    def __init__(self, step: Step, kernels: bool, size: int, bytes_moved: int) -> None:
        self.bytes_moved = bytes_moved
        self.with_gradient = bytes_moved == STEP_BYTES
        shape = jax.ShapeDtypeStruct((size,), jnp.float32)
        arguments = (shape, shape) if self.with_gradient else (shape,)
        start = time.perf_counter()
        with form(kernels):
            lowered = jax.jit(step, donate_argnums=len(arguments) - 1).lower(*arguments)
        self.is_kernel = any(call in lowered.as_text() for call in ("triton", "tpu_custom_call"))
        self.program = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.dispatches = 1
        self.milliseconds: list[float] = []

    def run(self, g: jax.Array, dispatches: int) -> float:
        """Milliseconds a dispatch, from a vector like the gradient."""
        x = jax.block_until_ready(g[::-1] * 1.5)
        start = time.perf_counter()
        for _ in range(dispatches):
            x, message = self.program(g, x) if self.with_gradient else self.program(x)
        jax.block_until_ready((x, message))
        return 1e3 * (time.perf_counter() - start) / dispatches


def measure(size: int, flags: argparse.Namespace) -> dict[str, Any]:
    """The rows of one size."""
    g = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    deadline = time.perf_counter() + flags.seconds
    runners: dict[str, Runner] = {}
    for name, step, kernels, moved in contenders(size):
        if kernels and flags.no_kernels:
            continue
        if time.perf_counter() > deadline - flags.seconds / 4 and name != FLOOR:
            print(f"left out for want of time: {name}", flush=True)
            continue
        try:
            runner = Runner(step, kernels, size, moved)
            first = runner.run(g, 1)
            runner.dispatches = int(np.clip(flags.milliseconds / runner.run(g, 1), 1, 50))
            runners[name] = runner
            print(f"{name}: compiled {runner.compile_seconds:.1f} s, {first:.2f} ms", flush=True)
        except Exception:
            print(f"FAILED: {name}", flush=True)
            traceback.print_exc()
    for _ in range(flags.rounds):
        for name, runner in list(runners.items()):
            if time.perf_counter() > deadline and len(runner.milliseconds) >= 1:
                continue
            try:
                runner.milliseconds.append(runner.run(g, runner.dispatches))
            except Exception:
                print(f"FAILED: {name}", flush=True)
                traceback.print_exc()
                del runners[name]
    return rows_of(runners, size)


def rows_of(runners: dict[str, Runner], size: int) -> dict[str, Any]:
    """Medians, ratios to the floor and the bandwidth that a perfect step would have needed."""
    floor = statistics.median(runners[FLOOR].milliseconds) if FLOOR in runners else float("nan")
    rows = {}
    for name, runner in runners.items():
        median = statistics.median(runner.milliseconds)
        rows[name] = {
            "median_ms": median,
            "range_ms": [min(runner.milliseconds), max(runner.milliseconds)],
            "floors": median / floor,
            "gigabytes_per_second": runner.bytes_moved * size / median / 1e6,
            "kernel": runner.is_kernel,
            "rounds": len(runner.milliseconds),
            "dispatches": runner.dispatches,
            "compile_seconds": runner.compile_seconds,
        }
    print(f"\n{size:,} float32 values")
    print(f"{'':38} {'median ms':>10} {'range':>19} {'x floor':>8} {'GB/s':>7} kernel")
    for name, row in rows.items():
        low, high = row["range_ms"]
        print(
            f"{name:38} {row['median_ms']:10.3f} {f'{low:.3f} - {high:.3f}':>19} "
            f"{row['floors']:8.2f} {row['gigabytes_per_second']:7.0f} {'yes' * row['kernel']}"
        )
    return rows


# ---------------------------------------------------------------------------- parts


def hardware() -> dict[str, str]:
    """Device and versions."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}


def run_part(flags: argparse.Namespace) -> None:
    """One part, in this process."""
    if flags.part == "hardware":
        result: dict[str, Any] = hardware()
        print(result)
    elif flags.part == "check":
        result = check(flags)
    else:
        result = measure(int(flags.part), flags)
    path = flags.out / f"part-{flags.part}.json"
    path.write_text(json.dumps(result), encoding="utf-8")


def spawn(part: str, flags: argparse.Namespace, *more: str) -> dict[str, Any] | None:
    """One part, in a separate process; None if it did not finish."""
    path = flags.out / f"part-{part}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.accelerator", "--part", part]
    command += ["--out", str(flags.out), "--rounds", str(flags.rounds)]
    command += ["--seconds", str(flags.seconds), "--milliseconds", str(flags.milliseconds), *more]
    print(f"\n== {part}", flush=True)
    try:
        subprocess.run(command, check=False, timeout=flags.seconds + 60)
    except subprocess.TimeoutExpired:
        print(f"{part}: stopped, it took too long", flush=True)
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return result


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--sizes", type=int, nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--milliseconds", type=float, default=60.0, help="of one round's loop")
    parser.add_argument("--seconds", type=float, default=40.0, help="for the timings of one size")
    parser.add_argument("--no_kernels", action="store_true")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.part is not None:
        run_part(flags)
        return
    record: dict[str, Any] = {"hardware": spawn("hardware", flags)}
    sizes = flags.sizes or SIZES
    if record["hardware"] is None or record["hardware"]["platform"] == "cpu":
        print("NO ACCELERATOR: small sizes, kernels interpreted; these times say nothing")
        sizes = flags.sizes or [1 << 17]
        flags.rounds, flags.milliseconds = 2, 1.0
    record["checks"] = spawn("check", flags)
    checks = record["checks"] or {"kernel": "did not come to its end"}
    bad = [name for name, wrong in checks.items() if wrong and name.startswith("kernel")]
    # A wrong kernel may crash its process: then only the others are timed.
    more = ["--no_kernels"] if bad or flags.no_kernels else []
    record["results"] = {}
    for size in sizes:
        record["results"][str(size)] = spawn(str(size), flags, *more)
        path = flags.out / "accelerator.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nkernels: {'WRONG: ' + ', '.join(bad) if bad else 'right'}; wrote {path}")


if __name__ == "__main__":
    main()
