"""Fixtures that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from fluxsae.flux.load import load_pipeline
from tests.random_flux import random_flux

torch.set_num_threads(1)  # test processes run beside each other, on matrices that no thread pool helps


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random FLUX of 2 dual-stream and 2 single-stream blocks, width 32, for 64×64 pixels."""
    return random_flux(tmp_path_factory.mktemp("random-flux"))


@pytest.fixture(scope="session")
def tiny_pipe(tiny_flux: Path) -> FluxPipeline:
    """The pipeline in `tiny_flux`; whoever hooks it must unhook it."""
    return load_pipeline(tiny_flux)
