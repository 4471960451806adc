"""Checkpoints under damage, full disks and kills: none is used that is not whole; runs end the same."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datasets.errors import SpaceError
from datasets.keys import canonical_json
from datasets.store import Store, WorkArea
from ldm.training.checkpoint import Checkpoint, Checkpoints, name_of, read, saved
from ldm.training.loop import History, Silent, train
from ldm.training.randomness import generator
from ldm.training.record import parsed, seal, sealed
from ldm.training.state import check_state, load_module, load_optimizer, module_tensors, optimizer_tensors
from ldm.training_config import Training

NUM_STEPS = 12
OF = {"training": {"lr": 0.01}, "inputs": {"latents": "ab"}}
NUM_TRIALS = 30
"""Of each kind of damage."""
NUM_KILLS = 30
KILLED_BYTES = 4_000_000

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One thread computes, so nothing is lost in a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class PowerCutError(Exception):
    """Ends a run between two steps."""


class Regression:
    """A small network in training, by the real loop; `before` is called before each step."""

    def __init__(self, *, before: Callable[[int], object] = lambda step: None, seed: int = 0) -> None:
        self.training = Training(
            num_images=4 * NUM_STEPS, batch_size=4, lr=0.01, keep_every_images=16, seed=seed
        )
        self.before, self.device = before, torch.device("cpu")
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 96), torch.nn.Tanh(), torch.nn.Linear(96, 1))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01, fused=True)

    def gradients(self, step: int) -> dict[str, Tensor]:
        self.before(step)
        self.num_steps = step + 1
        x = torch.randn(4, 8, generator=generator(self.training.seed, step, "x"))
        loss = (self.net(x).squeeze(1) - x.sin().sum(1)).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    def update(self, step: int) -> dict[str, Tensor]:
        del step
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {}

    def forget(self) -> None:
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        return module_tensors(self.net, "net") | optimizer_tensors(self.optimizer, "optimizer")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        check_state(tensors, self.tensors(), optimizers={"optimizer": self.optimizer})
        load_module(self.net, tensors, "net")
        load_optimizer(self.optimizer, tensors, "optimizer")

    def validates(self, images: int) -> bool:
        return images > 0

    def validate(self) -> Mapping[str, float]:
        return {"steps": float(self.num_steps) / 3}

    def heed(self, images: int, history: History) -> None:
        """Nothing follows."""

    def stops(self, history: History) -> bool:
        return False

    def look(self, history: History) -> Mapping[str, bytes]:
        return {}


def cut(at: int) -> Callable[[int], None]:
    """What ends a run before a step."""

    def before(step: int) -> None:
        if step == at:
            raise PowerCutError

    return before


def run(trainee: Regression, work: WorkArea) -> History:
    """Train with a checkpoint after every step."""
    return train(trainee, work, report=Silent(), of=OF, checkpoint_every_s=-1)


def area(root: Path) -> WorkArea:
    return Store(root).work("train", "0" * 64)


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """The state after each number of steps of a run left alone; the last one is its end."""
    states: list[dict[str, Tensor]] = []

    def note(step: int) -> None:
        states.append({name: value.clone() for name, value in trainee.tensors().items()})

    trainee = Regression(before=note)
    history = run(trainee, area(tmp_path_factory.mktemp("undisturbed")))
    states.append(trainee.tensors())
    return [Checkpoint(step, tensors, until(history, 4 * step)) for step, tensors in enumerate(states)]


def until(history: History, images: int) -> History:
    """What of a history was written down after so many images."""
    shorter = {name: [point for point in points if point[0] <= images] for name, points in history.items()}
    return {name: points for name, points in shorter.items() if points}


def assert_ends_the_same(work: WorkArea, undisturbed: list[Checkpoint]) -> None:
    """The run, started again, ends bit for bit as one left alone."""
    trainee = Regression()
    assert run(trainee, work) == undisturbed[-1].history
    assert same(trainee.tensors(), undisturbed[-1].tensors)


Files = dict[str, bytes]
KEPT = (4, 8, 9, 10)
"""Steps of the checkpoints that a run of ten steps leaves: two that stay, the newest two."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The work area of a run that was cut after ten steps."""
    return files_of(tmp_path_factory.mktemp("cut"), seed=0)


@pytest.fixture(scope="module")
def files_of_another(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The same of a run with another seed."""
    return files_of(tmp_path_factory.mktemp("another"), seed=1)


def files_of(root: Path, *, seed: int) -> Files:
    work = area(root)
    with suppress(PowerCutError):
        run(Regression(before=cut(10), seed=seed), work)
    assert saved(work) == list(KEPT)
    return {path.name: path.read_bytes() for path in work.path("any").parent.iterdir()}


def one_file(draws: random.Random, *, newest_first: bool = True) -> tuple[int, str]:
    """A file to damage, mostly of the newest checkpoint, and its step."""
    step = draws.choices(KEPT, (1, 1, 2, 6))[0] if newest_first else draws.choice(KEPT)
    return step, f"{name_of(step)}.{draws.choice(['json', 'safetensors'])}"


def flip(files: Files, draws: random.Random) -> set[int]:
    step, name = one_file(draws)
    data = bytearray(files[name])
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    files[name] = bytes(data)
    return {step}


def shorten(files: Files, draws: random.Random) -> set[int]:
    step, name = one_file(draws)
    files[name] = files[name][: draws.randrange(len(files[name]))]
    return {step}


def lengthen(files: Files, draws: random.Random) -> set[int]:
    step, name = one_file(draws)
    files[name] += draws.randbytes(draws.randint(1, 4096))
    return {step}


def zero_a_page(files: Files, draws: random.Random) -> set[int]:
    step, name = one_file(draws)
    data = files[name]
    start = draws.randrange(0, len(data), 512)
    files[name] = data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]
    assert files[name] != data
    return {step}


def swap_one_file(files: Files, draws: random.Random) -> set[int]:
    ending = draws.choice(["json", "safetensors"])
    first, second = steps = draws.sample(KEPT, 2)
    one, other = f"{name_of(first)}.{ending}", f"{name_of(second)}.{ending}"
    files[one], files[other] = files[other], files[one]
    return set(steps)


def swap_both_files(files: Files, draws: random.Random) -> set[int]:
    first, second = steps = draws.sample(KEPT, 2)
    for ending in ("json", "safetensors"):
        one, other = f"{name_of(first)}.{ending}", f"{name_of(second)}.{ending}"
        files[one], files[other] = files[other], files[one]
    return set(steps)


def tell_another_step(files: Files, draws: random.Random) -> set[int]:
    step, _ = one_file(draws)
    name = f"{name_of(step)}.json"
    record = parsed(files[name], name=name)
    told = draws.choice([other for other in range(20) if other != step])
    files[name] = sealed(record.model_copy(update={"step": told}))
    return {step}


def put_a_stale_copy(files: Files, draws: random.Random) -> set[int]:
    old, new = sorted(draws.sample(KEPT, 2))
    for ending in draws.choice([("json",), ("safetensors",), ("json", "safetensors")]):
        files[f"{name_of(new)}.{ending}"] = files[f"{name_of(old)}.{ending}"]
    return {new}


def lose_one_file(files: Files, draws: random.Random) -> set[int]:
    step, _ = one_file(draws)
    del files[f"{name_of(step)}.safetensors"]
    return {step}


DAMAGE = [
    *(flip, flip, shorten, lengthen, zero_a_page, swap_one_file, swap_both_files),
    *(tell_another_step, put_a_stale_copy, lose_one_file),
]


def fill(root: Path, files: Files) -> WorkArea:
    """A work area that holds just these files."""
    work = area(root)
    for name, data in files.items():
        work.path(name).write_bytes(data)
    return work


def check_fallback(work: WorkArea, damaged: set[int], undisturbed: list[Checkpoint]) -> None:
    """The newest good checkpoint is loaded as it was, and each one passed over was reported."""
    checkpoints = Checkpoints(work, of=OF)
    found = checkpoints.load()
    good = max(set(KEPT) - damaged)
    assert found is not None
    assert found.step == good
    assert same(found.tensors, undisturbed[good].tensors)
    assert found.history == undisturbed[good].history
    passed_over = sorted((step for step in damaged if step > good), reverse=True)
    assert len(checkpoints.incidents) == len(passed_over)
    for step, incident in zip(passed_over, checkpoints.incidents, strict=True):
        assert incident.startswith(name_of(step))


@pytest.mark.parametrize("number", range(len(DAMAGE)), ids=[damage.__name__ for damage in DAMAGE])
def test_damage_is_never_loaded_and_the_good_one_before_it_is_used(
    number: int, files: Files, undisturbed: list[Checkpoint], tmp_path: Path
) -> None:
    for trial in range(NUM_TRIALS):
        draws = random.Random(f"{number} {trial}")
        changed = dict(files)
        damaged = DAMAGE[number](changed, draws)
        work = fill(tmp_path / str(trial), changed)
        check_fallback(work, damaged, undisturbed)
        if trial < 2:
            assert_ends_the_same(work, undisturbed)


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_file_of_another_run_is_never_loaded(
    ending: str, files: Files, files_of_another: Files, undisturbed: list[Checkpoint], tmp_path: Path
) -> None:
    name = f"{name_of(10)}.{ending}"
    work = fill(tmp_path, files | {name: files_of_another[name]})
    check_fallback(work, {10}, undisturbed)


def test_a_run_all_of_whose_checkpoints_are_damaged_starts_over_and_says_so(
    files: Files, undisturbed: list[Checkpoint], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = fill(tmp_path, {name: data[:-1] for name, data in files.items()})
    assert_ends_the_same(work, undisturbed)
    assert caplog.text.count("a damaged checkpoint is passed over") == len(KEPT)
    assert saved(work) == [4, 8, 11, 12]


def limit_file_size(num_bytes: int) -> None:
    """From here on no file of this process may grow larger: the system refuses in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def in_a_process(work: Callable[[], str]) -> str:
    """What the work returns in a process of its own."""
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(work()))
    process.start()
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


def run_until_the_disk_is_full(root: Path, *, at: int, num_bytes: int) -> str:
    """The message of a run for which the disk is full from a step on."""
    trainee = Regression(before=lambda step: limit_file_size(num_bytes) if step == at else None)
    try:
        run(trainee, area(root))
    except SpaceError as error:
        return str(error)
    return "there was room"


@pytest.mark.parametrize("point", range(20))
def test_a_full_disk_leaves_good_checkpoints_alone_and_the_run_ends_the_same_once_there_is_room(
    point: int, files: Files, undisturbed: list[Checkpoint], tmp_path: Path
) -> None:
    draws = random.Random(point)
    at, largest = draws.randint(2, NUM_STEPS - 1), len(files[f"{name_of(10)}.safetensors"])
    num_bytes = draws.randrange(largest)
    message = in_a_process(lambda: run_until_the_disk_is_full(tmp_path, at=at, num_bytes=num_bytes))
    assert "needs more room than there is" in message
    assert "free space there or name another place with --store" in message
    work = area(tmp_path)
    steps = saved(work)
    assert len(work.names()) == 2 * len(steps)
    assert steps[-1] in (at - 1, at)  # that of step `at` was being written
    for step in steps:
        assert same(read(work, step, of=OF).tensors, undisturbed[step].tensors)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert_ends_the_same(work, undisturbed)


def save_a_long_history(root: Path) -> str:
    """The message of a save whose tensors fit onto the disk, and whose JSON does not."""
    limit_file_size(10_000)
    history = {"loss": [(step, step / 7) for step in range(5_000)]}
    try:
        with Checkpoints(area(root)) as checkpoints:
            checkpoints.save(Checkpoint(2, {"weight": torch.ones(4)}, history))
    except SpaceError as error:
        return str(error)
    return "there was room"


def test_a_disk_that_is_full_before_the_last_file_leaves_none_of_the_checkpoint(tmp_path: Path) -> None:
    with Checkpoints(area(tmp_path)) as checkpoints:
        checkpoints.save(Checkpoint(1, {"weight": torch.zeros(4)}, {}))
    message = in_a_process(lambda: save_a_long_history(tmp_path))
    assert f"{name_of(2)}.json needs more room" in message
    assert area(tmp_path).names() == [f"{name_of(1)}.json", f"{name_of(1)}.safetensors"]


def save_for_ever(root: Path, told: Connection) -> None:
    """Save one checkpoint after the other from the newest on, and tell which are good."""
    with Checkpoints(area(root)) as checkpoints:
        found = checkpoints.load()
        for step in itertools.count(found.step + 1 if found else 1):
            tensors = {"weight": torch.full((KILLED_BYTES // 4,), float(step))}
            checkpoints.save(Checkpoint(step, tensors, {"loss": [(step, float(step))]}))
            checkpoints.wait()
            told.send(step)


def killed_while_saving(root: Path, *, after_s: float) -> int:
    """The last step that a process told was good before SIGKILL, so long after it had told the first."""
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=save_for_ever, args=(root, sender))
    process.start()
    sender.close()
    good = receiver.recv()
    time.sleep(after_s)
    process.kill()
    process.join()
    with suppress(EOFError):
        while True:
            good = receiver.recv()
    return good


def unfinished(work: WorkArea) -> list[Path]:
    """What a killed save left: half-written files, and tensors without their JSON."""
    folder = work.path("any").parent
    half = list(folder.glob(".tmp-*"))
    tensors = [path for path in folder.glob("*.safetensors") if not path.with_suffix(".json").exists()]
    return half + tensors


def test_a_run_killed_inside_a_save_has_its_last_checkpoint_whole(tmp_path: Path) -> None:
    work, draws, num_inside = area(tmp_path), random.Random(0), 0
    for _ in range(20 * NUM_KILLS):
        good = killed_while_saving(tmp_path, after_s=draws.uniform(0, 0.05))
        left = unfinished(work)
        num_inside += bool(left)
        checkpoints = Checkpoints(work)
        found = checkpoints.load()
        assert found is not None
        assert found.step in (good, good + 1)  # one that was good, but not told
        assert torch.equal(found.tensors["weight"], torch.full((KILLED_BYTES // 4,), float(found.step)))
        assert found.history == {"loss": [(found.step, float(found.step))]}
        assert checkpoints.incidents == []
        for path in left:
            if path.name.startswith(".tmp-"):
                path.unlink()  # as the sweep of a later save does, an hour after
        if num_inside == NUM_KILLS:
            break
    assert num_inside == NUM_KILLS
    assert len(work.names()) <= 2 * 3 + 1


def test_a_seal_is_over_every_byte() -> None:
    line = seal(canonical_json({"step": 1}))
    for place in range(len(line)):
        for other in (line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :], line[:place]):
            with pytest.raises(Exception, match="must be sealed by its own digest"):
                parsed(other, name="a.json")
