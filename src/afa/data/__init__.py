"""Files to batches: images, tags and masks on disk become what training and evaluation take."""
