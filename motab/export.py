"""Trajectories in a file for other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from motab.dataset import TrajectoryDataset, labels
from motab.files import whole_path

_ENDS = (".parquet", ".jsonl")
_ROWS = 1000  # per Arrow table, whose token offsets have 32 bits


def export_dataset(dataset: TrajectoryDataset, output_file: str | Path) -> int:
    """Write trajectories as a table for other trainers: token ids as they were generated, no text.

    Its columns are ``input_ids``, the prompt and the target; ``labels``, the same with -100 at the prompt and at the
    tokens of ignored authors; and ``attention_mask``, ones. TRL's ``SFTTrainer`` takes the table as it is, axolotl as a
    pre-tokenised dataset, which must have exactly these columns. It has labels and no ``completion_mask``, since TRL
    uses labels as they are and the mask only with ``completion_only_loss=True``. TRL truncates examples at its
    ``max_length``, by default 1024 tokens. Text would be tokenised again, perhaps differently and with the chat
    template applied twice, and could not mark the tokens that are not trained on.

    Args:
        dataset: the trajectories, with the authors that are ignored.
        output_file: ends in ``.parquet`` or ``.jsonl``.

    Returns:
        The number of rows.

    Raises:
        ValueError: another file type; no trajectory.
    """
    import datasets
    import pyarrow as pa

    check_output_file(output_file)
    if not len(dataset):
        raise ValueError("dataset must hold at least one trajectory, got none")
    table = datasets.Dataset(pa.concat_tables(_part(dataset, at) for at in range(0, len(dataset), _ROWS)))
    with whole_path(output_file) as temporary:
        if Path(output_file).suffix == ".parquet":
            table.to_parquet(temporary)
        else:
            table.to_json(temporary)
    return len(dataset)


def _part(dataset: TrajectoryDataset, at: int) -> Any:
    """The table of the rows from one on, built from arrays: from lists, datasets would take 170 bytes per token."""
    import pyarrow as pa

    ids, trained = (rows[at : at + _ROWS] for rows in (dataset.ids, dataset.trained))
    values = {
        "input_ids": np.concatenate(ids),
        "attention_mask": np.ones(sum(map(len, ids)), dtype=np.int8),
        "labels": np.concatenate(list(map(labels, ids, trained))),
    }
    ends = pa.array(np.cumsum([0, *map(len, ids)]), pa.int32())
    return pa.table({name: pa.ListArray.from_arrays(ends, pa.array(column)) for name, column in values.items()})


def check_output_file(output_file: str | Path) -> None:
    """Refuse a file type that `export_dataset` does not write."""
    if Path(output_file).suffix not in _ENDS:
        raise ValueError(f"output_file must end in {' or '.join(_ENDS)}, got {str(output_file)!r}")
