"""Writes the table of all compressors: ``python -m docs.tables`` (a test fails if it is stale)."""

from __future__ import annotations

from pathlib import Path

import ef_optax as ef

PAGE = Path(__file__).with_name("compressors.md")
SHAPE, WORKERS = (64, 64), 8
DENSE = 32 * 64 * 64

CALLS = {
    "Dense and narrow": """
        identity()
        cast("bfloat16")
        cast("float8_e5m2")
        scaled_half()
        fp8("e4m3")
        fp8("e5m2")
        natural(key=0)
        inceptionn(2**-10)
    """,
    "Quantisers": """
        qsgd(7, key=0)
        qsgd(7, key=0, norm="linf", bucket=512)
        linear_dithering(7, key=0)
        natural_dithering(7, key=0)
        ternary(key=0)
        ternary(key=0, packing="quartic")
        ternary(key=0, clip_sigmas=2.5)
        three_lc(1.0)
        dorefa(4, key=0)
        uniform(4, bucket=512)
        uniform(4, bucket=512, key=0)
        block_quantize(4, block=256)
        block_quantize(4, block=256, key=0)
        quantile_8bit()
        quantile_sketch(16)
        sigma_bins(2)
        log_quantize(3)
    """,
    "Signs": """
        sign()
        scaled_sign()
        row_sign()
        rms_sign()
        two_mean_sign()
        two_mean_sign(columns=True)
        threshold_sign(0.0)
        two_bit(0.5)
        exchanges.majority_vote()
    """,
    "Sparsifiers": """
        top_k(0.01)
        block_top_k(0.01)
        row_top_k(0.01)
        random_k(0.01, key=0)
        random_k(0.01, key=0, scaled=True)
        random_k(0.01, key=0, shared_mask=True)
        random_block(0.01, key=0)
        exchanges.perm_k(key=0)
        arc_top_k(0.01)
        bernoulli(0.1, key=0)
        bernoulli(0.1, key=0, scaled=False)
        threshold(0.1, capacity=0.02)
        sampled_top_k(0.01)
        redsync(0.01)
        adaq(0.01)
        wangni(0.01, key=0)
        comp_k(40, 80, key=0)
        mix_k(20, 20, key=0)
        global_top_k(0.01)
        exchanges.global_top_k_of_sum(0.01)
        exchanges.global_top_k_of_sum(0.01, tree=True)
        exchanges.leader_top_k(0.01)
        count_sketch(5, 100, 0.01)
        dct_top_k(64, 32)
        shared_rows(0.25)
        shared_rows(k=4, transform="dct")
    """,
    "Low rank and rotations": """
        svd(2)
        atomo(2, key=0)
        power_sgd(2)
        acp_sgd(2)
        dion_factors(2)
        gradiveq(0.1)
        greedy_lore(2)
        rotate(scaled_sign(), key=0)
        rotate(qsgd(3, key=0, norm="linf"), key=0, kind="dft")
        rotate(uniform(4), key=0, kind="kashin")
        drive(key=0)
        drive(key=0, scale="mse")
        eden(4, key=0)
    """,
    "Made of others": """
        compose(cast("bfloat16"), block_top_k(0.01))
        compose(sigma_bins(2, means_dtype="bfloat16"), block_top_k(0.01))
        compose(scaled_sign(), top_k(0.01))
        compose(qsgd(7, key=0), random_k(0.1, key=0, scaled=True))
        induced(top_k(0.1), random_k(0.1, key=0, scaled=True))
        scale_to_contractive(qsgd(7, key=0))
        probabilistic_mix([natural(key=0), ternary(key=0)], [0.5, 0.5], key=0)
        fcc(top_k(0.01), 3)
    """,
    "By another transport": """
        exchanges.gather(identity())
        exchanges.reduce(top_k(0.01))
        exchanges.two_shot(scaled_sign())
        exchanges.two_shot(top_k(0.01), identity())
        exchanges.leader(block_top_k(0.01))
        exchanges.largest_of_sum(block_top_k(0.01))
        exchanges.tree(block_top_k(0.01))
        exchanges.majority(top_k(0.01))
        exchanges.mean_of_senders(top_k(0.01))
    """,
}

HEAD = f"""# The compressors in numbers

`python -m docs.tables` writes this page; a test fails when it is stale. The page of
[definitions](definitions.md) says what each compressor computes and where its constants come from.

All numbers are for one leaf of 64 x 64 float32 values ({DENSE:,} bits) and {WORKERS} workers.

- **bits**: of one worker's message; in brackets the bits of each round, if they differ.
- **factor**: dense bits over the bits that the worker contributes in all its rounds.
- **alpha**: E||C(x) - x||^2 <= (1 - alpha)||x||^2; **omega**: E C(x) = x and
  E||C(x) - x||^2 <= omega||x||^2; empty if there is none at this size.
- **noise**: E||C(x) - x||^2 / ||x||^2 for an x whose values (for `atomo`, singular values) are of
  equal size; empty if it is unknown or certainly below 1. Rules with a memory refuse a leaf for
  which it is 1 or more: under noise of unit size, the residual would grow at every step.
- **basis** (`codec.basis`): *exact*, some input attains them; *bound*, proved; *asymptotic*, there
  is a limit for long vectors (in the docstring) but no constant; *none*, none exists or is known.
- **properties**: u unbiased, l linear, h homogeneous, d deterministic, a additive (the aggregate is
  the mean of what was sent).
"""


def calls() -> list[str]:
    """Every call of the table."""
    return [line.strip() for text in CALLS.values() for line in text.strip().splitlines()]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def row(call: str) -> str:
    codec = eval(call, {"__builtins__": {}}, vars(ef)).codec
    traffic, bits = codec.traffic(SHAPE, "float32", WORKERS), codec.bits(SHAPE)
    rounds = "" if traffic == (bits,) else f" ({' + '.join(f'{part:,}' for part in traffic)})"
    flags = {
        "u": codec.unbiased,
        "l": codec.linear,
        "h": codec.homogeneous,
        "d": codec.deterministic,
        "a": codec.additive,
    }
    cells = (
        f"`{call}`",
        f"{bits:,}{rounds}",
        f"{DENSE / sum(traffic):.1f}",
        number(codec.alpha(SHAPE, WORKERS)),
        number(codec.omega(SHAPE, WORKERS)),
        number(codec.noise_error(SHAPE, WORKERS) or None),
        codec.basis,
        " ".join(flag for flag, holds in flags.items() if holds),
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, text in CALLS.items():
        parts.append(f"\n## {title}\n")
        parts.append("| compressor | bits | factor | alpha | omega | noise | basis | properties |")
        parts.append("|---|--:|--:|--:|--:|--:|---|---|")
        parts += [row(line.strip()) for line in text.strip().splitlines()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
