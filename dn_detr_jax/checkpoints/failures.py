"""The text of failures while checkpoints are written or read, in one line."""

import errno

_MOST_CHARACTERS = 300  # of an error's text


def describe_failure(error: BaseException) -> str:
    """Returns what went wrong: a full disk in words, else the error's type and first line."""
    return "no space left on the device" if _is_disk_full(error) else first_line(error)


def first_line(error: BaseException) -> str:
    """Returns the type and the first line of an error.

    Examples:
      >>> first_line(ValueError("wrong\\nand more")), first_line(KeyError())
      ('ValueError: wrong', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    return f"{kind}: {lines[0][:_MOST_CHARACTERS]}" if lines else kind


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # tensorstore's words
            return True
        error = error.__cause__ or error.__context__
    return False
