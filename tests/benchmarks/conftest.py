"""What the benchmarks share: two threads, and races of two functions side by side.

Times of a shared machine mean little; the ratio of two that ran one right after the other means more. Wall
and CPU time are both taken: while other work holds the cores, the CPU time is the steadier one.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import pytest
import torch

from ldm.bridge.diffusers import diffusers_config, to_diffusers
from ldm.first_stage_config import FirstStageModel
from ldm.models.first_stage import KLModel, VQModel

NUM_THREADS = 2
Work = Callable[[], object]


@dataclass(frozen=True)
class Race:
    """Two functions timed in turn: A B A B ..."""

    wall: list[float]
    """Time of the other over ours, round by round: above 1 ours is faster."""
    cpu: list[float]
    """The same of CPU time, all threads together."""
    seconds: tuple[float, float]
    """Median wall time of ours and of the other."""

    def __str__(self) -> str:
        ours, other = self.seconds
        wall, cpu = (
            f"{median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
            for ratios in (self.wall, self.cpu)
        )
        return f"{wall:>22} {cpu:>22} {ours:>9.3f} {other:>9.3f}"


def timed(work: Work) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def run_race(ours: Work, other: Work, *, rounds: int) -> Race:
    """Time both in turn, after one call of each that is not counted."""
    ours()
    other()
    times = [(timed(ours), timed(other)) for _ in range(rounds)]
    wall, cpu = ([b[i] / a[i] for a, b in times] for i in (0, 1))
    return Race(wall, cpu, (median(a[0] for a, _ in times), median(b[0] for _, b in times)))


def diffusers_twin(model: VQModel | KLModel, config: FirstStageModel) -> torch.nn.Module:
    """The model of the library diffusers with the same network and weights, in its default layout."""
    import diffusers

    settings = diffusers_config(config, scaling=1.0)
    twin = getattr(diffusers, settings["_class_name"]).from_config(settings)
    twin.load_state_dict(to_diffusers(model.state_dict()))
    return twin


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads, whatever the environment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def race() -> Callable[..., Race]:
    """`race(ours, other, rounds=5)` times both in turn."""
    return run_race


@pytest.fixture
def twin() -> Callable[[VQModel | KLModel, FirstStageModel], torch.nn.Module]:
    """`twin(model, config)` is the same network in diffusers."""
    return diffusers_twin


@pytest.fixture
def show(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Callable[[dict[str, Race]], None]:
    """`show(races)` prints a table, also without -s."""

    def table(races: dict[str, Race]) -> None:
        head = f"{'other / ours, wall':>22} {'CPU':>22} {'ours s':>9} {'other s':>9}"
        with capsys.disabled():
            print(f"\n{request.node.name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
            print(f"  {'against':<28} {head}")
            for name, result in races.items():
                print(f"  {name:<28} {result}")

    return table
