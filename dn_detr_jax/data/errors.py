"""The error of this package's data: one line for the person who started the run."""


class DataError(ValueError):
    """Data, or a setting of it, that can't be used; names the file, the picture or the key."""


def reason(error: Exception) -> str:
    """What an error of a library says, in a line of at most 300 characters; its type if nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
