"""How a run is run: processes, signals, folder locks, CUDA graphs, work in the background."""

from fluxsae.runtime.background import Background, HostCopy, side_by_side
from fluxsae.runtime.cuda_graphs import Graphs
from fluxsae.runtime.distributed import OneAllReduce, Processes
from fluxsae.runtime.folder_lock import OneRunOnly
from fluxsae.runtime.gathering import gather_objects, gather_tensors
from fluxsae.runtime.interrupts import Interrupted, LastCheckpoint, StopsWhereItCanGoOn, interruptible
from fluxsae.runtime.shared_array import SharedArray

__all__ = [
    "Background",
    "Graphs",
    "HostCopy",
    "Interrupted",
    "LastCheckpoint",
    "OneAllReduce",
    "OneRunOnly",
    "Processes",
    "SharedArray",
    "StopsWhereItCanGoOn",
    "gather_objects",
    "gather_tensors",
    "interruptible",
    "side_by_side",
]
