import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.training.diffusion import DiffusionTrainee
from ldm.training.first_stage import FirstStageTrainee
from ldm.training.randomness import seed_of
from ldm.training.virtual_shards import TreeSum, run_shards

Cats = Callable[[str], SampleReader]
KINDS = {"vq": (), "kl": ("first_stage.model.kind=kl", "first_stage.model.num_codes=null")}


def some_parts(count: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(count)
    return [torch.randn(1000, generator=draws) * 10.0**n for n in range(count)]


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """What the tree makes of parts that come one after the other."""
    sums = TreeSum()
    for part in parts:
        sums.add([part.clone()])
    (total,) = sums.total()
    return total


def sharded(
    tiny_recipe: Callable[..., Recipe], cats: Cats, num_shards: int, *overrides: str
) -> FirstStageTrainee:
    recipe = tiny_recipe(
        f"first_stage.training.virtual_shards={num_shards}",
        "first_stage.loss.adversarial_start_images=0",
        *overrides,
    ).first_stage
    return FirstStageTrainee(recipe, cats("train"), cats("held_out"))


def test_a_tree_adds_neighbours_first_and_an_odd_one_last() -> None:
    a, b, c, d, e = some_parts(5)
    assert torch.equal(tree_sum([a]), a)
    assert torch.equal(tree_sum([a, b, c]), (a + b) + c)
    assert torch.equal(tree_sum([a, b, c, d]), (a + b) + (c + d))
    assert not torch.equal(tree_sum([a, b, c, d]), ((a + b) + c) + d)
    assert torch.equal(tree_sum([a, b, c, d, e]), ((a + b) + (c + d)) + e)
    assert torch.equal(tree_sum([a, b, c, d, e, a]), ((a + b) + (c + d)) + (e + a))
    assert torch.equal(tree_sum([a, b, c, d, e, a, b]), ((a + b) + (c + d)) + ((e + a) + b))


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_any_power_of_two_of_ranks_adds_the_same_tree(num_ranks: int) -> None:
    parts = some_parts(8)
    own = [parts[start : start + 8 // num_ranks] for start in range(0, 8, 8 // num_ranks)]
    assert torch.equal(tree_sum([tree_sum(shards) for shards in own]), tree_sum(parts))


def test_every_shard_starts_from_the_same_buffers_and_counters_count_once() -> None:
    norm = torch.nn.BatchNorm2d(2)
    buffers, x = list(norm.buffers()), torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    alone = []
    for part in x.chunk(2):
        one = copy.deepcopy(norm)
        one(part)
        alone.append(one)

    def work(index: int) -> tuple[dict[str, Tensor], int]:
        loss = norm(x.chunk(2)[index]).square().sum()
        loss.backward()
        return {"loss": loss.detach()}, index

    logged, others = run_shards(work, 2, parameters=list(norm.parameters()), buffers=buffers)
    assert others == [0, 1]
    assert logged.keys() == {"loss"}
    for name in ("running_mean", "running_var"):
        halves = [getattr(one, name) for one in alone]
        assert not torch.equal(*halves)
        assert torch.equal(getattr(norm, name), (halves[0] + halves[1]) / 2)
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize("num_shards", [2, 4])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_in_shards_is_what_the_shards_do_alone_combined_by_hand(
    kind: str, num_shards: int, tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    trainee, by_hand = (sharded(tiny_recipe, cats, num_shards, *KINDS[kind]) for _ in range(2))
    logged = trainee.gradients(0) | trainee.update(0)
    expected = step_by_hand(by_hand, num_shards)
    found, wanted = trainee.tensors(), by_hand.tensors()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert {name: logged[name] for name in expected} == expected


def copy_of(trainee: FirstStageTrainee) -> FirstStageTrainee:
    """A trainee of its own state that reads with the same readers."""
    return copy.deepcopy(trainee, {id(r): r for r in (trainee.batches, trainee.held_out)})


def mean_by_hand(parts: list[Tensor]) -> Tensor:
    """The tree, written out for two and for four."""
    if len(parts) == 2:
        return (parts[0] + parts[1]) / 2
    return ((parts[0] + parts[1]) + (parts[2] + parts[3])) / 4


def step_by_hand(trainee: FirstStageTrainee, num_shards: int) -> Mapping[str, Tensor]:
    """The first step, each shard on a copy of its own."""
    x = trainee.batch(0)
    size = len(x) // num_shards
    parts = [x[index * size : (index + 1) * size] for index in range(num_shards)]
    copies = [copy_of(trainee) for _ in parts]
    passes, logs = [], []
    for index, (one, part) in enumerate(zip(copies, parts, strict=True)):
        passes.append(one.encode_shard(part, 0, index))
        logs.append(one.backward(passes[-1], part, 0, adversarial=True))
    leave_means(trainee.model, [one.model for one in copies])
    trainee.optimizer.step()
    trainee.ema.update(0)
    if trainee.config.kind == "vq":
        indices = torch.cat([encoded.quantized.indices for encoded in passes if encoded.quantized])
        trainee.codes.used_at[indices.unique()] = len(x)
    judges = [copy.deepcopy(trainee.discriminator) for _ in parts]
    for judge, part, encoded in zip(judges, parts, passes, strict=True):
        fake, real = judge(encoded.reconstruction.detach()), judge(part)
        (0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())).backward()
    leave_means(trainee.discriminator, judges)
    leave_buffers(trainee.discriminator, judges)
    trainee.discriminator_optimizer.step()
    return {name: mean_by_hand([log[name] for log in logs]) for name in logs[0]}


def leave_means(module: torch.nn.Module, copies: Sequence[torch.nn.Module]) -> None:
    for parameter, *own in zip(module.parameters(), *(list(one.parameters()) for one in copies), strict=True):
        gradients = [p.grad for p in own if p.grad is not None]
        assert len(gradients) == len(copies)
        parameter.grad = mean_by_hand(gradients)


def leave_buffers(module: torch.nn.Module, copies: Sequence[torch.nn.Module]) -> None:
    for buffer, *own in zip(module.buffers(), *(list(one.buffers()) for one in copies), strict=True):
        buffer.copy_(mean_by_hand(own) if buffer.is_floating_point() else own[0])


def test_dead_codes_move_onto_the_latents_of_all_shards_in_order(
    tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    overrides = ("first_stage.loss.revive_after_images=1",)
    apart, whole = (sharded(tiny_recipe, cats, number, *overrides) for number in (2, 1))
    x = whole.batch(0)
    passes = [whole.encode_shard(part, 0, 0).detached() for part in x.chunk(2)]
    together = whole.encode_shard(x, 0, 0).detached()
    logged = apart.track_latents(passes, 0, measured=True)
    assert logged == whole.track_latents([together], 0, measured=True)
    assert logged["watch/codes_revived"] > 0
    assert torch.equal(apart.codes.used_at, whole.codes.used_at)
    name = "quantize.embedding.weight"
    codes, expected = (dict(trainee.model.named_parameters())[name] for trainee in (apart, whole))
    torch.testing.assert_close(codes, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["noise", "dropout"])
def test_what_a_shard_draws_is_its_own_and_needs_no_other_shard(
    what: str, tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    overrides = KINDS["kl"] if what == "noise" else ("first_stage.model.dropout=0.5",)
    trainee = sharded(tiny_recipe, cats, 2, *overrides)
    x, step = trainee.batch(0)[:1], 3

    def shard(index: int) -> Tensor:
        torch.manual_seed(seed_of(trainee.training.seed, step, "layers"))  # as the loop does before a step
        return trainee.encode_shard(x, step, index).reconstruction

    first, second = shard(0), shard(1)
    assert not torch.equal(first, second)
    torch.manual_seed(99)
    assert torch.equal(trainee.encode_shard(x, step, 1).reconstruction, second)


def test_a_shard_of_the_unet_draws_time_steps_and_noise_of_its_own(
    vq_chain: object, diffusion_trainee: Callable[..., DiffusionTrainee]
) -> None:
    trainee = diffusion_trainee(vq_chain)
    samples = trainee.batches.at(0)
    losses = [trainee.backward(samples, 0, index)["loss"] for index in (0, 1, 1, 0)]
    assert losses[0] != losses[1]
    assert losses[2:] == [losses[1], losses[0]]
