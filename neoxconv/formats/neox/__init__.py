"""gpt-neox's folders: their files (`folder`), layers' `numbers`, `yaml_settings`, and optimizer files (`zero`)."""
