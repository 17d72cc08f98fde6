"""The terms of an objective: pure functions of log-probabilities."""
