"""The processes that `accelerate launch` or torchrun started, or a single one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

T = TypeVar("T")


def process_state() -> PartialState:
    """accelerate's state of this process: its index, its device."""
    # Without cpu=True, accelerate takes each of several processes on a CPU for the only one.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


class Processes:
    """Collective operations: every process makes one instance and calls its methods in the same order.

    The processes wait for each other without a limit. If one ends early, the others raise.
    """

    def __init__(self) -> None:
        state = process_state()
        self.index, self.count = state.process_index, state.num_processes
        self.group = _waiting_group(torch.distributed.group.WORLD) if self.count > 1 else None

    def from_main(self, call: Callable[[], T]) -> T:
        """Call in the main process; return its result, or raise its exception, in every process."""
        if self.count == 1:
            return call()
        outcome: list[Any] = [None]
        if self.index == 0:
            try:
                outcome = [call()]
            except Exception as error:
                outcome = [error]
        torch.distributed.broadcast_object_list(outcome, src=0, group=self.group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, by index, in every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.count > 1:
            torch.distributed.barrier(self.group)


@cache
def _waiting_group(world: Any) -> Any:
    """A gloo group of all processes: NCCL times out after ten minutes, and a process may write for hours."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
