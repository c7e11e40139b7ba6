"""Clients that remember: a momentum kept in the context."""
