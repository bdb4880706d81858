"""A local folder, or a Hugging Face Hub id fetched into one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_folder(source: str | PathLike[str], files: Sequence[str], *, what: str) -> Path:
    """The folder that `source` means.

    Args:
        source: a directory, or a Hub id "owner/name" of which `files` are fetched (kept in the Hub client's
            cache, which also serves without a network).
        files: names or patterns, safetensors and JSON only.
        what: what is looked for, for messages.

    Raises:
        FileNotFoundError: no such directory, and no Hub id that can be fetched.
        ValueError: a file instead of a directory.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"`source` must be the directory of {what}, got the file {folder}; give {folder.parent}.")
    if not (isinstance(source, str) and _HUB_ID.fullmatch(source)):
        raise FileNotFoundError(f"`source` must be the directory of {what} or a Hub id, got {source}: no such folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:  # the Hub client's errors share no base class, and httpx adds its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"`source` must be the directory of {what} or a Hub id that can be fetched, got {source!r}: "
            "there is no such folder here, and the Hugging Face Hub did not give it "
            f"({type(error).__name__}: {reason}); check the name and the network, or copy the folder to this "
            "machine and give its path."
        ) from error
