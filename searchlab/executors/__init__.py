"""Executors: where chunks of jobs are evaluated."""

from searchlab.executors.base import Chunk, Done, Executor, Usage, evaluate_chunk, usage_of
from searchlab.executors.local import LocalExecutor
from searchlab.executors.options import ExecutorOptions
from searchlab.executors.processes import ProcessExecutor, Retries
from searchlab.executors.ray import RayExecutor

__all__ = [
    "Chunk",
    "Done",
    "Executor",
    "ExecutorOptions",
    "LocalExecutor",
    "ProcessExecutor",
    "RayExecutor",
    "Retries",
    "Usage",
    "evaluate_chunk",
    "usage_of",
]
