"""Rollouts on the host: sampling batches of prompts, and their rewards."""
