"""Claims: one does a piece of work, and what dead processes claimed is free."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorarecycle.runtime import claims, owner
from lorarecycle.runtime.claims import Claims


def claim_of(folder, **changes):
    """Somebody's claim on "work"."""
    folder.mkdir(exist_ok=True)
    facts = {**json.loads(claims._describe()), **changes}
    (folder / "work").write_text(json.dumps(facts) + "\n")


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_of_two_gets_it_and_nothing_is_left(tmp_path):
    folder = tmp_path / "claims"
    one, other = Claims(folder), Claims(folder)
    with one.take("work") as mine:
        assert mine
        facts = json.loads((folder / "work").read_text())
        assert (facts["host"], facts["pid"]) == (owner.host(), os.getpid())
        assert facts["time"].endswith("+00:00")
        with other.take("work") as also:
            assert not also
        with other.take("else") as also:
            assert also
    with other.take("work") as mine:
        assert mine
    one.clear()
    assert not folder.exists()


def test_a_refused_claim_writes_nothing(tmp_path, monkeypatch):
    claim_of(tmp_path / "c")
    monkeypatch.setattr(claims, "_create_whole", lambda *_: pytest.fail("a file was written"))
    with Claims(tmp_path / "c").take("work") as mine:
        assert not mine


def test_a_file_where_claims_should_be(tmp_path):
    (tmp_path / "claims").touch()
    with (
        pytest.raises(NotADirectoryError, match="must be a folder of claims, got a file"),
        Claims(tmp_path / "claims").take("work"),
    ):
        pass


def test_of_many_threads_one_gets_it(tmp_path):
    counts = []

    def work(_):
        with Claims(tmp_path / "c").take("x") as mine:
            counts.append(mine)
            if mine:
                gate.wait(5)

    import threading

    gate = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, i) for i in range(8)]
        while len(counts) < 8:
            pass
        gate.set()
        for future in futures:
            future.result()
    assert sum(counts) == 1


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, False),
        ({"pid": "dead"}, True),
        ({"started": "1"}, True),  # another process has got its number
        ({"pid": "dead", "host": "other"}, False),
        ({"pid": "dead", "machine": "7"}, False),  # of a machine of this name
    ],
)
def test_whose_claims_are_free(tmp_path, changes, free):
    if changes.get("pid") == "dead":
        changes = {**changes, "pid": dead_pid()}
    claim_of(tmp_path / "c", **changes)
    with Claims(tmp_path / "c").take("work") as mine:
        assert mine == free


@pytest.mark.parametrize(
    ("run", "restart", "elsewhere", "free"),
    [("a", "0", {}, True), ("a", "1", {}, False), ("b", "0", {}, False), ("a", "0", {"host": "other"}, False)],
)
def test_claims_of_an_earlier_start_on_this_machine_are_free(tmp_path, monkeypatch, run, restart, elsewhere, free):
    """Each machine counts its restarts for itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    claim_of(tmp_path / "c", run=run, restart=restart, **elsewhere)
    with Claims(tmp_path / "c").take("work") as mine:
        assert mine == free


def test_a_claim_of_another_machine_that_gives_no_sign_of_life(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lorarecycle.runtime.claims.time.monotonic", lambda: now[0])
    claim_of(tmp_path / "c", host="other")
    watcher = Claims(tmp_path / "c")
    for moment, grows, free in ((0, False, False), (claims.STALE, True, False), (claims.STALE * 1.9, False, False)):
        now[0] = moment
        if grows:
            with open(tmp_path / "c" / "work", "a") as file:
                file.write(".")
        with watcher.take("work") as mine:
            assert mine == free
    now[0] = claims.STALE * 2.1
    with watcher.take("work") as mine:
        assert mine


def test_a_claim_grows_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    with Claims(tmp_path / "c").take("work"):
        before = (tmp_path / "c" / "work").stat().st_size
        for _ in range(1000):
            if (tmp_path / "c" / "work").stat().st_size > before + 2:
                break
            claims.time.sleep(0.01)
        else:
            pytest.fail("no sign of life")
    assert not (tmp_path / "c" / "work").exists()


def test_a_claim_that_was_taken_over_is_not_removed_by_its_first_owner(tmp_path):
    with Claims(tmp_path / "c").take("work"):
        claim_of(tmp_path / "c", host="other", token="new")
    assert json.loads((tmp_path / "c" / "work").read_text())["host"] == "other"


def test_a_claim_half_written_is_not_free(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "work").write_text('{"host')
    with Claims(tmp_path / "c").take("work") as mine:
        assert not mine
