"""Losses of a training step (paper Eq. 5, 11, 12).

Means over pixels or pairs are over the batch of all processes: `total` adds a count up over them. A process then
returns its share, and the shares add up to the loss of the whole batch.
"""
