"""Training: the schedule and the step are pure, the loop does all input and output."""
