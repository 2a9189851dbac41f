"""Errors of a run whose message is all that its user needs."""


class TrainingError(RuntimeError):
    """A training that can't go on; one line with the cause."""


class CheckpointError(TrainingError):
    """A checkpoint that can't be written, read or used; one line with the path and the cause."""
