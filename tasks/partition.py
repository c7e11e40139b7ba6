"""Deal a table to clients by `partition.kind`, with flwr-datasets' partitioners wherever it has one."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence

import numpy as np

from core.config import RunConfig
from core.data import Federation, Ragged, Split
from core.errors import InputError
from core.seeding import derive, rng
from tasks.base import Table

KINDS = {
    "natural": "one client per hospital, bank or author, as the data come",
    "iid": "every client a uniform sample",
    "dirichlet": "label skew: each label's shares over clients drawn from Dirichlet(partition.alpha)",
    "shards": "label skew: partition.shards shards of label-sorted examples per client (McMahan et al. 2017)",
    "quantity": "quantity skew: client sizes drawn from Dirichlet(partition.alpha), labels iid",
    "feature": "feature shift: clients sorted along the data's main direction by partition.strictness",
    "mixed": "label and quantity skew together: sizes and label shares from Dirichlet(partition.alpha)",
}
CENTRAL_SHARE = 0.2
# flwr-datasets draws ten times and gives up; with small alpha and many clients the next ten often succeed.
ATTEMPTS = 10
SPLIT_SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}


def federate(table: Table, config: RunConfig) -> Federation:
    """Return the federation: a central test set first, then partitions, then train/validation/test inside each.

    Raises `InputError` when the table cannot give every client `partition.min-examples` examples.
    """
    central = table.central if table.central is not None else _central_rows(table, config.seed)
    rest = np.flatnonzero(~central)
    own = np.sort(rng(config.seed, "server").permutation(rest)[: config.server_examples])
    rest = np.setdiff1d(rest, own)
    needed = config.clients * config.partition.min_examples
    if len(rest) < needed:
        raise InputError(
            f"{len(rest)} examples cannot give {config.clients} clients partition.min-examples="
            f"{config.partition.min_examples} each; lower clients or partition.min-examples."
        )
    if len(np.unique(table.y[rest])) < 2:
        raise InputError("all examples have the same label; there is nothing to learn: check the label column.")
    parts = [rest[rows] for rows in deal(table, rest, config)]
    least = min(map(len, parts))
    if least < config.partition.min_examples:
        raise InputError(
            f"a client would get {least} examples, fewer than partition.min-examples={config.partition.min_examples}; "
            f"lower it, lower clients{_or_alpha(config)}."
        )
    splits = [split_rows(table.y[rows], rng(config.seed, "splits", i)) for i, rows in enumerate(parts)]

    def ragged(name: str) -> Ragged:
        return Ragged.stack([_take(table, rows[split[name]]) for rows, split in zip(parts, splits, strict=True)])

    natural = config.partition.kind == "natural" and len(table.names) == config.clients
    return Federation(
        ragged("train"), ragged("validation"), ragged("test"), _take(table, np.flatnonzero(central)),
        table.names if natural else (), _take(table, own) if len(own) else None,
    )  # fmt: skip


def deal(table: Table, rest: np.ndarray, config: RunConfig) -> list[np.ndarray]:
    """Return for each client the positions in `rest` that are its own; positions inside a client are sorted."""
    kind = config.partition.kind
    columns: dict[str, list[float]] = {"label": table.y[rest].tolist(), "row": list(range(len(rest)))}
    if kind == "natural":
        columns["natural"] = _groups(table, rest, config.clients).tolist()
    if kind == "feature":
        feature = table.feature if table.feature is not None else _main_direction(table.x)
        columns["feature"] = feature[rest].tolist()
    return _with_flower(columns, config)


def _or_alpha(config: RunConfig) -> str:
    return ", or raise partition.alpha" if config.partition.kind in ("dirichlet", "quantity", "mixed") else ""


def split_rows(y: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return sorted positions of train, validation and test inside a partition with labels y, each label in proportion.

    Every split of a partition of three examples or more is non-empty.
    """
    order = generator.permutation(len(y))
    # Sorting a shuffled order by label, then dealing by quantile, keeps each label's share in every split.
    order = order[np.argsort(y[order], kind="stable")]
    edges = np.cumsum([SPLIT_SHARES["test"], SPLIT_SHARES["validation"]])
    offset = generator.random()
    # Low-discrepancy positions: consecutive rows of one label spread evenly over [0, 1).
    position = (np.arange(len(y)) * 0.6180339887498949 + offset) % 1
    which = np.digitize(position, edges)
    for needed in (0, 1, 2):
        if len(y) >= 3 and not (which == needed).any():
            which[np.flatnonzero(which == np.bincount(which, minlength=3).argmax())[0]] = needed
    return {name: np.sort(order[which == code]) for code, name in enumerate(("test", "validation", "train"))}


def _take(table: Table, rows: np.ndarray) -> Split:
    return Split(table.x[rows], table.y[rows])


def _central_rows(table: Table, seed: int) -> np.ndarray:
    """Return a mask (n,) of the central test set: a fifth of the rows, the same share of each label.

    And of each natural group, where there are enough rows for that.
    """
    # Only who reads the data needs it: scikit-learn takes a second to import, and workers read none.
    from sklearn.model_selection import train_test_split

    by_group = table.y if table.natural is None else table.natural * (table.y.max() + 1) + table.y
    stratify = next((strata for strata in (_mergeable(by_group), table.y) if _can_stratify(strata)), None)
    mask = np.zeros(len(table.y), dtype=bool)
    _, chosen = train_test_split(
        np.arange(len(table.y)),
        test_size=CENTRAL_SHARE,
        random_state=derive(seed, "central") % 2**32,
        stratify=stratify,
    )
    mask[chosen] = True
    return mask


def _mergeable(strata: np.ndarray) -> np.ndarray:
    """Return the strata with those of one row, which cannot be split, joined to the largest."""
    counts = np.bincount(strata)
    return np.where(counts[strata] < 2, counts.argmax(), strata)


def _can_stratify(strata: np.ndarray) -> bool:
    """Return whether scikit-learn can: it wants two rows of each stratum and as many test rows as strata."""
    found, examples = np.unique(strata, return_counts=True)
    return bool(examples.min() >= 2 and len(found) <= CENTRAL_SHARE * len(strata))


def _groups(table: Table, rest: np.ndarray, clients: int) -> np.ndarray:
    """Return the natural group of each row in `rest`; `InputError` when there are none or too few."""
    if table.natural is None:
        raise InputError(
            "partition.kind=natural needs data with natural groups and this data set has none; "
            f"choose {', '.join(kind for kind in KINDS if kind != 'natural')}."
        )
    groups = table.natural[rest]
    if clients > (found := len(np.unique(groups))):
        raise InputError(f"clients={clients} is more than the {found} natural groups; set clients={found} or fewer.")
    return groups


def _main_direction(x: np.ndarray) -> np.ndarray:
    """Return the first principal component of x (n, d), (n,); for tokens the length of the text."""
    if not np.issubdtype(x.dtype, np.floating):
        return (x != 0).sum(axis=1).astype(np.float64)
    flat = x.reshape(len(x), -1).astype(np.float64)
    flat = (flat - flat.mean(axis=0)) / (flat.std(axis=0) + 1e-9)
    values, vectors = np.linalg.eigh(flat.T @ flat)
    direction = vectors[:, values.argmax()]
    # The sign of an eigenvector is the library's whim: fix it, so that equal runs are equal.
    return flat @ (direction * np.sign(direction[np.abs(direction).argmax()]))


def _with_flower(columns: dict[str, list[float]], config: RunConfig) -> list[np.ndarray]:
    # datasets and flwr-datasets take seconds to import: only where a partitioner of theirs is used.
    from datasets import Dataset, disable_progress_bars
    from flwr_datasets import partitioner as fds

    disable_progress_bars()
    logging.getLogger("flwr_datasets").setLevel(logging.ERROR)
    p, n, clients = config.partition, len(columns["label"]), config.clients

    def build(seed: int) -> fds.partitioner.Partitioner:
        if p.kind == "natural":
            return fds.NaturalIdPartitioner("natural")
        if p.kind == "iid":
            return fds.IidPartitioner(clients)
        if p.kind == "dirichlet":
            return fds.DirichletPartitioner(clients, "label", p.alpha, min_partition_size=p.min_examples, seed=seed)
        if p.kind == "shards":
            return fds.ShardPartitioner(clients, "label", num_shards_per_partition=p.shards, seed=seed)
        if p.kind == "quantity":
            return fds.SizePartitioner(_sizes(n, config))
        if p.kind == "feature":
            return fds.ContinuousPartitioner(clients, "feature", p.strictness, seed=seed)
        return fds.InnerDirichletPartitioner(_sizes(n, config), "label", p.alpha, seed=seed)

    order = rng(config.seed, "shuffle").permutation(n)
    dataset = Dataset.from_dict({name: [values[i] for i in order] for name, values in columns.items()})
    reason = ""
    for attempt in range(ATTEMPTS):
        partitioner = build(derive(config.seed, "partition", attempt) % 2**32)
        partitioner.dataset = dataset
        try:
            # It draws a progress bar for milliseconds of work.
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                loaded = [partitioner.load_partition(i)["row"] for i in range(partitioner.num_partitions)]
            parts = [np.asarray(rows, dtype=np.int64) for rows in loaded]
            # Fewer clients than natural groups: groups are dealt round-robin, so that no example is lost.
            return _with_left_over([np.concatenate(parts[client::clients]) for client in range(clients)], n)
        except (ValueError, ZeroDivisionError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
    raise InputError(
        f"partition.kind={p.kind} cannot deal {n} examples to {clients} clients ({reason}); "
        f"lower clients or partition.min-examples{_or_alpha(config)}."
    )


def _with_left_over(parts: list[np.ndarray], n: int) -> list[np.ndarray]:
    """Return the sorted parts with every row in one of them: shards of equal size leave a few rows over."""
    rest = np.setdiff1d(np.arange(n), np.concatenate(parts))
    return [np.sort(np.concatenate([part, rest[i :: len(parts)]])) for i, part in enumerate(parts)]


def _sizes(n: int, config: RunConfig) -> Sequence[int]:
    """Return client sizes that sum to n: the minimum each, the rest in Dirichlet(alpha) proportions."""
    least, clients = config.partition.min_examples, config.clients
    shares = rng(config.seed, "sizes").dirichlet([config.partition.alpha] * clients)
    edges = np.round(np.cumsum(shares) * (n - least * clients)).astype(int)
    edges[-1] = n - least * clients
    return (np.diff(edges, prepend=0) + least).tolist()
