"""Steps over static buffers: nothing shows of the runs before capture, and captured steps do what plain ones do."""

import gc
import logging
import weakref

import pytest
import torch

from lorarecycle.runtime.graphs import Step, adam, held_weakly, reset, state_of, unchanged

CPU = torch.device("cpu")


class Descent:
    """A small training loop over buffers."""

    def __init__(self, device: torch.device) -> None:
        self.x = torch.linspace(-1, 1, 5, device=device).requires_grad_()
        self.optimizer = adam([self.x], device, betas=(0.5, 0.99))
        self.rates = torch.linspace(0.3, 0.1, 20, device=device)
        self.losses = torch.zeros(20, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)

    def take(self) -> None:
        loss = (self.x - 2).square().sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.param_groups[0]["lr"].copy_(self.rates.index_select(0, self.count)[0])
        self.optimizer.step()
        self.losses.index_copy_(0, self.count, loss.detach().view(1))
        self.count.add_(1)

    def state(self) -> list[torch.Tensor]:
        return [self.x, self.losses, self.count, *state_of(self.optimizer)]


def plain_adam(steps: int) -> torch.Tensor:
    x = torch.linspace(-1, 1, 5).requires_grad_()
    optimizer = torch.optim.Adam([x], betas=(0.5, 0.99))
    for rate in torch.linspace(0.3, 0.1, 20)[:steps]:
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad()
        (x - 2).square().sum().backward()
        optimizer.step()
    return x.detach()


def test_the_optimiser_is_plain_adam_from_its_first_step():
    descent = Descent(CPU)
    for _ in range(10):
        descent.take()
    torch.testing.assert_close(descent.x.detach(), plain_adam(10), rtol=1e-6, atol=1e-6)


def test_runs_before_capture_leave_no_trace():
    descent, fresh = Descent(CPU), Descent(CPU)
    places = [tensor.data_ptr() for tensor in descent.state()]
    unchanged(lambda: [descent.take() for _ in range(3)], descent.state())
    for tensor, place, other in zip(descent.state(), places, fresh.state(), strict=True):
        assert tensor.data_ptr() == place
        assert torch.equal(tensor, other)
    for _ in range(20):
        descent.take(), fresh.take()
    assert torch.equal(descent.losses, fresh.losses)


def test_what_a_failing_run_changed_is_put_back():
    x = torch.ones(2)

    def fails() -> None:
        x.add_(1)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        unchanged(fails, [x])
    assert torch.equal(x, torch.ones(2))


def test_runs_before_capture_do_not_go_beyond_the_last_step():
    """Tables have a row for each step, and the first call may be the last step."""
    descent = Descent(CPU)
    for _ in range(19):
        descent.take()
    before = [tensor.clone() for tensor in descent.state()]
    Step(descent.take, descent.state, CPU)._warm_up()
    assert all(map(torch.equal, descent.state(), before))


def test_an_object_with_a_step_of_its_own_goes_with_its_last_reference():
    """Its graph's memory goes too: nothing waits for the garbage collector."""
    descent = Descent(CPU)
    descent.step = Step(held_weakly(descent.take), held_weakly(descent.state), CPU)
    descent.step()
    gone = weakref.ref(descent)
    gc.disable()
    try:
        del descent
        assert gone() is None
    finally:
        gc.enable()


def test_reset_starts_anew_in_the_same_tensors():
    descent = Descent(CPU)
    for _ in range(5):
        descent.take()
    places = [tensor.data_ptr() for tensor in state_of(descent.optimizer)]
    reset(descent.optimizer)
    assert [tensor.data_ptr() for tensor in state_of(descent.optimizer)] == places
    assert not any(tensor.any() for tensor in state_of(descent.optimizer))
    assert descent.x.grad is None


def test_a_step_on_a_cpu_is_called_as_it_is():
    descent = Descent(CPU)
    step = Step(descent.take, descent.state, CPU)
    for _ in range(4):
        step()
    assert int(descent.count) == 4
    torch.testing.assert_close(descent.x.detach(), plain_adam(4), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_does_what_a_plain_one_does():
    gpu = torch.device("cuda")
    plain, captured = Descent(gpu), Descent(gpu)
    steps = [Step(each.take, each.state, gpu, graphs) for each, graphs in ((plain, False), (captured, None))]
    for _ in range(20):
        for step in steps:
            step()
    assert torch.equal(plain.losses, captured.losses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_the_last_step_may_be_the_first_that_is_captured():
    gpu = torch.device("cuda")
    plain, captured = Descent(gpu), Descent(gpu)
    for _ in range(19):
        plain.take(), captured.take()
    plain.take(), Step(captured.take, captured.state, gpu)()
    assert torch.equal(plain.losses, captured.losses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_memory_of_a_graph_goes_with_its_step():
    x = torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    step = Step(lambda: x.add_(torch.ones(1 << 26, device="cuda").sum()), lambda: [x], x.device)
    step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() > before
    del step
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_step_that_cannot_be_captured_runs_as_it_is(caplog):
    x = torch.zeros(1, device="cuda")
    step, stream = Step(lambda: x.add_(float((x + 1).item())), lambda: [x], x.device), torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING):
        step(), step()
    assert x.item() == 3
    assert torch.cuda.current_stream() == stream
    assert "could not be captured" in caplog.text
