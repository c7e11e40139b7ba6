"""Flower's server entry point: `server.app:app`; the same `train(grid, config, ...)` serves the local engine."""
