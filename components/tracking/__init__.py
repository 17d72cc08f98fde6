"""MLflow runs and registry, gates, and following a run's metrics file."""
