"""Whatever the library saves: the same content gives the same bytes, and the umask decides who may read it."""

import os
import stat

import numpy as np
import pytest
import torch
from torch import nn

from lorarecycle import Surrogate, recycle
from lorarecycle.adapters.adapter import Head
from lorarecycle.fewshot.prototype_files import write_prototypes
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.generate import LoRAGenerator, ModelSoup, PeftAdapter, save_vector
from lorarecycle.report.page import write_report
from lorarecycle.runtime.checkpoint import Checkpoint
from lorarecycle.runtime.files import write_json, write_text


def checkpoint(path):
    body = nn.Linear(3, 2)
    with torch.no_grad():
        for i, parameter in enumerate(body.parameters()):
            parameter.fill_(i)
    adam = torch.optim.Adam(body.parameters(), lr=0.1)
    body(torch.ones(1, 3)).sum().backward()
    adam.step()
    run = {"settings": {"lr": 0.1, "z": 1, "a": 2}, "seed": 0}
    histories = {"loss": torch.zeros(5), "kl": torch.ones(5)}
    Checkpoint(path, run, modules={"body": body}, optimizer=adam, histories=histories, steps=5).write(3)


def surrogate(path):
    facts = {"adapter": "a", "adapter_digest": "d" * 64, "config": {"steps": 1, "lr": 0.1}}
    images, labels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1])
    Surrogate(images, labels, torch.ones(2, 2), ("x", "y"), 8, **facts).save(path)


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def savers(made, tiny_backbone, make_adapter):
    """Name of a file or folder -> what saves it there."""
    if not made:
        pair, vectors = [make_adapter(tiny_backbone, seed=i) for i in (0, 1)], [torch.ones(3), -torch.ones(3)]
        quick = {"epochs": 2, "batch_size": 2, "conv_layers": 6, "latent": 8}
        made["adapter"] = pair[0]
        made["soup"] = ModelSoup.fit(pair, vectors, quiet=True)
        made["icm"] = LoRAGenerator.fit(pair, vectors, config=quick, device="cpu", quiet=True)
    beside = made["adapter"].with_head(Head(torch.ones(3, 32), None, ("a", "b", "c"), "mean"))
    centres, labels = np.ones((2, 4), np.float32), np.array(["a", "b"])
    bare = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2), "w": torch.ones(2)}
    tasks = sample_tasks(torch.arange(4).repeat(6), n_way=2, n_shot=1, n_query=2, n_tasks=3, seed=0)
    return {
        "adapter": made["adapter"].save,
        "head beside": beside.save,
        "bare PEFT": PeftAdapter(bare, {"peft_type": "LORA", "r": 2, "lora_alpha": 4}).save,
        "soup.safetensors": made["soup"].save,
        "icm.safetensors": made["icm"].save,
        "surrogate.safetensors": surrogate,
        "checkpoint.safetensors": checkpoint,
        "vector.safetensors": lambda path: save_vector(path, torch.arange(3.0), text="cats", encoder="clip", n=3),
        "centres.npz": lambda path: write_prototypes(path, centres, labels, "0" * 64),
        "centres.safetensors": lambda path: write_prototypes(path, centres, labels, "0" * 64),
        "tasks.npz": tasks.save,
        "a.json": lambda path: write_json(path, {"b": 1, "a": 2}),
        "a.txt": lambda path: write_text(path, "text"),
    }


def files(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_same_bytes_and_the_rights_that_the_umask_leaves(savers, tmp_path, mask, file, folder):
    before, contents = os.umask(mask), []
    try:
        for i in range(4):  # an order that differs from call to call agrees by chance once or twice
            for name, save in savers.items():
                save(tmp_path / str(i) / name)
            found = files(tmp_path / str(i))
            contents.append({name: path.read_bytes() for name, path in found.items() if path.is_file()})
            for name, path in found.items():
                assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), name
    finally:
        os.umask(before)
    assert {name.split(os.sep)[0] for name in contents[0]} == savers.keys()
    for other in contents[1:]:
        assert [name for name in other if other[name] != contents[0][name]] == []
        assert other.keys() == contents[0].keys()


def test_a_run_and_its_report(tiny_backbone, make_adapter, tmp_path):
    before = os.umask(0o027)
    try:
        adapters = [make_adapter(tiny_backbone, seed=i, size=0.1) for i in range(2)]
        few = {"inversion": {"pictures": 5}, "meta": {"steps": 1, "n_way": 2, "n_shot": 1, "n_query": 1}}
        recycle(adapters, base=tiny_backbone, work_dir=tmp_path / "run", quiet=True, **few)
        write_report([tmp_path / "run"], tmp_path / "out" / "report.html", backbone=tiny_backbone)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in files(tmp_path).items()}
    assert {"run/run.json", "run/summary.json", "run/losses.csv", "out/report.html"} < modes.keys()
    assert {name: mode for name, mode in modes.items() if mode not in (0o640, 0o750)} == {}
