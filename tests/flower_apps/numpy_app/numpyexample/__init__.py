"""Federated learning with NumPy and Flower."""
