"""Executors: where chunks of jobs are evaluated."""

from searchlab.executors.base import Chunk, Done, Executor, evaluate_chunk
from searchlab.executors.local import LocalExecutor

__all__ = ["Chunk", "Done", "Executor", "LocalExecutor", "evaluate_chunk"]
