"""Errors for people: what is wrong, and what to do about it.

PyperError
├── ConfigError          a key or value in a run file
│   └── UsageError       options of a command out of range, or that do not go together
├── DataError            text, shards, folders
├── TokenizerError       tokenizers or vocabularies that do not fit together
├── CheckpointError      missing, damaged or foreign checkpoints
├── OutOfMemoryError     the device is full
├── NonFiniteError       the loss or a gradient became NaN or infinite
├── LockedError          another process writes to the same folder
├── StorageError         a folder cannot be written or the disk is full
├── MissingExtraError    an optional package is not installed
├── PromptError          a prompt or a sampling setting that cannot be served
└── InterruptedRun       stopped by a signal, state saved
"""


class PyperError(Exception):
    """Something the user can mend: `message` says what is wrong, `hint` what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(PyperError):
    """A key or a value in a run file cannot be used."""


class UsageError(ConfigError):
    """Options of a command that are out of range, do not go together, or need another one."""

    exit_code = 2  # as where an option or a value is not known to the command line


class DataError(PyperError):
    """Text, shards or folders are missing, empty, too small or damaged."""


class TokenizerError(PyperError):
    """Tokenizers or vocabularies do not fit together."""


class CheckpointError(PyperError):
    """A checkpoint is missing, damaged or belongs to something else."""


class OutOfMemoryError(PyperError):
    """The device has too little memory for the settings."""


class NonFiniteError(PyperError):
    """The loss or a gradient became NaN or infinite; nothing was updated with it."""


class LockedError(PyperError):
    """Another process is writing to the same folder."""


class StorageError(PyperError):
    """A folder cannot be written, or the disk is full."""


class MissingExtraError(PyperError):
    """An optional package is not installed."""

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package `{package}`",
            hint=f"install it with `pip install 'pyper[{extra}]'`",
        )


class PromptError(PyperError):
    """A prompt or a sampling setting cannot be served."""


class InterruptedRun(PyperError):  # noqa: N818 - it ends a run on request; nothing failed
    """A signal stopped the run at a step boundary and the state was saved."""

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 130) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
