"""gpt-neox's folders: their files, numbers of layers, YAML, and optimizer files."""
