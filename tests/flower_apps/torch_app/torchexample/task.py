"""Model, data, training and test of the PyTorch app."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

dataset = None  # Cache the images


class Net(nn.Module):
    """A small CNN for 8x8 digits, in double precision so that printed digits do not depend on summing order."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8 * 4 * 4, 10)
        self.double()

    def forward(self, x):
        x = self.pool(F.relu(self.conv(x)))
        return self.fc(torch.flatten(x, 1))


def load_digits_once():
    """Return all images and labels; every fifth one is the server's."""
    global dataset
    if dataset is None:
        images, labels = load_digits(return_X_y=True)
        dataset = torch.tensor(images / 16.0).reshape(-1, 1, 8, 8), torch.tensor(labels)
    return dataset


def load_data(partition_id: int, num_partitions: int, batch_size: int):
    """Load one partition of the training images, split 80/20 into training and validation."""
    images, labels = load_digits_once()
    mine = [i for i in range(len(labels)) if i % 5 != 0][partition_id::num_partitions]
    cut = int(0.8 * len(mine))
    train, val = (TensorDataset(images[part], labels[part]) for part in (mine[:cut], mine[cut:]))
    generator = torch.Generator().manual_seed(partition_id)
    return DataLoader(train, batch_size, shuffle=True, generator=generator), DataLoader(val, batch_size)


def load_central_data(batch_size: int):
    """Load the server's images."""
    images, labels = load_digits_once()
    return DataLoader(TensorDataset(images[::5], labels[::5]), batch_size)


def train(net, trainloader, epochs, lr, device):
    """Train the model and return the mean loss over all batches."""
    net.to(device)
    net.train()
    criterion = nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    running_loss = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(trainloader))


def test(net, testloader, device):
    """Return loss and accuracy of the model."""
    net.to(device)
    net.eval()
    criterion = nn.CrossEntropyLoss(reduction="sum")
    correct, loss = 0, 0.0
    with torch.no_grad():
        for images, labels in testloader:
            outputs = net(images.to(device))
            loss += criterion(outputs, labels.to(device)).item()
            correct += (outputs.argmax(1).cpu() == labels).sum().item()
    return loss / len(testloader.dataset), correct / len(testloader.dataset)
