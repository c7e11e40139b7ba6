"""A deployment on this machine, of processes: a SuperLink, and a SuperNode for each client with a key of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nursery
import tomli_w

from privacy.secagg import identities
from simulations.run import preset

HERE = Path(__file__).parent
ROOT = HERE.parent
SECONDS = 200.0


class Deployment:
    """`warm` processes come from a nursery; the others are started as Flower starts them anywhere.

    Node `i` has `nodes[i]` in its configuration, besides its number and its key.
    """

    def __init__(
        self, folder: Path, clients: int, *, warm: bool = True, roster: bool = True,
        nodes: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.clients, self._warm = folder, clients, warm
        self._own, self._nodes = nodes or {}, clients
        folder.mkdir(parents=True, exist_ok=True)
        self.roster = identities.create(folder / "keys", clients) if roster else None
        self._port = free_port()
        self._log = (folder / "log.txt").open("w")
        self._socket = str(folder / "nursery")
        self._started: list[subprocess.Popen] = []
        self._environment = self._prepare()

    def __enter__(self) -> Deployment:
        try:
            if self._warm:
                self._popen([sys.executable, str(HERE / "nursery.py"), self._socket])
                self.until(self._answers_at_socket, "the nursery")
            self.start(["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self._port)])
            self.until(self._healthy, "the SuperLink")
            for client in range(self.clients):
                self.start_node(client)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every process, by its group or pid, and see that it is gone."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.until(lambda: not self._left(), "their end")
        self._log.close()

    def start_node(self, client: int) -> None:
        """Start a client's SuperNode; `node-N.pid` says which process that is."""
        own: dict[str, Any] = {"partition-id": client, "num-partitions": self.clients, **self._own.get(client, {})}
        if self.roster is not None:
            key = self.roster.parent / f"client-{client}.key"
            own = {"secure-identity": str(key), "secure-roster": str(self.roster), **own}
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in own.items())
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self._port}", "--host", "127.0.0.1"]
        pid = self.start([*command, "--port", str(free_port()), "--node-config", words])
        (self.folder / f"node-{client}.pid").write_text(str(pid))

    def start(self, command: Sequence[str]) -> int:
        """Start one of Flower's commands, and return its pid."""
        if self._warm:
            return nursery.start(self._socket, list(command), self._environment)
        return self._popen([str(self.folder / "bin" / command[0]), *command[1:]]).pid

    def run(self, settings: Mapping[str, Any], app: Path | str = ROOT, seconds: float = SECONDS) -> Path:
        """Run an app to its end, and return the run's folder. `app` may name one of `deployed_apps`."""
        out = self.submit(settings, app)
        self.until(lambda: list(out.glob("*/summary.json")), "the run's end", seconds)
        [found] = out.glob("*")
        return found

    def submit(self, settings: Mapping[str, Any], app: Path | str = ROOT) -> Path:
        """Start an app, and return the folder in which its run's will be."""
        out = self.folder / f"runs-{len(list(self.folder.glob('runs-*')))}"
        own = {"preset": "smoke", "clients": self.clients, "evaluate-every": 100, **settings, "out": str(out)}
        if self.roster is not None and own.get("secure-aggregation.profile", "none") != "none":
            own.setdefault("secure-aggregation.roster", str(self.roster))
        file = self.folder / "settings.toml"
        name = own.pop("preset")
        file.write_text(preset(name, own).with_(preset="deployed").toml())
        folder = app if isinstance(app, Path) else self._app(app)
        asking = ["run", str(folder), "here", "--run-config", str(file)]
        asked = subprocess.run(
            [sys.executable, "-c", "from flwr.cli.app import app; app()", *asking], env=self._environment,
            cwd=self.folder, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert asked.returncode == 0, asked.stdout + asked.stderr
        return out

    def log(self) -> str:
        """Return what the processes have said, its end."""
        return (self.folder / "log.txt").read_text(errors="replace")[-6000:]

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
        """Return when something holds; raise `TimeoutError` where it does not come to that."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no sign of {what} for {seconds} s\n{self.log()}")
            time.sleep(0.05)

    def _prepare(self) -> dict[str, str]:
        """Write what Flower's processes find, a home and commands on the PATH; return their environment."""
        home, commands = self.folder / "home", self.folder / "bin"
        home.mkdir()
        commands.mkdir()
        table = {"superlink": {"default": "here", "here": {"address": f"127.0.0.1:{self._port}", "insecure": True}}}
        (home / "config.toml").write_text(tomli_w.dumps(table))
        for command in nursery.COMMANDS:
            file = commands / command
            file.write_text(f"#!{sys.executable} {'-IS' if self._warm else '-I'}\n{self._script(command)}")
            file.chmod(0o700)
        return {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "PYTHONUNBUFFERED": "1",
            "DEPLOYMENT": str(self.folder),
        }

    def _script(self, command: str) -> str:
        if not self._warm:
            return (
                "import sys\nfrom importlib.metadata import entry_points\n"
                f"[found] = entry_points(group='console_scripts', name='{command}')\nsys.exit(found.load()())\n"
            )
        return (
            f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport nursery\n"
            f"nursery.start({self._socket!r}, ['{command}', *sys.argv[1:]], dict(os.environ))\n"
        )

    def _app(self, name: str) -> Path:
        """Return the folder of an app whose halves are those of that name in `deployed_apps`."""
        folder = self.folder / f"app-{name}"
        if not folder.exists():
            folder.mkdir()
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())
            own = project["tool"]["flwr"]["app"]
            own["components"] = {
                "serverapp": f"deployed_apps:{name}_server",
                "clientapp": f"deployed_apps:{name}_client",
            }
            about = {"name": f"test-{name.replace('_', '-')}", "version": "1.0.0", "dependencies": []}
            (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": about, "tool": {"flwr": {"app": own}}}))
            (folder / "deployed_apps.py").write_text((HERE / "deployed_apps.py").read_text())
        return folder

    def _popen(self, command: Sequence[str]) -> subprocess.Popen:
        process = subprocess.Popen(
            command, env=self._environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=self._log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def _answers_at_socket(self) -> bool:
        with socket.socket(socket.AF_UNIX) as found:
            return Path(self._socket).exists() and not found.connect_ex(self._socket)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _left(self) -> list[int]:
        return list(processes_with(f"DEPLOYMENT={self.folder}"))


def processes_with(words: str) -> Iterator[int]:
    """Yield the processes that were started with these words in their environment."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if words.encode() + b"\0" in entry.read_bytes():
                yield int(entry.parent.name)


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
