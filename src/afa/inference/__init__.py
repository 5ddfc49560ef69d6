"""Trained networks at work: the predictor, and the passes that write masks and pseudo labels to files."""
