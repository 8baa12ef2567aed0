"""From prompts to images and captured tokens."""

from fluxsae.capture.folder import set_folder
from fluxsae.capture.module import FluxCapture
from fluxsae.capture.prompt_data import GenerationRequest, PromptData, RequestBatch, image_seed

__all__ = ["FluxCapture", "GenerationRequest", "PromptData", "RequestBatch", "image_seed", "set_folder"]
