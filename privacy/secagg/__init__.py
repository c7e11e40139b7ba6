"""Secure aggregation: the server learns the sum of what clients send, and of each client that it took part."""
