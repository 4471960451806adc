"""Randomness as a function of what it is for: a resumed run draws what an undisturbed one draws."""

import hashlib

import torch


def seed_of(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: the same arguments give the same seed, others an unrelated one."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded for one purpose, such as (seed, step, "noise")."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))
