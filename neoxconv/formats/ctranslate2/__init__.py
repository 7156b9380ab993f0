"""CTranslate2's folders: their model.bin laid out and read, and the small files beside it."""
