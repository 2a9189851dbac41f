"""The error of this package's data: one line for the person who started the run."""


class DataError(ValueError):
    """Data, or a setting of it, that can't be used; names the file, the picture or the key."""
