"""What halovae raises of its own. Arguments that are wrong in themselves raise ValueError or TypeError."""

from __future__ import annotations


class HalovaeError(Exception):
    """The base of all of these."""


class CheckpointError(HalovaeError, ValueError):
    """A model cannot be loaded: which file, what is wrong with it, and what would be accepted."""


class MemoryBudgetError(HalovaeError, ValueError):
    """No way to share a call fits into the memory budget, or into what is free: says what would."""


class UnplannableError(HalovaeError, ValueError):
    """A call cannot be planned, since it cannot be recorded without data. Calls themselves run eagerly then."""


class TraceError(HalovaeError, RuntimeError):
    """A function cannot be recorded: what it does depends on the values in its input. Says where."""


class RankOutOfMemoryError(HalovaeError, RuntimeError):
    """A rank ran out of memory, and all ranks stopped after the same chunk. Raised where a leaner way was asked for."""


class RankError(HalovaeError, RuntimeError):
    """A rank failed, and the others were ended. The message holds the failing rank's traceback or signal.

    Attributes:
        cause: the exception that ended the rank, where it is known.
        killed: whether the system ended it (SIGKILL), as it does when the host's memory runs out.
    """

    def __init__(self, message: str, cause: Exception | None = None, killed: bool = False) -> None:
        super().__init__(message)
        self.cause = cause
        self.killed = killed


class PromptError(HalovaeError, ValueError):
    """Something that a pipeline cannot be asked for.

    Attributes:
        field: which of the prompt's attributes is wrong.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
