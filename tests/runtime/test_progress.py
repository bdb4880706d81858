"""A bar in a terminal, lines in a file or pipe, nothing where nothing runs."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from lorarecycle.runtime import progress
from lorarecycle.runtime.progress import duration, track

JOB = """
import sys, time
from lorarecycle.runtime.progress import track
for _ in track(range(3), "meta-training", initial=2):
    time.sleep(0.15)
for _ in track([], "empty list"): pass
for _ in track((x for x in ()), "empty generator"): pass
for _ in track(range(5, 5), "resumed at the end", initial=5): pass
with track(range(0), "empty count") as bar: pass
for _ in track("ab", "quiet one", quiet=True): pass
"""


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_in_a_pipe_it_is_lines():
    done = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "\r" not in done.stderr
    assert line.startswith("meta-training: 5/5 steps, ")
    assert line.endswith(" s")
    assert "steps/s, done in 0." in line


def test_in_a_terminal_it_is_a_bar():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen([sys.executable, "-c", JOB], stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert text.startswith("\rmeta-training:  40%")
    assert "5/5" in text
    assert "steps/s" in text
    for absent in ("0it", "empty", "resumed", "quiet", "| 0/"):
        assert absent not in text


def test_a_line_every_half_minute_and_at_the_end(clock, capsys):
    for step in track(range(100), "meta-training"):
        clock[0] += 4
        if step == 9:
            assert lines(capsys) == ["meta-training: 8/100 steps, 0.25 steps/s, 6 min 8 s left"]
    found = lines(capsys)
    assert found[0] == "meta-training: 16/100 steps, 0.25 steps/s, 5 min 36 s left"
    assert len(found) == 100 // 8
    assert found[-1] == "meta-training: 100/100 steps, 0.25 steps/s, done in 6 min 40 s"


def test_what_an_earlier_run_did_counts_as_done_and_not_for_the_rate(clock, capsys):
    for _ in track(range(60, 100), "tune", initial=60):
        clock[0] += 1
    assert lines(capsys) == [
        "tune: 90/100 steps, 1.0 steps/s, 10 s left",
        "tune: 100/100 steps, 1.0 steps/s, done in 40 s",
    ]


def test_values_beside_the_count(clock, capsys):
    bar = track(range(2), "tune")
    for step in bar:
        clock[0] += 40
        bar.set_postfix(loss=f"0.{step}")
    bar.set_postfix(loss="after the end")
    assert lines(capsys) == [
        "tune: 1/2 steps, 0.025 steps/s, 40 s left, loss 0.0",
        "tune: 2/2 steps, 0.025 steps/s, 0.0 s left, loss 0.1",
        "tune: 2/2 steps, 0.025 steps/s, done in 1 min 20 s, loss 0.1",
    ]


def test_items_that_nobody_has_counted(clock, capsys):
    for _ in track((x for x in "abc"), "features", unit="batches"):
        clock[0] += 20
    assert lines(capsys) == [
        "features: 2 batches, 0.05 batches/s",
        "features: 3 batches, 0.05 batches/s, done in 1 min 0 s",
    ]


def test_a_count_that_is_moved_by_hand(clock, capsys):
    with track(range(4), "invert") as bar:
        assert bar.total == 4
        for n in (1, 3):
            clock[0] += 10
            bar.update(n)
    assert bar.done == 4
    assert lines(capsys) == ["invert: 4/4 steps, 0.2 steps/s, done in 20 s"]


def test_what_is_stopped_says_so(clock, capsys):
    def stop(error):
        for step in track(range(5), "train"):
            clock[0] += 1
            if step == 2:
                raise error

    with pytest.raises(KeyboardInterrupt):
        stop(KeyboardInterrupt())
    assert lines(capsys) == ["train: 2/5 steps, 0.67 steps/s, stopped after 3.0 s"]


@pytest.mark.parametrize("empty", [[], range(3, 3), (x for x in ())])
def test_nothing_to_do_shows_nothing(empty, capsys):
    assert list(track(empty, "empty", initial=3)) == []
    with track(empty, "empty"):
        pass
    assert lines(capsys) == []


def test_quiet_counts_and_shows_nothing(capsys):
    bar = track("abc", "quiet", quiet=True)
    assert list(bar) == ["a", "b", "c"]
    bar.set_postfix(loss=1, refresh=True)
    assert (bar.done, bar.total) == (3, 3)
    assert lines(capsys) == []


def test_a_broken_standard_error_stops_no_work(monkeypatch):
    class Broken:
        def isatty(self):
            return False

        def write(self, text):
            raise BrokenPipeError

    for stream in (Broken(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(track([1, 2], "work")) == [1, 2]


def test_durations():
    shown = [duration(s) for s in (0, 0.26, 9.4, 20, 59.6, 200, 3599.7, 7500)]
    assert shown == ["0.0 s", "0.3 s", "9.4 s", "20 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 5 min"]
