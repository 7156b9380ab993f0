"""Questions that both sides answer."""
