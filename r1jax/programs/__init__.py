"""The compiled programs of a stage, with the shapes of their arguments."""
