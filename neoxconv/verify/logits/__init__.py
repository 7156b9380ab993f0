"""The third level: what the model predicts."""
