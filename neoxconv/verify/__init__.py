"""Proofs of a conversion: bytes as they were written, every tensor the source's, predictions the model's."""

from neoxconv.verify.bytes import verify_bytes
from neoxconv.verify.logits import compare_predictions
from neoxconv.verify.weights import verify_weights

__all__ = ["compare_predictions", "verify_bytes", "verify_weights"]
