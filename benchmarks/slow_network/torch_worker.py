"""One worker of the PyTorch side: ``DistributedDataParallel`` over Gloo, and a twin of the model.

It runs in an environment with PyTorch and NumPy alone, so it imports nothing else of this
repository but :mod:`benchmarks.slow_network.fleet` and reads the same text by itself.
"""

from __future__ import annotations

import gzip
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.distributed as dist  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

PORT = 29500
TEXT = pathlib.Path(__file__).parents[2] / "experiments" / "texts" / "shakespeare_sonnets.txt.gz"
DENSE_STEPS = 2
"""Steps before PowerSGD starts, the fewest that its hook takes with error feedback."""


class Norm(nn.Module):
    """Root mean square norm with a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of (batch, heads, length, features)."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[2])[:, None] * frequencies
    first, second = x.split(half, -1)
    sine, cosine = angles.sin(), angles.cos()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class Block(nn.Module):
    """Attention to the past, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.heads = heads
        self.first, self.second = Norm(width), Norm(width)
        self.query, self.key, self.value, self.output = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        apart = lambda z: z.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        query, key, value = (apart(f(y)) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))


class Twin(nn.Module):
    """The same matrices as ``experiments.transformer``."""

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = Norm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


class Worker:
    """Answers the requests of the benchmark."""

    def __init__(self, number: int, shape: tuple[int, int, int], rows: int, length: int) -> None:
        self.shape, self.number = shape, number
        text = gzip.decompress(TEXT.read_bytes()).decode()
        symbols = {symbol: i for i, symbol in enumerate(sorted(set(text)))}
        self.vocabulary = len(symbols)
        numbers = np.array([symbols[symbol] for symbol in text])
        starts = np.random.default_rng(number).integers(len(numbers) - length - 1, size=(64, rows))
        tokens = numbers[starts[..., None] + np.arange(length + 1)]
        self.tokens = torch.from_numpy(tokens)
        self.steps: dict[str, Callable[[int], float]] = {}

    def __call__(self, op: str, **options: Any) -> Any:
        return getattr(self, op)(**options)

    def parameters(self) -> int:
        """Number of parameters of the twin."""
        return sum(p.numel() for p in Twin(self.vocabulary, *self.shape).parameters())

    def prepare(self, method: str) -> float:
        """Makes a model and takes some steps with it; gives the seconds."""
        begin = time.perf_counter()
        self.steps[method] = self._step(method)
        for i in range(DENSE_STEPS + 2):
            self.steps[method](i)
        return time.perf_counter() - begin

    def run(self, method: str, steps: int) -> dict[str, Any]:
        """Takes one step, then times others, as the JAX side does."""
        from benchmarks.slow_network.fleet import timed

        return timed(self.steps[method], dist.barrier, steps)

    def _step(self, method: str) -> Callable[[int], float]:
        torch.manual_seed(0)
        model: nn.Module = Twin(self.vocabulary, *self.shape)
        if method != "compute":
            model = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=_bucket_cap(method))
            _hook(model, method)
        adam = torch.optim.Adam(model.parameters(), 1e-3)

        def step(i: int) -> float:
            rows = self.tokens[i % len(self.tokens)]
            adam.zero_grad()
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            adam.step()
            return loss.item()

        return step


def _bucket_cap(method: str) -> int | None:
    """Megabytes of a bucket; None is PyTorch's own choice, 1 for the first one and 25 for others.

    PowerSGD gets one bucket for the whole model. Its hook starts the second and third sum of a
    bucket when the one before arrives; with several buckets these moments differ between workers,
    and so does the order of their sums, by which Gloo matches them.
    """
    return 1024 if method == "DDP, PowerSGD" else None


def _hook(model: Any, method: str) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import (  # pyright: ignore[reportMissingImports]
        default_hooks,
        powerSGD_hook,
    )

    if method == "DDP, float16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif method == "DDP, PowerSGD":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=4, start_powerSGD_iter=DENSE_STEPS
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def main(number: str, count: str, address: str, *numbers: str) -> None:
    """Joins the others, then answers."""
    from benchmarks.slow_network.fleet import serve

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(PORT))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo", rank=int(number), world_size=int(count))
    layers, width, heads, rows, length = map(int, numbers)
    serve(Worker(int(number), (layers, width, heads), rows, length))


if __name__ == "__main__":
    main(*sys.argv[1:])
