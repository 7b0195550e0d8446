"""What the commands and the calls from Python do alike: open a checkpoint, analyze it, train a run."""
