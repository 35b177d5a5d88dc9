"""What all tests share: where the code is, how its commands are run, and what an absent extra means."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)        # what the tests compute is too small to share

# A network of every kind that trains in a second on one core, as constructor arguments
TINY = dict(unet=dict(dim=32, dim_mults=[1, 2], num_blocks=1, attn_sizes=[16], head_dim=32, dropout=0.0),
            uvit=dict(patch_size=8, dim=32, depth=3, heads=2),
            iuvit=dict(patch_size=8, dim=64, depth=3, heads=2),
            ascend=dict(dim=32, dim_mults=[1, 2], num_blocks=1, attn_sizes=[16], head_dim=32, dropout=0.0))


def command(*args, cwd=None, processes=1, code=0):
    """Run `python args...` (under torchrun for several processes) in cwd and return its output, stdout then stderr.

    One core, so that several runs side by side do not wait for each other; the exit code is checked."""
    launch = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      f"--nproc_per_node={processes}", "--"]
    script, *rest = map(str, args)
    done = subprocess.run([*launch, str(ROOT / script), *rest], cwd=cwd, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, f"exit code {done.returncode}, not {code}, of {args}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def tiny(model, **net):
    """Flags of a tiny run of a model: the fewest pictures and samples, no bf16, a constant rate."""
    return ["--model", model, "--net", json.dumps({**TINY[model], **net}), "--batch", 8, "--sample-steps", 2,
            "--dtype", "float32", "--device", "cpu", "--warmup", 0, "--cooldown", 0]


def need(present, what, how):
    """Skip a test whose optional extra is absent, saying how to get it; REQUIRE_EXTRAS=1 makes that a failure."""
    if not present:
        message = f"{what} is not here: {how}"
        pytest.fail(message) if os.environ.get("REQUIRE_EXTRAS") else pytest.skip(message)


@pytest.fixture(autouse=True)
def leave_this_process_as_it_was():
    """A run owns its process: it catches Ctrl-C and chooses how torch multiplies. The tests after it must not see."""
    handlers = {s: signal.getsignal(s) for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")}
    precision, flash = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
    reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    yield
    sys.excepthook = sys.__excepthook__
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(reduced)
    for s, handler in handlers.items():
        signal.signal(s, handler)


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """A --data-dir that already holds 200 prepared shapes, for the runs of all tests."""
    folder = tmp_path_factory.mktemp("datasets")
    command("data.py", "prepare", "shapes", "--limit", 200, "--data-dir", folder)
    return folder
