"""Masks for other tools: conversions of a folder of index PNGs, one module for each family of formats."""
