"""Federated analytics with queries and without a strategy."""
