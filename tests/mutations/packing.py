"""Faults of packing: codes in words, fields in a message, masks of one bit an entry."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

PACKING, FIELDS, MASKS = (f"ef_optax/_bits/{n}.py" for n in ("packing", "fields", "bitmask"))
OF_PACKING = "tests/bits/test_packing.py"
OF_FIELDS = "tests/bits/test_fields.py"
OF_MASKS = "tests/select/test_selection.py::test_masks_are_listed_counted_and_cut"

MUTATIONS = (
    Mutation(
        "the last word, which is not full, is left out",
        PACKING,
        "return -(-count * bits // WORD_BITS)",
        "return count * bits // WORD_BITS",
        (OF_PACKING,),
    ),
    Mutation(
        "twice as many narrow codes are joined as fit a word",
        PACKING,
        "return 1 << (WORD_BITS // bits).bit_length() - 1 if",
        "return 1 << (WORD_BITS // bits).bit_length() if",
        (OF_PACKING,),
    ),
    Mutation(
        "codes of one and two bits lie in a byte from the other end",
        PACKING,
        "<< shifts[: 8 // bits])",
        "<< shifts[: 8 // bits][::-1])",
        (OF_PACKING,),
    ),
    Mutation(
        "a code that straddles two words loses its upper part",
        PACKING,
        "for field in range(start // bits, min(",
        "for field in range(-(-start // bits), min(",
        (OF_PACKING,),
    ),
    Mutation(
        "of the codes in a word, taken from their places, the last is left out",
        PACKING,
        "for later in range(1, most):",
        "for later in range(1, most - 1):",
        (OF_PACKING,),
    ),
    Mutation(
        "the upper part of a code is read from its first word",
        PACKING,
        "after = jnp.minimum(word + np.uint32(1), np.uint32(words.size - 1))",
        "after = word",
        (OF_PACKING,),
    ),
    Mutation(
        "codes of a whole fraction of a word are read with their neighbours",
        PACKING,
        "codes = (joined[:, None] >> shifts) & np.uint32((1 << bits) - 1)",
        "codes = joined[:, None] >> shifts",
        (OF_PACKING,),
    ),
    Mutation(
        "the ragged end is padded in front",
        PACKING,
        "lax.pad(codes, np.uint32(0), ((0, -count % multiple, 0),))",
        "lax.pad(codes, np.uint32(0), ((-count % multiple, 0, 0),))",
        (OF_PACKING,),
    ),
    Mutation(
        "of many codes the ragged end is forgotten",
        PACKING,
        "jnp.concatenate([pack(codes[:full], bits), pack(codes[full:], bits)])",
        "pack(codes[:full], bits)",
        (f"{OF_PACKING}::test_many_codes_with_a_ragged_end",),
    ),
    Mutation(
        "zero counts as minus",
        PACKING,
        "return pack((x >= 0).astype(jnp.uint32), 1)",
        "return pack((x > 0).astype(jnp.uint32), 1)",
        (OF_PACKING,),
    ),
    Mutation(
        "minus is read as zero",
        PACKING,
        "return jnp.where(plus, jnp.ones((), dtype), -jnp.ones((), dtype))",
        "return jnp.where(plus, jnp.ones((), dtype), jnp.zeros((), dtype))",
        (OF_PACKING,),
    ),
    Mutation(
        "the norm of a bfloat16 leaf is summed in bfloat16",
        PACKING,
        "wide = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)",
        "wide = x.dtype",
        (f"{OF_PACKING}::test_signs_and_norm_in_one_reading",),
    ),
    Mutation(
        "every array of a message is padded to a whole word",
        FIELDS,
        "return 1, *divmod(exact_bits(field), WORD_BITS)",
        "return 1, -(-exact_bits(field) // WORD_BITS), 0",
        (OF_FIELDS,),
    ),
    Mutation(
        "a rest that straddles two words is added to the first alone",
        FIELDS,
        "joined = joined.at[word[over] + 1].add(high)",
        "joined = joined.at[word[over]].add(high)",
        (OF_FIELDS,),
    ),
    Mutation(
        "a rest that straddles two words is read from the first alone",
        FIELDS,
        "high = (words[np.minimum(word + 1, count - 1)] << 1)",
        "high = (words[word] << 1)",
        (OF_FIELDS,),
    ),
    Mutation(
        "rests are read with their neighbours' bits",
        FIELDS,
        "return (low | high) & mask",
        "return low | high",
        (OF_FIELDS,),
    ),
    Mutation(
        "the rests of stacked fields are counted once",
        FIELDS,
        "offsets.starts([rows * bool(rest) for",
        "offsets.starts([bool(rest) for",
        (OF_FIELDS,),
    ),
    Mutation(
        "the bits of a stack are those of one row",
        FIELDS,
        "total += math.prod(field.words.shape[:-1]) * field.bits",
        "total += field.bits",
        (OF_FIELDS,),
    ),
    Mutation(
        "a mask takes what is above the threshold, not what is at it",
        MASKS,
        "difference = threshold - jnp.ones((), entries.dtype) - entries",
        "difference = threshold - entries",
        ("tests/select/test_selection.py::test_same_set_as_a_stable_sort",),
    ),
    Mutation(
        "a word that ends exactly at the limit is cut",
        MASKS,
        "return jnp.where(ends <= limit, words, words & below)",
        "return words & below",
        (OF_MASKS,),
    ),
    Mutation(
        "of the bits of a word the one after the wanted is found",
        MASKS,
        "above = rank >= ones",
        "above = rank > ones",
        (OF_MASKS,),
    ),
    Mutation(
        "running sums are taken in float32 where they are not exact",
        MASKS,
        "_EXACT = 1 << 24",
        "_EXACT = 1 << 26",
        (
            "tests/select/test_selection.py::"
            "test_running_sums_are_exact_up_to_the_bound_and_beyond_it_after",
        ),
    ),
    Mutation(
        "the codes of all workers are one slice, which a loop reads several times",
        FIELDS,
        "isinstance(field, Packed) and by_worker",
        "False",
        (OF_FIELDS,),
    ),
)
