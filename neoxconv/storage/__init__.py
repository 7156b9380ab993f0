"""Bytes, here or far away."""
