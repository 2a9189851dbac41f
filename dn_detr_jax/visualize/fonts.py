"""Text that can be drawn: a font that has its characters, or escapes in their place.

matplotlib is imported when the first text is drawn: a training starts without it.
"""

import functools
import logging
import os
import unicodedata

from PIL import ImageFont

logger = logging.getLogger(__name__)


def drawable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Finds a font for a text.

    The font is matplotlib's, or an installed one that has all the characters. If there is none, the
    characters that matplotlib's font lacks are escaped, for example as \\u732b, and a warning says
    so once. Line breaks and other control characters are escaped, too; invisible format characters
    are dropped.

    Args:
      text: to draw on one line.
      size: of the font, pixels.

    Returns:
      The text to draw, and the font.
    """
    text, path = _drawable(text)
    return text, font(size, path)


@functools.cache
def font(size: int, path: str | None = None) -> ImageFont.FreeTypeFont:
    """Opens a font, by default matplotlib's, in a size in pixels."""
    return ImageFont.truetype(path or _own_font(), size)


@functools.cache
def _own_font() -> str:
    """Returns the path of matplotlib's own font, which is installed with this package.

    It has Latin, Greek, Cyrillic, Arabic and more, but not Chinese, Japanese, Korean, Thai or the
    scripts of India.
    """
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@functools.lru_cache(4096)
def _drawable(text: str) -> tuple[str, str]:
    kept = [char for char in text if unicodedata.category(char) != "Cf"]
    text = "".join(char if char.isprintable() else _escaped(char) for char in kept)
    missing = frozenset(map(ord, text)) - _characters(_own_font())
    if not missing:
        return text, _own_font()
    path = _installed_font(frozenset(map(ord, text)))
    if path is not None:
        return text, path
    _warn_of_script(unicodedata.name(chr(min(missing)), "UNKNOWN").split()[0])
    return "".join(_escaped(char) if ord(char) in missing else char for char in text), _own_font()


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


@functools.cache
def _warn_of_script(script: str) -> None:
    logger.warning(
        "no installed font has the characters of some class names (%s): they are drawn as escapes "
        "such as \\u732b; install a font that has them, for example Noto Sans",
        script,
    )


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """Returns the code points of a font; none if it can't be read."""
    from matplotlib import font_manager

    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.cache
def _installed_font(characters: frozenset[int]) -> str | None:
    """Finds an installed font that has all the characters and that Pillow opens."""
    from matplotlib import font_manager

    for path in sorted(font_manager.findSystemFonts()):
        if characters <= _characters(path):
            try:
                font(10, path)
            except OSError:
                continue
            return path
    return None
