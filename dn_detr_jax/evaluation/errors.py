"""The error of an evaluation whose message is all that its user needs."""


class EvaluationError(ValueError):
    """Detections that can't be evaluated; one line with the cause."""
