"""Proofs of a conversion: bytes as they were written, every tensor the source's, predictions the model's.

Each level is imported by itself: `verify.logits` needs torch, and what runs in `verify.engines` needs numpy alone.
"""
