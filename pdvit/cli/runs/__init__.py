"""What the commands that train have in common: how a run is prepared, begun, taken up again, and what is said of it."""
