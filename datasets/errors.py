"""The errors of this package, each with a message that says the rule, what was received, and the cure.

::

    DatasetsError
    |-- ConfigError          an unknown name or key, or a value out of its range
    |-- MissingDataError     pictures or lists that the configuration names are not where it says
    |-- DownloadError        a list that could not be turned into enough usable pictures
    |-- LoaderError          a worker that reads ahead ended without an answer
    `-- StoreError           the artifact store cannot be used, or refuses what it was asked to do
        |-- CorruptionError  bytes differ from the digest, count or layout recorded for them
        `-- SpaceError       too little room for what is about to be written
"""

from __future__ import annotations


class DatasetsError(Exception):
    """Anything this package raises on purpose."""


class ConfigError(DatasetsError):
    """A configuration names something unknown or holds a value out of its range."""


class MissingDataError(DatasetsError):
    """Pictures or lists that the configuration names are not where it says."""


class DownloadError(DatasetsError):
    """A list could not be turned into enough usable pictures."""


class LoaderError(DatasetsError):
    """A worker that reads ahead ended without an answer."""


class StoreError(DatasetsError):
    """The artifact store cannot be used, or refuses what it was asked to do."""


class CorruptionError(StoreError):
    """Bytes differ from the digest, count or layout that was recorded for them."""


class SpaceError(StoreError):
    """There is too little room for what is about to be written."""
