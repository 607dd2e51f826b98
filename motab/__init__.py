"""Distil reasoning with a safety boundary: monitored generation with rollback. See `synthesize`."""

from motab.config import MotabConfig
from motab.data import Problem, load_problems
from motab.dataset import TrajectoryDataset, collate
from motab.evaluation import Evaluation, evaluate
from motab.export import export_dataset
from motab.generation import synthesize
from motab.grading import grade
from motab.models import load_model, load_tokenizer
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
from motab.prompts import PromptFormat
from motab.rollouts import Rollouts
from motab.solutions import as_trajectories
from motab.synthesis import synthesize_to_file
from motab.trainer import MotabTrainer
from motab.trajectory import Step, Trajectory
from motab.trajectory_file import read_trajectories

__all__ = [
    "AdaSwitch",
    "Evaluation",
    "MotabConfig",
    "MotabPolicy",
    "MotabTrainer",
    "OnPolicy",
    "Problem",
    "PromptFormat",
    "RelayOPD",
    "Rollouts",
    "Step",
    "StepSKD",
    "TeacherOnly",
    "TokenSKD",
    "Trajectory",
    "TrajectoryDataset",
    "Truncated",
    "as_trajectories",
    "collate",
    "evaluate",
    "export_dataset",
    "grade",
    "load_model",
    "load_problems",
    "load_tokenizer",
    "read_trajectories",
    "synthesize",
    "synthesize_to_file",
]
