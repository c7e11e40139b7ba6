"""A task that needs no file: how long the patients of four wards stay. Generated."""

import numpy as np
from torch import nn

from core.seeding import rng
from tasks.base import Table, classification_loss
from tasks.partition import federate


class Stay:
    """Longer than a week or not, from six measurements; four wards."""

    labels = ("short", "long")
    metrics = ("loss", "accuracy", "auroc")
    standardise = "federated"
    tuned_threshold = False

    def __init__(self, config):
        self.config = config

    def federation(self):
        random = rng(self.config.seed, "hospital stay")
        ward = random.integers(4, size=800)
        # The sickest patients lie in the last ward.
        x = random.normal(size=(800, 6)) + 0.3 * ward[:, None]
        y = x @ [2.0, -1.0, 1.0, 0.5, 0.0, 0.0] + random.normal(size=800) > 1
        wards = ("surgery", "cardiology", "oncology", "intensive care")
        return federate(Table(x.astype(np.float32), y.astype(np.int64), natural=ward, names=wards), self.config)

    def model(self):
        return nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))

    def loss(self, logits, y):
        return classification_loss(logits, y)
