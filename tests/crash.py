"""Kill a run at random moments with SIGKILL, which no program can catch, and see whether it recovers: a script.

    python tests/crash.py                     20 kills of one process; prints a tally, exit code 1 if any check fails
    python tests/crash.py --kills 5 --processes 2

A tiny network saves after every step, so that many kills strike while a checkpoint is being written. After each,
ckpt.pt must be absent (before the first was written) or whole. At the end the run must have the weights, averages,
optimiser state and log of an undisturbed run, bit for bit.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from conftest import ROOT, tiny
import data
from test_train import differences, state


def start(folder, out, steps, processes):
    launch = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      f"--nproc_per_node={processes}", "--"]
    argv = [*tiny("iuvit", dim=128, depth=5), "--data-dir", folder, "--out", folder / out, "--steps", steps,
            "--save-every", 1, "--log-every", 1, "--sample-every", 40, "--samples", 4, "--timeout", 60]
    return subprocess.Popen([*launch, ROOT / "train.py", *map(str, argv)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ckpt, log, broken, writing, step = folder / "killed" / "ckpt.pt", folder / "killed" / "log.csv", 0, 0, 0
        for kill in range(1, args.kills + 1):
            before = log.stat().st_mtime_ns if log.exists() else 0
            run = start(folder, "killed", 10**6, args.processes)
            if kill % 4:                                        # else at any moment, also before training begins
                while run.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
                    time.sleep(0.01)
            time.sleep(moments.uniform(0, 3))
            assert run.poll() is None, run.stderr.read().decode()
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            writing += Path(f"{ckpt}.part").exists()
            try:
                step = data.read_dict(ckpt)["step"] if ckpt.exists() else 0
            except data.UserError as e:
                broken += 1
                print(e)
            print(f"kill {kill:2}: the checkpoint is of step {step}", flush=True)
        for out in ("killed", "whole"):
            run = start(folder, out, step + 10, args.processes)
            errors = run.communicate()[1].decode()
            assert run.returncode == 0, errors
        ends = [data.read_dict(folder / out / "ckpt.pt") for out in ("whole", "killed")]
        same = differences(*map(state, ends)) == {}
        logs = [[row.rsplit(",", 3)[0] for row in (folder / out / "log.csv").read_text().splitlines()]
                for out in ("whole", "killed")]                 # without the clock's columns
        print(f"{args.kills} kills, {writing} of them while a checkpoint was written: {broken} checkpoints broken; the end "
              f"equals the undisturbed run's bit for bit: {same}; so does its log: {logs[0] == logs[1]}")
        sys.exit(broken > 0 or not same or logs[0] != logs[1])


if __name__ == "__main__":
    main()
