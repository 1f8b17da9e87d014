"""Which executor a run uses, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from searchlab.config import EXECUTORS, resolve
from searchlab.errors import ConfigError
from searchlab.executors.base import Executor

__all__ = ["ExecutorOptions"]


@dataclass(frozen=True)
class ExecutorOptions:
    """An executor by name; what is None is the executor's own default.

    Attributes:
        name: of `EXECUTORS`; None = "processes" for two workers and more, else "local".
        workers: how many chunks are evaluated at once.
        deadline: seconds for one attempt at a chunk.
        retries: further attempts at a chunk whose worker died or was too slow.
        memory: bytes per worker.
        more: options that only this executor has.
    """

    name: str | None = None
    workers: int | None = None
    deadline: float | None = None
    retries: int | None = None
    memory: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Executor:
        """A new executor.

        Raises:
            ConfigError: an unknown name, or options that this executor does not take.
        """
        name = self.name
        if name is None:
            name = "local" if self.workers in (None, 1) else "processes"
        factory: Callable[..., Executor] = resolve(EXECUTORS, name, "executor")
        given: dict[str, Any] = {
            "workers": self.workers,
            "deadline": self.deadline,
            "retries": self.retries,
            "memory": self.memory,
            **self.more,
        }
        known = inspect.signature(factory).parameters
        for option, value in self.more.items():
            if value is not None and option not in known:
                raise ConfigError(
                    f"option {option} {value!r} with executor {name!r}; allowed: executor 'ray'"
                )
        try:
            return factory(**{key: value for key, value in given.items() if value is not None})
        except TypeError as error:
            raise ConfigError(f"options of executor {name!r}: {error}") from None
