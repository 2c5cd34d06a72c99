"""Settings of the test session that must hold before JAX starts.

They are at the root because the examples in the docstrings of ``ef_optax`` need them as much as
the tests do. Variables already set in the environment win.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from importlib.metadata import version

NUM_DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The thread pool must be larger than the number of virtual devices: on machines with few cores
# their collectives otherwise wait for threads that are never started.
os.environ.setdefault("PJRT_NPROC", str(2 * NUM_DEVICES))
xla_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in xla_flags:
    xla_flags = f"{xla_flags} --xla_force_host_platform_device_count={NUM_DEVICES}".strip()
# Most programs of the tests run for less time than they take to compile. The numbers do not depend
# on how well that is done; programs that tests look into are compiled in full (tests/programs.py).
# XLA_FLAGS=--xla_backend_optimization_level=3 compiles all of them in full.
if "xla_backend_optimization_level" not in xla_flags:
    xla_flags += " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    xla_flags += " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones have no choice
        xla_flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = xla_flags

import jax  # noqa: E402  (the environment above is read when it is imported)
import pytest  # noqa: E402

# Whole, before pytest imports a single module of it for its examples: that would put the module in
# place of the function of the same name.
import ef_optax  # noqa: E402, F401
from tests.parts import chosen_part  # noqa: E402

# A wire format would hide a float32 that silently widens to the other operand's type.
jax.config.update("jax_numpy_dtype_promotion", "strict")

DAYS_KEPT = 14


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs for the next run; ``pytest --cache-clear`` removes them.

    A session that was killed may leave half a file behind, and another process may still be writing
    one. JAX then warns and compiles as without it, so that is no error here.
    """
    kept = config.cache.mkdir("programs")
    for old in kept.iterdir():
        if time.time() - old.stat().st_mtime > DAYS_KEPT * 24 * 3600:
            old.unlink(missing_ok=True)
    config.addinivalue_line("filterwarnings", "ignore:Error (read|writ)ing persistent compilation")
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def promotion_of_examples(request: pytest.FixtureRequest) -> Iterator[None]:
    """Examples show whole chains, and Optax's own Adam mixes dtypes; tests stay strict."""
    if isinstance(request.node, pytest.DoctestItem):
        with jax.numpy_dtype_promotion("standard"):
            yield
    else:
        yield


@pytest.fixture
def nothing_traced_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codecs are traced again, so that a test may change what they are made of."""
    from ef_optax._core import transport

    monkeypatch.setattr(transport, "traced_once", lambda method, *args: method(*args))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Examples of private helpers are slow tests: those of their rooms try more than they show."""
    if isinstance(item, pytest.DoctestItem) and "._" in item.name:
        item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps one part of the tests if ``EF_OPTAX_PART`` says so: ``2/4`` is the second quarter."""
    chosen = os.environ.get("EF_OPTAX_PART")
    if chosen:
        names = chosen_part([item.nodeid for item in items], chosen)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in names])
        items[:] = [item for item in items if item.nodeid in names]


def pytest_collection_finish() -> None:
    """Lets the garbage collector look at what the tests make, now and then.

    Every full collection would visit all modules, test items and traced programs: a second each.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 10)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what would begin after ``EF_OPTAX_DEADLINE`` (seconds since the epoch).

    Continuous integration has a time limit. On a slow machine it leaves out the last of the slow
    tests and says how many, instead of ending without a result.
    """
    deadline = os.environ.get("EF_OPTAX_DEADLINE")
    if deadline and time.time() > float(deadline):
        pytest.skip("no time is left for it (EF_OPTAX_DEADLINE)")


def pytest_report_header() -> str:
    """Name the versions that a failure depends on."""
    return f"jax {jax.__version__}, optax {version('optax')}, XLA_FLAGS={xla_flags}"
