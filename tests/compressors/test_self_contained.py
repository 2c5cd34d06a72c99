"""Which codecs are self-contained: derived, so a codec with its own protocol never is."""

from __future__ import annotations

import dataclasses

import pytest

import ef_optax as ef
from ef_optax._core.codec import Codec
from tests.compressors.pool import CASES


@pytest.mark.parametrize("name", CASES)
def test_a_protocol_of_its_own_is_never_taken_for_self_contained(name: str) -> None:
    codec = CASES[name].make().codec
    kind = type(codec)

    class Own(kind):
        def protocol(self, x, state, workers):
            return (yield from super().protocol(x, state, workers))

    own = object.__new__(Own)
    for field in dataclasses.fields(codec):
        object.__setattr__(own, field.name, getattr(codec, field.name))
    assert not own.self_contained
    assert codec.self_contained == (kind.protocol is Codec.protocol)


def test_state_and_groups_are_not_self_contained() -> None:
    class Stateful(type(ef.top_k(k=1).codec)):
        @property
        def traits(self):
            return dataclasses.replace(super().traits, stateful=True)

    assert ef.top_k(k=1).codec.self_contained and not Stateful(k=1).self_contained
    assert not ef.global_top_k(k=1).codec.self_contained
    assert not ef.per_leaf(lambda path, leaf: ef.top_k(k=1)).codec.self_contained
    assert not ef.scheduled([1], [ef.top_k(k=1), ef.sign()]).codec.self_contained


def test_traits_are_declared_in_one_property() -> None:
    with pytest.raises(TypeError, match=r"Old defines linear, unbiased.*Traits\(linear=\.\.\.\)"):

        class Old(Codec):
            unbiased = True
            linear = False
