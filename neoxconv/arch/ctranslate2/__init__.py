"""CTranslate2's words: the names of tensors, and the numbers that say the function."""
