"""The files of runs: directory, environment, trackers."""
