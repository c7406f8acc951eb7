"""What a run would take on a slice that need not be there, by compiling all of it."""
