"""Looking a data set over before training: tags and counts, every image, and what training would cost here."""
