"""Experiment tracking in MLflow: what a stage was given, how it went and what it left behind.

The only package that imports MLflow (inside functions: it takes seconds). By default everything lies in one
SQLite file below the store, without a server. Tracking never stops the work, nor makes it wait: a run reports
to a journal on disk, and a thread sends from there. What an MLflow that is gone did not take waits on disk
and is sent when the next run begins, by whatever process.

    tracker        one tracking address: starts runs, finds registered models
    tracked_run    what `Tracker.start` returns: report and go on
    outbox         what that reports through: a journal and a thread
    journal        what runs had to say, and how far it was delivered; all of it files
    delivery       sends a journal in order, each thing exactly once; knows a service by protocol only
    sender         the thread that does so beside the work
    mlflow_runs    that service: runs in MLflow
    connection     clients of MLflow, its SQLite file, and what its errors mean
    system_metrics CPU, memory, disk, network and GPU of a run
"""

from ldm.tracking.journal import Waiting, waiting
from ldm.tracking.tracked_run import RegisteredVersion, TrackedRun
from ldm.tracking.tracker import RunRow, Tracker, tracking_uri

__all__ = ["RegisteredVersion", "RunRow", "TrackedRun", "Tracker", "Waiting", "tracking_uri", "waiting"]
