"""How many processors a process may use, and how many threads it then takes."""

import os
import sys

import pytest
import torch

from utils.system import faults, processes
from utils.system.processes import default_workers, processors, quota


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes control groups as Linux shows them: this process's own, and files with limits."""

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    monkeypatch.setattr(processes, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(processes, "OWN_GROUPS", tmp_path / "own")
    return write


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's affinities")
def test_a_part_of_the_machine_is_all_there_is(groups, monkeypatch):
    granted = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(granted)})
        assert processors() == default_workers() == 1
    finally:
        os.sched_setaffinity(0, granted)
    assert processors() == len(granted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(96))
    assert default_workers() == 4
    for ranks, workers in (("8", 4), ("32", 3), ("200", 1)):  # that torchrun starts here
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert default_workers() == workers


V1 = "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "limit", "count"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None, 64),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3, 3),
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "20000 100000\n"}, 0.2, 1),
        ("0::/of/the/host\n", {"cpu.max": "400000 100000\n"}, 4, 4),
        (V1, {"cpu/job/cpu.cfs_quota_us": "250000", "cpu/job/cpu.cfs_period_us": "100000"}, 2.5, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "50000"}, 4, 4),
        (V1, {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None, 64),
        ("0::/\n", {"cpu.max": "of another kind\n"}, None, 64),
        ("4:memory:/\n", {}, None, 64),
        ("\nof another kind\n0::\n", {"cpu.max": "200000 0\n"}, None, 64),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 99, 64),
    ],
)
def test_a_container_s_limit_counts_as_its_processors(
    groups, monkeypatch, own, files, limit, count
):
    groups(own, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert quota() == limit
    assert processors() == count


@pytest.mark.parametrize(("chosen", "threads"), [("", 1), ("3", 2)])
def test_threads_fit_the_limit_and_a_user_s_choice_stands(groups, monkeypatch, chosen, threads):
    groups("0::/\n", {"cpu.max": "100000 100000\n"})
    for name in processes.THREADS:
        monkeypatch.setenv(name, chosen)
    monkeypatch.setattr(faults, "end_children", lambda: True)
    former, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    with pytest.raises(SystemExit):
        faults.run_script(lambda: seen.append(torch.get_num_threads()))
    torch.set_num_threads(former)
    assert seen == [threads]
