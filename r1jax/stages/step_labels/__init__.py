"""Labels of steps, by rollouts."""
