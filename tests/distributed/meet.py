"""What the processes of a test run: they meet, rank 1 dies once while 0 is busy, and those of the next start
add up their ranks.

torchrun ... tests/distributed/meet.py FOLDER
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lorarecycle.runtime.distributed import join, leave

folder, count = Path(sys.argv[1]), os.environ["TORCHELASTIC_RESTART_COUNT"]
died = folder / "died"
first = not died.exists()  # asked before the ranks meet, as rank 1 may be dead right after
group = join(torch.device("cpu"))
if first:
    if group.rank == 1:
        died.touch()
        os._exit(7)
    time.sleep(90)  # its torchrun ends it: nothing failed on this machine
total = torch.tensor([group.rank])
group.add(total)
leave()
assert not dist.is_initialized()
(folder / f"of-{os.environ['RANK']}").write_text(f"{int(total)} {count}")
