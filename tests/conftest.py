"""What every test shares: the smoke federation in one line, run folders in a temporary place, and no process left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Measured cohort sizes and downloads of tests are nobody's.
os.environ["FEDRA_CACHE"] = tempfile.mkdtemp(prefix="fedra-tests-")
SESSION = os.environ.setdefault("FEDRA_TEST_SESSION", uuid.uuid4().hex)
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def smoke(tmp_path: Path) -> Callable[..., Any]:
    """Return a function from changed settings to the smoke preset, writing into the test's own folder."""
    from simulations.run import preset

    return lambda **changes: preset("smoke", **{"out": str(tmp_path / "runs"), **changes})


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function from changed settings to a finished smoke run; equal settings run once."""
    from simulations.run import preset, simulate

    done: dict[str, Any] = {}

    def run(**changes: Any) -> Any:
        name = json.dumps(changes)
        if name not in done:
            done[name] = simulate(preset("smoke", out=str(tmp_path_factory.mktemp("runs")), **changes))
        return done[name]

    return run


@pytest.fixture(scope="session")
def heart_files() -> str:
    """Return the folder with the four hospitals' files, or skip."""
    folder = SHARED / "medical" / "heart"
    if not folder.is_dir():
        pytest.skip(f"the heart disease files are not at {folder}")
    return str(folder)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Provide one small Ray for all tests that need actors: starting one takes seconds."""
    import ray

    from simulations.pool import start_ray

    # Ray's workers inherit this: they import the tests' own client apps.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    start_ray(ray, workers=4, address="")
    yield
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["FEDRA_CACHE"], ignore_errors=True)
    left = list(_descendants())
    deadline = time.monotonic() + 20
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = list(_descendants())
    assert not left, f"tests left processes running: {left}"


def _descendants() -> Iterator[str]:
    """Yield the command of every process but this one that inherited this test session's mark."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.name != str(os.getpid()) and SESSION.encode() in (entry / "environ").read_bytes():
                yield (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
