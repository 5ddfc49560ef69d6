"""Readers of the formats of people and tools: each turns a folder, or a file of tags in it, into one table of tags."""
