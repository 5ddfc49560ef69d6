"""The network: a transformers encoder with its raw attention, a decoder and the affinity head."""
