"""Runs as jobs of this machine or of Slurm, through submitit."""

from pdvit.launch.job import RunJob
from pdvit.launch.jobs import Jobs, end_of_job

__all__ = ["Jobs", "RunJob", "end_of_job"]
