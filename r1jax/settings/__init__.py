"""Settings of a run, by section. Nothing here imports JAX."""
