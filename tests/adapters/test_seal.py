"""The files of a saved adapter belong together, or the folder is refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors
from lorarecycle.adapters.peft.seal import SEAL
from lorarecycle.generate.parameters import PeftAdapter
from lorarecycle.runtime import settled
from lorarecycle.runtime.settled import TornFolderError

FILES = ("adapter_model.safetensors", "adapter_config.json", "lorarecycle.json")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(settled, "_WAITS", (0.0,))
    monkeypatch.setattr(os, "fsync", lambda _: None)


def make(seed, scaling=1.0, head=None, parts="qv"):
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"blocks.{i}.attn.{part}": LoRAFactors(
            torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator), scaling
        )
        for i in range(2)
        for part in parts
    }
    if head:
        head = Head(torch.randn(3, 8, generator=generator), torch.zeros(3), ("a", "b", "c"), head)
    return Adapter(factors, head=head, base_model="tiny", name=f"adapter {seed}")


CASES = {
    "scaling": (make(0), make(1, 8.0)),
    "weights only": (make(0), make(1)),
    "sites": (make(0), make(1, parts="qk")),
    "head beside": (make(0, head="mean"), make(1, head="mean")),
    "head beside, then none": (make(0, head="mean"), make(1)),
    "none, then head beside": (make(0), make(1, head="mean")),
    "head inside, then none": (make(0, head="token"), make(1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sealed", [True, False], ids=["own", "PEFT's"])
def test_a_save_that_stops_after_any_file(tmp_path, monkeypatch, case, sealed):
    """What loads is the one adapter or the other, whether or not the first one had a seal."""
    old, new = CASES[case]
    if not sealed and case == "head beside, then none":
        pytest.skip("a head that no save of ours put there stays")
    before = tmp_path / "before"
    old.save(before)
    if not sealed:
        weights = before / FILES[0]
        save_file(load_file(weights), weights, metadata={"format": "pt"})
        (before / FILES[2]).unlink()
        config = json.loads((before / FILES[1]).read_text())
        (before / FILES[1]).write_text(json.dumps({**config, "peft_version": "0.1"}))
    old_digest, new_digest = Adapter.load(before).weights_digest(), new.weights_digest()

    class Killed(BaseException):
        pass

    original = os.replace
    seen = []
    for stop in range(7):
        folder = tmp_path / str(stop)
        shutil.copytree(before, folder)
        done = []

        def replace(source, target, folder=folder, stop=stop, done=done):
            if os.path.dirname(target) == str(folder):
                if len(done) == stop:
                    raise Killed
                done.append(target)
            original(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            new.save(folder)
        except Killed:
            pass
        else:
            break
        monkeypatch.setattr(os, "replace", original)
        try:
            seen.append(Adapter.load(folder).weights_digest())
        except TornFolderError:
            seen.append("torn")
    else:
        pytest.fail("the save was never finished")
    assert Adapter.load(folder).weights_digest() == new_digest
    assert set(seen) <= {old_digest, new_digest, "torn"}
    assert seen[0] == old_digest
    assert ("torn" in seen) == (case != "weights only" or not sealed)  # the other files are equal


def test_mixed_files_are_refused(tmp_path):
    make(0).save(tmp_path / "a")
    make(1, 8.0, parts="qk").save(tmp_path / "b")
    for name in FILES:
        folder = tmp_path / f"mixed-{name}"
        shutil.copytree(tmp_path / "a", folder)
        shutil.copy(tmp_path / "b" / name, folder)
        with pytest.raises(
            TornFolderError, match=rf"files in .*mixed-{name} must be .* saved together, .*; save the adapter again"
        ):
            Adapter.load(folder)


def test_another_head_beside_is_refused(tmp_path):
    for i, name in enumerate("ab"):
        make(i, head="mean").save(tmp_path / name)
    shutil.copy(tmp_path / "b" / "head.safetensors", tmp_path / "a")
    with pytest.raises(TornFolderError, match=r"got another head\.safetensors than that of adapter_model"):
        Adapter.load(tmp_path / "a")


def test_changed_tensors_are_refused(tmp_path):
    folder = make(0).save(tmp_path / "a")
    path = folder / FILES[0]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TornFolderError, match=r"got changed tensors in adapter_model\.safetensors"):
        Adapter.load(folder)


def test_what_people_may_change(tmp_path):
    """Names, where the base lies, the card; a head given in place of a lost one; PEFT's two files alone."""
    adapter = make(0, head="mean")
    folder = adapter.save(tmp_path / "a", layout="vit")
    (folder / "README.md").write_text("mine")
    config = json.loads((folder / FILES[1]).read_text())
    (folder / FILES[1]).write_text(json.dumps({**config, "base_model_name_or_path": "/elsewhere"}))
    notes = json.loads((folder / FILES[2]).read_text())
    notes["name"], notes["head"]["class_names"] = "mine", ["x", "y", "z"]
    (folder / FILES[2]).write_text(json.dumps(notes))
    assert Adapter.load(folder).name == "mine"
    (folder / FILES[2]).unlink()
    assert Adapter.load(folder).weights_digest() == adapter.weights_digest()
    (folder / "head.safetensors").unlink()
    with pytest.raises(TornFolderError, match=r"got no head\.safetensors"):
        Adapter.load(folder)
    assert Adapter.load(folder, head=adapter.head).head is not None


def test_folders_without_a_seal_load_as_before(tmp_path):
    folder = make(0).save(tmp_path / "a")
    save_file(load_file(folder / FILES[0]), folder / FILES[0], metadata={"format": "pt"})
    config = json.loads((folder / FILES[1]).read_text())
    (folder / FILES[1]).write_text(json.dumps({**config, "lora_alpha": config["r"] * 3}))
    assert {pair.scaling for pair in Adapter.load(folder).factors.values()} == {3.0}


def test_a_damaged_seal(tmp_path):
    folder = make(0).save(tmp_path / "a")
    for seal in ("{", "[]", "{}"):
        save_file(load_file(folder / FILES[0]), folder / FILES[0], metadata={"format": "pt", SEAL: seal})
        with pytest.raises(TornFolderError, match="got a damaged seal"):
            Adapter.load(folder)


def test_bare_peft_parameters_are_sealed_too(tmp_path):
    for name, alpha in (("a", 2), ("b", 16)):
        tensors = {"base_model.model.x.lora_A.weight": torch.ones(2, 3).bfloat16(), "scale": torch.ones(())}
        PeftAdapter(tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}).save(tmp_path / name)
    assert PeftAdapter.load(tmp_path / "a").config["lora_alpha"] == 2
    shutil.copy(tmp_path / "b" / FILES[1], tmp_path / "a")
    with pytest.raises(TornFolderError, match=r"got another adapter_config\.json"):
        PeftAdapter.load(tmp_path / "a")


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    adapter = make(0, head="mean")
    contents = []
    for i in range(4):  # two of four orders of two names agree by chance at most
        folder = adapter.save(tmp_path / str(i) / "a")
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert all(content == contents[0] for content in contents)
