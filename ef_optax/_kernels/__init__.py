"""Kernels for GPU and TPU behind two functions of the XLA form; everywhere else nothing changes.

Which one runs is decided when a program is lowered for a platform: ``cuda`` and ``tpu`` take a
Pallas kernel, all others the XLA form, whose program for the CPU is the same as without this
folder. A leaf that the kernels are not made for takes the XLA form on every platform.
"""

from __future__ import annotations

from ef_optax._kernels.dispatch import block_top_k_indices as block_top_k_indices
from ef_optax._kernels.dispatch import pack_signs_and_norm as pack_signs_and_norm
