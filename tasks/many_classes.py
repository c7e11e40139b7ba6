"""What tasks with more than two classes and no files have in common: inputs as they are, and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from core.config import RunConfig
from core.data import Federation
from tasks.base import Dataset, Standardise, choose_model, classification_loss
from tasks.partition import federate


class ManyClasses:
    """A task whose clients deal a data set by `partition.kind`; logits (B, classes). A subclass gives what it lacks."""

    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("loss", "accuracy", "macro_f1", "auroc", "ece")
    standardise: Standardise = "none"
    tuned_threshold = False
    config: RunConfig
    dataset: Dataset
    models: Mapping[str, Callable[[], nn.Module]]
    """What model= names, freshly initialised; the first is the default."""

    def federation(self) -> Federation:
        """Return all clients' inputs x (n, ...) float32 and labels y (n,) int64, and the central test set."""
        return federate(self.dataset.read(self.config, None), self.config)

    def model(self) -> nn.Module:
        """Return the configured model, freshly initialised."""
        return choose_model(self.models, self.config)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return each example's cross-entropy, (B,)."""
        return classification_loss(logits, y)
