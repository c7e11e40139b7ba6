"""Gradients of single examples, clipped and summed for many clients at once: what DP-SGD adds noise to."""
