"""Options of every public function, by its signature: a value of the wrong kind is refused by name.

The kind of an option is read from its annotation (a random key from its name); arguments
without a default come from ``GIVEN`` by their names. So a new function is tested without a change
here, unless it needs an argument with a new name; then the test says so.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax import theory
from tests.public import public_names

TOP = ef.top_k(k=1)

GIVEN: dict[str, Any] = {
    "memory": "bfloat16",
    "alpha": 0.5,
    "axis_name": "data",
    "text": "identity",
    "baseline": 0,
    "beta": 0.5,
    "biased": TOP,
    "bin_size": 2,
    "bits": 2,
    "boundaries": [1],
    "budget": 100,
    "capacity": 0.5,
    "chunk": 2,
    "codes": jnp.arange(2),
    "columns": 4,
    "compressed": TOP,
    "compression_factor": 8.0,
    "compressor": TOP,
    "compressors": [TOP, TOP],
    "consensus_rate": 0.5,
    "constants": theory.Smoothness(L=2.0, L_i=(1.0, 3.0)),
    "control": ef.natural(0),
    "count": 2,
    "data": jnp.ones((2, 1, 2)),
    "decay": 0.5,
    "delta": 0.5,
    "dtype": "bfloat16",
    "edges": [(0, 1)],
    "epoch": 1,
    "errors": TOP,
    "estimator": "sgdm",
    "eta": 0.5,
    "features": [np.eye(2)],
    "field": ef.extend.pack(jnp.arange(2), 2),
    "forward": TOP,
    "fragments": 2,
    "fresh_weight": 0.5,
    "fraction": 0.5,
    "freeze_step": 1,
    "gradients": TOP,
    "factor": 0.5,
    "fields": ["nu"],
    "grads": jnp.ones(2),
    "heavy": TOP,
    "initial_distortion": 1.0,
    "initial_gap": 1.0,
    "inner": optax.sgd(0.1),
    "k": 1,
    "key": 0,
    "L": 2.0,
    "lam": 0.5,
    "learning_rate": 0.1,
    "levels": 2,
    "light": TOP,
    "loss_fn": lambda w, x=1.0: jnp.sum((w * x) ** 2),
    "make": ef.top_k,
    "mask": [True, False],
    "mesh": jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]),
    "mesh_or_num_workers": 2,
    "momentum": 0.5,
    "mu": 0.5,
    "mu_x": 0.5,
    "norms": {"w": 1.0},
    "num_examples": 2,
    "num_workers": 2,
    "omega": 0.5,
    "opt_state": ef.monitor(ef.error_feedback(TOP)).init(jnp.ones(2)),
    "outer": optax.sgd(0.1),
    "p": 0.5,
    "parameters": theory.ef_bv_parameters(0.5, 0.5),
    "params": jnp.ones(2),
    "period": 2,
    "policy": lambda path, like: TOP,
    "power": 0.5,
    "probabilities": (0.5, 0.5),
    "probability": 0.5,
    "prox": ef.l1_prox(0.1),
    "quantiles": 2,
    "quantizer": ef.scaled_sign(),
    "random": 1,
    "rank": 1,
    "rate": 0.5,
    "ratio": 0.5,
    "rounds": 1,
    "rows": 3,
    "rule": ef.error_feedback(TOP),
    "scale": 0.5,
    "schedule": lambda step: 0.5,
    "second_moment": 1.0,
    "server": TOP,
    "shared_by": 1,
    "sparsifier": TOP,
    "sigma": 1.0,
    "start": 5,
    "states": 2,
    "step": 1,
    "steps": 10,
    "steps_per_epoch": 10,
    "strength": 0.5,
    "three_point": theory.three_point_constants("clag", alpha=0.5, zeta=1.0),
    "threshold": 0.5,
    "tiers": [("data", TOP)],
    "tolerance": 0.5,
    "top": 2,
    "tx": ef.error_feedback(TOP, axis_name="data"),
    "unbiased": ef.natural(0),
    "value": 0.5,
    "values": [1],
    "variance": 1.0,
    "var_freeze_step": 2,
    "variant": "clag",
    "warmup_epochs": 2,
    "weights": (0.5, 0.5),
    "when": lambda step: step == 0,
    "width": 2,
}
"""The value of an argument without a default, by its name."""

ALSO: dict[str, dict[str, Any]] = {
    "ef21_normalised": {"key": None},
    "ef21_normalised key": {"estimator": "rhm"},
    "diana": {"compressor": ef.natural(0)},
    "theory.three_point_constants omega": {"variant": "v2"},
    "theory.three_point_constants second_alpha": {"variant": "v4"},
    "dense": {"tx": optax.clip(1.0)},
    "diloco": {"compressor": TOP},
    "dct_adamw": {"others": optax.sgd(0.1)},
    "dion": {"others": optax.sgd(0.1)},
    "dion2": {"others": optax.sgd(0.1)},
    "ldadam": {"others": optax.sgd(0.1)},
    "muloco": {"inner": optax.sgd(0.1), "compressor": TOP},
    "trion": {"others": optax.sgd(0.1)},
    "dgc_warmup": {"compressor": ef.top_k},
    "freeze": {"tx": optax.scale_by_adam()},
    "gradient_shift": {"compressor": ef.natural(0)},
    "gradiveq": {"period": 500},
    "l_greco": {"gradients": jnp.ones(4)},
    "within_bytes": {"gradients": jnp.ones(4)},
    "with_contraction": {"gradients": jnp.ones(4)},
    "marina": {"compressor": ef.natural(0)},
    "three_point_compressor": {"zeta": 1.0, "key": None},
    "three_point_compressor probability": {"variant": "v5", "key": 0, "zeta": None},
    "three_point_compressor key": {"variant": "v5", "probability": 0.5, "zeta": None},
}
"""Further or different arguments that a function (or one option of it) needs."""

NO_FACTORIES = ("restore", "save", "save_args")
"""Functions that read or write files, with tests of their own."""

KIT = ("pack", "unpack")
"""Functions of the author's kit that users call too; the others trust an author's arguments."""

WRONG: dict[str, list[Any]] = {
    "bool": [1, 0, "yes", None, jnp.ones((), bool)],
    "int": [True, 1.5, "2", -1, jnp.int32(2), (1,), None],
    "float": [True, "half", float("nan"), (0.5,), jnp.ones(2), None],
    "key": [True, 1.5, "seed", jnp.ones(3)],
    "rate": [True, "fast", float("nan"), -1.0, (0.1,), jnp.ones(2), None],
    "axis": [0, True, 1.5, ["data"], ("data", 1), ()],
    "workers": [True, 0, 1.5, "2", (1, True), [], None],
    "memory": [True, 3, "nonsense", jnp.int32, ("bfloat16",)],
    "word": ["nonsense", "", 3, ["l2"], jnp.ones(2), None],
}
"""Values that no option of the kind may have."""


KINDS = {"bool": "bool", "int": "int", "float": "float", "str": "word", "MemoryLike": "memory"}
KINDS |= {"optax.ScalarOrSchedule": "rate", "AxisName": "axis", "coll.AxisName": "axis"}
KINDS["int | tuple[int, ...]"] = KINDS["Mesh | int | tuple[int, ...]"] = "workers"


def kind_of(name: str, written: str, hint: Any) -> tuple[str, bool]:
    """The kind of an option ("" for none of them), and whether it may be None."""
    if name == "key":
        return "key", True
    if name == "name":  # of the function that is called, for its errors: any text
        return "", False
    plain = written.removesuffix(" | None")
    word = typing.get_origin(hint) is typing.Literal
    return "word" if word else KINDS.get(plain, ""), plain != written


def public_functions() -> dict[str, Any]:
    """By name; those of ``ef_optax.theory`` with a leading ``theory.``."""
    found = {}
    for path, value in public_names().items():
        home, _, name = path.rpartition(".")
        private = name in NO_FACTORIES or (home == "extend" and name not in KIT)
        if inspect.isfunction(value) and not private:
            found[path if home == "theory" else name] = value
    return found


def options() -> Iterator[tuple[str, str, str, bool]]:
    """Function, option, its kind, whether it may be None."""
    for name, function in FUNCTIONS.items():
        hints = typing.get_type_hints(function)
        for option, parameter in inspect.signature(function).parameters.items():
            kind, optional = kind_of(option, parameter.annotation, hints[option])
            if kind:
                yield name, option, kind, optional


def call(name: str, option: str, value: Any, **more: Any) -> Any:
    """The function with one option set, and with the arguments that it needs."""
    function = FUNCTIONS[name]
    given = {}
    parameters = inspect.signature(function).parameters
    for argument, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            assert argument in GIVEN, f"{name}: give an example of {argument!r} in GIVEN"
            given[argument] = GIVEN[argument]
    if {"ratio", "k"} <= set(parameters) and option != "k" and parameters["k"].default is None:
        given["ratio"] = 0.5
    if parameters.get("key") is not None and parameters["key"].default is None:
        given["key"] = 0
    given |= ALSO.get(name, {}) | ALSO.get(f"{name} {option}", {}) | {option: value} | more
    return function(**given)


FUNCTIONS = public_functions()
OPTIONS = list(options())


def test_all_kinds_are_found() -> None:
    kinds = {kind: sum(k == kind for _, _, k, _ in OPTIONS) for kind in WRONG}
    assert min(kinds.values()) > 2 and sum(kinds.values()) > 300, kinds


NAMES = sorted({name for name, *_ in OPTIONS})


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_accepted(name: str) -> None:
    option = next(option for other, option, *_ in OPTIONS if other == name)
    default = inspect.signature(FUNCTIONS[name]).parameters[option].default
    call(name, option, GIVEN[option] if default in (inspect.Parameter.empty, None) else default)


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_the_wrong_kind_is_refused_by_name(name: str) -> None:
    own = [row for row in OPTIONS if row[0] == name]
    for (_, option, kind, optional), bad in ((row, bad) for row in own for bad in WRONG[row[2]]):
        if bad is None and (optional or kind == "key"):
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            call(name, option, bad)
            pytest.fail(f"{name}({option}={bad!r}) is taken")
        text = str(caught.value)
        assert name.startswith("theory.") or text.startswith((name, f"{option}=")), (bad, text)
        shown = text.partition(f"{option}=")[2]
        assert shown.startswith(repr(bad)[:20]), (bad, text)
        remedy = shown.replace(repr(bad), "", 1)
        assert re.search("must be|give|pass|use", remedy), (bad, text)


def test_numpy_is_not_in_the_way() -> None:
    """A NumPy float counts as a float; NumPy arrays are not options."""
    assert ef.top_k(np.float64(0.5)).bits((8,)) == ef.top_k(0.5).bits((8,))
