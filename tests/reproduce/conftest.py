"""A rehearsal's world, made once for all tests of tables: cells that tables share are computed once."""

from functools import partial

import pytest
import torch

from lorarecycle.reproduce.prepare import prepare_run


@pytest.fixture(scope="session")
def rehearse(tmp_path_factory):
    """Prepares a rehearsal of an experiment, in one work folder for all of them."""
    work = tmp_path_factory.mktemp("reproduced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1)
        yield partial(prepare_run, quick=True, work_dir=work, device="cpu", dtype="float32", quiet=True)
