"""Every codec that encodes and decodes one leaf, with example hyper-parameters, and inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ef_optax._compressor import Compressor
from ef_optax.compressors.dithering import dorefa, linear_dithering, natural_dithering, qsgd
from ef_optax.compressors.natural import natural
from ef_optax.compressors.ternary import ternary, three_lc


@dataclasses.dataclass(frozen=True)
class Case:
    """A codec of the pool, and what its definition exempts it from."""

    make: Callable[[], Compressor]
    keeps_zero: bool = True  # a leaf of zeros decodes to zeros


CASES = {
    "qsgd": Case(lambda: qsgd(7, 0)),
    "qsgd-linf-bucket": Case(lambda: qsgd(4, 1, norm="linf", bucket=10)),
    "linear_dithering": Case(lambda: linear_dithering(1, 2)),
    "natural_dithering": Case(lambda: natural_dithering(4, 3)),
    "dorefa": Case(lambda: dorefa(3, 4, bucket=16)),
    "natural": Case(lambda: natural(5)),
    "ternary": Case(lambda: ternary(6)),
    "ternary-clipped-quartic": Case(lambda: ternary(7, clip_sigmas=1.5, packing="quartic")),
    "three_lc": Case(lambda: three_lc(1.5)),
}

SHAPES = [(0,), (), (37,), (6, 11)]


def inputs(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Leaves that try to break a codec: ties, spikes, extremes, order."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(shape)
    flat = np.zeros(int(np.prod(shape)))
    if flat.size:
        flat[flat.size // 2] = -3.0
    draws = {
        "normal": normal,
        "shifted": normal + 2.5,
        "equal": np.where(normal < 0, -1.5, 1.5),
        "spike": flat.reshape(shape),
        "zeros": np.zeros(shape),
        "sorted": np.sort(normal.reshape(-1)).reshape(shape),
        "ties": np.round(2 * normal) / 2,
        "wide": normal * 10.0 ** rng.integers(-6, 7, shape),
        "huge": normal * 1e30,
        "tiny": normal * 1e-30,
        "denormal": np.sign(normal) * 1e-40,
    }
    return {name: np.asarray(x, np.float32) for name, x in draws.items()}
