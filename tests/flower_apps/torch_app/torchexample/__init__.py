"""Federated learning with PyTorch and Flower."""
