"""Any source as one model under unified names."""
