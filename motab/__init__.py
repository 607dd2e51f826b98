"""Distil reasoning with a safety boundary: monitored generation with rollback. See `synthesize`."""

from motab.dataset import TrajectoryDataset, collate
from motab.export import export_dataset
from motab.generation import synthesize
from motab.policies import (
    AdaSwitch,
    MotabPolicy,
    OnPolicy,
    RelayOPD,
    StepSKD,
    TeacherOnly,
    TokenSKD,
    Truncated,
)
from motab.rollouts import Rollouts
from motab.synthesis import synthesize_to_file
from motab.trainer import MotabTrainer
from motab.training_config import MotabConfig
from motab.trajectory import Step, Trajectory
from motab.trajectory_file import read_trajectories

__all__ = [
    "AdaSwitch",
    "MotabConfig",
    "MotabPolicy",
    "MotabTrainer",
    "OnPolicy",
    "RelayOPD",
    "Rollouts",
    "Step",
    "StepSKD",
    "TeacherOnly",
    "TokenSKD",
    "Trajectory",
    "TrajectoryDataset",
    "Truncated",
    "collate",
    "export_dataset",
    "read_trajectories",
    "synthesize",
    "synthesize_to_file",
]
