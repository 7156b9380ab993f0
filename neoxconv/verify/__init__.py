"""Proofs of a conversion: that the bytes are those that were written, and that every tensor is the source's."""

from neoxconv.verify.bytes import verify_bytes
from neoxconv.verify.weights import verify_weights

__all__ = ["verify_bytes", "verify_weights"]
