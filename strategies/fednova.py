"""FedNova: clients that take unlike numbers of local steps no longer pull the optimum. Wang et al., NeurIPS 2020.

Client i's update x - x_i is divided by ||a_i||_1, what its steps add up to: d_i. It sends x - d_i, which attacks and
compression see as any model. The server moves by tau_eff mean(d_i) with tau_eff = mean(||a_i||_1), both weighted by
p_i = n_i / n. Of tau steps of SGD with local momentum rho, ||a_i||_1 = (tau - rho (1 - rho^tau) / (1 - rho)) /
(1 - rho), which is tau without momentum. Running statistics are averaged as in FedAvg.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord
from torch import nn

from core.config import RunConfig
from core.devices import full_work
from core.server_side import ServerSide
from core.training import LocalRound, LocalUpdate, local_sgd
from strategies.linear import Linear, Vectors
from strategies.requirements import needs_plain_sgd, per_client, trainable

TAU = "tau"


class FedNova(Linear):
    """FedAvg of normalised updates."""

    private_by_example = True

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse local optimisers whose a_i is not known."""
        needs_plain_sgd(config, "fednova's normalised updates", momentum=True)

    @staticmethod
    def numbers(config: RunConfig, examples: int) -> dict[str, float]:
        """Return the largest ||a_i||_1: that of a client that takes all its steps."""
        [steps], _ = full_work(config, np.array([examples]))
        return {TAU: float(length(torch.tensor([float(steps)]), config.momentum))}

    def set_up(self, server: ServerSide) -> None:
        """Learn which tensors take steps: running statistics do not."""
        self.names = trainable(server)
        config = server.config
        # Where all take as many steps nobody has to say how many: differential privacy lets no such number pass.
        alike = config.local_steps and config.faults.late != "partial"
        steps = torch.tensor([float(config.local_steps)])
        self.tau = float(length(steps, config.momentum)) if alike else None

    def combine(self, mean: Vectors, beside: dict[str, Vectors], metrics: MetricRecord, weight: float) -> Vectors:
        """Return x - tau_eff sum_i p_i d_i."""
        tau: Any = metrics[TAU] if self.tau is None else self.tau
        return mean | {name: self.current[name] + tau * (mean[name] - self.current[name]) for name in self.names}

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return x - d_i in place of x_i, and ||a_i||_1."""
        update = local_sgd(r)
        rho = float(getattr(r.optimizer, "keywords", {}).get("momentum", 0.0))
        tau = length(r.batches.steps.to(torch.float32), rho).to(update.loss.device)
        own = [name for name, p in r.model.named_parameters() if p.requires_grad]
        normalised = {
            name: r.global_params[name] + (update.params[name] - r.global_params[name])
            / per_client(tau, update.params[name]) for name in own
        }  # fmt: skip
        return LocalUpdate({**update.params, **normalised}, update.loss, {TAU: tau})


def length(steps: torch.Tensor, rho: float) -> torch.Tensor:
    """Return ||a_i||_1 of clients (C,) that take so many steps with local momentum rho."""
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
