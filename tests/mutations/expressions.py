"""Faults of the texts that name methods."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

HERE = "ef_optax/expressions.py"
TESTS = "tests/test_expressions.py::"
REFUSED = (f"{TESTS}test_anything_else_is_refused",)

MUTATIONS = (
    Mutation(
        "the parts of a chain are turned round",
        HERE,
        "yield from _parts(node.left)\n        yield node.right",
        "yield node.right\n        yield from _parts(node.left)",
        (f"{TESTS}test_what_is_built_is_what_is_written_by_hand",),
    ),
    Mutation(
        "rules inside of others do not get the worker axis",
        HERE,
        "return x.build(axis_name) if isinstance(x, Call) else x",
        "return x.build(None) if isinstance(x, Call) else x",
        (f"{TESTS}test_the_worker_axis_reaches_every_rule_and_may_be_named",),
    ),
    Mutation(
        "any public function may be called",
        HERE,
        "if _returns(function) in _MAKES_A_TRANSFORMATION | _MAKES_AN_ARGUMENT:",
        "if callable(function):",
        REFUSED,
    ),
    Mutation(
        "a compressor may be a part of a chain",
        HERE,
        "if len(parts) > 1 and not self.makes_a_transformation(part):",
        "if False:",
        REFUSED,
    ),
    Mutation(
        "a list is written as a tuple",
        HERE,
        "return f\"[{', '.join(map(_text, x))}]\"",
        "return f\"({', '.join(map(_text, x))},)\"",
        (f"{TESTS}test_the_text_of_an_expression_is_read_as_the_same_expression",),
    ),
)
