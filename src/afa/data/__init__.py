"""From files to batches: images, tags and masks on disk become the input of training and evaluation."""
