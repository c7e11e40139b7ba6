"""What a server does with examples of its own: FLTrust's reference update, FedDF's distillation.

- FLTrust (Cao et al., NDSS 2021, algorithm 2): the server trains the global model on its examples as a client does:
  g_0. Client i has the trust score max(0, cos(g_i, g_0)); its update is scaled to the length of g_0, and the mean is
  weighted by the scores. Where nobody is trusted the global model stays. Running statistics are means weighted by the
  scores, which they have no part in: a variance that is stretched may end below 0.
- FedDF (Lin et al., NeurIPS 2020, algorithm 1): from the mean of the models, the student is trained on the server's
  examples without their labels towards the mean of the clients' logits. One round of it is one-shot federated ensemble
  distillation. Running statistics are those of the student's own passes, from the mean of the clients'.

`server-examples` are kept from all clients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy
from torch.func import functional_call
from torch.nn import functional as F

from core import records
from core.batches import plan
from core.optimizers import learning_rate, make_optimizer
from core.records import to_arrays, to_tensors, travelling
from core.seeding import derive, permutations
from core.server_side import ServerSide
from core.training import assemble, local_sgd
from strategies.requirements import trainable
from strategies.robust import Rule, arrays_of


class FLTrust(Rule):
    """Mean of updates by their agreement with the server's own."""

    settings: ClassVar[dict[str, Any]] = {"server-examples": 100}

    def set_up(self, server: ServerSide) -> None:
        """Take the server's examples, and learn which tensors take steps."""
        self.server = server
        self.names = trainable(server)
        self.round = 0

    def rule(self, server_round: int, updates: np.ndarray, replies: list[Message]) -> Any:
        """Note the round, which the server's own training is seeded by."""
        self.round = server_round
        return super().rule(server_round, updates, replies)

    def combine(self, updates: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Return the trusted mean (d,)."""
        moving = np.concatenate([np.full(value.size, name in self.names) for name, value in self.current.items()])
        own = self._own_update() * moving
        length = float(np.linalg.norm(own))
        lengths = np.linalg.norm(updates * moving, axis=1)
        cosines = updates @ own / np.maximum(lengths * length, 1e-12)
        trust = np.maximum(cosines, 0)
        if trust.sum() == 0:
            self.shares = [0.0] * len(updates)
            return np.zeros_like(own)
        shares = (trust / trust.sum()).astype(np.float32)
        self.shares = shares.tolist()
        stretched = (shares * length / np.maximum(lengths, 1e-12)).astype(np.float32)
        mean: np.ndarray = np.where(moving, stretched @ updates, shares @ updates)
        return mean

    def _own_update(self) -> np.ndarray:
        """Return g_0 (d,) float32: as many epochs as a client makes, on the server's examples."""
        config, data = self.server.config, self.server.data
        assert data is not None
        size = len(data)
        steps = max(1, config.local_steps * config.batch_size // size) if config.local_steps else config.local_epochs
        batches = plan(
            [size], config.batch_size,
            lambda at, n: permutations(config.seed, "server", self.round, clients=at, size=n, times=steps),
        )  # fmt: skip
        weights = {name: torch.from_numpy(np.array(value)) for name, value in self.current.items()}
        r = assemble(
            config.with_(engine__device="cpu"), self.server.fresh_model(config.seed), self.server.loss, data.x, data.y,
            batches, make_optimizer(config, learning_rate(config, self.round)),
            global_params=weights, sizes=(size,), seed=derive(config.seed, "server", self.round), vectorised=False,
        )  # fmt: skip
        trained = local_sgd(r).params
        return np.concatenate([(trained[name][0] - weights[name]).numpy().ravel() for name in self.current])


class FedDF(strategy.FedAvg):
    """FedAvg, then distillation of the clients' ensemble on the server's examples, `distillation_steps` of Adam."""

    settings: ClassVar[dict[str, Any]] = {"server-examples": 100}

    def __init__(
        self, *, distillation_steps: int = 200, distillation_learning_rate: float = 0.001,
        distillation_batch: int = 64, **fedavg: Any,
    ) -> None:  # fmt: skip
        super().__init__(**fedavg)
        self.steps, self.rate, self.batch = int(distillation_steps), distillation_learning_rate, int(distillation_batch)

    def set_up(self, server: ServerSide) -> None:
        """Take the server's examples; their labels are not used."""
        self.server = server

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the distilled model and the aggregated metrics."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None or self.server.data is None:
            return arrays, metrics
        model = self.server.fresh_model(self.server.config.seed)
        like = travelling(model)
        x = torch.from_numpy(self.server.data.x)
        members = [to_tensors(arrays_of(reply.content)) for reply in replies if reply.has_content()]
        with torch.no_grad():
            # AVGLOGITS: the mean of logits, turned into probabilities.
            logits = [functional_call(model.eval(), member, (x,)) for member in members]
            teacher = torch.stack(logits).mean(0)
        start = to_tensors(records.in_dtypes_of(arrays, like))
        student = records.load_into(model, start).train()
        order = np.random.default_rng(derive(self.server.config.seed, "distillation", server_round))
        optimizer = torch.optim.Adam(student.parameters(), self.rate)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.server.config.seed, "distillation-dropout", server_round))
            for _ in range(self.steps):
                rows = torch.from_numpy(order.permutation(len(x))[: self.batch])
                optimizer.zero_grad()
                _distance(student(x[rows]), teacher[rows]).backward()
                optimizer.step()
        return to_arrays(travelling(student)), metrics


def _distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence of the student's prediction from the teacher's."""
    if teacher.ndim == 1:
        return F.binary_cross_entropy_with_logits(student, torch.sigmoid(teacher))
    return F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), log_target=True, reduction="batchmean")
