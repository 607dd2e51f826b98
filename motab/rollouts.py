"""Prompts on which the student writes at every step of training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motab.dataset import TrajectoryDataset, encode, example
from motab.generation import SETTINGS, synthesize
from motab.policies import MotabPolicy, Policy, check_policy, token_budget
from motab.prompts import Prompt, encode_prompts, end_tokens, refuse_alone
from motab.trajectory import Grade, Trajectory
from motab_kernels.arguments import is_number


@dataclass(frozen=True)
class Rollouts(Dataset[int]):
    """Prompts that `MotabTrainer` takes instead of trajectories that are already written.

    Before each optimizer step the student, as it is then, and the teacher write one trajectory for each of the step's
    prompts, as `synthesize` would. With `OnPolicy` and a reverse KL this is on-policy distillation; with
    `MotabPolicy`, the teacher monitors it. With ``lmbda`` below 1, a step is a mixture of such trajectories and of
    given ones (GKD, arXiv 2306.13649, algorithm 1, which draws once for a whole batch).

    Args:
        prompts: as for `synthesize`, or given trajectories, on whose prompts the student writes, and whose
            ``ignore_authors`` holds for what it writes too; an epoch is one pass over them, in an order that the
            trainer draws.
        policy, max_new_tokens, batch_size, block_size, temperature, top_k, top_p, min_p, torch_compile,
            max_cached_tokens: as for `synthesize`. ``batch_size`` holds during generation only;
            more than the prompts of one device and step has no effect.
        grade: says whether a trajectory answers its problem, given the place of its prompt in ``prompts``; kept as its
            ``correct``, see `motab.grade`, and the share is logged.
        lmbda: the probability, above 0 and at most 1, that the student writes on a prompt, drawn for each prompt anew
            in every epoch; otherwise its given trajectory is trained on.

    Raises:
        ValueError: a policy that is none; a prompt that is not in a list; prompts without a length, such as a generator
            or a streamed dataset; ``lmbda`` out of range, or below 1 with prompts that are no `TrajectoryDataset`.
    """

    prompts: Sequence[Prompt] | TrajectoryDataset
    policy: Policy = field(default_factory=MotabPolicy)
    max_new_tokens: int = 1024
    batch_size: int = 8
    block_size: int = 16
    temperature: float = 0.6
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None
    torch_compile: bool = False
    max_cached_tokens: int | None = None
    grade: Grade | None = None
    lmbda: float = 1.0

    def __post_init__(self) -> None:
        check_policy(self.policy)
        refuse_alone(self.prompts)
        if not (hasattr(self.prompts, "__len__") and hasattr(self.prompts, "__getitem__")):
            raise ValueError(
                f"prompts must be a sequence, of which an epoch is one pass, got {type(self.prompts).__name__}; make a "
                "list of it"
            )
        if not is_number(self.lmbda) or not 0 < self.lmbda <= 1:
            raise ValueError(
                f"lmbda must be above 0 and at most 1, got {self.lmbda!r}; to train on given trajectories alone, give "
                "them to MotabTrainer without Rollouts, or leave --lmbda out"
            )
        if self.lmbda < 1 and self.given is None:
            raise ValueError(
                f"lmbda {self.lmbda} mixes in given trajectories, got prompts alone; give Rollouts a "
                "TrajectoryDataset, such as one of motab.as_trajectories, or leave lmbda out"
            )

    @property
    def given(self) -> TrajectoryDataset | None:
        """The given trajectories, None for prompts alone."""
        return self.prompts if isinstance(self.prompts, TrajectoryDataset) else None

    def _prompt(self, place: int) -> Prompt:
        return self.prompts.prompt(place) if isinstance(self.prompts, TrajectoryDataset) else self.prompts[place]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> int:
        return range(len(self))[index]  # a trajectory is graded by the place of its prompt

    def check_prompts(self, models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
        """Check all prompts before generation begins.

        Raises:
            ValueError: a prompt that `synthesize` would refuse, named by its place in `prompts`.
        """
        prompts = [self._prompt(place) for place in range(len(self))]
        encode_prompts(prompts, tokenizer, models, token_budget(self.policy, self.max_new_tokens))

    def end_tokens(self, models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """The tokens that end a text according to the tokenizer, any of the models or a given trajectory."""
        return {*end_tokens(models, tokenizer), *(() if self.given is None else self.given.end_tokens)}

    def write(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        places: Sequence[int],
        *,
        seed: int,
        indices: Sequence[int],
    ) -> list[Trajectory | None]:
        """A trajectory for each of these places in `prompts`, written with the student in evaluation mode; None where
        the given one is to be trained on. ``indices``, ascending, are what sets them apart from all others of a
        training.

        Raises:
            ValueError: all that `synthesize` refuses.
        """
        # By seed and index alone: the same in a training that is resumed, and in any number of processes.
        writes = [np.random.default_rng((seed, index)).random() < self.lmbda for index in indices]
        chosen = list(compress(places, writes))
        settings = {name: getattr(self, name) for name in SETTINGS if name != "seed"}
        settings |= {"seed": seed, "indices": list(compress(indices, writes))}
        prompts = [self._prompt(place) for place in chosen]
        was_training = student.training
        student.eval()
        try:
            written = list(synthesize(student, teacher, tokenizer, prompts, policy=self.policy, **settings))
        finally:
            student.train(was_training)
        if self.grade is not None:
            for trajectory, place in zip(written, chosen, strict=True):
                trajectory.correct = bool(self.grade(trajectory, place))
        found = iter(written)
        return [next(found) if does else None for does in writes]

    def examples(
        self, written: Sequence[Trajectory | None], places: Sequence[int], ignored: Collection[str]
    ) -> Iterator[dict[str, list[int]]]:
        """What `write` returned for these places as `motab.collate` takes it, without the authors that are ignored, or
        that the given trajectories ignore."""
        ignored = ignored if self.given is None else self.given.ignore_authors
        for trajectory, place in zip(written, places, strict=True):
            if trajectory is not None:
                yield example(*encode(trajectory, ignored))
            elif self.given is not None:
                yield self.given[place]
