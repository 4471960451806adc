"""Services of a run on one machine, all of whose state lies under the store."""

import os
from pathlib import Path


def use_local_services(local_root: Path) -> None:
    """Point Prefect at a server that lives as long as this process, unless PREFECT_API_URL names one.

    Call it before Prefect is imported, which reads its settings then.

    Args:
        local_root: folder for Prefect's database.
    """
    defaults = {
        "PREFECT_HOME": str((local_root / "prefect").resolve()),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # A server that is gone when a stage ends is waited for: pauses of 2, 4, 8 ... s, 17 minutes in all.
        "PREFECT_CLIENT_MAX_RETRIES": "9",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "datasets,ldm,flows",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # lines of background threads have no flow run
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "DO_NOT_TRACK": "1",
        # Threads that wait for each other sleep instead of spinning: on a busy machine spinning costs 3 times
        # the CPU time of the work (read by libgomp when torch is imported).
        "OMP_WAIT_POLICY": "passive",
        # Large tensors lie on huge pages where the kernel allows it: a training step of the UNet takes 25,000
        # page faults without (read by torch at its first allocation).
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
