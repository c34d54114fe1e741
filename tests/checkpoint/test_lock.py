import os
import signal
import time
from pathlib import Path

import pytest
from small_checkpoints import start_python

from pyper.checkpoint import folder_lock
from pyper.errors import LockedError

HOLD = """
import time
with folder_lock(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_at_once_and_told_who_writes(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "run"):
        start = time.monotonic()
        with pytest.raises(LockedError, match=f"process {os.getpid()} on ") as caught:
            folder_lock(tmp_path / "run").__enter__()
        assert time.monotonic() - start < 1
        assert caught.value.hint
    with folder_lock(tmp_path / "run"):
        pass


def test_another_process_is_refused_until_the_holder_is_killed(tmp_path: Path) -> None:
    holder = start_python(HOLD, tmp_path)
    with pytest.raises(LockedError, match=f"process {holder.pid} on "):
        folder_lock(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with folder_lock(tmp_path):
        pass


def test_the_lock_is_freed_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path):
        raise ZeroDivisionError
    with folder_lock(tmp_path):
        pass
