"""Layouts become the tokens that the published builder makes; see fixtures/layouts/README.md."""

import json
from pathlib import Path

import pytest

from datasets.conditions.layout import Box, LayoutObject, layout_tokens

pytestmark = pytest.mark.parity

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "layout_tokens.json").read_text("utf-8"))


@pytest.mark.parametrize("flags", ["plain", "flags"])
@pytest.mark.parametrize("part", ["full", "crop", "flip"])
def test_tokens_are_the_published_builders(flags: str, part: str) -> None:
    objects = [
        LayoutObject(one["label"], Box(*one["box"]), *(bool(flag) for flag in one["flags"]))
        for one in FIXTURE["objects"]
    ]
    tokens = layout_tokens(
        objects,
        crop=Box(*FIXTURE["crops"][part]),
        mirror=part == "flip",
        flags_of=FIXTURE["num_classes_with_flags"] if flags == "flags" else None,
    )
    assert tokens.tolist() == FIXTURE["tokens"][f"{flags}_{part}"]
