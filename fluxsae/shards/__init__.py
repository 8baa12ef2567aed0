"""The disk format: tokens and images as WebDataset tars that appear only when whole."""

from fluxsae.shards.channels import describe_channels
from fluxsae.shards.format import SampleRecord, ShardMetadata, Storage
from fluxsae.shards.read import ShardSet
from fluxsae.shards.token_blocks import RowReader, TokenBlock
from fluxsae.shards.verification import verify
from fluxsae.shards.write import ShardWriter

__all__ = [
    "RowReader",
    "SampleRecord",
    "ShardMetadata",
    "ShardSet",
    "ShardWriter",
    "Storage",
    "TokenBlock",
    "describe_channels",
    "verify",
]
