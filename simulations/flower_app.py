"""A Flower app as its folder has it: what pyproject.toml says, and its ServerApp and ClientApp."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from flwr.common.config import get_fused_config_from_dir, get_project_config, parse_config_args
from flwr.supercore.object_ref import load_app

from core.errors import InputError

# Packages of ours that an app may have under the same name, as its own top level shadows ours.
_SHADOWED = ("client", "server", "strategies", "tasks", "privacy", "reports")
_NEEDED = ("core", "simulations")


@dataclass(frozen=True)
class FlowerApp:
    """A Flower app's folder and what its pyproject.toml says."""

    folder: Path
    serverapp: str
    clientapp: str
    run_config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, overrides: Sequence[str] = ()) -> FlowerApp:
        """Return the app in a folder; `overrides` are as in `flwr run --run-config`. `InputError` when it is none."""
        folder = folder.absolute()
        if not (folder / "pyproject.toml").is_file():
            raise InputError(f"{folder} is not a Flower app: it has no pyproject.toml.")
        try:
            components = get_project_config(folder)["tool"]["flwr"]["app"]["components"]
            config = get_fused_config_from_dir(folder, parse_config_args(list(overrides) or None))
            serverapp, clientapp = components["serverapp"], components["clientapp"]
        except (ValueError, KeyError, OSError) as error:
            raise InputError(f"{folder}: {' '.join(str(error).split())}.") from None
        except click.ClickException as error:
            raise InputError(error.format_message()) from None
        if taken := [name for name in _NEEDED if _has_module(folder, name)]:
            raise InputError(f"{folder} has a module named '{taken[0]}', which is Fedra's own; rename it.")
        return cls(folder, serverapp, clientapp, config)

    def load(self, reference: str, kind: type) -> Any:
        """Return the object that a component names; `InputError` when it cannot be imported or is something else."""
        for name in _SHADOWED:
            if (self.folder / name).is_dir() or (self.folder / f"{name}.py").is_file():
                for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                    del sys.modules[module]
        try:
            found = load_app(reference, ValueError, self.folder)
        except Exception as error:  # An app may raise anything while it is imported.
            raise InputError(
                f"{reference} of {self.folder} cannot be loaded: {type(error).__name__}: {error}."
            ) from error
        if not isinstance(found, kind):
            raise InputError(f"{reference} of {self.folder} is {found!r}, not a {kind.__name__}.")
        return found


def load(folder: Path, reference: str, kind: type) -> Any:
    """Return the object that a component names; `InputError` when it cannot be imported or is something else."""
    for name in _SHADOWED:
        if _has_module(folder, name):
            for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                del sys.modules[module]
    try:
        found = load_app(reference, ValueError, folder)
    except Exception as error:  # An app may raise anything while it is imported.
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{reference} of {folder} cannot be loaded: {reason}.") from error
    if not isinstance(found, kind):
        raise InputError(f"{reference} of {folder} is {found!r}, not a {kind.__name__}.")
    return found


def _has_module(folder: Path, name: str) -> bool:
    return (folder / name).is_dir() or (folder / f"{name}.py").is_file()
