"""Model, data and training, as in Flower's PyTorch quickstart; the data are generated for each partition."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A network of 2,049 parameters."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(30, 64)
        self.fc2 = nn.Linear(64, 1)

    def forward(self, x):
        """Return logits (B,)."""
        return self.fc2(F.relu(self.fc1(x))).squeeze(1)


def load_data(partition_id):
    """Return a loader of the partition's 60 examples."""
    generator = torch.Generator().manual_seed(partition_id)
    x = torch.randn(60, 30, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).float()), batch_size=20, shuffle=True)


def train(net, loader, lr):
    """Train for an epoch and return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    running = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(net(x), y)
        loss.backward()
        optimizer.step()
        running += loss.item()
    return running / len(loader)
