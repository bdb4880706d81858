"""A local folder, or a Hugging Face Hub id fetched into one; and a folder pushed to the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .hub_errors import HubRateLimitError, explain

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["HubRateLimitError", "find_folder", "is_hub_id", "push_folder"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def find_folder(
    source: str | PathLike[str],
    files: Sequence[str],
    *,
    what: str,
    argument: str = "source",
    marker: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder that `source` means.

    Args:
        source: a directory, or a Hub id "owner/name" of which `files` are fetched (kept in the Hub client's
            cache, which also serves without a network).
        files: names or patterns, safetensors and JSON only.
        what: what is looked for, for messages.
        argument: what the caller calls `source`, for messages.
        marker: a file that what is looked for has; where a repository has it in its folders only, they are named.
        revision: branch, tag or commit on the Hub.
        token: for private and gated repositories; True for the one of `hf auth login`, which is also the default,
            False for none.
        subfolder: folder inside the directory or repository.
        cache_dir: in place of the Hub client's own cache.
        local_files_only: take what the cache has, without a network.

    Raises:
        FileNotFoundError: no such directory, no such repository (or a private one that the token does not open), no
            such subfolder, nothing in the cache.
        PermissionError: a gated repository, or a token that the Hub refuses.
        ConnectionError: no network, a Hub that is down, or (`HubRateLimitError`) too many requests.
        ValueError: a file instead of a directory, an unknown revision, or one for a directory; a repository whose
            folders have the `marker`, and no `subfolder`.
    """
    inside = _inside(subfolder)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"`revision` must be left out for a directory, got {revision!r} with {folder}; where the Hub's "
                f"{fspath(source)!r} is meant, call from another directory or move that one."
            )
        return _subfolder(folder, inside, f"{folder}")
    if folder.is_file():
        holder = marker is None or (folder.parent / marker).is_file()
        advice = f"give {folder.parent}" if holder else f"give the directory that holds {marker}, or leave the file out"
        raise ValueError(f"`{argument}` must be the directory of {what}, got the file {folder}; {advice}.")
    if not (isinstance(source, str) and is_hub_id(source)):
        raise FileNotFoundError(
            f"`{argument}` must be the directory of {what} or a Hub id, got {source}: no such folder."
        )
    with _explained(argument, source, revision=revision, local_files_only=local_files_only):
        fetched = _fetch(source, revision, token, cache_dir, local_files_only, [str(inside / name) for name in files])
    if marker and not subfolder and not local_files_only and not (fetched / marker).is_file():
        _refuse_several(source, marker, revision, token)
    return _subfolder(fetched, inside, f"{source!r} at {revision or 'its default branch'}")


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    delete: Sequence[str] = (),
) -> CommitInfo:
    """Upload a folder to a model repository on the Hub, made if absent.

    Args:
        folder: all its files go to the top of the repository.
        repo_id: "owner/name", or "name" under the token's own account.
        private: of a new repository; the account's setting when None.
        commit_message: the client's own when None.
        token: with write access.
        revision: branch, made if absent; the default branch when None.
        create_pr: open a pull request instead.
        delete: files that go from the repository unless `folder` has them.

    Raises:
        PermissionError, ConnectionError, FileNotFoundError, ValueError: as in `find_folder`.
    """
    if create_pr and revision is not None:
        raise ValueError(
            f"`revision` must be left out with `create_pr=True`, got {revision!r}: the Hub opens pull requests "
            "against the default branch."
        )
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained("repo_id", repo_id, revision=revision, pushing=True):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(delete) or None,
        )


def is_hub_id(text: str) -> bool:
    """Whether a text has the form "owner/name"."""
    return _HUB_ID.fullmatch(text) is not None


@contextmanager
def _explained(argument: str, source: str, **facts: object) -> Iterator[None]:
    """Turns the Hub client's errors into ones that say what to do."""
    try:
        yield
    except Exception as error:  # they share no base class
        explained = explain(error, argument, source, **facts)  # type: ignore[arg-type]
        if explained is None:
            raise
        raise explained from error


def _fetch(
    source: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | PathLike[str] | None,
    local_files_only: bool,
    patterns: list[str],
) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(local_files_only: bool) -> Path:
        folder = snapshot_download(
            source,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=patterns,
        )
        return Path(folder)

    if local_files_only or revision is None or not _COMMIT.fullmatch(revision):
        return download(local_files_only)
    # A branch is looked up in one request that fails at once; a commit needs no look-up, and the requests that follow
    # are repeated for half a minute where the Hub does not answer, and longer where it asks to wait. So ask once.
    try:
        HfApi().model_info(source, revision=revision, token=token, timeout=10)
    except Exception as error:
        try:
            return download(local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
    return download(local_files_only=False)


def _refuse_several(source: str, marker: str, revision: str | None, token: str | bool | None) -> None:
    """Raises ValueError with the folders of a repository that hold the marker, where there are any."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(source, revision=revision, token=token, timeout=10).siblings or []
    except Exception:  # it is known to be absent from the top; this only says where it might be
        return
    found = sorted(
        {str(PurePosixPath(one.rfilename).parent) for one in siblings if one.rfilename.endswith(f"/{marker}")}
    )
    if found:
        shown = ", ".join(map(repr, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise ValueError(f"`subfolder` must choose one of the {len(found)} in {source!r}, got None; they are {shown}.")


def _inside(subfolder: str | None) -> PurePosixPath:
    path = PurePosixPath(subfolder or "")
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"`subfolder` must lie inside the directory or repository, got {subfolder!r}.")
    return path


def _subfolder(folder: Path, inside: PurePosixPath, where: str) -> Path:
    found = folder / inside
    if not found.is_dir():
        raise FileNotFoundError(f"`subfolder` must be a folder of {where}, got {str(inside)!r}: no such folder there.")
    return found
