"""Several nodes: torchrun's agents on this machine; the Slurm script with stand-ins for Slurm."""

import contextlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import small_runs
from helpers.small_runs import LONG, SMALL, Running, all_gone, progress
from helpers.trees import ROOT

from tests.scripts.test_torchrun import FLAGS, assert_step_of_two_halves
from utils.runs import checkpoint

SCRIPT = ROOT / "slurm" / "train.sbatch"


def guide(program: str) -> list[list[str]]:
    """The commands of docs/SCALING.md that take several nodes, as words."""
    text = (ROOT / "docs" / "SCALING.md").read_text()
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)).splitlines()
    return [shlex.split(line) for line in lines if line.startswith(program)]


def in_short(command: list[str], tree: Path) -> list[str]:
    """A command of the guide with a network and data of seconds."""
    short = {
        "eca_resnet50": ["mobilenetv2", *map(str, SMALL[2:])],
        "DATA": [str(tree)],
        "main.py": [str(ROOT / "main.py")],
        "light_main.py": [str(ROOT / "light_main.py")],
        "--master-addr=HEAD": ["--master-addr=127.0.0.1"],
        "--master-port=29500": [f"--master-port={os.getpid() % 10000 + 20000}"],
        "--nproc-per-node=8": ["--nproc-per-node=1"],
    }
    return [word for old in command for word in short.get(old, [old])]


@pytest.mark.faults
def test_two_nodes_train_and_evaluate_as_one_process(call, tree, tmp_path):
    """By the guide's commands, one for each node; `FLAGS` come behind theirs."""
    agents = []
    for name, command in zip(("first", "second"), guide("torchrun"), strict=True):
        (tmp_path / name).mkdir()
        words = ["-m", "torch.distributed.run", *in_short(command[1:], tree), *FLAGS]
        agents.append(Running(tmp_path / name, *words, "--output", tmp_path / "two"))
    (code, out, err), (other, silent, errors) = (agent.end() for agent in agents)
    assert (code, other) == (0, 0), err + errors
    assert any("2 processes (DistributedDataParallel)" in line for line in out)
    assert any(line.startswith("done: best top-1") for line in out)
    again = f"torchrun --nnodes=2 --nproc-per-node=1 … {ROOT / 'main.py'} --resume "
    assert any(f"{again}{tmp_path / 'two' / 'last.pth'} --epochs 2" in line for line in out)
    assert silent == []  # rank 0 alone speaks and writes
    written = sorted(p.name for p in (tmp_path / "two").glob("*.pth"))
    assert written == ["best.pth", "last.pth", "previous.pth"]

    saved = checkpoint.load(tmp_path / "two" / "last.pth")
    assert_step_of_two_halves(saved["state_dict"], tree, batch=24, lr=0.001, seed=1)
    assert call("-e", "--resume", tmp_path / "two" / "best.pth", "--output", "one")[0] == 0
    one, row = json.loads((tmp_path / "one" / "evaluation.json").read_text()), saved["history"][0]
    assert one["images"] == 15  # 8 on the one node, 7 on the other
    assert (one["top1"], one["top5"]) == (row["val_top1"], row["val_top5"])
    assert abs(one["loss"] - row["val_loss"]) < 1e-6 * one["loss"]


SRUN = """
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(i)}) for i in (0, 1)]
signal.signal(signal.SIGUSR1, lambda signum, _: [task.send_signal(signum) for task in tasks])
codes = []
while tasks:
    for task in list(tasks):
        try:
            codes.append(task.wait(0.05))
        except subprocess.TimeoutExpired:
            continue
        tasks.remove(task)
        if codes[-1]:  # --kill-on-bad-exit
            for other in tasks:
                other.kill()
sys.exit(max(abs(code) for code in codes))
"""
SCONTROL = """
import sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1", "another", sep="\\n")
else:
    print(*sys.argv[1:], file=open("asked.txt", "a"))
"""
TORCHRUN = """
import runpy
runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
"""
AS_BASH = "import os, sys; os.execvp('bash', ['bash', *sys.argv[1:]])"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The commands and the environment that a job of two nodes finds."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (programs / name).write_text(f"#!{sys.executable}{code}")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(small_runs, "PATH", f"{programs}{os.pathsep}{small_runs.PATH}")
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)


@pytest.mark.faults
def test_a_job_before_its_time_limit_saves_and_is_requeued(slurm, tree, tmp_path):
    first, _ = (in_short(command, tree) for command in guide("sbatch"))
    assert first[:2] == ["sbatch", "slurm/train.sbatch"]
    command = ("-c", AS_BASH, SCRIPT, *first[2:], *LONG[len(SMALL) :])
    job = Running(tmp_path, *command)
    try:
        job.wait_for("epoch 2/500  step 2/4")
        (srun,) = job.children()
        job.process.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@120
        code, out, err = job.end()
        assert code == 0, err
        assert (tmp_path / "asked.txt").read_text() == f"requeue {os.getpid()}\n"
        assert all_gone([srun])
        saved = progress(tmp_path / "runs/big")
        assert (saved["epoch"], saved["step"]) >= (1, 2)
        assert any("no checkpoint in runs/big yet" in line for line in out)

        # The same command again; here with an end.
        job = Running(tmp_path, *command, "--epochs", saved["epoch"] + 1)
        code, out, err = job.end()
        assert code == 0, err
        assert "resuming runs/big/last.pth" in out
        assert any("2 processes (DistributedDataParallel)" in line for line in out)
        rows = (tmp_path / "runs/big" / "metrics.csv").read_text().splitlines()[1:]
        assert [int(row.split(",")[0]) for row in rows] == list(range(1, saved["epoch"] + 2))
        assert (tmp_path / "asked.txt").read_text().count("requeue") == 1  # a run at its end is not
    finally:
        with contextlib.suppress(OSError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()


@pytest.mark.faults
def test_a_job_of_light_main(slurm, tree, tmp_path):
    """On two nodes, where the guide asks for four."""
    _, command = (in_short(command, tree) for command in guide("sbatch"))
    assert command[1:4] == ["--nodes=4", "--gpus-per-node=8", "slurm/train.sbatch"]
    flags = (*SMALL[2:], "--epochs", 1)
    code, out, err = Running(tmp_path, "-c", AS_BASH, SCRIPT, *command[4:], *flags).end()
    assert code == 0, err
    assert any(line.startswith("network: eca_mobilenetv2") for line in out)
    assert any("2 processes (DistributedDataParallel)" in line for line in out)
    assert checkpoint.load(tmp_path / "runs/light" / "last.pth")["progress"]["epoch"] == 1
    assert not (tmp_path / "asked.txt").exists()


@pytest.mark.faults
def test_a_job_that_fails_is_not_requeued(slurm, tree, tmp_path):
    command = ("-c", AS_BASH, SCRIPT, ROOT / "main.py", "-b", 9, "--output", "run", tree)
    code, _, err = Running(tmp_path, *command).end()
    assert code not in (0, 143)
    assert any("does not divide over 2 devices: give 8 or 10" in line for line in err)
    assert not (tmp_path / "asked.txt").exists()


def test_the_script_is_bash_and_wants_a_run_folder(slurm, tmp_path):
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    done = subprocess.run(
        ["bash", SCRIPT, "main.py", "-a", "resnet18", "data"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: give the run a folder with --output DIR: a requeued job goes on in it\n"
    )
    assert stat.S_ISREG(SCRIPT.stat().st_mode)
    directives = re.findall(r"^#SBATCH (--[\w-]+)", SCRIPT.read_text(), re.M)
    assert len(set(directives)) == len(directives)  # the last of two would win without a word
