"""Attacks on a run's privacy, and the numbers that they yield: mathematics and torch, nothing that starts a run."""
