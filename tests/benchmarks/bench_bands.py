"""Memory and time of decoding 1024x1024 pixels whole and in bands, in the layout of vq-f4.

Each way has a process of its own, so that its peak is the process's.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.models.bands import decode_in_bands, seam_levels
from ldm.models.first_stage import VQModel, build_first_stage
from ldm.recipe import load_recipe

SIDE = 256
ROWS = 16
MAX_SHARE = 0.4
MAX_LEVELS = 0.5


def peak_gib() -> float:
    """The most memory this process had at a time; unlike ru_maxrss it starts anew with the program."""
    (line,) = [a for a in Path("/proc/self/status").read_text().splitlines() if a.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def decode(rows: int, output: str) -> None:
    """Decode one latent, whole for no rows; print what it took and store the picture."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = build_first_stage(load_recipe("celebahq").first_stage.model)
    assert isinstance(model, VQModel)
    model.eval().requires_grad_(False)
    z = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) / 8192
    loaded, start = peak_gib(), time.perf_counter()
    picture = decode_in_bands(model, z, rows=rows) if rows else model.decode(z)
    seconds = time.perf_counter() - start
    json.dump({"loaded_gib": loaded, "peak_gib": peak_gib(), "seconds": seconds}, sys.stdout)
    np.save(output, picture.numpy())


def measured(rows: int, output: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """What a child process took, and its picture."""
    command = [sys.executable, __file__, str(rows), str(output)]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
    return json.loads(done.stdout), torch.from_numpy(np.load(output))


@pytest.mark.benchmark
@pytest.mark.timeout(3600)
def test_a_large_picture_decodes_in_bands_in_two_fifths_of_the_memory(tmp_path: Path) -> None:
    whole, expected = measured(0, tmp_path / "whole.npy")
    banded, found = measured(ROWS, tmp_path / "banded.npy")
    seam = seam_levels(found, expected, rows=ROWS)
    for name, run in (("whole", whole), ("bands", banded)):
        rise = run["peak_gib"] - run["loaded_gib"]
        sys.stdout.write(
            f"\n{name}: peak {run['peak_gib']:.2f} GiB, {rise:.2f} GiB above the loaded model, "
            f"{run['seconds']:.0f} s"
        )
    share, slower = banded["peak_gib"] / whole["peak_gib"], banded["seconds"] / whole["seconds"]
    sys.stdout.write(f"\nbands of {ROWS} rows: {share:.2f} of the memory, {slower:.2f} of the time, {seam}\n")
    assert share <= MAX_SHARE
    assert seam.largest < MAX_LEVELS


if __name__ == "__main__":
    decode(int(sys.argv[1]), sys.argv[2])
