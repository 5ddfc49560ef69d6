"""Checks a data set before training: tags and counts, every image, and what training would cost here."""
