"""Flower's client entry point: `client.app:app`, the same in the local engine, under `flwr run` and on a SuperNode."""
