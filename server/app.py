"""The ServerApp: `train(grid, config, folder)` drives any strategy over any Grid and keeps the run folder true."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from core.config import RunConfig
from core.errors import RunError, told
from server.build import check
from server.observe import ObservedGrid
from server.polled import PolledGrid
from server.recorder import RunFolder
from server.secure_grid import SecureGrid
from server.session import OnRound, Session

NODES_SECONDS = 60.0
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured federation under Flower's own runtime."""
    config = RunConfig.of(context.run_config)
    check(config)
    _wait_for_nodes(grid, config.clients)
    folder = RunFolder.create(config)
    print(f"Run folder: {folder.path}")
    train(grid, config, folder, on_round=lambda row: print(row, flush=True))


def _wait_for_nodes(grid: Grid, clients: int) -> None:
    """Return when as many nodes as clients are there; Flower's strategies would wait for ever."""
    deadline = time.monotonic() + NODES_SECONDS
    while (found := len(list(grid.get_node_ids()))) != clients:
        if time.monotonic() > deadline:
            raise RunError(
                f"{found} SuperNodes are connected and clients={clients}; "
                f"set options.num-supernodes={clients} in $FLWR_HOME/config.toml, or start that many SuperNodes."
            )
        time.sleep(0.5)


def train(
    grid: Grid,
    config: RunConfig,
    folder: RunFolder,
    *,
    baselines: Callable[[], dict[str, Any]] | None = None,
    on_round: OnRound | None = None,
) -> dict[str, Any]:
    """Train from the folder's last checkpoint (or from the start) and return what `summary.json` holds.

    Interrupting (KeyboardInterrupt) and failing both leave a valid folder; then the exception goes on.
    """
    if not hasattr(grid, "client_of"):
        grid = PolledGrid(grid)
    if config.secure_aggregation.profile != "none":
        grid = SecureGrid(grid, config)
    session = Session(ObservedGrid(grid), config, folder, on_round)
    status, error = "failed", ""
    try:
        session.run()
        if baselines is not None:
            session.baselines = baselines()
        status = "completed"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as exception:
        error = told(exception)
        raise
    finally:
        summary = session.finish(status, error)
    return summary
