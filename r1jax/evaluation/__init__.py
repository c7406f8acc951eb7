"""What a model can do: figures with intervals, and a run's before and after."""
