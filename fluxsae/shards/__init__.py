"""The disk format: tokens and images as WebDataset tars that appear only when whole."""

from fluxsae.shards.format import SampleRecord, ShardMetadata
from fluxsae.shards.read import ShardSet
from fluxsae.shards.write import ShardWriter

__all__ = ["SampleRecord", "ShardMetadata", "ShardSet", "ShardWriter"]
