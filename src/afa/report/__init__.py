"""From a run folder to one page and one JSON file that say what the run did."""
