"""Laws of canonical bytes and of keys."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.keys import artifact_key, canonical_json, sha256_file, sha256_hex

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=8)
values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=50)
@given(values)
def test_canonical_json_loses_nothing(value: object) -> None:
    data = canonical_json(value)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(texts, values, max_size=5), st.randoms())
def test_the_order_in_which_a_mapping_was_filled_does_not_matter(value: dict, random) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)


def test_canonical_json_is_compact_sorted_utf8() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "\u00e9"}) == b'{"a":"\xc3\xa9","b":[1,2.5]}'


def test_lists_and_tuples_are_the_same_value_but_1_and_1_0_are_not() -> None:
    assert canonical_json((1, 2)) == canonical_json([1, 2])
    assert canonical_json(1) != canonical_json(1.0)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), [-float("inf")], {1, 2}, b"x", object(), "\ud800"]
)
def test_values_without_one_finite_json_form_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"must be made of JSON types with finite numbers.*convert it"):
        canonical_json({"value": value})


def test_keys_that_json_would_turn_into_strings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be strings, got 1 .*use '1'"):
        canonical_json({"a": [{1: "x"}]})


def test_a_value_nested_in_itself_is_refused() -> None:
    value: list = []
    value.append(value)
    with pytest.raises(ValueError, match="JSON types"):
        canonical_json(value)


def test_a_file_and_its_bytes_have_one_digest(tmp_path) -> None:
    data = bytes(range(256)) * 9000
    path = tmp_path / "x"
    path.write_bytes(data)
    assert sha256_file(path) == sha256_hex(data) == hashlib.sha256(data).hexdigest()


BASE: dict[str, Any] = {
    "stage": "encode-latents",
    "code_version": 1,
    "what": {"f": 4},
    "parents": {"images": "0" * 64},
}


def key_of(**changed: Any) -> str:
    named = BASE | changed
    return artifact_key(named["stage"], named["code_version"], what=named["what"], parents=named["parents"])


@pytest.mark.parametrize(
    "changed",
    [
        {"stage": "train-ldm"},
        {"code_version": 2},
        {"what": {"f": 8}},
        {"what": {"f": 4, "seed": 0}},
        {"parents": {"images": "1" * 64}},
        {"parents": {"first_stage": "0" * 64}},
        {"parents": {}},
    ],
    ids=str,
)
def test_every_part_of_the_key_changes_it(changed: dict) -> None:
    assert key_of(**changed) != key_of()


def test_a_key_is_the_same_in_every_version() -> None:
    # The sha256sum of {"code_version":1,"parents":{"images":"(64 zeros)"},
    # "stage":"encode-latents","what":{"f":4}} on one line, without a line end.
    assert key_of() == "477b914d80adc7693b66fbd03d34ecdad2a408e980c1d2c979feb1756b46bdf1"
