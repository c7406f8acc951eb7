"""One HTML page that says what a run did, complete in itself; and one for several seeds."""
