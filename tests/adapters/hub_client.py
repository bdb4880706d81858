"""The Hub's client in a process of its own, and what the tests tell it to do."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors

from ..hub_server import Repo

FETCH = "Adapter.from_pretrained('alice/a', cache_dir={cache}%s).digest()"


PUSH = "Adapter.load(%r).push_to_hub('alice/a', %s).commit_url"

LOOP = """
import json, sys
from huggingface_hub import constants
from lorarecycle.adapters.adapter import Adapter
from lorarecycle.adapters.load_many import load_adapters
replies, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    try:
        reply = {"value": eval(json.loads(line))}
    except Exception as error:
        reply = {"kinds": [k.__name__ for k in type(error).__mro__], "message": str(error)}
    print(json.dumps(reply), file=replies, flush=True)
"""


class Refused(Exception):
    """What the client's process raised."""

    def __init__(self, kinds, message):
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds = kinds


class Client:
    """A Python process in which the Hub's client finds HF_ENDPOINT when it is imported."""

    def __init__(self, endpoint, home, **environment):
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            env={**kept, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self("constants.ENDPOINT") == endpoint  # everything is imported now

    def __call__(self, expression):
        self.process.stdin.write(json.dumps(expression) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        if "value" in reply:
            return reply["value"]
        raise Refused(reply["kinds"], reply["message"])

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def refused(client, expression, kind, message):
    start = time.monotonic()
    with pytest.raises(Refused, match=message) as caught:
        client(expression)
    assert time.monotonic() - start < 15  # the client's own retries wait for 23 seconds at least
    assert caught.value.kinds[0] == kind


def adapter(seed=0, *, head=True, pool="token", name="mine", base_model="some/base"):
    generator = torch.Generator().manual_seed(seed)
    pair = LoRAFactors(torch.randn(2, 6, generator=generator), torch.randn(6, 2, generator=generator), 0.5)
    classes = Head(torch.randn(2, 6, generator=generator), None, ("cat", "dog"), pool) if head else None
    return Adapter({"blocks.0.attn.q": pair}, classes, base_model, name=name)


def put(hub, folder, repo="alice/a", inside="", **facts):
    """Put a saved adapter into a repository, without the client."""
    files = {f"{inside}{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.repos[repo] = Repo(**facts)
    hub.repos[repo].commit("main", files, "first")
