"""Reward model training."""
