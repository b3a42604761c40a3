"""What can go wrong: a bad request or plan, a checkpoint that does not fit, NaN, a missing extra.

Every message has three parts: the value seen, the rule, the way out.
"""


class RequestError(ValueError):
    """A generation was asked for that cannot be made as asked."""


class CheckpointError(ValueError):
    """A weight file is unreadable, incomplete, or does not fit the network it is for."""


class TrainingError(ValueError):
    """A training plan is contradictory, or a run cannot go on."""


class NumericsError(RuntimeError):
    """A computation gave NaN or infinity; the message names the stage."""


class MissingExtra(ImportError):
    """An optional package is needed; the message names the extra to install."""
