"""Byte formats: one file each, reader and layout together. They know names and bytes, not models."""
