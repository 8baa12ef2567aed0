"""From tokens to S and the features table: pooled codes, and analyses of them."""

from fluxsae.scoring.analyses.alive import AliveStatistics
from fluxsae.scoring.analyses.attributes import Attributes
from fluxsae.scoring.analyses.coherence import Coherence
from fluxsae.scoring.analyses.overlays import Overlays, overlay, read_overlays
from fluxsae.scoring.analyses.scores_writer import ScoresWriter
from fluxsae.scoring.analyses.top_images import TopImages
from fluxsae.scoring.analysis import FeatureAnalysis
from fluxsae.scoring.by_feature import FeatureScores
from fluxsae.scoring.clip import Clip, embed, load_clip
from fluxsae.scoring.maps import FeatureMapping
from fluxsae.scoring.module import ImageScores, SAEScoring
from fluxsae.scoring.scores import Scores

__all__ = [
    "AliveStatistics",
    "Attributes",
    "Clip",
    "Coherence",
    "FeatureAnalysis",
    "FeatureMapping",
    "FeatureScores",
    "ImageScores",
    "Overlays",
    "SAEScoring",
    "Scores",
    "ScoresWriter",
    "TopImages",
    "embed",
    "load_clip",
    "overlay",
    "read_overlays",
]
