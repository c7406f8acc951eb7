"""What a run measures, and the watchdog of a run that makes no progress."""
