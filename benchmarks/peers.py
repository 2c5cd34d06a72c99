"""The same steps written in the obvious way: in JAX without tuning, and in PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 4096


def obvious_top_k(k: int) -> Callable[..., Any]:
    """The backend's partial sort, values and int32 indices."""

    def step(g: jax.Array, e: jax.Array) -> Any:
        p = g + e
        _, indices = jax.lax.top_k(jnp.abs(p), k)
        return (p[indices], indices), p.at[indices].set(0)

    return step


def obvious_block_top_k(k: int) -> Callable[..., Any]:
    """The backend's partial sort in each block."""

    def step(g: jax.Array, e: jax.Array) -> Any:
        p = g + e
        blocks = jnp.pad(p, (0, -p.size % BLOCK)).reshape(-1, BLOCK)
        _, indices = jax.lax.top_k(jnp.abs(blocks), k)
        values = jnp.take_along_axis(blocks, indices, axis=1)
        rows = jnp.arange(len(blocks))[:, None]
        left = blocks.at[rows, indices].set(0)
        return (values, indices), left.reshape(-1)[: p.size]

    return step


def obvious_scaled_sign() -> Callable[..., Any]:
    """Mean magnitude, packed bits."""

    def step(g: jax.Array, e: jax.Array) -> Any:
        p = g + e
        scale = jnp.mean(jnp.abs(p))
        return (jnp.packbits(p >= 0), scale), p - scale * jnp.where(p >= 0, 1.0, -1.0)

    return step


def obvious_qsgd(states: int, bucket: int) -> Callable[..., Any]:
    """Uniform numbers of `jax.random`, codes as bytes."""

    def step(g: jax.Array, e: jax.Array) -> Any:
        p = g + e
        blocks = jnp.pad(p, (0, -p.size % bucket)).reshape(-1, bucket)
        norm = jnp.linalg.norm(blocks, axis=1, keepdims=True)
        key = jax.random.key(jax.lax.bitcast_convert_type(g[0], jnp.uint32))
        y = blocks * states / jnp.where(norm == 0, 1.0, norm)
        codes = jnp.floor(y + jax.random.uniform(key, y.shape)).astype(jnp.int8)
        left = blocks - codes.astype(p.dtype) * norm / states
        return (codes, norm), left.reshape(-1)[: p.size]

    return step


def has_torch() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def torch_top_k(k: int) -> Callable[..., Any]:
    """``torch.topk``, a dense decode by scatter, a subtraction."""
    import torch  # pyright: ignore[reportMissingImports]

    def step(g: Any, e: Any) -> Any:
        p = g + e
        _, indices = torch.topk(p.abs(), k, sorted=False)
        values = p[indices]
        dense = torch.zeros_like(p).scatter_(0, indices, values)
        return (values, indices), p - dense

    return step


def torch_block_top_k(k: int) -> Callable[..., Any]:
    """``torch.topk`` along the rows of the blocks."""
    import torch  # pyright: ignore[reportMissingImports]

    def step(g: Any, e: Any) -> Any:
        p = g + e
        padded = torch.nn.functional.pad(p, (0, -p.numel() % BLOCK)).view(-1, BLOCK)
        _, indices = torch.topk(padded.abs(), k, dim=1, sorted=False)
        values = padded.gather(1, indices)
        dense = torch.zeros_like(padded).scatter_(1, indices, values)
        return (values, indices), (padded - dense).view(-1)[: p.numel()]

    return step


def torch_scaled_sign() -> Callable[..., Any]:
    """A mean, and eight signs to a byte: PyTorch has no packing of its own."""
    import torch  # pyright: ignore[reportMissingImports]

    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)

    def step(g: Any, e: Any) -> Any:
        p = g + e
        scale = p.abs().mean()
        plus = p >= 0
        bits = torch.nn.functional.pad(plus.to(torch.uint8), (0, -p.numel() % 8)).view(-1, 8)
        packed = (bits * places).sum(1, dtype=torch.uint8)
        return (packed, scale), p - torch.where(plus, scale, -scale)

    return step


def torch_qsgd(states: int, bucket: int) -> Callable[..., Any]:
    """``torch.rand`` and codes as bytes, two of them to a byte at the end."""
    import torch  # pyright: ignore[reportMissingImports]

    def step(g: Any, e: Any) -> Any:
        p = g + e
        blocks = torch.nn.functional.pad(p, (0, -p.numel() % bucket)).view(-1, bucket)
        norm = blocks.norm(dim=1, keepdim=True)
        unit = norm / states
        codes = (blocks / torch.where(unit == 0, 1.0, unit) + torch.rand_like(blocks)).floor_()
        nibbles = (codes + states).to(torch.uint8).view(-1, 2)
        packed = nibbles[:, 0] | (nibbles[:, 1] << 4)
        return (packed, norm), (blocks - codes * unit).view(-1)[: p.numel()]

    return step


def to_torch(x: np.ndarray) -> Any:
    """A tensor that shares no memory with the array."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.from_numpy(x.copy())
