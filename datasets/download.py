"""Files of the web, fetched with img2dataset in a process of their own.

img2dataset is used as its distributors use it: its ``Downloader`` takes one part of a list (an Arrow file),
fetches it with a pool of threads and leaves one Parquet file with the bytes, and a statistics file last.
Its own entry point would start two more processes, each of which imports everything once more (4
CPU-seconds), and does not report a part that failed.

The process reads one JSON line, the job, from stdin, and writes one line to stdout per finished part. It
ends when its parent does.

As img2dataset is imported nowhere else, this module is also its own program: ``python -m datasets.download``.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from datasets.curate import Outcome
from datasets.errors import DownloadError

BYTES_COLUMN = "bin"
SCHEMES = ("http", "https")
KEY_DIGITS = 5
USER_AGENT_TOKEN = "ldm-pipeline"
PR_SET_PDEATHSIG = 1

# Addresses that Python calls global although they lead elsewhere: to IPv4 embedded in them, or into a site.
_NOT_GLOBAL = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "2002::/16", "fec0::/10"))

_OUTCOME_PATTERNS = (
    (re.compile(r"HTTP Error (404|410)\b"), Outcome.NOT_FOUND),
    (re.compile(r"HTTP Error \d+"), Outcome.HTTP_ERROR),
    (re.compile(r"X-Robots-Tag"), Outcome.OPTED_OUT),
    (re.compile(r"timed out|timeout", re.IGNORECASE), Outcome.TIMEOUT),
    (
        re.compile(r"Name or service not known|getaddrinfo|name resolution", re.IGNORECASE),
        Outcome.UNRESOLVED_HOST,
    ),
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchSettings:
    """How to fetch; nothing here changes what a picture is.

    Attributes:
        num_threads: Requests under way at a time.
        timeout_s: Longest wait for the next bytes of an answer.
        num_retries: Further attempts at a file after the first.
    """

    num_threads: int = 8
    timeout_s: int = 10
    num_retries: int = 2


def download_parts(
    urls: Sequence[str],
    folder: Path,
    *,
    parts: Collection[int],
    rows_per_part: int,
    allow_private_addresses: bool = False,
    settings: FetchSettings | None = None,
) -> Generator[tuple[int, Iterable[tuple[int, bytes | Outcome]]]]:
    """Yield each part with its rows, as (position in the list, file or reason), in any order within a part.

    Parts that an earlier attempt finished in the folder are taken from there; nothing of them is fetched
    again. A part's rows are read while they are iterated over, at most a hundred files at a time; its files
    may be removed after that.

    Args:
        urls: Absolute addresses, in list order.
        folder: Where files wait, on this machine.
        parts: Which parts are wanted; part n holds the rows from ``n * rows_per_part`` on.
        rows_per_part: Rows per part; the folder must not hold parts of another size or list.
        allow_private_addresses: Whether loopback, private and other non-global addresses may be asked.
        settings: How to fetch.

    Raises:
        DownloadError: When the process that fetches fails as a whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refused: dict[int, dict[int, Outcome]] = {}
    jobs: list[int] = []
    verdicts: dict[str, Outcome | None] = {}
    for part in sorted(parts):
        positions = range(part * rows_per_part, min((part + 1) * rows_per_part, len(urls)))
        refused[part] = _refusals(urls, positions, verdicts, allow_private_addresses=allow_private_addresses)
        fetchable = [row for row in positions if row not in refused[part]]
        if fetchable and not _is_finished(folder, part, len(fetchable)):
            remove_part(folder, part)
            _write_job_part(folder, part, [(row, urls[row]) for row in fetchable])
            jobs.append(part)
    for part in sorted(set(parts) - set(jobs)):
        yield part, _rows(folder, part, refused[part], urls, rows_per_part)
    for part in _fetched(folder, jobs, settings or FetchSettings(), rows_per_part):
        yield part, _rows(folder, part, refused[part], urls, rows_per_part)


def remove_part(folder: Path, part: int) -> None:
    """Remove a part's files, finished or not."""
    for name in (f"{part:0{KEY_DIGITS}d}.parquet", f"{part:0{KEY_DIGITS}d}_stats.json", _job_name(part)):
        (folder / name).unlink(missing_ok=True)


# Before fetching


def address_refusal(url: str, *, allow_private_addresses: bool) -> Outcome | None:
    """Return why an address must not be asked, or None.

    Refused are other schemes than http and https, and hosts that are unknown or not global.
    """
    try:
        split = urlsplit(url)
        host, port = split.hostname, split.port
    except ValueError:
        return Outcome.REFUSED_ADDRESS
    if split.scheme not in SCHEMES:
        return Outcome.REFUSED_SCHEME
    if not host:
        return Outcome.REFUSED_ADDRESS
    if allow_private_addresses:
        return None
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return Outcome.UNRESOLVED_HOST
    return None if all(is_global(str(answer[4][0])) for answer in answers) else Outcome.REFUSED_ADDRESS


def is_global(address: str) -> bool:
    """Return whether an IP address belongs to one host of the public internet."""
    ip = ipaddress.ip_address(address.split("%", 1)[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    inside = any(ip.version == net.version and ip in net for net in _NOT_GLOBAL)
    return ip.is_global and not ip.is_multicast and not inside


def _refusals(
    urls: Sequence[str], rows: range, verdicts: dict[str, Outcome | None], *, allow_private_addresses: bool
) -> dict[int, Outcome]:
    """Return the rows that must not be asked for, with the reason; each host is looked up once."""
    hosts = {row: _host(urls[row]) for row in rows}
    new = {host: urls[row] for row, host in hosts.items() if host not in verdicts}
    with ThreadPoolExecutor(16, thread_name_prefix="resolve") as pool:
        answers = pool.map(
            lambda url: address_refusal(url, allow_private_addresses=allow_private_addresses), new.values()
        )
        verdicts.update(zip(new, answers, strict=True))
    return {row: verdict for row, host in hosts.items() if (verdict := verdicts[host]) is not None}


def _host(url: str) -> str:
    """Return scheme and host of an address, or the whole of it when it cannot be split."""
    try:
        split = urlsplit(url)
    except ValueError:
        return url
    return f"{split.scheme}://{split.netloc}"


# Parts in the folder


def _job_name(part: int) -> str:
    return f"{part:0{KEY_DIGITS}d}.arrow"


def _write_job_part(folder: Path, part: int, rows: Sequence[tuple[int, str]]) -> None:
    """Write what the process should fetch for one part."""
    positions, urls = zip(*rows, strict=True)
    table = pa.table({"position": pa.array(positions, pa.int64()), "url": pa.array(urls, pa.string())})
    with (
        pa.OSFile(str(folder / _job_name(part)), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def _is_finished(folder: Path, part: int, num_rows: int) -> bool:
    """Return whether a part is whole: its statistics, written last, count all rows, and its Parquet opens."""
    try:
        stats = json.loads((folder / f"{part:0{KEY_DIGITS}d}_stats.json").read_bytes())
        held = pq.ParquetFile(folder / f"{part:0{KEY_DIGITS}d}.parquet")
        with held:
            return stats["count"] == num_rows and held.metadata.num_rows <= num_rows
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return False


def _rows(
    folder: Path, part: int, refused: dict[int, Outcome], urls: Sequence[str], rows_per_part: int
) -> Iterator[tuple[int, bytes | Outcome]]:
    """Yield the rows of a finished part, each exactly once."""
    left = set(range(part * rows_per_part, min((part + 1) * rows_per_part, len(urls)))) - refused.keys()
    yield from refused.items()
    if not left:
        return
    with pq.ParquetFile(folder / f"{part:0{KEY_DIGITS}d}.parquet") as held:
        columns = ["position", "error_message", BYTES_COLUMN]
        for batch in held.iter_batches(batch_size=100, columns=columns):
            for row in batch.to_pylist():
                left.discard(row["position"])
                error = row["error_message"]
                yield row["position"], row[BYTES_COLUMN] if error is None else outcome_of(error)
    for position in sorted(left):  # img2dataset drops a row when its own bookkeeping for it fails
        yield position, Outcome.CONNECTION_ERROR


def outcome_of(error: str) -> Outcome:
    """Return the outcome that a message of img2dataset stands for."""
    for pattern, outcome in _OUTCOME_PATTERNS:
        if pattern.search(error):
            return outcome
    return Outcome.CONNECTION_ERROR


# The process that fetches, seen from its parent


def _fetched(
    folder: Path, parts: Sequence[int], settings: FetchSettings, rows_per_part: int
) -> Iterator[int]:
    """Start the process, yield each part once it is finished, and see that the process ends."""
    if not parts:
        return
    job = {
        "folder": str(folder),
        "parts": list(parts),
        "rows_per_part": rows_per_part,
        "num_threads": settings.num_threads,
        "timeout_s": settings.timeout_s,
        "num_retries": settings.num_retries,
        "parent": os.getpid(),
    }
    log_path = folder / "fetch.log"
    with log_path.open("ab") as log, _start(log) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()  # stays open: when it closes, the process ends
            for line in process.stdout:
                yield int(json.loads(line)["part"])
        except BrokenPipeError:
            _log.debug("the fetching process ended before it took its job")
        finally:
            process.kill()
    unfinished = [part for part in parts if (folder / _job_name(part)).exists()]
    if unfinished:
        raise DownloadError(
            f"every part of the list must be fetched, but {len(unfinished)} of {len(parts)} were not "
            f"(part {unfinished[0]} first); what is fetched is kept, run it again. "
            f"The process said: {_last_words(log_path)}"
        )


def _start(log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start this module as a program that finds our package and asks loopback hosts without a proxy."""
    root = str(Path(__file__).resolve().parents[1])
    direct = ",".join(
        filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1,localhost"])
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "PYTHONWARNINGS": "ignore",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "OMP_NUM_THREADS": "1",
        "no_proxy": direct,
        "NO_PROXY": direct,
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "datasets.download"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
    )


def _last_words(log_path: Path) -> str:
    """Return the end of a log, on one line."""
    text = log_path.read_text("utf-8", "replace").strip()
    return " | ".join(text.splitlines()[-5:]) or "nothing"


# The process that fetches


def _main() -> None:
    """Fetch the parts of the job on stdin, one after another."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # img2dataset prints; stdout is for replies
    job = json.loads(sys.stdin.readline())
    _die_with_parent(job["parent"])
    downloader = _downloader(job)
    for part in job["parts"]:
        row = (part, str(Path(job["folder"]) / _job_name(part)))
        finished, _ = downloader(row)
        if not finished:
            finished, _ = downloader(row)
        if finished:
            replies.write(json.dumps({"part": part}) + "\n")
            replies.flush()
    os._exit(0)  # nothing is left to write, and threads of img2dataset may still wait for a slow server


def _die_with_parent(parent: int) -> None:
    """End this process when its parent ends, by the kernel's signal or when stdin closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _downloader(job: dict[str, Any]) -> Any:
    """Return img2dataset's downloader, told to keep bytes as they came and write them into Parquet files."""
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import ParquetSampleWriter

    def writer(
        shard: int, folder: str, save_caption: bool, digits: int, schema: pa.Schema, _suffix: str
    ) -> Any:
        return ParquetSampleWriter(shard, folder, save_caption, digits, schema, BYTES_COLUMN)

    return Downloader(
        sample_writer_class=writer,
        resizer=Resizer(
            image_size=0, resize_mode="no", resize_only_if_bigger=False, disable_all_reencoding=True
        ),
        thread_count=job["num_threads"],
        save_caption=False,
        extract_exif=False,
        output_folder=job["folder"],
        column_list=["position", "url"],
        timeout=job["timeout_s"],
        number_sample_per_shard=job["rows_per_part"],
        oom_shard_count=KEY_DIGITS,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="png",
        retries=job["num_retries"],
        user_agent_token=USER_AGENT_TOKEN,
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
    )


if __name__ == "__main__":
    _main()
