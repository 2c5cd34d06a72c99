"""The environment that all other tests rely on."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest


def test_eight_virtual_devices(mesh8: jax.sharding.Mesh) -> None:
    assert mesh8.devices.size == 8
    assert {device.platform for device in mesh8.devices.flat} == {"cpu"}


def test_mixed_dtypes_do_not_promote() -> None:
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_warnings_are_errors() -> None:
    with pytest.raises(UserWarning, match="loud"):
        warnings.warn("loud", UserWarning, stacklevel=1)
