"""How a run is run: processes, signals, folder locks, CUDA graphs, work in the background."""

from fluxsae.runtime.background import Background, HostCopy, side_by_side
from fluxsae.runtime.cuda_graphs import Graphs
from fluxsae.runtime.distributed import OneAllReduce, Processes
from fluxsae.runtime.folder_lock import OneRunOnly
from fluxsae.runtime.gathering import gather_objects, gather_tensors
from fluxsae.runtime.interrupts import Interrupted, LastCheckpoint, StopsWhereItCanGoOn, interruptible
from fluxsae.runtime.lightning_internals import (
    EpochPosition,
    close_resumed_epoch,
    count_manual_step,
    epoch_position,
)
from fluxsae.runtime.shared_array import SharedArray

__all__ = [
    "Background",
    "EpochPosition",
    "Graphs",
    "HostCopy",
    "Interrupted",
    "LastCheckpoint",
    "OneAllReduce",
    "OneRunOnly",
    "Processes",
    "SharedArray",
    "StopsWhereItCanGoOn",
    "close_resumed_epoch",
    "count_manual_step",
    "epoch_position",
    "gather_objects",
    "gather_tensors",
    "interruptible",
    "side_by_side",
]
