"""Distil reasoning with a safety boundary: monitored generation with rollback. See `synthesize`."""

from motab.engine import synthesize
from motab.policies import MotabPolicy, OnPolicy, TeacherOnly
from motab.synthesis import read_trajectories, synthesize_to_file
from motab.trainer import MotabConfig, MotabTrainer
from motab.trajectory import Step, Trajectory

__all__ = [
    "MotabConfig",
    "MotabPolicy",
    "MotabTrainer",
    "OnPolicy",
    "Step",
    "TeacherOnly",
    "Trajectory",
    "read_trajectories",
    "synthesize",
    "synthesize_to_file",
]
