"""Losses of a training step (paper Eq. 5, 11, 12).

With `total`, which adds a count up over all processes, means over pixels or pairs are over the batch of all of them: a
process then returns its share, and the shares add up to the loss of the whole batch. Without it they are over the
process's own images.
"""
