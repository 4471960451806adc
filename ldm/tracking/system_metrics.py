"""CPU, memory, disk, network and GPU of the machine, as MLflow's own monitor measures and names them."""

import importlib.util
import logging
import threading
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0


class SystemMetrics:
    """A daemon thread that measures and reports `system/...` every INTERVAL_S seconds.

    MLflow's monitor asks its server before each point and ends for good when there is no answer, so only its
    measuring is used.
    """

    def __init__(self, report: Callable[[Mapping[str, float]], None]) -> None:
        self._report = report
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="ldm-system-metrics", daemon=True).start()

    def end(self) -> None:
        """Reports no more."""
        self._ended.set()

    def _run(self) -> None:
        if importlib.util.find_spec("psutil") is None:
            logger.info("system metrics are not recorded: psutil is not installed")
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id=None)
        while True:
            monitor.collect_metrics()
            if self._ended.wait(INTERVAL_S):
                return
            self._report({f"system/{name}": value for name, value in monitor.aggregate_metrics().items()})
            for part in monitor.monitors:
                part.clear_metrics()
