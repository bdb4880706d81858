"""A training that was stopped goes on to the same bits, and only from a checkpoint of its own."""

import errno
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lorarecycle.runtime.checkpoint import Checkpoint, differences
from lorarecycle.runtime.files import load_tensors, save_tensors
from lorarecycle.runtime.seeds import stream

STEPS = 9
RUN = {"settings": {"lr": 0.1, "layers": (1, 2)}, "seed": 0, "data": "a" * 64}


class Job:
    """Two small modules, one with a parameter that no loss reaches, and what trains them."""

    def __init__(self, path, run=RUN, optimizer=torch.optim.Adam, histories=True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)
        self.head.idle = nn.Parameter(torch.ones(2))
        self.optimizer = optimizer([*self.body.parameters(), *self.head.parameters()], lr=0.05)
        self.histories = {"loss": torch.zeros(STEPS)} if histories else {}
        modules = {"body": self.body, "head": self.head}
        self.checkpoint = Checkpoint(
            path, run, modules=modules, optimizer=self.optimizer, histories=self.histories, steps=STEPS
        )

    def train(self, until=STEPS, every=4):
        done = self.checkpoint.resume()
        for step in range(done, until):
            x = torch.randn(5, 3, generator=stream(0, step))
            loss = self.head(self.body(x)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.histories.setdefault("loss", torch.zeros(STEPS))[step] = loss.detach()
            if (step + 1) % every == 0:
                self.checkpoint.write(step + 1)
        return done

    def state(self):
        state = {**self.body.state_dict(prefix="body."), **self.head.state_dict(prefix="head."), **self.histories}
        return {name: tensor.clone() for name, tensor in state.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("histories", [True, False])
def test_going_on_ends_with_the_same_bits(tmp_path, optimizer, histories):
    path = tmp_path / "deep" / "c.safetensors"
    whole = Job(None, optimizer=optimizer)
    assert whole.train() == 0
    stopped = Job(path, optimizer=optimizer, histories=histories)
    assert stopped.train(until=7) == 0
    resumed = Job(path, optimizer=optimizer, histories=histories)
    assert resumed.train() == 4
    assert same(resumed.state(), whole.state())
    assert not same(stopped.state(), whole.state())
    assert resumed.histories["loss"][:4].tolist() == whole.histories["loss"][:4].tolist()
    assert Job(path, optimizer=optimizer).train() == 8
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]
    resumed.checkpoint.remove()
    resumed.checkpoint.remove()
    assert not path.exists()
    assert Job(path, optimizer=optimizer).train(until=1) == 0


def test_the_order_of_settings_and_tuples_do_not_matter(tmp_path):
    Job(tmp_path / "c").train()
    again = {"data": RUN["data"], "seed": 0, "settings": {"layers": [1, 2], "lr": 0.1}}
    assert Job(tmp_path / "c", again).checkpoint.resume() == 8


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"seed": 1}, "seed (0 there, 1 here)"),
        ({"settings": {"lr": 0.2, "layers": (1, 2)}}, "settings.lr (0.1 there, 0.2 here)"),
        ({"settings": {"lr": 0.1, "layers": None}}, "settings.layers ([1, 2] there, null here)"),
        ({"data": "b" * 64}, "data"),
        ({"data": "b" * 64, "seed": 1}, "seed (0 there, 1 here), data"),
        ({"backbone": "new"}, 'backbone (null there, "new" here)'),
    ],
)
def test_another_training_is_refused_by_what_differs(tmp_path, change, parts):
    path = tmp_path / "c.safetensors"
    Job(path).train()
    before = path.read_bytes()
    other = Job(path, {**RUN, **change})
    start = other.state()
    with pytest.raises(ValueError, match=rf"c\.safetensors must be of this training, .* in {re.escape(parts)}; take"):
        other.train()
    assert same(other.state(), start)
    assert path.read_bytes() == before


def rewrite(path, change=None, facts=None):
    """Change a checkpoint's tensors or metadata, its list of names kept up to date."""
    tensors, strings = load_tensors(path)
    if change:
        change(tensors)
    meta = {key: json.loads(value) for key, value in strings.items() if key != "format"}
    save_tensors(path, tensors, {**meta, "names": sorted(tensors), **(facts or {})})


def replaced(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.weight"), "must be whole, got one without head.weight"),
        (replaced("head.weight", lambda x: x[:1].clone()), r"float32 \[2, 4\] in head.weight, got .*\[1, 4"),
        (replaced("head.weight", lambda x: x.double()), "in head.weight, got torch.float64"),
        (replaced("head.weight", lambda x: x * torch.nan), "must be finite in head.weight, got NaN or infinite"),
        (replaced("body.1.running_var", lambda x: x * torch.inf), "must be finite in body.1.running_var"),
        (replaced("optimizer.head.bias.exp_avg", lambda x: x * torch.nan), "finite in optimizer.head.bias.exp_avg,"),
        (replaced("optimizer.head.bias.exp_avg", lambda x: x.half()), "exp_avg, got torch.float16"),
        (replaced("optimizer.head.bias.step", lambda x: x.double()), "step, got torch.float64"),
        (lambda t: t.pop("optimizer.head.bias.exp_avg"), "must be of the same optimiser and weights"),
        (replaced("history.loss", lambda x: x[:3].clone()), r"\[8\] in history.loss, got torch.float32 \[3\]"),
        (replaced("history.loss", lambda x: x.double()), "in history.loss, got torch.float64"),
        (lambda t: t.update({"optimizer.other.step": torch.ones(())}), "of the same optimiser and weights"),
    ],
)
def test_damage_is_one_clear_error_and_loads_nothing(tmp_path, change, message):
    path = tmp_path / "c.safetensors"
    Job(path).train()
    rewrite(path, change)
    job = Job(path)
    start = job.state()
    with pytest.raises(ValueError, match=rf"`checkpoint` .*c\.safetensors .*{message}.*remove this one") as caught:
        job.train()
    assert "\n" not in str(caught.value)
    assert same(job.state(), start)
    assert not job.optimizer.state


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"kind": "another"}, "must be a training's checkpoint, got another kind of file"),
        ({"format_version": 2}, "must be of format 1, got format 2"),
        ({"step": 0}, "must be of step 1 to 9, got step 0"),
        ({"step": 10}, "got step 10"),
        ({"step": "8"}, "got step '8'"),
        ({"step": True}, "got step True"),
        ({"names": ["more"]}, "must be whole, got one with .* missing or added"),
        ({"names": None}, "must be whole"),
        ({"run": None}, r"must be of this training, got one that differs in settings .*, seed \(null there, 0 here\)"),
    ],
)
def test_facts_that_do_not_fit(tmp_path, facts, message):
    path = tmp_path / "c.safetensors"
    Job(path).train()
    rewrite(path, facts=facts)
    with pytest.raises(ValueError, match=message):
        Job(path).train()


def test_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "c.safetensors"
    Job(path).train()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"c\.safetensors must be a whole safetensors file"):
        Job(path).train()
    save_file({"x": torch.ones(1)}, path, {"kind": "someone else's, no JSON"})
    with pytest.raises(ValueError, match="must be a training's checkpoint, got another kind of file"):
        Job(path).train()


def test_nothing_is_written_that_no_training_could_go_on_from(tmp_path):
    path = tmp_path / "c.safetensors"
    job = Job(path)
    job.train(until=5)
    before = path.read_bytes()
    with torch.no_grad():
        job.head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"head.weight became NaN or infinite by step 5; lower `lr`"):
        job.checkpoint.write(5)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    job = Job(path)
    job.train(until=5)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lorarecycle.runtime.files.os.replace", full)
    with pytest.raises(OSError, match=r"cannot write .*c\.safetensors: No space left on device"):
        job.checkpoint.write(5)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_places_where_no_file_can_be(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"`checkpoint` must be a file, got the folder"):
        Job(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"`checkpoint` must be a place that can be written to"):
        Job(tmp_path / "file" / "c.safetensors")
    Job(tmp_path / "deep" / "c.safetensors")
    assert not (tmp_path / "deep").exists(), "nothing is made before there is something to keep"


def test_differences():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) == []
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}}) == ["b.c (2 there, 3 here)", "a (1 there, null here)"]
    assert differences({"a": list(range(100))}, {"a": []}) == ["a"]
