"""Laws of the manifest: what is hashed, what is not, and that damage is seen."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import CorruptionError
from datasets.keys import canonical_json, sha256_hex
from datasets.manifest import Content, FileRecord, Manifest, Parent

RECORD = FileRecord("train-00000.tar", "train-00000-0123456789ab.tar", 10240, "0" * 64, 7)


def content_of(**changed) -> Content:
    named = {
        "stage": "download-shards",
        "key": "1" * 64,
        "code_version": 3,
        "what": {"image_size_px": 32, "classes": ("red", "blue")},
        "parents": {"url_list": Parent("url-list", "2" * 64, "3" * 64)},
        "files": (RECORD,),
        "statistics": {"num_train": 7, "mean": [0.1, 1e-17]},
    }
    return Content(**(named | changed))


MANIFEST = Manifest(content_of(), {"host": "a", "seconds": 1.5})


def test_a_manifest_survives_storage() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert Manifest.from_json(MANIFEST.to_json().decode()) == MANIFEST


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.floats(allow_nan=False, allow_infinity=False))
)
def test_any_statistics_keep_their_digest_through_storage(statistics: dict[str, float]) -> None:
    manifest = Manifest(content_of(statistics=statistics))
    assert Manifest.from_json(manifest.to_json()).digest == manifest.digest


def test_the_digest_is_that_of_the_contents_canonical_json() -> None:
    content = json.loads(MANIFEST.to_json())["content"]
    assert MANIFEST.digest == sha256_hex(canonical_json(content))


def test_provenance_is_not_identity() -> None:
    assert Manifest(content_of(), {"host": "b"}).digest == MANIFEST.digest


@pytest.mark.parametrize(
    "changed",
    [
        {"stage": "url-list"},
        {"key": "9" * 64},
        {"code_version": 4},
        {"what": {}},
        {"parents": {}},
        {"files": ()},
        {"statistics": {"num_train": 8}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_part_of_the_content_is_identity(changed: dict) -> None:
    assert Manifest(content_of(**changed)).digest != MANIFEST.digest


def test_a_manifest_does_not_follow_later_changes_of_what_it_was_made_from() -> None:
    what = {"sizes": [1, 2]}
    manifest = Manifest(content_of(what=what))
    before = manifest.digest
    what["sizes"].append(3)
    assert manifest.digest == before


def test_every_changed_byte_of_a_stored_manifest_is_seen_or_harmless() -> None:
    stored = MANIFEST.to_json()
    for place in range(len(stored)):
        damaged = stored[:place] + bytes([stored[place] ^ 1]) + stored[place + 1 :]
        try:
            read = Manifest.from_json(damaged)
        except CorruptionError:
            continue
        assert read.content == MANIFEST.content  # it hit provenance, or white space


@pytest.mark.parametrize("cut", [0, 1, 100, -2])
def test_a_cut_manifest_is_refused_with_its_name_and_a_cure(cut: int) -> None:
    with pytest.raises(CorruptionError, match=r"/a/manifest\.json must be a manifest.*delete its folder"):
        Manifest.from_json(MANIFEST.to_json()[:cut], source="/a/manifest.json")


def test_a_content_that_is_not_the_digests_is_refused_naming_both() -> None:
    other = MANIFEST.to_json().replace(b'"code_version": 3', b'"code_version": 4')
    found = Manifest(content_of(code_version=4)).digest
    with pytest.raises(CorruptionError, match=f"{MANIFEST.digest}.*{found}"):
        Manifest.from_json(other)


def test_a_manifest_of_another_format_is_refused() -> None:
    with pytest.raises(CorruptionError, match="format 1"):
        Manifest.from_json(MANIFEST.to_json().replace(b'"format": 1', b'"format": 2'))


@pytest.mark.parametrize(
    "path", ["../x", "a/b", "/etc/passwd", "", ".hidden", "a\nb", "a" * 201], ids=lambda path: repr(path[:9])
)
def test_a_file_cannot_lie_outside_its_artifact(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        FileRecord(name="x", path=path, bytes=1, sha256="0" * 64)


def test_statistics_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        content_of(statistics={"loss": float("nan")})


def test_two_files_cannot_share_a_name() -> None:
    with pytest.raises(ValueError, match=r"distinct.*train-00000\.tar"):
        content_of(files=(RECORD, RECORD))


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown"):
        content_of(unknown=1)


def test_a_file_is_found_by_name_and_a_missing_one_is_told_with_those_there_are() -> None:
    assert MANIFEST.file("train-00000.tar") == RECORD
    with pytest.raises(KeyError, match=r"no file 'x'; it holds train-00000\.tar"):
        MANIFEST.file("x")


def test_a_manifest_knows_its_names_and_size() -> None:
    assert (MANIFEST.stage, MANIFEST.key, MANIFEST.short) == ("download-shards", "1" * 64, "1" * 12)
    assert MANIFEST.num_bytes == 10240
