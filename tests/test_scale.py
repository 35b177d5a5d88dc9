"""What can happen to a long run on many machines: processes that die, nodes that join, disks that fill up."""
import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import data
from conftest import ROOT, command
from test_train import column, differences, flags_of, state, wait_for

DIES_ONCE_AT_STEP_3 = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import diffusion, train
draw_times, steps = diffusion.draw_times, []
def dying(*args):
    steps.append(1)
    store = train.dist.distributed_c10d._get_default_store()._underlying_non_prefix_store
    if len(steps) == 4 and os.environ["RANK"] == "1" and not Path("died").exists():
        Path("died").touch()
        store.set("exception_dump", "1")        # as NCCL does when it gives up, and then looks for in every group
        os.kill(os.getpid(), signal.SIGKILL)
    assert not store.check(["exception_dump"])
    return draw_times(*args)
diffusion.draw_times = dying
train.main()
"""


LOADER_FAILS_AT_STEP_2 = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data, train
read = data.Batches.__getitem__
def failing(self, step):
    if step == 2:
        HOW
    return read(self, step)
data.Batches.__getitem__ = failing
if __name__ == "__main__":
    data.run(train.main)
"""


@pytest.mark.parametrize("how, code, says", [
    ("raise OSError('the disk is gone')", 2, "error: OSError: the disk is gone"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 1, "rank 0 failed at step")], ids=["raises", "killed"])
def test_a_run_ends_whose_loader_fails(datasets, tmp_path, how, code, says):
    """Loaders outlive a SIGTERM, and Python, which sends them one before it ends, would wait for them for ever."""
    driver = tmp_path / "driver.py"
    driver.write_text(LOADER_FAILS_AT_STEP_2.replace("HOW", how))
    flags = [*flags_of("uvit", datasets, "run"), "--steps", 20, "--workers", 2]
    run = subprocess.run([sys.executable, driver, *map(str, flags)], cwd=tmp_path, capture_output=True, text=True,
                         timeout=100)
    assert run.returncode == code and says in run.stderr, run.stderr


def descendants(pid):
    """A process and all that it has started, as a scheduler finds them, the first one first."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):                                      # it has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def tell(process, sig):
    """Signal a process and all that it has started, as a scheduler does, unless it has ended."""
    for pid in descendants(process.pid) if process.poll() is None else []:
        with contextlib.suppress(ProcessLookupError):                           # it was quick to obey
            os.kill(pid, sig)


@pytest.mark.parametrize("start", [0, 5])
def test_loaders_end_with_the_program_even_if_no_step_is_left_for_them(datasets, start):
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, data, train
config, _, _ = train.parse(["--steps", "5", "--workers", "1"])
shares = data.Batches(data.open_set("shapes", {str(datasets)!r}), 2, range(2), 0, False)
batches = train.read_ahead(shares, config, {start}, torch.device("cpu"))
if __name__ == "__main__":
    raise data.UserError("as when a sheet cannot be written")"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "as when a sheet" in run.stderr, run.stderr


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(...) starts `torchrun ...` in an empty folder. What still runs at the end of the test is killed."""
    runs = []

    def start(*args):
        runs.append(subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, args)], cwd=tmp_path,
                                     text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                     env={**os.environ, "OMP_NUM_THREADS": "1"}))
        return runs[-1]

    yield start
    for run in runs:
        tell(run, signal.SIGKILL)


def test_torchrun_replaces_a_process_that_dies_and_the_run_goes_on_by_itself(torchrun, datasets, tmp_path):
    """The new processes must not look for the old ones, whose addresses are still in torchrun's store: without keys of
    their own, every second time they waited for each other in vain."""
    driver = tmp_path / "driver.py"
    driver.write_text(DIES_ONCE_AT_STEP_3)
    argv = [*flags_of("uvit", datasets, "run"), "--steps", 6, "--save-every", 1, "--timeout", 20]
    run = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=3", "--", driver, *argv, "--fresh")
    printed = run.communicate(timeout=240)[0]
    assert run.returncode == 0 and (tmp_path / "died").exists(), printed
    assert not (tmp_path / "run-old1").exists(), "it started over, since --fresh was still among the flags"
    command("train.py", *argv, "--out", "whole", cwd=tmp_path, processes=2)
    ends = [data.read_dict(tmp_path / out / "ckpt.pt") for out in ("run", "whole")]
    assert differences(*map(state, ends)) == {}
    assert column("step", tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_two_nodes_have_the_losses_and_gradients_of_one_process_and_must_agree(torchrun, datasets, tmp_path):
    argv = [*flags_of("ascend", datasets, "nodes"), "--steps", 3]

    def nodes(*more):                                   # flags of each
        with socket.socket() as free:
            free.bind(("", 0))                          # to a port that the system chooses
            port = f"--master_port={free.getsockname()[1]}"
        runs = [torchrun("--nnodes=2", "--nproc_per_node=1", f"--node_rank={i}", "--master_addr=127.0.0.1", port,
                         ROOT / "train.py", *argv, *flags) for i, flags in enumerate(more)]
        return [run.communicate(timeout=240)[0] for run in runs], [run.returncode for run in runs]

    printed, codes = nodes([], [])
    assert codes == [0, 0], "\n".join(printed)
    command("train.py", *argv, "--out", "one", cwd=tmp_path)
    assert column("loss", tmp_path / "nodes") == pytest.approx(column("loss", tmp_path / "one"), rel=1e-4)
    assert column("grad_norm", tmp_path / "nodes") == pytest.approx(column("grad_norm", tmp_path / "one"), rel=1e-3)
    command("data.py", "prepare", "shapes", "--limit", 100, "--data-dir", tmp_path)
    printed, codes = nodes(["--steps", 4], ["--steps", 4, "--out", "elsewhere", "--data-dir", tmp_path, "--lr", 0.5])
    assert 0 not in codes
    for text in printed:
        assert re.search(r"processes differ \(steps done in --out: \[3, 0\]; pictures, by their fingerprint: "
                         r"\['\w{16}', '\w{16}'\]; lr: \[[\d.]+, 0\.5\]\): all nodes need the same flags, --out and "
                         "pictures", text), text


def test_a_job_of_which_a_scheduler_tells_every_process_to_stop_saves(torchrun, datasets, tmp_path):
    """torchrun passes on what the processes have been told already: the second signal must not kill."""
    argv = [*flags_of("uvit", datasets, "run"), "--steps", 10**6, "--workers", 1]
    run = torchrun("--standalone", "--nproc_per_node=2", "--", ROOT / "train.py", *argv)
    wait_for(tmp_path / "run" / "log.csv", run)
    tell(run, signal.SIGTERM)
    printed = run.communicate(timeout=60)[0]
    assert "the same command resumes" in printed, printed
    assert data.read_dict(tmp_path / "run" / "ckpt.pt")["step"] == column("step", tmp_path / "run")[-1]


def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(datasets, tmp_path):
    argv = [*map(str, flags_of("uvit", datasets, "run"))]
    command("train.py", *argv, cwd=tmp_path)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()

    def small_files():                                                          # as on a disk with that much room
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    done = subprocess.run([sys.executable, ROOT / "train.py", *argv, "--steps", "4"], cwd=tmp_path, text=True,
                          capture_output=True, preexec_fn=small_files, env={**os.environ, "OMP_NUM_THREADS": "1"})
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.endswith(errors[0] + "\n"), "it is not the last line"
    assert "ckpt.pt" in errors[0] and "File too large" in errors[0], errors
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before and not list(tmp_path.rglob("*.part"))


DELETES_ITS_FOLDER = f"""
import shutil, sys
sys.path.insert(0, {str(ROOT)!r})
import data, diffusion, train
draw_times = diffusion.draw_times
diffusion.draw_times = lambda *args: shutil.rmtree("run", ignore_errors=True) or draw_times(*args)
data.run(train.main)
"""


def test_a_run_whose_folder_is_deleted_ends_in_one_line_and_writes_nowhere_else(datasets, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DELETES_ITS_FOLDER)
    printed = command(driver, *flags_of("uvit", datasets, "run"), cwd=tmp_path, code=2)
    assert "error:" in printed and "run" in printed and "Traceback" not in printed
    assert os.listdir(tmp_path) == ["driver.py"]


def test_a_run_may_go_on_with_another_number_of_processes_and_micro_batches(datasets, tmp_path):
    argv = flags_of("uvit", datasets, "run")
    command("train.py", *argv, cwd=tmp_path)
    command("train.py", *argv, "--steps", 4, "--accum", 2, cwd=tmp_path, processes=2)
    command("train.py", *argv, "--steps", 4, "--out", "whole", cwd=tmp_path)
    assert column("loss", tmp_path / "run") == pytest.approx(column("loss", tmp_path / "whole"), rel=1e-4)
