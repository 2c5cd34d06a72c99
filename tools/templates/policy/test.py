"""``ef.policies.new_name``: which compressor each leaf gets, and when."""

from __future__ import annotations

import pytest


def test_new_name() -> None:
    pytest.fail("write down which compressor each leaf gets, and when")
