"""Readers of what people and tools write: each turns a folder, or a file of tags in it, into one table of tags."""
