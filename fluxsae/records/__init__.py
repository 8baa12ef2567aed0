"""What travels with every artefact: specs, statistics of tokens, prompts, the features table."""

from fluxsae.records.columns import Column
from fluxsae.records.features import Feature, FeatureTable, Selection, read_features, read_table, update_features
from fluxsae.records.prompts import Prompt, prompts_hash, read_prompts, shown
from fluxsae.records.spec import (
    WHICH_IMAGES,
    CaptureSpec,
    GenerationSpec,
    Grid,
    Site,
    Stream,
    check_step,
    differences,
    parse_site,
    token_grid,
)
from fluxsae.records.statistics import Statistics, Sums, merge_sums, statistics_of

__all__ = [
    "WHICH_IMAGES",
    "CaptureSpec",
    "Column",
    "Feature",
    "FeatureTable",
    "GenerationSpec",
    "Grid",
    "Prompt",
    "Selection",
    "Site",
    "Statistics",
    "Stream",
    "Sums",
    "check_step",
    "differences",
    "merge_sums",
    "parse_site",
    "prompts_hash",
    "read_features",
    "read_prompts",
    "read_table",
    "shown",
    "statistics_of",
    "token_grid",
    "update_features",
]
