"""A run folder, read back. What an interrupted or failed run did not get to write is simply empty."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import Scalar, read_toml
from core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

AUDIT = "audit.json"


def described(heterogeneity: Mapping[str, Any]) -> Sequence[int]:
    """Return the numbers of the clients that heterogeneity.json describes: of very many only some are drawn."""
    numbers: Sequence[int] = heterogeneity.get("clients") or range(len(heterogeneity.get("names") or []))
    return numbers


@dataclass(frozen=True)
class RunData:
    """The files of one run. Numbers that were nan are None, as in the files."""

    path: Path
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    """A dict per finished round, as in rounds.jsonl; rounds without an evaluation lack its keys."""
    clients: pd.DataFrame | None
    """A row per client and round, or None when no client finished a round."""
    heterogeneity: dict[str, Any]
    """labels, names, label_counts (clients x labels), sizes of splits; empty when the clients never described them."""
    config: dict[str, Scalar]
    audit: dict[str, Any] = field(default_factory=dict)
    """What `fedra audit` found, by part; empty before it."""

    @property
    def personal(self) -> bool:
        """Return whether the clients evaluated models of their own, and not the global one."""
        return bool(self.summary.get("personal"))

    def name(self, client: int) -> str:
        """Return what a client calls itself, its number where that was not asked for."""
        names = dict(zip(described(self.heterogeneity), self.heterogeneity.get("names") or [], strict=False))
        return str(names.get(client, f"client {client}"))


def load(folder: Path) -> RunData:
    """Return a run folder's content; `InputError` when it is no run folder or has no readable summary.json."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name a run folder, for example one in runs/.")
    if not (folder / "config.toml").is_file():
        raise InputError(f"{folder} is not a run folder: it has no config.toml.")
    if not (folder / "summary.json").is_file():
        raise InputError(
            f"{folder} has no summary.json: the run is still going on or was killed; "
            f"finish it with `fedra run --resume {folder}`."
        )
    summary = _read_json(folder / "summary.json")
    heterogeneity = folder / "heterogeneity.json"
    return RunData(
        path=folder,
        summary=summary,
        rounds=read_rounds(folder),
        clients=_read_clients(folder / "clients.parquet"),
        heterogeneity=_read_json(heterogeneity) if heterogeneity.is_file() else {},
        config=read_toml(folder / "config.toml"),
        audit=_read_json(folder / AUDIT) if (folder / AUDIT).is_file() else {},
    )


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Return a dict per finished round of a run folder; a killed process may leave half a line, which is left out."""
    path = folder / "rounds.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for i, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if i < len(lines):
                raise InputError(f"cannot read {path}: line {i} is not JSON.") from None
    return rows


def series(rounds: list[dict[str, Any]], *keys: str) -> tuple[list[int], list[float | None]]:
    """Return the rounds that recorded a value under these nested keys, and the values; nan is None."""
    found = [(row["round"], nested(row, *keys)) for row in rounds if _has(row, keys)]
    return [number for number, _ in found], [value for _, value in found]


def nested(content: Mapping[str, Any], *keys: str) -> Any:
    """Return content[key][key]..., None as soon as one is missing."""
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _has(row: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    parent = nested(row, *keys[:-1])
    return isinstance(parent, Mapping) and keys[-1] in parent


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}.") from None
    if not isinstance(content, dict):
        raise InputError(f"cannot read {path}: it holds no JSON object.")
    return content


def _read_clients(path: Path) -> pd.DataFrame | None:
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError):
        return None
    return table if len(table) else None
