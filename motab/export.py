"""Trajectories in a file that other people's trainers read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from motab.dataset import TrajectoryDataset
from motab.files import whole_path

_ENDS = (".parquet", ".jsonl")
_ROWS = 1000  # of a table in Arrow, which counts its tokens in 32 bits


def export_dataset(dataset: TrajectoryDataset, output_file: str | Path) -> int:
    """Write what is trained on as a table for other people's trainers: the tokens as they were written, never text.

    Its columns are ``input_ids``, the prompt and the target; ``labels``, the same with -100 at the prompt and at the
    tokens of ignored authors; and ``attention_mask``, ones. So TRL's ``SFTTrainer`` takes it as it is, and axolotl as a
    pre-tokenised dataset, which asks for these three and no other. Labels and no mask, for TRL uses labels as they are,
    and looks at ``completion_mask`` only with ``completion_only_loss=True``. TRL cuts examples at its ``max_length`` of
    1024 tokens where no other is given. There is no text: it would be tokenised anew, perhaps into other tokens, under
    a chat template that the prompt already went through, and it cannot say which tokens are not trained on.

    Args:
        dataset: the trajectories, with the authors that are ignored.
        output_file: ends in ``.parquet`` or ``.jsonl``.

    Returns:
        How many rows it has. Trajectories without a token to train on are left out, with one warning: of a batch of
        these alone PyTorch's mean cross-entropy is NaN.

    Raises:
        ValueError: a file of another kind; no trajectory with a token to train on.
    """
    import datasets
    import pyarrow as pa

    check_output_file(output_file)
    rows = [index for index, trained in enumerate(dataset.trained) if trained.any()]
    if not rows:
        raise ValueError(f"none of {len(dataset)} trajectories has a token to train on; ignore fewer authors")
    if idle := len(dataset) - len(rows):
        warnings.warn(f"{idle} of {len(dataset)} trajectories have no token to train on and are left out", stacklevel=2)
    table = datasets.Dataset(
        pa.concat_tables(_part(dataset, rows[at : at + _ROWS]) for at in range(0, len(rows), _ROWS))
    )
    with whole_path(output_file) as temporary:
        if Path(output_file).suffix == ".parquet":
            table.to_parquet(temporary)
        else:
            table.to_json(temporary)
    return len(rows)


def _part(dataset: TrajectoryDataset, rows: Sequence[int]) -> Any:
    """The table of some rows, straight from their arrays: of lists, datasets would take 170 bytes a token."""
    import pyarrow as pa

    ids = [dataset.ids[row] for row in rows]
    values = {
        "input_ids": np.concatenate(ids),
        "attention_mask": np.ones(sum(map(len, ids)), dtype=np.int8),
        "labels": np.concatenate([dataset.labels(row) for row in rows]),
    }
    ends = pa.array(np.cumsum([0, *map(len, ids)]), pa.int32())
    return pa.table({name: pa.ListArray.from_arrays(ends, pa.array(column)) for name, column in values.items()})


def check_output_file(output_file: str | Path) -> None:
    """Refuse a kind of file that is not written."""
    if Path(output_file).suffix not in _ENDS:
        raise ValueError(f"output_file must end in {' or '.join(_ENDS)}, got {str(output_file)!r}")
