"""The public names: those of the package itself and of its public submodules."""

from __future__ import annotations

import types
from typing import Any

import ef_optax as ef


def public_names() -> dict[str, Any]:
    """Every public name as a user types it after ``ef.``, and what it is."""
    names = {name: getattr(ef, name) for name in ef.__all__}
    homes = {name: x for name, x in names.items() if isinstance(x, types.ModuleType)}
    for home, module in homes.items():
        exported = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
        names |= {f"{home}.{name}": getattr(module, name) for name in exported}
    return {name: x for name, x in names.items() if name not in homes}


def named(name: str) -> Any:
    """The public object of this name, from the module that has it."""
    (found,) = {x for path, x in public_names().items() if path.rpartition(".")[2] == name}
    return found
