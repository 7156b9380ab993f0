"""gpt-neox's own code on a CPU, as an oracle: it writes checkpoints that we read, and reads those that we write."""
