"""Load things by name: from a table of ours, from an installed entry point, or from `module:attr`."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from core.errors import InputError, unknown


def installed(group: str) -> dict[str, str]:
    """Return the names of installed entry points with where each comes from; nothing is imported."""
    return {
        point.name: f"{point.value}, installed with {point.dist.name if point.dist else 'a package'}"
        for point in importlib.metadata.entry_points(group=group)
    }


def load(kind: str, name: str, table: Mapping[str, str], group: str) -> Any:
    """Return the object called `name`: a "module:attr" of `table`, of the entry-point `group`, or `name` itself.

    Raises `InputError` in one sentence when there is none or when its module does not import.
    """
    target = table.get(name) or (name if ":" in name else "")
    if not target:
        # Only now: listing what is installed takes milliseconds.
        points = {point.name: point.value for point in importlib.metadata.entry_points(group=group)}
        target = points.get(name, "")
        if not target:
            raise unknown(kind, name, {*table, *points})
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # A broken plug-in may raise anything while it is imported.
        raise InputError(f"{kind} '{name}' cannot be loaded from {target}: {type(error).__name__}: {error}.") from error
    return found
