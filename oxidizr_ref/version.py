"""The two version numbers: of the package, and of its numerics."""

__version__ = "0.1.0"

#: Raised by every change that changes a bit of a checkpoint, however small. Files say which one they were made with.
NUMERICS_VERSION = 2
