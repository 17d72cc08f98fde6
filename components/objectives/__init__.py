"""The terms of an objective, pure functions of what the model says, and their weights."""
