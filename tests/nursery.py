"""Starts Flower's processes by forking one that has imported everything: a message then costs tenths of a second.

Flower starts a process for every message, which imports torch for seconds. Here a process is as much one of its own,
but it is born with the libraries. Nodes also look for messages more often, and are missed sooner when they are gone.

    python nursery.py SOCKET              serve
    python nursery.py SOCKET COMMAND ...  start a command there (what the scripts on Flower's PATH do); prints its pid
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import types

HEARTBEAT_SECONDS, HEARTBEAT_TIMEOUT = 6, 1
POLL_SECONDS = 0.2
COMMANDS = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp")


def serve(path: str) -> None:
    """Answer requests until killed: each is a process to be."""
    import flwr.common.constant

    for name in ("HEARTBEAT_DEFAULT_INTERVAL", "HEARTBEAT_MIN_INTERVAL"):
        setattr(flwr.common.constant, name, HEARTBEAT_SECONDS)
    flwr.common.constant.HEARTBEAT_CALL_TIMEOUT = HEARTBEAT_TIMEOUT
    # What the apps import, some of it late.
    import flwr_datasets.partitioner  # noqa: F401
    import sklearn.datasets  # noqa: F401
    from flwr.supercore.cli import flower_superexec
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    from client.app import app  # noqa: F401
    from server.app import main  # noqa: F401

    entries = (flower_superlink, flower_supernode, flower_superexec, flwr_serverapp, flwr_clientapp)
    named = dict(zip(COMMANDS, entries, strict=True))
    quick = {**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, POLL_SECONDS))}
    start_client_internal.time = types.SimpleNamespace(**quick)
    # Nobody waits for what is born here.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        while True:
            asking, _ = listening.accept()
            with asking:
                line = asking.makefile().readline()
                if not line:
                    # Somebody wanted to know whether there is a nursery.
                    continue
                command, environment, folder = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    listening.close()
                    asking.close()
                    _become(named[os.path.basename(command[0])], command, environment, folder)
                asking.sendall(f"{pid}\n".encode())


def _become(entry: types.FunctionType, command: list[str], environment: dict[str, str], folder: str) -> None:
    """Be the process of a command, and end with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    code = 1
    try:
        entry()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(path: str, command: list[str], environment: dict[str, str]) -> int:
    """Return the pid of a command that was started there."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(path)
        asking.sendall(json.dumps([command, environment, os.getcwd()]).encode() + b"\n")
        return int(asking.makefile().readline())


if __name__ == "__main__":
    if sys.argv[2:]:
        print(start(sys.argv[1], sys.argv[2:], dict(os.environ)))
    else:
        serve(sys.argv[1])
