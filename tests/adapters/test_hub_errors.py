"""What the Hub refuses, or cannot answer: each its own kind of error, at once, with what to do."""

import pytest

from ..hub_server import Refusal, Repo
from .hub_client import FETCH, PUSH, put, refused

pytestmark = pytest.mark.medium

ABSENT = r"the Hub has no such repository or it is private \(it does not tell which\).*`hf auth login`.*`token=`"


@pytest.mark.parametrize("token", ["False", "'hf_read'"], ids=["no token", "token"])
def test_absent_repository(client, token):
    refused(client, FETCH % f", token={token}", "FileNotFoundError", ABSENT)


@pytest.mark.parametrize("token", ["False", "'hf_other'"], ids=["no token", "another's token"])
def test_private_repository_without_permission(hub, client, saved, token):
    put(hub, saved[0], private=True)
    refused(client, FETCH % f", token={token}", "FileNotFoundError", ABSENT)


@pytest.mark.parametrize("token", ["False", "'hf_other'"], ids=["no token", "another's token"])
def test_gated_repository(hub, client, saved, token):
    put(hub, saved[0], gated=True)
    refused(client, FETCH % f", token={token}", "PermissionError", "'alice/a', which is gated: accept its terms")


def test_token_that_the_hub_does_not_know(hub, client, saved):
    put(hub, saved[0])
    refused(client, FETCH % ", token='hf_wrong'", "PermissionError", "`token` must be one that the Hub knows")


def test_token_that_is_asked_for_and_not_there(client):
    refused(client, FETCH % ", token=True", "PermissionError", "`token` True must find the token of a login")


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40], ids=["branch", "commit"])
def test_revision_that_is_not_there(hub, client, saved, revision):
    put(hub, saved[0])
    message = rf"`revision` must be a branch, tag or commit of 'alice/a', got '{revision}'"
    refused(client, FETCH % f", revision={revision!r}", "ValueError", message)


@pytest.mark.parametrize("revision", ["None", repr("1" * 40)], ids=["branch", "commit"])
@pytest.mark.parametrize(("headers", "when"), [({}, "in some minutes"), ({"Retry-After": "300"}, "in 300 seconds")])
def test_too_many_requests(hub, client, revision, headers, when):
    hub.refusal = Refusal(429, None, "Too many requests", headers)
    message = rf"too many requests \(429\); try again {when}, or with a token"
    refused(client, FETCH % f", revision={revision}", "HubRateLimitError", message)


@pytest.mark.parametrize("revision", ["None", repr("1" * 40)], ids=["branch", "commit"])
def test_hub_that_is_down(hub, client, revision):
    hub.refusal = Refusal(503, None, "Service Unavailable")
    message = r"failed on `path_or_id` 'alice/a' \(503: Service Unavailable\); try again later; .*local_files_only"
    refused(client, FETCH % f", revision={revision}", "ConnectionError", message)


@pytest.mark.parametrize("revision", ["None", repr("1" * 40)], ids=["branch", "commit"])
def test_not_in_the_cache(client, revision):
    message = "must lie whole in the Hub client's cache, for `local_files_only` is set, and it does not"
    refused(client, FETCH % f", revision={revision}, local_files_only=True", "FileNotFoundError", message)


# older clients (1.0.0) hand the folder out all the same, and the reader finds the gap
INCOMPLETE = "must lie whole in the Hub client's cache|must hold adapter_model.safetensors, got none"


def test_cache_that_misses_a_file(hub, client, saved, tmp_path):
    put(hub, saved[0])
    client(FETCH % "")
    next((tmp_path / "cache").rglob("snapshots/*/adapter_model.safetensors")).unlink()
    refused(client, FETCH % ", local_files_only=True", "FileNotFoundError", INCOMPLETE)


def test_repository_without_an_adapter(hub, client):
    hub.repos["alice/a"] = Repo()
    hub.repos["alice/a"].commit("main", {"config.json": b"{}"}, "first")
    refused(client, FETCH % "", "FileNotFoundError", "an adapter directory must hold adapter_config.json")


NO_ANSWER = "the Hugging Face Hub did not answer for `%s` 'alice/a' .*; check the network"


@pytest.mark.parametrize("revision", ["None", repr("1" * 40)], ids=["branch", "commit"])
def test_no_network(unreachable, revision):
    expression = f"Adapter.from_pretrained('alice/a', revision={revision})"
    refused(unreachable, expression, "ConnectionError", NO_ANSWER % "path_or_id" + ".*`local_files_only=True` takes it")


def test_no_network_to_push_over(unreachable, saved):
    refused(unreachable, PUSH % (str(saved[0]), "token='hf_write'"), "ConnectionError", NO_ANSWER % "repo_id")


def test_offline_mode_of_the_client(client):
    client("setattr(constants, 'HF_HUB_OFFLINE', True)")  # what the variable HF_HUB_OFFLINE sets on import
    try:
        refused(client, FETCH % "", "FileNotFoundError", "for HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE")
    finally:
        client("setattr(constants, 'HF_HUB_OFFLINE', False)")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ("'alice/a', token=False", "PermissionError", "`token` must be one with write access to 'alice/a'"),
        ("'alice/a', token='hf_wrong'", "PermissionError", "`token` must be one with write access to 'alice/a'"),
        (
            "'alice/a', token='hf_read'",
            "PermissionError",
            r"`token` must have write access to 'alice/a', .*the rights to",
        ),
        ("'alice/a', token='hf_other'", "PermissionError", r"`token` must have write access to 'alice/a', .*namespace"),
        ("'no//id', token='hf_write'", "ValueError", "`repo_id` must be a Hub id 'owner/name', got 'no//id'"),
        ("'alice/a', revision='x', create_pr=True", "ValueError", "`revision` must be left out with `create_pr=True`"),
        ("'alice/a', layout='resnet'", "ValueError", "`layout` must be one of"),
    ],
    ids=["no token", "wrong token", "read token", "another's token", "impossible id", "pull request", "layout"],
)
def test_push_that_is_refused(hub, client, saved, arguments, kind, message):
    refused(client, f"Adapter.load({str(saved[0])!r}).push_to_hub({arguments})", kind, message)
    assert not hub.repos


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("Adapter.from_pretrained({folder!r}, revision='v1')", "`revision` must be left out for a directory, got 'v1'"),
        ("Adapter.from_pretrained({folder!r}, subfolder='../x')", "`subfolder` must lie inside .*, got '../x'"),
        (
            "Adapter.load({folder!r}).save_pretrained('x', repo_id='a/b')",
            "`push_to_hub` must be True where `repo_id` is",
        ),
        ("load_adapters([{folder!r}], revision='v1')", "`revision` must come with a Hub id among `adapters`, got 'v1'"),
        ("load_adapters([Adapter.load({folder!r})], subfolder='x')", "`subfolder` must come with folders or Hub ids"),
    ],
    ids=["revision", "subfolder outside", "no push", "revision for many", "subfolder for objects"],
)
def test_arguments_that_nothing_uses(client, saved, call, message):
    refused(client, call.format(folder=str(saved[0])), "ValueError", message)
