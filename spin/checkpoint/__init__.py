"""Checkpoint formats. Start reading at pipeline.py."""

from spin.checkpoint.hub import locate
from spin.checkpoint.pipeline import (
    Pipeline,
    hash_checkpoint,
    load_pipeline,
    load_unet,
    save_pipeline,
    save_single_file,
)

__all__ = [
    "Pipeline",
    "hash_checkpoint",
    "load_pipeline",
    "load_unet",
    "locate",
    "save_pipeline",
    "save_single_file",
]
