"""Adapters from and to the Hugging Face Hub: the real client in a process of its own, against `hub_server.py`."""

import pytest

from lorarecycle.adapters.adapter import Adapter

from ..hub_server import Refusal
from .hub_client import FETCH, PUSH, Refused, adapter, put

pytestmark = pytest.mark.medium

# --- fetching ----------------------------------------------------------------------------------------


def test_from_pretrained(hub, client, saved):
    put(hub, saved[0])
    hub.repos["alice/a"].files("main")["pytorch_model.bin"] = b"a pickle"
    assert client(FETCH % "") == saved[1]
    assert not [line for line in hub.log if "resolve" in line and line.endswith((".bin", ".md"))]


def test_load_takes_an_id_too(hub, client, saved):
    (saved[0] / "lorarecycle.json").unlink()
    put(hub, saved[0], "alice/nameless")
    assert client("Adapter.load('alice/nameless', class_names=['x', 'y']).head.class_names") == ["x", "y"]
    assert client("Adapter.load('alice/nameless').name") == "alice/nameless"


def test_revisions_are_branches_and_commits(hub, client, saved, tmp_path):
    put(hub, saved[0])
    repo, first = hub.repos["alice/a"], hub.repos["alice/a"].refs["main"]
    other = adapter(seed=1)
    files = {path.name: path.read_bytes() for path in other.save(tmp_path / "other").iterdir()}
    repo.commit("tries/second", files, "second")
    assert client(FETCH % ", revision='tries/second'") == other.digest()
    repo.commit("main", files, "third")
    assert client(FETCH % "") == other.digest()
    assert client(FETCH % f", revision={first!r}") == saved[1]


def test_subfolder(hub, client, saved):
    put(hub, saved[0], inside="adapters/seven/")
    assert client(FETCH % ", subfolder='adapters/seven'") == saved[1]
    with pytest.raises(Refused, match=r"`subfolder` must be a folder of 'alice/a' at its default branch, got 'eight'"):
        client(FETCH % ", subfolder='eight'")


def test_a_repository_of_several_names_them(hub, client, saved):
    files = {path.name: path.read_bytes() for path in saved[0].iterdir()}
    put(hub, saved[0], inside="adapters/seven/")
    repo = hub.repos["alice/a"]
    repo.commit("main", {**repo.files("main"), **{f"b/{name}": file for name, file in files.items()}}, "more")
    for expression in (FETCH % "", "load_adapters('alice/a', cache_dir={cache})"):
        with pytest.raises(Refused, match=r"`subfolder` must choose one of the 2 in 'alice/a'.* 'adapters/seven', 'b'"):
            client(expression)
    assert client(FETCH % ", subfolder='b'") == saved[1]


def test_private_with_token(hub, client, saved):
    put(hub, saved[0], private=True)
    assert client(FETCH % ", token='hf_read'") == saved[1]


@pytest.mark.parametrize("how", [", local_files_only=True", ""], ids=["asked", "hub fails"])
@pytest.mark.parametrize("revision", ["", "pinned"], ids=["branch", "commit"])
def test_the_cache_serves_without_the_hub(hub, client, saved, how, revision):
    put(hub, saved[0])
    revision = f", revision={hub.repos['alice/a'].refs['main']!r}" if revision else ""
    assert client(FETCH % revision) == saved[1]
    hub.log.clear()
    hub.refusal = Refusal(503, None, "down")
    assert client(FETCH % (revision + how)) == saved[1]
    assert len(hub.log) == (0 if how else 1)


def test_load_adapters_takes_folders_and_ids(hub, client, saved, tmp_path):
    put(hub, saved[0], "alice/a", inside="sub/")
    put(hub, saved[0], "alice/b", inside="sub/", private=True)
    local = adapter(seed=5).save(tmp_path / "local" / "sub").parent
    hub.repos["alice/a"].refs["v1"] = hub.repos["alice/a"].refs["main"]
    hub.repos["alice/b"].refs["v1"] = hub.repos["alice/b"].refs["main"]
    sources = ["alice/a", str(local), "alice/b"]
    given = f"{sources!r}, revision='v1', subfolder='sub', token='hf_read', cache_dir={{cache}}"
    found = client(f"[a.digest() for a in load_adapters({given})]")
    assert found == [saved[1], adapter(seed=5).digest(), saved[1]]


# --- pushing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [True, False], ids=["private", "public"])
def test_round_trip(hub, client, saved, private):
    url = client(PUSH % (str(saved[0]), f"private={private}, commit_message='the first', token='hf_write'"))
    repo = hub.repos["alice/a"]
    assert url == f"{hub.url}/alice/a/commit/{repo.refs['main']}"
    assert repo.private is private
    assert repo.messages[repo.refs["main"]] == "the first"
    assert any(line.startswith("PUT /lfs/") for line in hub.log)
    assert {"README.md", "adapter_config.json", "lorarecycle.json"} < set(repo.files("main"))
    assert client(FETCH % (", token='hf_read'" if private else "")) == saved[1]


def test_push_to_a_branch(hub, client, saved):
    client(PUSH % (str(saved[0]), "revision='try', token='hf_write'"))
    assert "adapter_config.json" not in hub.repos["alice/a"].files("main")
    client(PUSH % (str(adapter(seed=2).save(saved[0])), "revision='try', token='hf_write'"))
    assert client(FETCH % ", revision='try'") == adapter(seed=2).digest()


def test_push_as_a_pull_request(hub, client, saved):
    given = "create_pr=True, token='hf_write', layout='timm'"
    url = client(f"Adapter.load({str(saved[0])!r}).push_to_hub('alice/a', {given}).pr_url")
    assert url == f"{hub.url}/alice/a/discussions/1"
    assert "adapter_config.json" not in hub.repos["alice/a"].files("main")
    assert client(FETCH % ", revision='refs/pr/1'") == saved[1]


def test_a_second_push_takes_the_head_file_of_the_first_away(hub, client, saved):
    client(PUSH % (str(adapter(pool="mean").save(saved[0])), "token='hf_write'"))
    assert "head.safetensors" in hub.repos["alice/a"].files("main")
    client(PUSH % (str(adapter(head=False).save(saved[0])), "token='hf_write'"))
    assert "head.safetensors" not in hub.repos["alice/a"].files("main")
    assert client(FETCH % "") == adapter(head=False).digest()


def test_save_pretrained_keeps_a_folder_and_pushes(hub, client, saved, tmp_path):
    out = str(tmp_path / "named-so")
    given = f"{out!r}, push_to_hub=True, private=True, token='hf_write'"
    assert client(f"str(Adapter.load({str(saved[0])!r}).save_pretrained({given}))") == out
    assert Adapter.load(out).digest() == saved[1]
    assert hub.repos["alice/named-so"].private


def test_a_base_that_is_no_hub_id_does_not_spoil_the_card(hub, client, tmp_path):
    folder = adapter(base_model="vit_tiny_patch16_224").save(tmp_path / "a")
    client(PUSH % (str(folder), "token='hf_write'"))
    assert client("Adapter.load('alice/a').base_model") == "vit_tiny_patch16_224"


def test_push_with_xet_installed(hub, client, saved):
    """The client's other way to upload; files that the Hub takes as they are, for Xet has no server here."""
    pytest.importorskip("hf_xet")
    hub.lfs = False
    client("setattr(constants, 'HF_HUB_DISABLE_XET', False)")
    try:
        client(PUSH % (str(saved[0]), "token='hf_write'"))
        assert client("Adapter.from_pretrained('alice/a').digest()") == saved[1]
    finally:
        client("setattr(constants, 'HF_HUB_DISABLE_XET', True)")
        hub.lfs = True
