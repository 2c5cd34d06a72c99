"""Kernels for GPU and TPU behind two functions, which use XLA operations elsewhere.

The choice is made when a program is lowered for a platform: ``cuda`` and ``tpu`` use a Pallas
kernel, and all others the XLA form, whose CPU program is the same as without this folder. Leaves
for which the kernels are not made use the XLA form on every platform.
"""

from __future__ import annotations

from ef_optax._kernels.dispatch import block_top_k_indices as block_top_k_indices
from ef_optax._kernels.dispatch import pack_signs_and_norm as pack_signs_and_norm
