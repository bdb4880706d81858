"""Several processes on one run: the result of one, whatever their number, and a run that goes on with fewer."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lorarecycle import Adapter, Backbone
from lorarecycle.runtime.files import LEFTOVER, load_tensors
from lorarecycle.vit.lora import LoRA

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
JOB = str(Path(__file__).with_name("job.py"))


MEET, RESUME = (str(Path(__file__).with_name(name)) for name in ("meet.py", "resume.py"))


def torchrun(
    processes: int, *command: str, restarts: int = 0, machines: tuple[str, ...] = ("--standalone",), **more
) -> subprocess.Popen:
    options = [*machines, "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        **more,
    )


def end(process: subprocess.Popen, timeout: float = 400) -> str:
    """Output of a process that must end well."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    return output


def results(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_tensors(folder / f"{name}.safetensors")[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, JOB, str(folder), "guide", "episodes"], env=environment, timeout=400)
    assert done.returncode == 0
    return folder


@pytest.mark.medium
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_result_does_not_depend_on_the_number_of_processes(alone, tmp_path, processes):
    budget = ["--budget", "0"] if processes == 4 else []  # images from disk as well
    output = end(torchrun(processes, JOB, str(tmp_path), "guide", "episodes", *budget))
    for rank in range(processes):
        assert f"rank {rank} is done" in output
    for name in ("guide", "episodes"):
        one, several = results(alone, name), results(tmp_path, name)
        assert one.keys() == several.keys()
        assert one["losses"].std() > 0
        assert len(one["accuracies"].unique()) > 2
        for key, value in one.items():  # sums in another order, nothing else
            torch.testing.assert_close(several[key], value, rtol=1e-3, atol=1e-5, msg=f"{name}, {key}")
        shared = [sorted(p.name for p in (f / f"work-{name}" / "surrogates").iterdir()) for f in (alone, tmp_path)]
        assert shared[0] == shared[1]
        for file in shared[0]:
            assert load_tensors(alone / f"work-{name}" / "surrogates" / file)[0]["images"].equal(
                load_tensors(tmp_path / f"work-{name}" / "surrogates" / file)[0]["images"]
            )
    assert not [*tmp_path.rglob(f"{LEFTOVER}*"), *tmp_path.rglob("claims")]


@pytest.mark.slow
def test_machines_that_count_their_restarts_differently_find_one_another(tmp_path):
    """Two agents, as on two machines: the one whose process died counts a restart, the other starts anew without."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    machines = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", place)
    agents = [torchrun(1, MEET, str(tmp_path), restarts=2, machines=machines) for _ in range(2)]
    for agent in agents:
        end(agent, timeout=100)
    said = sorted((tmp_path / f"of-{rank}").read_text() for rank in range(2))
    assert said == ["1 0", "1 1"], "ranks 0 and 1, after no and one restart"


@pytest.mark.slow
def test_a_run_of_four_is_finished_by_two(alone, tmp_path):
    """Killed whole while images are made: what is there stays, and others go on."""
    process = torchrun(4, JOB, str(tmp_path), "episodes")
    made, deadline = tmp_path / "work-episodes" / "surrogates", time.monotonic() + 200
    while not list(made.glob("0*.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    time.sleep(0.5)
    before = {path: path.stat().st_ino for path in made.glob("0*.safetensors")}
    assert before
    end(torchrun(2, JOB, str(tmp_path), "episodes"))
    assert all(path.stat().st_ino == inode for path, inode in before.items()), "made once"
    for key, value in results(alone, "episodes").items():
        torch.testing.assert_close(results(tmp_path, "episodes")[key], value, rtol=1e-3, atol=1e-5)
    assert not [*tmp_path.rglob(f"{LEFTOVER}*"), *tmp_path.rglob("claims")]


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    """The first one reads Adam's state; the other has it from the first."""
    end(torchrun(2, RESUME, str(tmp_path)))
    found = [json.loads((tmp_path / f"of-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["losses"]
    assert found[0]["moved"]
    assert found[0]["steps before"] == 5
    assert len(set(found[0]["digests"])) == 1


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    backbone = Backbone.load("demo")
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        lora = LoRA.random(backbone, generator=generator)
        for parameter in lora.lora_B.values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        lora.to_adapter(name=f"a{i}", like=backbone).save(tmp_path / "many" / f"a{i}")
    settings = [
        "--base",
        "demo",
        "--inversion.pictures",
        "20",
        "--meta.steps",
        "2",
        "--meta.n-query",
        "1",
        "--quiet",
        "--dtype",
        "float32",
    ]
    command = ["-m", "lorarecycle", "recycle", str(tmp_path / "many"), *settings]
    output = end(torchrun(2, *command, "--output", str(tmp_path / "out")))
    assert output.count(str(tmp_path / "out")) == 1, "one process writes and says so"
    assert (tmp_path / "out-run" / "meta_lora").is_dir()
    done = subprocess.run([sys.executable, *command, "--output", str(tmp_path / "one")], timeout=300)
    assert done.returncode == 0
    one, two = (Adapter.load(tmp_path / name) for name in ("one", "out"))
    for site in one.sites:
        torch.testing.assert_close(one.delta(site), two.delta(site), rtol=1e-3, atol=1e-5)
