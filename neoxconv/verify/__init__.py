"""Proofs of a conversion: bytes as they were written, every tensor the source's, predictions the model's.

The third level (`verify.logits`) needs torch and is imported by itself.
"""

from neoxconv.verify.bytes import verify_bytes
from neoxconv.verify.weights import verify_weights

__all__ = ["verify_bytes", "verify_weights"]
