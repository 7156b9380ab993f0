"""Every option of every command with its help text: a file a command. A command's own text is in `main`."""
