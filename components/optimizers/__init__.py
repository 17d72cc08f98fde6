"""SOUL, and the choice of first-order optimizers."""
