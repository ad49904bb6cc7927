"""The errors this package raises on purpose: one line saying what is wrong, where, and what to do.

Each type carries the exit code the command line ends with (0 done, 1 failed, 2 wrong usage or config).
"""


class OxidizrError(Exception):
    """Base of all errors raised on purpose. Shown without a traceback unless ``--debug`` is given."""

    exit_code = 1


class ConfigError(OxidizrError):
    """A config file or an override is wrong: unknown key, wrong type, broken constraint."""

    exit_code = 2


class DataError(OxidizrError):
    """A data file is missing, unreadable, too short, malformed, or does not fit the model's vocabulary."""

    exit_code = 2


class DeviceError(OxidizrError):
    """The device that was demanded is not there."""

    exit_code = 2


class UsageError(OxidizrError):
    """A command was asked for something it cannot do as asked; the message names the ways on."""

    exit_code = 2


class CheckpointError(OxidizrError):
    """A checkpoint is damaged, or is not a checkpoint of this package."""


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written: another one must be used."""


class SaveError(CheckpointError):
    """A checkpoint could not be written. Those written before are whole; the next save may succeed."""


class MismatchError(CheckpointError):
    """A sound checkpoint does not fit the run that wants to continue from it."""

    exit_code = 2


class TrainingError(OxidizrError):
    """Training cannot go on (the loss or a gradient became NaN or infinite)."""


class TraceError(OxidizrError):
    """A trace cannot be read, or cannot be compared with the other one."""

    exit_code = 2


class TraceWriteError(TraceError):
    """A trace could not be written: the disk refused."""

    exit_code = 1
