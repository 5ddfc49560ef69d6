"""High-dimensional Gaussian filtering, and what stands on it: the dense CRF and the energy loss."""
