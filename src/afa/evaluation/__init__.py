"""Scores of masks and pseudo labels: the confusion matrix, the named protocols, and the pass over a list."""
