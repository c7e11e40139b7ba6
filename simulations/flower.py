"""fedra flower APP_DIR: somebody else's Flower app, unmodified, on this engine.

The app's ServerApp runs in this process over a `RayGrid`, its ClientApp in the workers: node configuration, run
configuration, mods, lifespan, client state and query messages are as under `flwr run`.
"""

from __future__ import annotations

import time
from functools import partial

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from core.seeding import seed_globals
from simulations.flower_app import FlowerApp, load
from simulations.grid import RayGrid
from simulations.pool import LocalPool, Pool, RayPool
from simulations.worker import RUN_ID, Worker

# Jobs a worker gets in a round, about: enough to even out slow clients, few enough that shipping them costs nothing.
JOBS_PER_WORKER = 4
MOST_TOGETHER = 64


def run_app(app: FlowerApp, nodes: int, workers: int, address: str = "", seed: int | None = 0) -> float:
    """Run the app's ServerApp over `nodes` clients and return the seconds it took, start-up apart.

    With a seed, Python's, NumPy's and torch's global generators are seeded before the ServerApp and before every
    client's answer, by (seed, client, message): the numbers do not depend on `workers`. None leaves them alone.
    """
    server_app: ServerApp = load(app.folder, app.serverapp, ServerApp)
    load(app.folder, app.clientapp, ClientApp)
    together = max(1, min(MOST_TOGETHER, nodes // (JOBS_PER_WORKER * max(workers, 1))))
    arguments = (app.clientapp, app.run_config, nodes, None, str(app.folder), seed)
    pool: Pool = RayPool(workers, address, arguments) if workers else LocalPool(partial(Worker, *arguments))
    try:
        grid = RayGrid(pool, nodes, together)
        context = Context(RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=app.run_config)
        if seed is not None:
            seed_globals(seed, "server")
        began = time.perf_counter()
        server_app(grid, context)
        return time.perf_counter() - began
    finally:
        pool.close()
