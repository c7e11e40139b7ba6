"""Where a process gets the federation from: what the engine put into shared memory, or the task's own loader."""

from __future__ import annotations

from core.config import RunConfig
from core.data import Federation
from tasks import load

# Settings that change what the federation's data are; two runs that agree on them share one federation.
_DATA_KEYS = ("task", "dataset", "data-dir", "clients", "seed", "partition.", "server-examples")
_federations: dict[str, Federation] = {}


def _fingerprint(config: RunConfig) -> str:
    return repr(sorted(item for item in config.flat().items() if item[0].startswith(_DATA_KEYS)))


def provide(config: RunConfig, federation: Federation) -> None:
    """Make `federation` what `federation_of(config)` returns in this process (one federation is kept at a time)."""
    _federations.clear()
    _federations[_fingerprint(config)] = federation


def federation_of(config: RunConfig) -> Federation:
    """Return the configured federation, loading it at the first call."""
    if (key := _fingerprint(config)) not in _federations:
        provide(config, load(config).federation())
    return _federations[key]
