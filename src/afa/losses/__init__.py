"""Losses of a training step (paper Eq. 5, 11, 12; method.md sections 4 and 6).

Means over pixels or pairs are over the batch of all processes: `total` adds a count up over them, and what a process
returns is then its share, so that the shares add up to the loss of the whole batch.
"""
