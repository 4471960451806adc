import numpy as np
import pytest

from datasets.conditions.layout import WHOLE, Box, LayoutObject, empty_layout, layout_tokens
from datasets.errors import ConfigError

LEFT = LayoutObject(3, Box(0.0, 0.25, 0.25, 0.5))
RIGHT = LayoutObject(7, Box(0.625, 0.5, 0.25, 0.25), is_occluded=True)


def corner(token: int) -> tuple[float, float]:
    return token % 90 / 89, token // 90 / 89


def test_a_layout_is_objects_then_empty_slots_then_the_crop() -> None:
    tokens = layout_tokens([LEFT, RIGHT])
    assert (tokens.shape, tokens.dtype.name) == ((92,), "int64")
    assert tokens[[0, 3]].tolist() == [3, 7]
    assert (tokens[6:90] == 8191).all()
    assert [corner(token) for token in tokens[90:]] == [(0, 0), (1, 1)]


def test_corners_lie_within_half_a_step_of_the_grid() -> None:
    draws = np.random.default_rng(0)
    for _ in range(50):
        x, y = draws.uniform(0, 0.5, 2)
        box = Box(x, y, *draws.uniform(0, 0.5, 2))
        _, first, second = layout_tokens([LayoutObject(0, box)])[:3]
        wanted = [(x, y), (x + box.width, y + box.height)]
        np.testing.assert_allclose([corner(first), corner(second)], wanted, atol=0.5 / 89 + 1e-9)


def test_mirroring_twice_changes_nothing_and_once_swaps_left_and_right() -> None:
    once = layout_tokens([LEFT], mirror=True)
    left, right = corner(once[1])[0], corner(once[2])[0]
    assert left == pytest.approx(0.75, abs=0.01)
    assert right == 1.0
    mirrored = LayoutObject(3, LEFT.box._replace(x=0.75))
    assert layout_tokens([mirrored], mirror=True).tolist() == layout_tokens([LEFT]).tolist()


def test_what_lies_outside_the_crop_is_left_out_and_the_rest_stays_where_it_was() -> None:
    cut = layout_tokens([LEFT, RIGHT], crop=Box(0.5, 0.0, 0.5, 1.0))
    whole = layout_tokens([RIGHT])
    assert cut[:90].tolist() == whole[:90].tolist()
    assert corner(cut[90])[0] == pytest.approx(0.5, abs=0.01)


def test_a_mirrored_crop_is_where_it_was_in_the_mirrored_picture() -> None:
    tokens = layout_tokens([], crop=Box(0.0, 0.0, 0.25, 1.0), mirror=True)
    assert corner(tokens[90])[0] == pytest.approx(0.75, abs=0.01)
    assert corner(tokens[91])[0] == 1.0


def test_objects_past_the_last_slot_are_left_out() -> None:
    objects = [LayoutObject(label, WHOLE) for label in range(40)]
    assert layout_tokens(objects)[:90:3].tolist() == list(range(30))


def test_shuffling_keeps_the_objects() -> None:
    objects = [LayoutObject(label, WHOLE) for label in range(20)]
    shuffled = layout_tokens(objects, shuffle=np.random.default_rng(0))[:60:3].tolist()
    assert shuffled != list(range(20))
    assert sorted(shuffled) == list(range(20))


def test_flags_go_into_the_class_when_asked() -> None:
    assert layout_tokens([RIGHT])[0] == 7
    assert layout_tokens([RIGHT], flags_of=500)[0] == 7 + 2 * 500


def test_nothing_is_not_an_empty_picture() -> None:
    assert (empty_layout() == 8191).all()
    assert layout_tokens([]).tolist() != empty_layout().tolist()


@pytest.mark.parametrize(
    ("one", "flags_of", "message"),
    [
        (LayoutObject(8191, WHOLE), None, r"a class must lie in 0..8190 .*, got class 8191"),
        (LayoutObject(500, WHOLE), 500, r"a class must lie in 0..499 .*, got class 500"),
        (
            LayoutObject(600, WHOLE, is_depiction=True, is_inside=True),
            700,
            r"its token below 8191, got class 600 and token 9000; .*with flags at most 511",
        ),
        (LayoutObject(1, Box(0.5, 0, 0.6, 1)), None, r"a box must lie inside the picture, .*clip it first"),
    ],
)
def test_what_has_no_token_is_refused(one: LayoutObject, flags_of: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_tokens([one], flags_of=flags_of)
