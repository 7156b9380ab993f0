"""The programs that will run a target, where they are installed: each in a process of its own."""
