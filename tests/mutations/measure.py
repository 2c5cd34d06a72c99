"""Faults of what is measured, and of what theory says before the first step."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

MEASURE, THEORY = "ef_optax/measure", "ef_optax/theory"
OF_WIRE = "tests/measure/test_wire.py::"
OF_ENTROPY = "tests/measure/test_entropy.py::"
OF_MONITOR = "tests/measure/test_monitor.py::"
OF_PLANNER = "tests/measure/test_planner.py::"
OF_REPORT = "tests/report/test_report.py::"
OF_TIGHT = "tests/theory/test_tight.py::"
OF_THEORY = "tests/theory/test_theory.py::"
SPELLINGS = (f"{OF_WIRE}test_report_reads_every_spelling",)

MUTATIONS = (
    Mutation(
        "the tight step is that of gradient descent times 1 - q",
        f"{THEORY}/tight.py",
        "return 2 / (L + mu) * one_minus_q / (1 + q)",
        "return 2 / (L + mu) * one_minus_q",
        (f"{OF_TIGHT}test_the_rate_is_attained",),
    ),
    Mutation(
        "the tight rate is only a bound",
        f"{THEORY}/tight.py",
        "root = math.sqrt((L - mu) ** 2 + 16 * L * mu * q / (1 + q) ** 2)",
        "root = math.sqrt((L - mu) ** 2 + 16 * L * mu * q)",
        (f"{OF_TIGHT}test_the_rate_is_attained",),
    ),
    Mutation(
        "compressed gradient descent takes the step of gradient descent",
        f"{THEORY}/tight.py",
        "return 2 / (one_minus_q * mu + (1 + q) * L)",
        "return 2 / (mu + L)",
        (f"{OF_TIGHT}test_the_rate_is_attained",),
    ),
    Mutation(
        "the number of groups is taken for their size",
        f"{MEASURE}/wire.py",
        "rows, columns = int(tiled.group(1)), int(tiled.group(2))",
        "columns, rows = int(tiled.group(1)), int(tiled.group(2))",
        SPELLINGS,
    ),
    Mutation(
        "groups along an axis are those along the axis after it",
        f"{MEASURE}/wire.py",
        "for name in (*others, *axes)])",
        "for name in (*axes, *others)])",
        (f"{OF_WIRE}test_axes_of_equal_size_are_told_apart",),
    ),
    Mutation(
        "a reduction is as cheap as a gather",
        "ef_optax/_exchange/links.py",
        "return 4 * (size - 1) * message // size",
        "return 2 * (size - 1) * message // size",
        (f"{OF_WIRE}test_what_a_device_sends_and_receives",),
    ),
    Mutation(
        "a collective in a loop counts once",
        f"{MEASURE}/wire.py",
        "times[target] = None if outer is None or count is None else outer * count",
        "times[target] = outer",
        SPELLINGS,
    ),
    Mutation(
        "a collective under a condition is not said to be so",
        f"{MEASURE}/wire.py",
        "conditional[target] = conditional[name] or branch",
        "conditional[target] = conditional[name]",
        SPELLINGS,
    ),
    Mutation(
        "a monitor takes what is left over for what was sent",
        "ef_optax/_exchange/monitored.py",
        "[p - r for p, r in zip(inputs, errors or (), strict=True)]",
        "[r for p, r in zip(inputs, errors or (), strict=True)]",
        (f"{OF_MONITOR}test_what_is_recorded_now_and_then",),
    ),
    Mutation(
        "stacked leaves get the sums of the first of them",
        "ef_optax/_numeric/moments.py",
        "order[i], rows = rows, rows + 1",
        "order[i] = rows",
        (f"{OF_MONITOR}test_error_feedback",),
    ),
    Mutation(
        "the counter of bits loses its carry",
        "ef_optax/_exchange/monitored.py",
        "traffic[:, 1::2] + bits[:, 1::2] + carry",
        "traffic[:, 1::2] + bits[:, 1::2]",
        (f"{OF_MONITOR}test_counters_carry_into_the_second_word",),
    ),
    Mutation(
        "the error of a rule with an estimate is what it sent",
        "ef_optax/_exchange/monitored.py",
        "errors = [p - c for p, c in",
        "errors = [c for p, c in",
        (f"{OF_MONITOR}test_an_estimate_and_groups",),
    ),
    Mutation(
        "a monitor sees one slice of a leaf",
        "ef_optax/_exchange/monitored.py",
        "coll.psum(sums, axes)",
        "sums",
        (f"{OF_MONITOR}test_leaves_that_are_split_over_a_model_axis",),
    ),
    Mutation(
        "the first exchange is not recorded",
        "ef_optax/_exchange/monitored.py",
        "step % monitor.every == 0",
        "step % monitor.every == 1",
        (f"{OF_MONITOR}test_what_is_recorded_now_and_then",),
    ),
    Mutation(
        "the gradient of a recorded exchange is that of the next one",
        "ef_optax/_exchange/monitored.py",
        "look(monitor, step - 1)",
        "look(monitor, step)",
        (f"{OF_MONITOR}test_what_is_recorded_now_and_then",),
    ),
    Mutation(
        "the input without what is kept of it",
        "ef_optax/_exchange/monitored.py",
        "[c + r for c, r in",
        "[c for c, r in",
        (f"{OF_MONITOR}test_what_is_recorded_now_and_then",),
    ),
    Mutation(
        "only the first bundle of leaves is counted",
        "ef_optax/_exchange/exchange.py",
        "for number, bundle in enumerate(bundles):\n            members",
        "for number, bundle in enumerate(bundles[:1]):\n            members",
        (f"{OF_MONITOR}test_error_feedback",),
    ),
    Mutation(
        "a group has the largest of the promised contractions",
        f"{MEASURE}/statistics.py",
        '"promised_alpha": "min"',
        '"promised_alpha": "max"',
        (f"{OF_MONITOR}test_an_estimate_and_groups",),
    ),
    Mutation(
        "what every worker remembers is added up",
        f"{MEASURE}/_records.py",
        "return jnp.sum(x).astype(jnp.float32) / max(x.size, 1)",
        "return jnp.sum(x).astype(jnp.float32) * 4 / max(x.size, 1)",
        (f"{OF_MONITOR}test_error_feedback",),
    ),
    Mutation(
        "a residual that settled is said to grow",
        "ef_optax/report/advice.py",
        "now, before = values[-quarter:], values[-2 * quarter : -quarter]",
        "now, before = values[-quarter:], values[:quarter]",
        (f"{OF_REPORT}test_growth_compares_the_last_two_quarters",),
    ),
    Mutation(
        "the spread of the uncompressed run is forgotten",
        "ef_optax/report/comparison.py",
        "deviation**2 / len(values) + other**2 / len(reference)",
        "deviation**2 / len(values)",
        (f"{OF_REPORT}test_gaps_and_their_spread",),
    ),
    Mutation(
        "a name may end the script that holds a chart",
        "ef_optax/report/page.py",
        'for sign in "<>&',
        'for sign in "&',
        (f"{OF_REPORT}test_names_are_escaped_and_charts_hold_the_numbers",),
    ),
    Mutation(
        "the workers' memories count together as one worker's bytes",
        f"{MEASURE}/memories.py",
        "_bytes(x) / (workers if own else 1)",
        "_bytes(x)",
        ("tests/measure/test_memories.py::test_bytes_are_those_of_the_arrays_of_one_worker",),
    ),
    Mutation(
        "Elias' delta code spells the length in one bit too few",
        f"{MEASURE}/entropy.py",
        "_floor_log2(length + 1) + 1))",
        "_floor_log2(length + 1)))",
        (f"{OF_ENTROPY}test_elias_codes",),
    ),
    Mutation(
        "a run of zeros that fills its counter is not followed by another",
        f"{MEASURE}/entropy.py",
        "return int(np.sum(runs // (2**width - 1) + 1)) * width",
        "return int(np.sum(-(-runs // (2**width - 1)))) * width",
        (f"{OF_ENTROPY}test_run_length",),
    ),
    Mutation(
        "EF21's step takes the wrong mean of the constants",
        f"{THEORY}/ef21.py",
        'average = constants.L_AM if mean == "AM" else constants.L_QM',
        'average = constants.L_QM if mean == "AM" else constants.L_AM',
        (f"{OF_THEORY}test_the_order_of_the_steps", f"{OF_THEORY}test_example_of_the_paper"),
    ),
    Mutation(
        "MARINA's step does not know that exact rounds have no variance",
        f"{THEORY}/difference.py",
        "math.sqrt((1 - p) * variance / p)",
        "math.sqrt(variance / p)",
        (f"{OF_THEORY}test_marina_step_by_hand",),
    ),
    Mutation(
        "a contraction that is repeated adds up",
        f"{THEORY}/contraction.py",
        "return 1.0 if a == 1 else -math.expm1(R * math.log1p(-a))",
        "return min(1.0, R * a)",
        (f"{OF_THEORY}test_repeated_contraction",),
    ),
    Mutation(
        "the curvature of a regularizer is left out",
        f"{THEORY}/constants.py",
        "L_i.append(float(scale * np.linalg.eigvalsh(small)[-1] / m + shift))",
        "L_i.append(float(scale * np.linalg.eigvalsh(small)[-1] / m))",
        (f"{OF_THEORY}test_least_squares_is_the_spectrum_of_the_hessians",),
    ),
    Mutation(
        "collectives of more than five arrays are not seen",
        f"{MEASURE}/wire.py",
        're.sub(r"/\\*.*?\\*/", "", text)',
        "text",
        ("tests/exchanges/test_traffic.py",),
    ),
    # ---------------------------------------------------------------- the planner
    Mutation(
        "planner: a method by name sends dense means",
        f"{MEASURE}/planner/named.py",
        "_compressor(part) or identity(), rule",
        "identity(), rule",
        (f"{OF_PLANNER}test_named_methods_send_what_the_listed_ones_send",),
    ),
    Mutation(
        "planner: a gather costs one message, however many workers there are",
        f"{MEASURE}/planner/cost.py",
        '"gather": workers - 1, "reduce": 2 * share',
        '"gather": 1, "reduce": 2 * share',
        (f"{OF_PLANNER}test_rounds_are_those_of_the_compiled_program",),
    ),
    Mutation(
        "planner: an outer tier moves the whole gradient",
        f"{MEASURE}/planner/cost.py",
        "size /= tier.devices",
        "size /= 1",
        (f"{OF_PLANNER}test_tiers_inside_of_a_worker_by_hand",),
    ),
    Mutation(
        "planner: the software is never slower than the link",
        f"{MEASURE}/planner/links.py",
        "return min(wire, float(self.software)) / 8",
        "return wire / 8",
        (f"{OF_PLANNER}test_no_message_is_faster_than_the_software",),
    ),
    Mutation(
        "planner: local steps pay for an exchange in every step",
        f"{MEASURE}/planner/plan.py",
        "transfer = transfer_seconds(rounds, workers, link, ring=ring) / method.period",
        "transfer = transfer_seconds(rounds, workers, link, ring=ring)",
        (f"{OF_PLANNER}test_times_by_hand",),
    ),
    Mutation(
        "planner: the codec's time does not count at the break-even",
        f"{MEASURE}/planner/plan.py",
        "return compute + work + fast + max(0.0, transfer - overlap * compute)",
        "return compute + fast + max(0.0, transfer - overlap * compute)",
        (f"{OF_PLANNER}test_break_even_is_where_the_order_changes",),
    ),
    Mutation(
        "planner: costs are measured at every call",
        f"{MEASURE}/planner/timing.py",
        "        if not fresh:",
        "        if fresh:",
        (f"{OF_PLANNER}test_costs_are_measured_once",),
    ),
)
