"""The processes that `accelerate launch` or torchrun started, or the one that there is."""

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
    # Unless told that it computes on a CPU, accelerate takes each of several processes there for the only one.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


class Processes:
    """What the processes do together: all of them make one, and call its methods in the same order.

    They wait for each other for as long as it takes. Where one of them ends before, the others raise.
    """

    def __init__(self) -> None:
        state = process_state()
        self.index, self.count = state.process_index, state.num_processes
        self.group = _waiting_group(torch.distributed.group.WORLD) if self.count > 1 else None

    def from_main(self, call: Callable[[], T]) -> T:
        """What ``call`` returns or raises in the main process, in every process."""
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
        """Until every process has come here."""
        if self.count > 1:
            torch.distributed.barrier(self.group)


@cache
def _waiting_group(world: Any) -> Any:
    """All processes, through gloo: NCCL gives up after ten minutes, where a process may write for hours."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
