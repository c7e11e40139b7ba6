"""The run folder: config.toml, rounds.jsonl (flushed each round), clients.parquet, model, summary.json, checkpoint/."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord
from safetensors.numpy import save_file

from core.config import RunConfig, read_toml
from core.errors import InputError
from core.records import Columns, to_numpy
from server.checkpoint import Checkpoint, last_round, load

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("fedra", "flwr", "ray", "torch", "numpy", "pandas", "scikit-learn", "flwr-datasets")
LATEST = 3
CLIENT_ROWS = "clients.jsonl"


def clean(value: Any) -> Any:
    """Return the value with nan and infinity as None: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFolder:
    """The files of one run. What was written stays valid whenever the process ends."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self.checkpoints = path / "checkpoint"

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """Make `<out>/<utc>-<preset>-<strategy>-s<seed>/` with its config.toml, and return it."""
        if config.data_dir:
            # A run may be resumed from another folder than it was started in.
            config = config.with_(data_dir=str(Path(config.data_dir).absolute()))
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        strategy = config.strategy.replace(":", ".").replace("/", ".")
        base = Path(config.out).absolute() / f"{stamp}-{config.preset}-{strategy}-s{config.seed}"
        path, again = base, 1
        while True:
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                again += 1
                path = base.with_name(f"{base.name}-{again}")
            except OSError as error:
                raise InputError(f"cannot make a run folder in out={config.out}: {error.strerror}.") from None
        folder = cls(path, config)
        (path / "config.toml").write_text(config.toml(), encoding="utf-8")
        return folder

    @staticmethod
    def check_place(config: RunConfig) -> None:
        """Raise `InputError` where no run folder could be made in `out`, without making anything."""
        out = Path(config.out).absolute()
        place = next(folder for folder in (out, *out.parents) if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise InputError(f"cannot make a run folder in out={config.out}: {place} is not a folder to write in.")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return an existing run's folder; `InputError` when it is not one."""
        if not (path / "config.toml").is_file():
            raise InputError(f"{path} is not a run folder: it has no config.toml. {latest_runs()}".strip())
        return cls(path.absolute(), RunConfig.of(read_toml(path / "config.toml")))

    @classmethod
    def resumable(cls, path: Path) -> RunFolder:
        """Return a run's folder that has rounds left; `InputError` when it is complete."""
        folder = cls.open(path)
        summary: dict[str, Any] = {}
        # A summary that is missing or broken off is that of a run that was killed.
        with contextlib.suppress(OSError, ValueError):
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        rounds = path / "rounds.jsonl"
        if not any(folder.checkpoints.glob("round-*")) and rounds.is_file() and rounds.read_text().count("\n") > 1:
            raise InputError(f"{path} has rounds but no checkpoint; start anew with: fedra run {path / 'config.toml'}.")
        if summary.get("status") == "completed":
            raise InputError(f"{path} is completed; start a new run with: fedra run {path / 'config.toml'}.")
        return folder

    def with_config(self, config: RunConfig) -> RunFolder:
        """Return this folder with a configuration of which more is decided, and write that down."""
        if config != self.config:
            _replace(self.path / "config.toml", config.toml())
        return RunFolder(self.path, config)

    def rounds_done(self) -> int:
        """Return the last checkpoint's round, 0 where there is none."""
        return last_round(self.checkpoints)

    def last_checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint and drop the records of later, unfinished rounds."""
        checkpoint = load(self.checkpoints)
        done = checkpoint.round if checkpoint else 0
        for file in ("rounds.jsonl", f"checkpoint/{CLIENT_ROWS}"):
            if (path := self.path / file).exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                # A killed process may leave half a line at the end.
                whole = [line for line in lines if line.endswith("\n") and json.loads(line)["round"] <= done]
                if len(whole) < len(lines):
                    _replace(path, "".join(whole))
        return checkpoint

    def append_round(self, row: dict[str, Any], trained: Columns, evaluated: Columns) -> None:
        """Append a round's line to rounds.jsonl, and beside the checkpoint what each client did, column by column.

        Both have a column `client`; a metric of a client's own test split is called test_<metric>.
        """
        self.checkpoints.mkdir(exist_ok=True)
        columns = {"round": row["round"], "trained": trained, "evaluated": evaluated}
        self._append(self.checkpoints / CLIENT_ROWS, columns)
        self._append(self.path / "rounds.jsonl", row)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the folder."""
        _replace(self.path / name, json.dumps(clean(content), indent=2) + "\n")

    def finish(self, arrays: ArrayRecord, summary: dict[str, Any]) -> None:
        """Write model.safetensors, clients.parquet and summary.json."""
        save_file({name: to_numpy(array) for name, array in arrays.items()}, self.path / "model.safetensors")
        self._client_table().to_parquet(self.path / "clients.parquet", index=False)
        self.write_json("summary.json", summary)

    def _client_table(self) -> pd.DataFrame:
        """Return a row per round and client that trained or evaluated then, sorted."""
        import pandas as pd

        trained: Columns = {"round": [], "client": [], "num_examples": [], "train_loss": [], "train_seconds": []}
        evaluated: Columns = {"round": [], "client": []}
        rows = self.checkpoints / CLIENT_ROWS
        for line in map(json.loads, rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []):
            for table, columns in ((trained, line["trained"]), (evaluated, line["evaluated"])):
                for name, values in {"round": [line["round"]] * len(columns.get("client", [])), **columns}.items():
                    table.setdefault(name, []).extend(values)
        # A metric that nobody has is None everywhere; it is still a column of numbers.
        tests = pd.DataFrame(evaluated).astype({name: float for name in evaluated if name.startswith("test_")})
        both = pd.DataFrame(trained).merge(tests, how="outer", on=["round", "client"])
        return both.sort_values(["round", "client"], ignore_index=True)

    @staticmethod
    def _append(path: Path, row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(row) + "\n")
            file.flush()


def latest_runs(file: str = "") -> str:
    """Return a sentence that names the latest runs (or this file of theirs) in runs/; empty where there are none."""
    found = sorted(Path(RunConfig().out).glob("*/config.toml"), key=lambda path: path.parent.name)[-LATEST:]
    named = ", ".join(str(path.parent / file) for path in reversed(found))
    return f"The latest in {RunConfig().out}/: {named}. " if named else ""


def _line(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:
        return json.dumps(clean(row))


def _replace(path: Path, text: str) -> None:
    """Write a file so that a kill at any moment leaves the old or the new one whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def versions() -> dict[str, str]:
    """Return the installed versions of what decides a run's numbers."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            # Flower's runtime ships the source folders to machines where the package itself is not installed.
            return "not installed"

    return {package: installed(package) for package in PACKAGES}


class Clock:
    """Seconds since it was started, the time before an interruption included."""

    def __init__(self, before: float = 0.0) -> None:
        self._began = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.perf_counter() - self._began
