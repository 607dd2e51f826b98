"""Ranks that work together, each a process: forks of one that has imported what they need, which takes seconds."""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

RANKS = 2
CODES = "exit codes.json"


def run_ranks(folder, *calls, **environment):
    """Each call with `rank, RANKS, folder` in as many processes, one call after another: their exit codes, by the name
    of the call and then by the rank, and what all wrote."""
    (file,) = {call.__code__.co_filename for call in calls}
    command = [sys.executable, __file__, file, str(folder), *(call.__name__ for call in calls)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"} | environment
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.run(command, env=environment, **streams)
    assert run.returncode == 0, run.stdout
    return json.loads((folder / CODES).read_text()), run.stdout


def run_rank(call, rank, folder):
    signal.alarm(300)  # ends a rank that waits for another that failed
    call(rank, RANKS, folder)


def exit_codes(call, folder):
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=run_rank, args=(call, rank, folder)) for rank in range(RANKS)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return [process.exitcode for process in running]


if __name__ == "__main__":
    file, folder, *names = sys.argv[1:]
    sys.path[:0] = [str(Path(file).parent), str(Path(__file__).parents[1])]  # its own conftest before that of all
    calls = importlib.import_module(Path(file).stem)
    gc.freeze()  # as in conftest, for each training collects
    codes = {name: exit_codes(getattr(calls, name), Path(folder)) for name in names}
    Path(folder, CODES).write_text(json.dumps(codes))
