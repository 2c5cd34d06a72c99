"""Faults of the experiments."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

TESTS = "tests/experiments"
ERRORS = f"{TESTS}/test_errors.py::"

MUTATIONS = (
    Mutation(
        "both stages of the pipeline have the first half of the blocks",
        "experiments/pipeline.py",
        "range(model.size.layers // 2, model.size.layers)",
        "range(model.size.layers // 2)",
        ("tests/experiments/test_pipeline.py::test_the_two_stages_are_the_transformer",),
    ),
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
    Mutation(
        "a window begins in the file before",
        "experiments/text.py",
        'side="right"',
        'side="left"',
        (f"{TESTS}/test_text.py::test_windows_stay_within_one_file",),
    ),
    Mutation(
        "a truncated shard is trained on",
        "experiments/text.py",
        "if held != header[2]:",
        "if held > header[2]:",
        (f"{TESTS}/test_text.py::test_what_is_no_token_file_is_refused",),
    ),
    Mutation(
        "keys are not turned",
        "experiments/transformer.py",
        "rotate(query), rotate(key)",
        "rotate(query), key",
        (f"{TESTS}/test_transformer.py::test_logits_are_those_of_numpy_and_see_only_the_past",),
    ),
    Mutation(
        "attention sees the future",
        "experiments/transformer.py",
        "is_causal=True",
        "is_causal=False",
        (f"{TESTS}/test_transformer.py::test_logits_are_those_of_numpy_and_see_only_the_past",),
    ),
    Mutation(
        "bytes of local steps are those of a step that sends",
        "experiments/report.py",
        "(1 - 1 / period) * sometimes[name]",
        "0 * sometimes[name]",
        (f"{TESTS}/test_lm.py::test_the_files_of_a_run_with_local_steps",),
    ),
    Mutation(
        "padding counts as held-out text",
        "experiments/lm.py",
        "real = (np.arange(batches * size) < len(rows))",
        "real = (np.arange(batches * size) >= 0)",
        (f"{TESTS}/test_lm.py::test_held_out_rows_are_padded_to_the_devices_and_counted_once",),
    ),
    Mutation(
        "names in braces keep their first value",
        "experiments/sweep.py",
        "filled = _filled(text, chosen)",
        "filled = _filled(text, combinations[0])",
        (f"{TESTS}/test_sweep.py::test_all_combinations_run_and_one_table_joins_them",),
    ),
    Mutation(
        "local steps send every step",
        "experiments/lm_costs.py",
        "/ (period if sometimes else 1)",
        "/ 1",
        (f"{TESTS}/test_lm_costs.py::test_bytes_and_seconds_until_the_same_loss",),
    ),
    Mutation(
        "dense steps at the start send as little as the later ones",
        "experiments/lm_costs.py",
        "return first * np.minimum(steps, dense)",
        "return later * np.minimum(steps, dense)",
        (f"{TESTS}/test_lm_costs.py::test_dense_steps_at_the_start_count_as_such",),
    ),
    Mutation(
        "a budget is spent as if all steps were later ones",
        "experiments/lm_costs.py",
        "        if budget < first * dense:",
        "        if budget < 0:",
        (f"{TESTS}/test_lm_costs.py::test_dense_steps_at_the_start_count_as_such",),
    ),
    Mutation(
        "a policy is compared with a level of other bytes",
        "experiments/policies_report.py",
        "best is None or off[best] > TOLERANCE",
        "best is None",
        (f"{TESTS}/test_policies.py::test_a_policy_is_compared_with_the_level_of_its_bytes",),
    ),
    Mutation(
        "the fixed level is the smallest there is",
        "experiments/policies.py",
        "(middle, up) if bytes_of(middle) < size",
        "(middle, up) if bytes_of(middle) > size",
        (f"{TESTS}/test_policies.py::test_the_level_with_the_same_bytes",),
    ),
    Mutation(
        "records of other flags are continued",
        "experiments/policies.py",
        'if records.about["flags"].get(n) != settings[n]]',
        "if n not in SETTINGS]",
        (f"{TESTS}/test_policies.py::test_records_of_other_flags_are_not_continued",),
    ),
)
