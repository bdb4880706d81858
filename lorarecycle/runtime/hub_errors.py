"""What the Hugging Face Hub's client raises, as errors of ours that stay apart and say what to do."""

from __future__ import annotations

_LOG_IN = "log in with `hf auth login`, set HF_TOKEN or give `token=`"
_OFFLINE = "where it was fetched before, `local_files_only=True` takes it from the cache; or give the path of a copy"


class HubRateLimitError(ConnectionError):
    """The Hub answered that there were too many requests (HTTP 429)."""


def explain(
    error: BaseException,
    argument: str,
    source: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    pushing: bool = False,
) -> Exception | None:
    """The error to raise in place of one of `huggingface_hub`; None where it is not one of its.

    Args:
        error: what the client raised.
        argument: what the caller calls `source`.
        source: the Hub id.
        revision, local_files_only: as the client got them.
        pushing: uploading, not fetching.

    Returns:
        FileNotFoundError: no such repository, or a private one that the token does not open; nothing in the cache.
        PermissionError: gated or disabled repository, a token that is missing, wrong or without the right.
        HubRateLimitError: too many requests.
        ConnectionError: no network, no answer, a server error.
        ValueError: unknown revision, an impossible id, or a request that the Hub calls wrong.
    """
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and cause is None:
        return _not_cached(argument, source, revision, local_files_only)
    if isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) and cause is not None:
        # the client looked into its cache after the request had failed, or a thread of it failed
        return explain(cause, argument, source, revision=revision, local_files_only=local_files_only, pushing=pushing)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _not_cached(argument, source, revision, local_files_only)
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"`{argument}` must be a Hub id 'owner/name', got {source!r}: {_first_line(error)}")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return PermissionError(f"`token` True must find the token of a login, and there is none here; {_LOG_IN}.")
    if isinstance(error, errors.HfHubHTTPError):
        return _of_answer(error, argument, source, revision, pushing)
    if isinstance(error, _transport_errors()):
        return ConnectionError(
            f"the Hugging Face Hub did not answer for `{argument}` {source!r} ({type(error).__name__}: "
            f"{_first_line(error)}); check the network{'' if pushing else f'; {_OFFLINE}'}."
        )
    return None


def _of_answer(error, argument: str, source: str, revision: str | None, pushing: bool) -> Exception:  # type: ignore[no-untyped-def]
    """The error for an answer (a `HfHubHTTPError`) of the Hub; classes first, for they are finer than status codes."""
    from huggingface_hub import errors

    status, reason = error.response.status_code, error.server_message or _first_line(error)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"`{argument}` must be a repository that you have access to, got {source!r}, which is gated: accept its "
            f"terms on its page on the Hub, then {_LOG_IN}."
        )
    if isinstance(error, errors.DisabledRepoError):
        return PermissionError(f"`{argument}` must be a repository that is open, got {source!r}, which is disabled.")
    if status == 401 and pushing:  # the client calls this one, too, a repository that was not found
        return PermissionError(
            f"`token` must be one with write access to {source!r}, got none or a wrong one; {_LOG_IN}."
        )
    anonymous = "Authorization" not in error.response.request.headers
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 401 and anonymous):
        use = "written to" if pushing else "read"
        return FileNotFoundError(
            f"`{argument}` must be a directory here or a repository that can be {use} on the Hugging Face Hub, got "
            f"{source!r}: there is no such directory, and the Hub has no such repository or it is private (it does "
            f"not tell which); check the name, and for a private one {_LOG_IN}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(
            f"`revision` must be a branch, tag or commit of {source!r}, got {revision!r}; its page on the Hub "
            "lists them."
        )
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return HubRateLimitError(
            f"the Hugging Face Hub refused `{argument}` {source!r} for too many requests (429); try again "
            f"{f'in {wait} seconds' if wait else 'in some minutes'}, or with a token, which is allowed more: {_LOG_IN}."
        )
    if status == 401:
        return PermissionError(f"`token` must be one that the Hub knows, got a refusal for {source!r}; {_LOG_IN}.")
    if status == 403:
        right = "write access" if pushing else "read access"
        return PermissionError(f"`token` must have {right} to {source!r}, got a refusal ({reason}); {_LOG_IN}.")
    if status >= 500:
        return ConnectionError(
            f"the Hugging Face Hub failed on `{argument}` {source!r} ({status}: {reason}); try again later"
            f"{'' if pushing else f'; {_OFFLINE}'}."
        )
    return ValueError(f"`{argument}` {source!r} was refused by the Hugging Face Hub ({status}): {reason}")


def _not_cached(argument: str, source: str, revision: str | None, local_files_only: bool) -> FileNotFoundError:
    at = "" if revision is None else f" at revision {revision!r}"
    why = "`local_files_only` is set" if local_files_only else "HF_HUB_OFFLINE is set"
    fix = "leave `local_files_only` out" if local_files_only else "unset HF_HUB_OFFLINE"
    return FileNotFoundError(
        f"`{argument}` {source!r}{at} must lie whole in the Hub client's cache, for {why}, and it does not; {fix} "
        "once to fetch it, or give the `cache_dir` that it was fetched into."
    )


def _transport_errors() -> tuple[type[BaseException], ...]:
    """The base class of errors of the client's HTTP library: httpx's `HTTPError`, or requests' `RequestException`."""
    from huggingface_hub.errors import HfHubHTTPError

    foreign = [k for k in HfHubHTTPError.__mro__ if k.__module__.split(".")[0] not in ("huggingface_hub", "builtins")]
    return tuple(foreign)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
