"""Weights by the name of a repository on the Hugging Face Hub: `hf:OWNER/NAME` or with `:FILE`.

Files are taken from a folder of the user, `$DN_DETR_JAX_HUB/OWNER/NAME/FILE`, if they are there.
Otherwise the optional package huggingface_hub downloads them into its cache, once.
"""

import contextlib
import os
import re
from pathlib import Path

from dn_detr_jax.config import expand_user
from dn_detr_jax.errors import WeightsError, short_reason
from dn_detr_jax.files import checksum
from dn_detr_jax.interop.transformers_config import FILES

PREFIX = "hf:"
_FOLDER = "DN_DETR_JAX_HUB"  # environment variable
_DEFAULT_FOLDER = "~/.cache/dn_detr_jax/hub"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?::([\w./-]+))?", re.ASCII)
# What a repository's weights are called, the preferred one first.
_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")


def is_hub_name(text: str) -> bool:
    """Whether a text names a repository and not a path.

    Examples:
      >>> is_hub_name("hf:timm/resnet50.tv_in1k"), is_hub_name("resnet50.pth")
      (True, False)
    """
    return text.startswith(PREFIX)


def weights_path(text: str, key: str) -> Path:
    """The file or folder that a config key or an argument names; of the hub, see `fetch`.

    Args:
      text: path or name.
      key: config key, for errors.

    Raises:
      ConfigError: a path that can't be one.
      WeightsError: see `fetch`.
    """
    return fetch(text) if is_hub_name(text) else expand_user(text, key)


def fetch(name: str) -> Path:
    """Finds or downloads a file of weights, and prints its path and checksum.

    Args:
      name: "hf:OWNER/NAME" or "hf:OWNER/NAME:FILE".

    Raises:
      WeightsError: not such a name, no such file, or no way to it: huggingface_hub is missing, or
        there is no network; with the place to put the file at.
    """
    match = _NAME.fullmatch(name)
    if not match or ".." in name:
        raise WeightsError(f"{name}: expected hf:OWNER/NAME or hf:OWNER/NAME:FILE")
    repository, file = match[1], match[2]
    folder = _folder() / repository
    files = [file] if file else list(_FILES)
    local = next((folder / file for file in files if (folder / file).is_file()), None)
    path = local or _download(name, repository, files, folder)
    print(f"{name}: {path}, sha256 {_checksum(path)}")
    return path


def _folder() -> Path:
    return Path(os.environ.get(_FOLDER) or _DEFAULT_FOLDER).expanduser()


def _checksum(path: Path) -> str:
    found = checksum(path)
    # The Hub's cache names the blob of a large file by its checksum.
    expected = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", expected) and expected != found:
        raise WeightsError(f"{path}: damaged: its sha256 is {found}, not {expected}; delete it")
    return found


def _download(name: str, repository: str, files: list[str], folder: Path) -> Path:
    """Downloads the first of `files` that a repository has, or finds it in the Hub's cache."""
    address = f"https://huggingface.co/{repository}/resolve/main/{files[0]}"
    by_hand = f"or put {address} at {folder / files[0]}"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise WeightsError(f"{name}: pip install huggingface_hub, {by_hand}") from None
    reasons: list[Exception] = []
    for file in files:
        try:
            path = Path(hf_hub_download(repository, file))
            for settings in FILES:  # into the same folder, if there are some
                with contextlib.suppress(EntryNotFoundError):
                    hf_hub_download(repository, settings)
            return path
        except EntryNotFoundError as error:  # also without a network, if it is not in the cache
            reasons.append(error)
        except Exception as error:  # of the HTTP client, of permissions, of the file system
            raise WeightsError(f"{name}: {short_reason(error)}; {by_hand}") from error
    raise WeightsError(f"{name}: {short_reason(reasons[0])}; {by_hand}") from reasons[0]
