"""A whole study: its stages in order, and what they found."""

from fluxsae.study.plan import Stage, Study, read_study
from fluxsae.study.run import run_study

__all__ = ["Stage", "Study", "read_study", "run_study"]
