"""A run folder belongs to one process at a time, and to nobody once that process is gone, however it ended."""

import json
import signal
import socket
import subprocess
import sys

import pytest
import yaml
from tiny_runs import PRETRAIN, merge

from qirl.errors import UserError
from qirl.run.folder import RunFolder

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CONFIG = {"run": {"seed": 3}}
HOLDER = """
import sys
from qirl.run.folder import RunFolder
RunFolder.open(sys.argv[1], {"run": {"seed": 3}})
print("open", flush=True)
sys.stdin.read()
"""


def test_second_process_is_refused_until_the_first_is_killed(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "open\n"
        owner = json.loads((out / ".lock").read_text())
        assert (owner["pid"], owner["host"]) == (first.pid, socket.gethostname())
        for attempt in (RunFolder.open, RunFolder.check):
            words = f"in use by process {first.pid} on {owner['host']} since {owner['since']}"
            with pytest.raises(UserError) as caught:
                attempt(out, CONFIG)
            assert words in str(caught.value) and "\n" not in str(caught.value)
        first.send_signal(signal.SIGKILL)
        first.wait()
        RunFolder.open(out, CONFIG)


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["one process", "two ranks"])
def test_command_ends_with_code_2_on_all_ranks_in_a_folder_in_use(launcher, tmp_path):
    values = merge(PRETRAIN, {"model": {"architecture": {"rope_axes": [4, 6, 6]}}, "run": {"steps": 2}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "open\n"
        command = [sys.executable, *launcher, "-m", "qirl", "pretrain", str(tmp_path / "c.yaml"), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        first.kill()
    assert done.stderr.count(f"is in use by process {first.pid} on {socket.gethostname()} since") == 1, done.stderr
    assert done.returncode == 2 or (launcher and "exitcode  : 2" in done.stderr)
