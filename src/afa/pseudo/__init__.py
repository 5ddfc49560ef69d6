"""Pseudo labels without gradient: CAM, refinement, affinity labels, random walk, and the two label merges."""
