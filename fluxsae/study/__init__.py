"""A whole study: its stages in order, and what they found."""

from fluxsae.study.config_files import names_root, read_config, read_mapping, root_beside, substitute
from fluxsae.study.plan import Stage, Study, read_study
from fluxsae.study.run import RunStage, run_study
from fluxsae.study.start import Start, start_study

__all__ = [
    "RunStage",
    "Stage",
    "Start",
    "Study",
    "names_root",
    "read_config",
    "read_mapping",
    "read_study",
    "root_beside",
    "run_study",
    "start_study",
    "substitute",
]
