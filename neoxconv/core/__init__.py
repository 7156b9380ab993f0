"""The shared nouns: a tensor, a model, an encoding, a layout."""
