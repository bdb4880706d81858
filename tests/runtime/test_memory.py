"""Free memory, also where the system counts fewer things than Linux does."""

import os
from pathlib import Path

import pytest
import torch

from lorarecycle.runtime.memory import free_memory, image_budget, total_memory

CPU = torch.device("cpu")


@pytest.fixture
def no_proc(monkeypatch):
    """A system without Linux's files."""
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))


def test_as_macos_counts(no_proc, monkeypatch):
    """It knows how many pages there are, but not how many are free."""

    def sysconf(name):
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert total_memory() == 1 << 32
    assert free_memory(CPU) == 1 << 31
    assert image_budget(CPU, None) == 1 << 30


def test_as_windows_counts(no_proc, monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert total_memory() is None
    assert free_memory(CPU) == 1 << 33


def test_here():
    total = total_memory()
    assert 0 < free_memory(CPU) <= (total or 1 << 60)
