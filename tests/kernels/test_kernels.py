"""The kernels for GPU and TPU: equal to the XLA form, lowered on their platform and nowhere else.

No accelerator is needed: values are checked in interpret mode, and programs are lowered for an
abstract device.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from benchmarks import accelerator
from benchmarks.adversaries import adversaries, block_top_k, sign_words
from ef_optax import _kernels
from ef_optax._bits import packing
from ef_optax._kernels import block_top_k_tpu, block_top_k_triton, dispatch, signs_tpu, signs_triton
from ef_optax._select import blocks as block_select
from tests.programs import compiled

SIGNS = {"cuda": signs_triton.pack_signs_and_norm, "tpu": signs_tpu.pack_signs_and_norm}
TOP_K = {
    "cuda": block_top_k_triton.block_top_k_indices,
    "tpu": block_top_k_tpu.block_top_k_indices,
}
DEVICES = {
    "cuda": AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu"),
    "tpu": AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu"),
}
CALLS = {"cuda": "xla.gpu.triton", "tpu": "tpu_custom_call"}
LARGE = dispatch.MIN_SIZE
# JAX 0.12 announces that its Triton backend will go.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


# ---------------------------------------------------------------------------- values


xla_signs = jax.jit(packing.pack_signs_and_norm)
xla_top_k = jax.jit(block_select.block_top_k_indices, static_argnums=(1, 2))


# Less than a row, whole tiles, and many programs with a rest.
@pytest.mark.parametrize(
    ("platform", "dtype", "size"),
    [
        (platform, *case)
        for platform in SIGNS
        for case in [("float32", 33), ("float32", 3 * 4096), ("float32", 35 * 4096 + 1501)]
    ]
    + [
        pytest.param(platform, "bfloat16", 35 * 4096 + 1501, marks=pytest.mark.slow)
        for platform in SIGNS
    ],
)
def test_signs_and_norm_in_interpret_mode(platform: str, dtype: str, size: int) -> None:
    kernel = functools.partial(SIGNS[platform], interpret=True)
    for name, x in adversaries(size, jnp.dtype(dtype)).items():
        words, norm = kernel(x)
        expected, _ = xla_signs(x)
        assert words.dtype == jnp.uint32 and norm.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(words), np.asarray(expected), name)
        if name != "denormal":  # the processor decides what it flushes there
            np.testing.assert_array_equal(np.asarray(words), sign_words(x), name)
            exact = np.sum(np.abs(np.asarray(x, np.float64)))
            np.testing.assert_allclose(np.asarray(norm), exact, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "k"),
    [(platform, *case) for platform in TOP_K for case in [("float32", 2048, 21)]]
    + [("tpu", "bfloat16", 4096, 1)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("cuda", "bfloat16", 4096, 1),
            ("cuda", "bfloat16", 4096, 256),
            ("cuda", "float32", 4096, 41),
            ("tpu", "float32", 4096, 41),
            ("tpu", "bfloat16", 4096, 256),
        ]
    ]
    + [("cuda", "float32", 2048, 2047)],  # the kernel for TPU is not used for so many
)
def test_block_top_k_in_interpret_mode(platform: str, dtype: str, length: int, k: int) -> None:
    # More blocks than a program of the TPU has, and a remainder.
    size = 9 * length + 17
    kernel = functools.partial(TOP_K[platform], length=length, k=k, interpret=True)
    cases = adversaries(size, jnp.dtype(dtype))
    # Compiled in full: where XLA does not optimise, it reads bfloat16 as float32, and flushes.
    kernel = compiled(jax.jit(kernel).lower(cases["denormal"]))
    for name, x in cases.items():
        indices = kernel(x)
        assert indices.dtype == jnp.int32
        np.testing.assert_array_equal(np.asarray(indices), block_top_k(x, length, k), name)
        np.testing.assert_array_equal(
            np.asarray(indices), np.asarray(xla_top_k(x, length, k)), name
        )


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_under_vmap_in_interpret_mode(platform: str) -> None:
    x = jnp.stack(list(adversaries(2 * 4096, jnp.float32).values())[:3])
    words, norms = jax.vmap(functools.partial(SIGNS[platform], interpret=True))(x)
    expected, sums = jax.vmap(packing.pack_signs_and_norm)(x)
    np.testing.assert_array_equal(np.asarray(words), np.asarray(expected))
    np.testing.assert_allclose(np.asarray(norms), np.asarray(sums), rtol=1e-5)
    found = jax.vmap(functools.partial(TOP_K[platform], length=4096, k=41, interpret=True))(x)
    same = jax.vmap(lambda x: block_select.block_top_k_indices(x, 4096, 41))(x)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(same))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "compressor"),
    [
        pytest.param("cuda", ef.scaled_sign(), id="cuda-sign"),
        pytest.param("tpu", ef.block_top_k(0.01), id="tpu-k"),
    ],
)
def test_error_feedback_with_the_kernels_in_interpret_mode(
    platform: str,
    compressor: ef.Compressor,
    monkeypatch: pytest.MonkeyPatch,
    nothing_traced_before: None,
) -> None:
    """Three public steps with and without kernels, on ragged leaves of both dtypes."""
    rng = np.random.default_rng(3)
    gradients = {
        "a": jnp.asarray(rng.standard_normal((130, 1001)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((64, 2048)), jnp.bfloat16),
    }

    def run() -> tuple:
        tx = ef.error_feedback(compressor)
        state = tx.init(gradients)
        step = jax.jit(tx.update)
        for _ in range(3):
            updates, state = step(gradients, state)
        return updates, state

    expected = run()
    calls = []

    def kernels(step: str, function: str) -> dict:
        calls.append(step)
        kernel = {"signs": SIGNS, "block_top_k": TOP_K}[step][platform]
        return {"cpu": functools.partial(kernel, interpret=True)}

    monkeypatch.setattr(dispatch, "_kernels", kernels)
    actual = run()
    assert len(calls) >= 2
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------------------- programs


def sign_step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _kernels.pack_signs_and_norm(x)


def top_k_step(x: jax.Array) -> jax.Array:
    return _kernels.block_top_k_indices(x, 4096, 41)


def update_of(compressor: ef.Compressor):
    def update(x: jax.Array) -> jax.Array:
        tx = ef.error_feedback(compressor)
        return tx.update({"w": x}, tx.init({"w": x}))

    return update


DOORS = {
    "signs": sign_step,
    "block_top_k": top_k_step,
    "ef.scaled_sign": update_of(ef.scaled_sign()),
    "ef.block_top_k": update_of(ef.block_top_k(0.01)),
}


@contextlib.contextmanager
def abstract_device(platform: str, workers: int | None = None) -> Iterator[AbstractMesh]:
    axes = ((), (), ()) if workers is None else ((workers,), ("data",), (AxisType.Auto,))
    mesh = AbstractMesh(*axes, abstract_device=DEVICES.get(platform))
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh


def program(function, platform: str, shape, dtype=jnp.float32, workers: int | None = None) -> str:
    """The program lowered for a platform."""
    with abstract_device(platform, workers):
        traced = jax.jit(function).trace(jax.ShapeDtypeStruct(shape, dtype))
        return traced.lower(lowering_platforms=(platform,)).as_text()


def kernels_in(text: str) -> set[str]:
    return {platform for platform, call in CALLS.items() if call in text}


@pytest.mark.parametrize(
    "door",
    [
        pytest.param(door, marks=() if door.startswith("ef.") else pytest.mark.slow)
        for door in DOORS
    ],
)
def test_each_platform_is_lowered_to_its_own_kernel(door: str) -> None:
    for platform in ("cuda", "tpu", "cpu"):
        text = program(DOORS[door], platform, (LARGE + 1001,))
        assert kernels_in(text) == {platform} - {"cpu"}, platform


@pytest.mark.parametrize("door", ["signs", pytest.param("block_top_k", marks=pytest.mark.slow)])
def test_the_smallest_leaf_that_fits_and_what_does_not(door: str) -> None:
    function = DOORS[door]
    for platform in ("cuda", "tpu"):
        assert kernels_in(program(function, platform, (LARGE,), jnp.bfloat16)) == {platform}
        assert kernels_in(program(function, platform, (LARGE - 1,))) == set()
        assert kernels_in(program(function, platform, (LARGE,), jnp.float16)) == set()
        with jax.enable_x64(True):
            assert kernels_in(program(lambda x: function(x), platform, (LARGE,))) == set()


@pytest.mark.parametrize(
    ("length", "k", "expected"), [(4095, 41, []), (4096, 4096, []), (4096, 257, ["cuda"])]
)
def test_blocks_that_do_not_fit_take_the_xla_form(length: int, k: int, expected: list) -> None:
    select = functools.partial(_kernels.block_top_k_indices, length=length, k=k)
    assert [p for p in CALLS if kernels_in(program(select, p, (LARGE,)))] == expected


@pytest.mark.parametrize(
    ("door", "platform"),
    [
        ("ef.scaled_sign", "tpu"),
        ("ef.block_top_k", "cuda"),
        pytest.param("signs", "cuda", marks=pytest.mark.slow),
        pytest.param("block_top_k", "tpu", marks=pytest.mark.slow),
    ],
)
def test_kernels_under_vmap_and_in_maps(door: str, platform: str) -> None:
    function = DOORS[door]
    assert kernels_in(program(jax.vmap(function), platform, (3, LARGE))) == {platform}
    for checked in (True, False):
        local = lambda x: jax.tree.map(lambda y: y[None], function(x[0]))  # noqa: E731
        mapped = jax.shard_map(local, in_specs=P("data"), out_specs=P("data"), check_vma=checked)
        text = program(mapped, platform, (4, LARGE), workers=4)
        assert kernels_in(text) == {platform}, f"check_vma={checked}"


def instructions(lowered: jax.stages.Lowered) -> collections.Counter[str]:
    """Every instruction of the optimised program with its type, without names and numbers."""
    lines = re.findall(r"= (\S+ [\w-]+)\(", compiled(lowered).as_text())
    return collections.Counter(lines)


@pytest.mark.parametrize(
    ("with_choice", "without"),
    [
        pytest.param(sign_step, packing.pack_signs_and_norm, id="signs"),
        pytest.param(
            top_k_step,
            lambda x: block_select.block_top_k_indices(x, 4096, 41),
            id="block_top_k",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_program_for_the_cpu_is_that_of_the_xla_form(with_choice, without) -> None:
    x = jax.ShapeDtypeStruct((2 * LARGE + 77,), jnp.float32)
    plain = instructions(jax.jit(without).lower(x))
    assert instructions(jax.jit(with_choice).lower(x)) == plain
    assert sum(plain.values()) > 10


@pytest.mark.slow
def test_indices_may_be_differentiated_through() -> None:
    """The values sent depend on the input; their positions do not."""

    def sent(x: jax.Array) -> jax.Array:
        return jnp.sum(x[_kernels.block_top_k_indices(x, 4096, 1)[0]])

    x = jnp.zeros(LARGE).at[5].set(2.0)
    np.testing.assert_array_equal(np.asarray(jax.grad(sent)(x)), np.eye(1, LARGE, 5)[0])


@pytest.mark.parametrize("size", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_signs_and_norm_may_be_differentiated_through(size: int) -> None:
    """For scaled sign the signs are constant, and the scale is the mean magnitude."""
    x = np.linspace(-1.0, 2.0, size, dtype=np.float32)
    codec = ef.scaled_sign().codec

    def sent(x: jax.Array) -> jax.Array:
        return jnp.sum(x * codec.decode(codec.encode(x), x))

    signs = np.where(x >= 0, 1.0, -1.0)
    expected = signs * np.mean(np.abs(x)) + np.sum(x * signs) * np.sign(x) / size
    np.testing.assert_allclose(jax.jit(jax.grad(sent))(x), expected, rtol=1e-5)


def test_a_version_without_the_backend_takes_the_xla_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    for platform in CALLS:
        assert kernels_in(program(lambda x: sign_step(x), platform, (LARGE,))) == set()


@pytest.mark.slow
def test_the_benchmark_runs_without_an_accelerator(tmp_path: Path) -> None:
    accelerator.main(["--out", str(tmp_path), "--sizes", str(2 * LARGE)])
    record = json.loads((tmp_path / "accelerator.json").read_text(encoding="utf-8"))
    assert record["hardware"]["platform"] == "cpu"
    assert len(record["checks"]) >= 8 and not any(record["checks"].values())
    rows = record["results"][str(2 * LARGE)]
    assert len(rows) >= 16 and rows[accelerator.FLOOR]["floors"] == 1.0
