"""The explorer: a local page that shows why a mask is as it is."""
