"""``ef.policies.new_name``: which leaf gets what, and when."""

from __future__ import annotations

import pytest


def test_new_name() -> None:
    pytest.fail("write down what each leaf gets, and when")
