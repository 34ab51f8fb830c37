"""The exceptions that halovae defines. Invalid arguments raise ValueError or TypeError."""

from __future__ import annotations


class HalovaeError(Exception):
    """The base class of halovae's exceptions."""


class CheckpointError(HalovaeError, ValueError):
    """A model cannot be loaded. The message names the file, what is wrong with it, and what would be accepted."""


class MemoryBudgetError(HalovaeError, ValueError):
    """No plan for a call fits into the memory budget or the free memory. The message says what would fit."""


class UnplannableError(HalovaeError, ValueError):
    """A call cannot be planned, because it cannot be recorded without data. The call itself still runs, eagerly."""


class TraceError(HalovaeError, RuntimeError):
    """A function cannot be recorded: what it does depends on the values in its input. The message says where."""


class RankOutOfMemoryError(HalovaeError, RuntimeError):
    """A rank ran out of memory, and all ranks stopped after the same chunk. Raised if a leaner plan can be tried."""


class RankError(HalovaeError, RuntimeError):
    """A rank failed, and the others were stopped. The message holds the failing rank's traceback or signal.

    Attributes:
        cause: the exception that ended the rank, if it is known.
        killed: whether the system killed the rank (SIGKILL), as it does when the host runs out of memory.
    """

    def __init__(self, message: str, cause: Exception | None = None, killed: bool = False) -> None:
        super().__init__(message)
        self.cause = cause
        self.killed = killed


class PromptError(HalovaeError, ValueError):
    """A prompt that a pipeline does not support.

    Attributes:
        field: the prompt's attribute that is wrong.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
