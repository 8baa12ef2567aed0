"""Pictures of results, each with its numbers in a CSV."""

from fluxsae.figures.study_figures import Figures, draw_figures

__all__ = ["Figures", "draw_figures"]
