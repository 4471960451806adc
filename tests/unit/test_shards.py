"""Laws of shards: reproducible bytes, lossless round trips, and a reader that trusts nothing."""

from __future__ import annotations

import io
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import CorruptionError
from datasets.keys import sha256_hex
from datasets.samples import (
    decode_image,
    decode_latent,
    decode_png,
    encode_image,
    encode_latent,
    encode_png,
    from_bfloat16_bits,
    to_bfloat16_bits,
)
from datasets.shards import EXTENSIONS, read_shard, write_shard

SAMPLES = [
    {"__key__": f"{i:09d}", "png": bytes([i]) * 600 * i, "json": b'{"class_label":%d}' % i} for i in range(7)
]


def tar_of(*members: tuple[str, bytes], **changed) -> bytes:
    """A tar as somebody else may have written it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changed.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


keys = st.text("abcXYZ019_-=+", min_size=1, max_size=9).filter(lambda key: key[0].isalnum())
bodies = st.dictionaries(st.sampled_from(sorted(EXTENSIONS)), st.binary(max_size=1500), min_size=1)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(keys, bodies, max_size=6))
def test_what_is_written_is_read_in_order(named: dict[str, dict[str, bytes]]) -> None:
    samples = [{"__key__": key, **body} for key, body in named.items()]
    assert list(read_shard(write_shard(samples))) == samples


def test_equal_samples_give_equal_bytes_at_another_time(monkeypatch) -> None:
    first = write_shard(SAMPLES)
    later = time.time() + 86400 * 400
    monkeypatch.setattr(time, "time", lambda: later)
    assert write_shard(SAMPLES) == first


def test_the_order_of_members_in_a_sample_does_not_matter() -> None:
    turned = [dict(reversed(sample.items())) for sample in SAMPLES]
    assert write_shard(turned) == write_shard(SAMPLES)


def test_a_shards_bytes_are_the_same_in_every_version() -> None:
    # PYTHONPATH=tests/unit:. python -c "from test_shards import *; print(sha256_hex(write_shard(SAMPLES)))"
    assert (
        sha256_hex(write_shard(SAMPLES)) == "8da1cb3ac398f5c2278ebd125eb5bf0f5290fb8d5f0bc7a5267bf45b88b1199e"
    )


def test_the_members_tell_nothing_of_who_wrote_them() -> None:
    with tarfile.open(fileobj=io.BytesIO(write_shard(SAMPLES))) as archive:
        facts = {(m.uid, m.gid, m.uname, m.gname, m.mode, m.mtime) for m in archive}
    assert facts == {(0, 0, "ldm", "ldm", 0o444, 0)}


def test_webdataset_reads_the_shards_alike() -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    opened = [{"url": "shard.tar", "stream": io.BytesIO(write_shard(SAMPLES))}]
    read = list(group_by_keys(tar_file_expander(opened)))
    assert read == [{**sample, "__url__": "shard.tar"} for sample in SAMPLES]


def test_a_shard_cut_anywhere_is_refused() -> None:
    shard = write_shard(SAMPLES[:3])
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    cuts = {*range(0, end + 1024, 512), *range(1, end + 1024, 97)}
    for cut in cuts:
        with pytest.raises(CorruptionError, match="store the shard again"):
            list(read_shard(shard[:cut]))


def test_a_damaged_header_is_refused_and_not_taken_for_the_end() -> None:
    shard = write_shard(SAMPLES)
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        offsets = [member.offset for member in archive]
    for offset in offsets:
        damaged = shard[: offset + 5] + bytes([shard[offset + 5] ^ 4]) + shard[offset + 6 :]
        with pytest.raises(CorruptionError):
            list(read_shard(damaged))


def header_bits() -> list[int]:
    """The place of each bit of the headers of a shard of one sample."""
    with tarfile.open(fileobj=io.BytesIO(write_shard(SAMPLES[1:2]))) as archive:
        headers = [place for member in archive for place in range(member.offset, member.offset_data)]
    return [8 * place + bit for place in headers for bit in range(8)]


def test_no_flipped_bit_of_a_header_changes_what_is_read() -> None:
    shard, refused = write_shard(SAMPLES[1:2]), 0
    bits = header_bits()
    for place in bits:
        damaged = bytearray(shard)
        damaged[place // 8] ^= 1 << place % 8
        try:
            assert list(read_shard(bytes(damaged))) == SAMPLES[1:2]
        except CorruptionError:
            refused += 1
    assert refused > 0.4 * len(bits)


@pytest.mark.parametrize(
    "size", [b"-0000000001", b"0o000000017", b" 1234567890", b"\x80" + bytes(10), b"9" * 11]
)
def test_a_size_that_is_not_eleven_octal_digits_is_refused(size: bytes) -> None:
    shard = bytearray(tar_of(("x.png", b"data")))
    shard[124:135] = size
    shard[148:156] = b" " * 8
    shard[148:156] = b"%06o\0 " % sum(shard[:512])
    with pytest.raises(CorruptionError, match="have no header at 0"):
        list(read_shard(bytes(shard)))


def test_a_size_beyond_the_shard_is_refused() -> None:
    shard = bytearray(tar_of(("x.png", b"data")))
    shard[124:135] = b"77777777777"
    with pytest.raises(CorruptionError, match="needs 8589935104 bytes and ends after"):
        list(read_shard(bytes(shard)))


@pytest.mark.parametrize("records", [{"path": "y.png"}, {"size": "3"}, {"mtime": "1", "path": "../y.png"}])
def test_extended_headers_that_say_more_than_a_time_are_refused(records: dict[str, str]) -> None:
    with pytest.raises(CorruptionError, match="may hold a time alone"):
        list(read_shard(tar_of(("x.png", b"data"), pax_headers=records)))


def test_a_folder_in_the_prefix_is_refused() -> None:
    name = "a" * 90 + "/" + "b" * 90 + ".png"
    info = tarfile.TarInfo(name)
    with pytest.raises(CorruptionError, match="may hold plain files"):
        list(read_shard(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)))


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(CorruptionError, match="zero blocks after its last member"):
        list(read_shard(write_shard(SAMPLES) + b"x"))


@pytest.mark.parametrize(
    "name",
    ["../x.png", "/etc/x.png", "a/x.png", "x.pickle", "x.pyd", "x.pth", "x.tar.png", "x", ".png", "x.PNG"],
)
def test_members_that_are_not_plain_data_are_refused(name: str) -> None:
    with pytest.raises(CorruptionError, match=r"may hold plain files named key\.extension"):
        list(read_shard(tar_of((name, b"data"))))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_folders_and_devices_are_refused(kind: bytes) -> None:
    with pytest.raises(CorruptionError, match="may hold plain files"):
        list(read_shard(tar_of(("x.png", b""), type=kind, linkname="/etc/passwd")))


def test_a_compressed_tar_is_refused() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz"):
        pass
    with pytest.raises(CorruptionError, match="must be a plain tar"):
        list(read_shard(buffer.getvalue()))


def test_a_sample_or_member_that_comes_twice_is_refused() -> None:
    with pytest.raises(CorruptionError, match=r"got a\.png twice"):
        list(read_shard(tar_of(("a.png", b"1"), ("a.png", b"2"))))
    with pytest.raises(CorruptionError, match="got 'a' twice"):
        list(read_shard(tar_of(("a.png", b"1"), ("b.png", b"2"), ("a.json", b"3"))))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"__key__": "a/b", "png": b""}], "key must be a word"),
        ([{"__key__": "a.b", "png": b""}], "key must be a word"),
        ([{"png": b""}], "key must be a word"),
        ([{"__key__": "a", "png": b""}, {"__key__": "a", "png": b""}], "distinct, got 'a' twice"),
        ([{"__key__": "a", "pickle": b""}], r"has \['pickle'\]"),
        ([{"__key__": "a"}], r"has \[\]"),
        ([{"__key__": "a", "txt": "text"}], r"a\.txt is str; encode it first"),
    ],
)
def test_samples_that_could_not_be_read_back_are_not_written(samples: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(samples)


def picture(seed: int = 0, size_px: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size_px, size_px + 1, 3), np.uint8)


def test_a_picture_survives_its_sample_bit_for_bit() -> None:
    image, about = decode_image(encode_image("a", picture(), about={"class_label": 3, "caption": "\u00e9"}))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, picture())
    assert about == {"class_label": 3, "caption": "\u00e9"}


def test_bits_of_bfloat16_survive_their_sample_and_only_finite_ones_are_taken() -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    stored, _ = decode_latent(encode_latent("a", to_bfloat16_bits(values), about={}))
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored, to_bfloat16_bits(values))
    infinite = np.full((1, 1, 1), 0x7F80, np.uint16)
    with pytest.raises(ValueError, match="latent must be finite"):
        encode_latent("a", infinite, about={})


def test_rounding_to_bfloat16_is_to_nearest_with_ties_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, 1.00390637, -1.00390625, 3.4e-39, 65505.0], np.float32)
    rounded = from_bfloat16_bits(to_bfloat16_bits(values))
    expected = np.array([1.0, 1.0, 1.015625, 1.0078125, -1.0, 3.3978e-39, 65536.0], np.float32)
    np.testing.assert_allclose(rounded, expected, rtol=1e-4)
    np.testing.assert_array_equal(to_bfloat16_bits(rounded), to_bfloat16_bits(values))


def test_a_picture_is_kept_beside_a_latent() -> None:
    png = encode_png(picture())
    sample = encode_latent("a", np.ones((1, 2, 2), np.float32), about={"class_label": 3}, picture=png)
    [read] = read_shard(write_shard([sample]))
    np.testing.assert_array_equal(decode_image(read)[0], picture())
    np.testing.assert_array_equal(decode_latent(read)[0], np.ones((1, 2, 2)))


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ">f4"])
def test_a_latent_survives_its_sample_bit_for_bit(dtype: str) -> None:
    latent = np.random.default_rng(0).standard_normal((8, 5, 6)).astype(dtype)
    stored, about = decode_latent(encode_latent("a", latent.transpose(0, 2, 1), about={}))
    assert stored.dtype == np.dtype(dtype).newbyteorder("<")
    np.testing.assert_array_equal(stored, latent.transpose(0, 2, 1))
    assert about == {}


HOSTILE_NPY = {
    "an object": b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 2), }",
    "another type": b"{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1, 1), }",
    "another byte order": b"{'descr': '>f4', 'fortran_order': False, 'shape': (1, 1, 2), }",
    "another order": b"{'descr': '<f4', 'fortran_order': True, 'shape': (1, 1, 2), }",
    "huge": b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 999999999, 999999999), }",
    "too large": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 3), }",
    "too small": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1), }",
    "negative": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1, 2), }",
    "two axes": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }",
    "code": b"__import__('os').system('true')",
    "nested": b"(" * 5000,
}


@pytest.mark.parametrize("header", HOSTILE_NPY.values(), ids=HOSTILE_NPY.keys())
def test_an_npy_that_is_no_latent_is_refused(header: bytes) -> None:
    data = b"\x93NUMPY\x01\0" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + bytes(8)
    with pytest.raises(CorruptionError, match="latent a must be a plain npy"):
        decode_latent({"__key__": "a", "npy": data, "json": b"{}"})


@pytest.mark.parametrize("cut", range(0, 150, 7))
def test_a_cut_npy_is_refused(cut: int) -> None:
    sample = encode_latent("a", np.ones((1, 3, 2), np.float32), about={})
    with pytest.raises(CorruptionError, match="latent a must be a plain npy"):
        decode_latent(sample | {"npy": sample["npy"][:cut]})


def test_samples_of_equal_values_are_equal_bytes() -> None:
    latent = np.ones((2, 3, 4), np.float32)
    assert encode_latent("a", latent, about={}) == encode_latent("a", np.asfortranarray(latent), about={})
    assert encode_png(picture()) == encode_png(picture()[:, ::-1][:, ::-1])


@pytest.mark.parametrize(
    "image", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3), np.float32)]
)
def test_only_rgb_bytes_are_pictures(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="picture must be uint8"):
        encode_png(image)


@pytest.mark.parametrize(
    "latent", [np.zeros((2, 2)), np.zeros((2, 2), np.float32), np.full((1, 2, 2), np.nan, np.float32)]
)
def test_only_finite_single_or_half_floats_are_latents(latent: np.ndarray) -> None:
    with pytest.raises(ValueError, match="latent must be finite float32 or float16, or bits of bfloat16"):
        encode_latent("a", latent, about={})


def test_a_pickled_array_is_refused_unread() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptionError, match="latent a must be a plain npy"):
        decode_latent({"__key__": "a", "npy": buffer.getvalue(), "json": b"{}"})


def test_a_damaged_picture_is_refused() -> None:
    data = encode_png(picture(size_px=40))
    for damaged in (b"", b"GIF89a", data[:60], data[: len(data) // 2]):
        with pytest.raises(CorruptionError, match="must be stored as RGB PNG"):
            decode_png(damaged)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"json": b"{}"}, r"must have a member 'png', has \['json'\]"),
        ({"png": encode_png(picture())}, r"must have a member 'json', has \['png'\]"),
        ({"png": encode_png(picture()), "json": b"["}, r"a\.json must be JSON"),
        ({"png": encode_png(picture()), "json": b"[]"}, r"a\.json must be an object, got list"),
    ],
)
def test_an_incomplete_sample_is_refused(sample: dict, message: str) -> None:
    with pytest.raises(CorruptionError, match=message):
        decode_image({"__key__": "a", **sample})
