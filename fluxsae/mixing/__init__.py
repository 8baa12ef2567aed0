"""Feeds training with tokens that are mixed across images: in host memory, or in that of the device."""

from fluxsae.mixing.order import WHOLE, Chunk, Part
from fluxsae.mixing.tokens import Feed, MixedTokens

__all__ = ["WHOLE", "Chunk", "Feed", "MixedTokens", "Part"]
