"""The backend switch, the build of the C++ twins, imports, export and torch.compile."""

from __future__ import annotations

import logging
import shutil
import threading

import pytest
import torch
from lorarecycle.kernels import batch_norm_prior, cls_topk_gather, cpp, lora_qkv, use_backend
from lorarecycle.kernels.backend import choose_backend


def _inputs():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn((2, 2, 2, 9, 8), generator=generator)
    return q, k, torch.randn((2, 9, 6), generator=generator)


def test_unknown_backend():
    message = "`backend` must be one of auto, reference, triton, cpp, got 'cuda'"
    with pytest.raises(ValueError, match=message), use_backend("cuda"):
        pass


def test_the_choice_ends_with_the_block_and_stays_in_its_context():
    x = torch.zeros(1)
    seen = []
    with use_backend("reference"):
        assert choose_backend(x, has_cpp=True) == "reference"
        thread = threading.Thread(target=lambda: seen.append(choose_backend(x.double(), has_cpp=True)))
        with use_backend("cpp"):
            assert choose_backend(x, has_cpp=False) == "reference"
            with pytest.raises(ValueError, match=r"takes the dtype of the tensors, got 'cpp' for torch\.float64"):
                choose_backend(x.double(), has_cpp=True)
            thread.start()
            thread.join()
        assert choose_backend(x, has_cpp=True) == "reference"
    assert seen == ["reference"]  # "auto" in the other thread: no C++ for float64


@pytest.mark.parametrize(
    ("backend", "tensor", "message"),
    [
        ("cpp", torch.zeros(1, device="meta"), "got 'cpp' for meta; move the tensors to the CPU"),
        ("triton", torch.zeros(1).double(), "got 'triton' for torch.float64"),
    ],
    ids=["device", "dtype"],
)
def test_a_backend_that_cannot_run(backend, tensor, message, device):
    with use_backend(backend), pytest.raises(ValueError, match=message):
        choose_backend(tensor.to(device) if backend == "triton" else tensor, has_cpp=True)


def test_triton_needs_cuda_outside_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with (
        use_backend("triton"),
        pytest.raises(ValueError, match="got 'triton' for cpu; move the tensors to a CUDA"),
    ):
        choose_backend(torch.zeros(1), has_cpp=True)


def test_without_a_compiler_the_reference_runs_and_one_line_says_so(monkeypatch, caplog):
    def no_compiler():
        raise RuntimeError("no compiler\nand a long explanation")

    q, k, x = _inputs()
    with use_backend("reference"):
        expected = cls_topk_gather(q, k, x, 4)
    monkeypatch.setattr(cpp, "_loaded", None)
    monkeypatch.setattr(cpp, "_build", no_compiler)
    with caplog.at_level(logging.INFO, logger="lorarecycle"):
        for _ in range(3):
            actual = cls_topk_gather(q, k, x, 4)
    assert [record.getMessage() for record in caplog.records] == [
        "C++ kernels are not built (no compiler); plain PyTorch runs instead."
    ]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


class _Pruned(torch.nn.Module):
    def forward(self, q, k, x, weight, lora_A, lora_B):
        x, _ = cls_topk_gather(q, k, x, 4)
        return lora_qkv(x, weight, None, lora_A, lora_B)


def test_export_uses_the_reference():
    q, k, x = _inputs()
    args = (q, k, x, torch.randn(12, 6), torch.randn(3, 2, 6), torch.randn(12, 2))
    program = torch.export.export(_Pruned(), args)
    assert not [node for node in program.graph.nodes if "lorarecycle" in str(node.target)]
    assert torch.allclose(program.module()(*args), _Pruned()(*args), atol=1e-6)


def test_compiles_without_a_graph_break(cpp_backend):
    q, k, x = _inputs()
    running_mean, running_var = torch.zeros(3), torch.ones(3)

    def step(q, k, x, images):
        tokens, index = cls_topk_gather(q, k, x, 4)
        return tokens.sum() + batch_norm_prior(images, running_mean, running_var), index

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    images = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    results = []
    for run in (step, compiled):
        inputs = x.clone().requires_grad_(), images.clone().requires_grad_()
        loss, index = run(q, k, *inputs)
        results.append((loss.detach(), index, *torch.autograd.grad(loss, inputs)))
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="no C++ compiler or ninja here")
def test_the_cpp_twins_build_where_a_compiler_is():
    assert cpp.available(), "a build that fails would turn every test of a C++ twin into a skip"


def test_a_damaged_library_is_never_loaded(tmp_path, monkeypatch):
    """A damaged one, one without its hash, cut objects and the lock of a killed builder go; a whole one stays."""
    library, did = tmp_path / "x.so", []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: did.append("loaded"))

    def build():
        assert not list(tmp_path.iterdir()), "a build would make use of objects"
        library.write_bytes(b"library" * 100)
        did.append("built")

    def load():
        (tmp_path / "lock").write_text("of a process that is gone")
        (tmp_path / "x.o").write_bytes(b"")
        cpp._load(library, build)
        return did.pop()

    assert load() == "built"
    assert load() == "loaded"
    whole = library.read_bytes()
    for content in (b"", whole[:-300], whole[:300], whole[:9] + b"L" + whole[10:], whole + b"l"):
        library.write_bytes(content)
        assert load() == "built"
        assert load() == "loaded"
    for record in (b"", b"\xff" * 64):
        (tmp_path / "x.sha256").write_bytes(record)
        assert load() == "built"
    (tmp_path / "x.sha256").unlink()
    assert load() == "built"
    assert load() == "loaded"
    assert not did


def test_a_build_that_fails_leaves_no_hash(tmp_path):
    def fail():
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        cpp._load(tmp_path / "x.so", fail)
    assert not list(tmp_path.iterdir())
