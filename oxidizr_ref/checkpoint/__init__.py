"""Checkpoints: one self-contained file a step, from which training continues to the same bits.

`format` turns named arrays into bytes and back, `state` says what is saved and whether it fits a run, `store` looks
after the directory.
"""

from oxidizr_ref.checkpoint.format import Checkpoint, load, save, verify

__all__ = ["Checkpoint", "load", "save", "verify"]
