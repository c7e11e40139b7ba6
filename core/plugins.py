"""Load things by name: from a table of ours, from what other packages install (entry points), or from `module:attr`.

Ours come first and cannot be replaced; a name that two packages offer is refused. Nothing is imported before it is
asked for, except by `foreign`, which has to know what works.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import InputError, unknown

# What a broken plug-in may raise while it is imported: a script without a main guard ends the process.
BROKEN = (Exception, SystemExit)


@dataclass(frozen=True)
class Plugin:
    """What an installed package offers under a name."""

    target: str
    """module:attr."""
    package: str
    """Name and version, as pip has them."""


def offered(group: str) -> dict[str, list[Plugin]]:
    """Return the plug-ins of an entry-point group by name, as their packages' metadata say; nothing is imported."""
    found: dict[str, list[Plugin]] = {}
    for point in importlib.metadata.entry_points(group=group):
        # Not `point.module`, which raises where the value is malformed: that is this plug-in's trouble alone.
        target = "".join(point.value.partition("[")[0].split())
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"
        found.setdefault(point.name, []).append(Plugin(target, package))
    return dict(sorted(found.items()))


def load(kind: str, name: str, table: Mapping[str, str], group: str) -> Any:
    """Return the object called `name`: a "module:attr" of `table`, of the entry-point `group`, or `name` itself.

    `kind` is the setting that names it. Raises `InputError` in one sentence when there is none, when several packages
    offer it, or when its module does not import.
    """
    target = table.get(name) or (name if ":" in name else "")
    where, remedy = f"cannot be loaded from {target}", ""
    if not target:
        plugin = _only(kind, name, group, tuple(table), tuple(sys.path))
        target, where = plugin.target, f"from {plugin.package} cannot be loaded"
        remedy = f"; mend or update that package, or choose another {kind}"
    try:
        return _import(target)
    except BROKEN as error:
        module, _, attribute = name.partition(":")
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            remedy = f"; start fedra in the folder where {error.name}.py lies, or install its package"
        elif isinstance(error, AttributeError) and (own := _defined(module)) and attribute not in own:
            raise unknown(f"{kind} of {module}", attribute, own) from None
        raise InputError(f"{kind} '{name}' {where}: {_reason(error)}{remedy}.") from error


# A client asks before every cohort, and listing what is installed takes as long as a small one. What is refused is not
# kept: what is installed meanwhile is found.
@functools.lru_cache
def _only(kind: str, name: str, group: str, ours: tuple[str, ...], path: tuple[str, ...]) -> Plugin:
    """Return the one plug-in of the name; `InputError` when there is none or several. `path` is sys.path."""
    plugins = offered(group)
    if name not in plugins:
        raise unknown(kind, name, {*ours, *plugins})
    if len(plugins[name]) > 1:
        raise InputError(
            f"{kind} '{name}' is offered by {_packages(plugins[name])}; "
            f"write {_targets(kind, plugins[name])}, or uninstall one of them."
        )
    return plugins[name][0]


def foreign(kind: str, table: Mapping[str, str], group: str, describe: Callable[[str, Any], str]) -> dict[str, str]:
    """Return what `fedra list` says of every name that other packages offer: where it comes from and what it is.

    Their modules are imported to know whether they can be; `describe(name, object)` returns a sentence or raises
    `InputError`. One that is broken says so and leaves the others alone.
    """
    rows: dict[str, str] = {}
    for name, plugins in offered(group).items():
        origin = f"from {_packages(plugins)}: "
        if name in table:
            rows[name] = f"{origin}not used, '{name}' is Fedra's own; write {_targets(kind, plugins)}."
        elif len(plugins) > 1:
            rows[name] = f"{origin}not used, several packages offer the name; write {_targets(kind, plugins)}."
        else:
            rows[name] = f"{origin}{_described(name, plugins[0].target, describe)} [{plugins[0].target}]"
    return rows


def first_line(found: Any) -> str:
    """Return the first line of an object's docstring, without its full stop."""
    lines = (getattr(found, "__doc__", None) or "").strip().splitlines()
    return lines[0].removesuffix(".") if lines else "no description"


def _described(name: str, target: str, describe: Callable[[str, Any], str]) -> str:
    try:
        return describe(name, _import(target))
    except InputError as error:
        return str(error)
    except BROKEN as error:
        return f"cannot be loaded: {_reason(error)}"


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _defined(module: str) -> list[str]:
    """Return the classes and functions that a module which was imported defines itself."""
    named = vars(sys.modules[module]) if module in sys.modules else {}
    return [name for name, found in named.items() if name[0] != "_" and getattr(found, "__module__", "") == module]


def _reason(error: BaseException) -> str:
    """Return the kind of error and what it says, on one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...").rstrip(".: ")


def _packages(plugins: list[Plugin]) -> str:
    return " and ".join(plugin.package for plugin in plugins)


def _targets(kind: str, plugins: list[Plugin]) -> str:
    return " or ".join(f"{kind}={plugin.target}" for plugin in plugins)
