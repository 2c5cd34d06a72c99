"""Faults of the experiments."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

TESTS = "tests/experiments"
ERRORS = f"{TESTS}/test_errors.py::"

MUTATIONS = (
    Mutation(
        "a rate at the edge of stability is chosen",
        "experiments/tuning.py",
        "if scores[b][0] >= scores[a][0] / 2",
        "if scores[b][0] >= 0",
        (f"{TESTS}/test_train.py::test_the_rate_that_is_chosen_is_not_at_the_edge_of_stability",),
    ),
    Mutation(
        "a checkpoint is begun on a full disk",
        "experiments/storage.py",
        "if free < needed:",
        "if free < 0:",
        (f"{ERRORS}test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before",),
    ),
    Mutation(
        "a header may promise more than 64 bits can count",
        "experiments/data.py",
        "if expected > _LARGEST:",
        "if expected > 1 << 200:",
        (f"{ERRORS}test_a_header_that_promises_too_much_is_refused",),
    ),
    Mutation(
        "a batch is unpacked to its end",
        "experiments/data.py",
        "return _bounded(_read(path, _LARGEST + 1), path)",
        "return _read(path, 1 << 40)",
        (f"{ERRORS}test_a_batch_that_unpacks_without_end_is_refused",),
    ),
    Mutation(
        "a store is taken for a folder",
        "experiments/storage.py",
        'if "://" in text:',
        "if False:",
        (f"{ERRORS}test_what_is_no_folder_is_refused",),
    ),
)
