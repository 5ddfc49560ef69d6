"""Generated images and the demonstration that trains on them."""
