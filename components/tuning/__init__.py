"""Sweeps: spaces, what to try next, what came of it."""
