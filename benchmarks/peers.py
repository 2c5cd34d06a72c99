"""The same steps as others write them: in JAX without thought for speed, and in PyTorch."""

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
    """Bytes of signs and a mean; the bits are not packed."""
    import torch  # pyright: ignore[reportMissingImports]

    def step(g: Any, e: Any) -> Any:
        p = g + e
        scale = p.abs().mean()
        signs = (p >= 0).to(torch.uint8)
        dense = (signs.to(p.dtype) * 2 - 1) * scale
        return (signs, scale), p - dense

    return step


def to_torch(x: np.ndarray) -> Any:
    """A tensor that shares no memory with the array."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.from_numpy(x.copy())
