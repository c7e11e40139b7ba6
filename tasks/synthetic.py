"""Synthetic(alpha, beta): clients of a known heterogeneity, no two of which label alike. Li et al., MLSys 2020, 5.1.

Client k draws its own model and inputs, as in Shamir, Srebro and Zhang (ICML 2014):

    u_k ~ N(0, alpha),  W_k[i, j] ~ N(u_k, 1),  b_k[j] ~ N(u_k, 1),  y = argmax softmax(W_k^T x + b_k)
    B_k ~ N(0, beta),   v_k[j] ~ N(B_k, 1),     x ~ N(v_k, Sigma),   Sigma diagonal, Sigma[j, j] = j^-1.2

and the iid variant has one W and b for all clients and x ~ N(0, Sigma). As in the authors' generator
(github.com/litian96/FedProx, from which their figures come), alpha and beta are standard deviations, which matters only
where they are neither 0 nor 1. Beware what alpha does: u_k adds u_k (sum(x) + 1) to all ten logits alike, so the
weights of two clients lie further apart and no label changes. What sets clients apart is a W_k of their own, at
alpha = beta = 0 too, and inputs whose means differ, by beta: a client sees two or three of the ten classes.

Two differences from the authors' data. A client has lognormal(4, 2) + 50 examples, a heavy tail of which the largest of
30 may hold half of all: here 5,000 at most, which one client in 80 would exceed. And they train on 90 % of each
client's examples and test on 10 %; here, as in every task, a fifth of every client's examples goes to the central test
set, and the rest is split into train (70 %), validation (15 %) and test (15 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from core.config import RunConfig
from core.errors import InputError
from core.seeding import rng
from tasks.base import Dataset, Table, choose
from tasks.many_classes import ManyClasses

FEATURES, CLASSES = 60, 10
LABELS = tuple(f"class {k}" for k in range(CLASSES))
LEAST, MOST = 50, 5000
DEVIATIONS = np.arange(1, FEATURES + 1) ** -0.6
"""(60,) float64: the roots of Sigma's diagonal."""


class Synthetic(ManyClasses):
    """Ten classes drawn from a linear model per client, as far apart as dataset=ALPHA,BETA says (FedProx's data)."""

    labels = LABELS

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        given = heterogeneity(config.dataset)
        # Any two numbers will do; those of the paper have names and a line in `fedra list`.
        table = DATASETS if given is None else {config.dataset: _dataset("", *given)} | DATASETS
        _, self.dataset = choose(table, config)
        # Multinomial logistic regression: x (B, 60) float32 -> logits (B, 10).
        self.models = {"logistic": lambda: nn.Linear(FEATURES, CLASSES)}


@dataclass(frozen=True)
class Client:
    """What one client draws its examples from."""

    size: int
    weights: np.ndarray
    """W_k, (60, 10) float64."""
    bias: np.ndarray
    """b_k, (10,) float64."""
    mean: np.ndarray
    """v_k, (60,) float64."""


def draw_client(seed: int, client: int, alpha: float, beta: float, iid: bool = False) -> Client:
    """Return the client's size, model and mean input, which do not depend on how many other clients there are.

    The draws behind them are the same for every alpha and beta, so that runs which differ in these differ in nothing
    else.
    """
    g = rng(seed, "synthetic", "client", client)
    size = LEAST + min(int(g.lognormal(4, 2)), MOST - LEAST)
    if iid:
        shared = rng(seed, "synthetic", "shared model")
        return Client(size, *_weights(shared, 0.0), mean=np.zeros(FEATURES))
    u, centre = alpha * g.normal(), beta * g.normal()
    return Client(size, *_weights(g, u), mean=centre + g.normal(size=FEATURES))


def draw_examples(seed: int, client: int, of: Client) -> tuple[np.ndarray, np.ndarray]:
    """Return the client's x (size, 60) float32 and y (size,) int64."""
    g = rng(seed, "synthetic", "examples", client)
    x = of.mean + DEVIATIONS * g.normal(size=(of.size, FEATURES))
    return x.astype(np.float32), np.argmax(x @ of.weights + of.bias, axis=1)


def _weights(g: np.random.Generator, u: float) -> tuple[np.ndarray, np.ndarray]:
    return u + g.normal(size=(FEATURES, CLASSES)), u + g.normal(size=CLASSES)


def heterogeneity(dataset: str) -> tuple[float, float] | None:
    """Return (alpha, beta) of a data set's name `ALPHA,BETA`, None for a name without comma; else `InputError`."""
    if "," not in dataset:
        return None
    try:
        alpha, beta = map(float, dataset.split(","))
    except ValueError:
        alpha, beta = math.nan, math.nan
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf):
        raise InputError(f"dataset={dataset} is not ALPHA,BETA; give two numbers from 0 as in dataset=0.5,0.5, or iid.")
    return alpha, beta


def generate(config: RunConfig, folder: Path | None, *, alpha: float, beta: float, iid: bool = False) -> Table:
    """Return the examples of `config.clients` clients, who are the natural groups."""
    clients = [draw_client(config.seed, k, alpha, beta, iid) for k in range(config.clients)]
    x, y = zip(*(draw_examples(config.seed, k, client) for k, client in enumerate(clients)), strict=True)
    return Table(
        np.concatenate(x), np.concatenate(y),
        natural=np.repeat(np.arange(len(clients)), [client.size for client in clients]),
        names=tuple(f"client {k}" for k in range(len(clients))),
    )  # fmt: skip


def _dataset(sentence: str, alpha: float, beta: float, iid: bool = False) -> Dataset:
    return Dataset(sentence, partial(generate, alpha=alpha, beta=beta, iid=iid), LABELS, FEATURES)


DATASETS = {
    "1,1": _dataset("synthetic(1, 1) of FedProx: inputs differ most; any other dataset=ALPHA,BETA too", 1, 1),
    "0.5,0.5": _dataset("synthetic(0.5, 0.5): inputs differ less", 0.5, 0.5),
    "0,0": _dataset("synthetic(0, 0): still a labelling and a mean input of each client's own", 0, 0),
    "iid": _dataset("one labelling and one distribution of inputs for all clients", 0, 0, iid=True),
}
