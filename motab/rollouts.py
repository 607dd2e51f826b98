"""Prompts on which the student writes at every step of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motab.generation import SETTINGS, synthesize
from motab.policies import MotabPolicy, Policy, check_policy, token_budget
from motab.prompts import Prompt, encode_prompts
from motab.trajectory import Grade, Trajectory


@dataclass(frozen=True)
class Rollouts(Dataset[int]):
    """Prompts that `MotabTrainer` takes instead of trajectories that are already written.

    Before each optimizer step the student, as it is then, and the teacher write one trajectory for each of the step's
    prompts, as `synthesize` would. With `OnPolicy` and a reverse KL this is on-policy distillation; with
    `MotabPolicy`, the teacher monitors it.

    Args:
        prompts: as for `synthesize`; an epoch is one pass over them, in an order that the trainer draws.
        policy, max_new_tokens, batch_size, block_size, temperature, top_k, top_p, min_p, torch_compile,
            max_cached_tokens: as for `synthesize`. ``batch_size`` holds during generation only;
            more than the prompts of one device and step has no effect.
        grade: says whether a trajectory answers its problem, given the place of its prompt in ``prompts``; kept as its
            ``correct``, see `motab.grade`, and the share is logged.

    Raises:
        ValueError: a policy that is none; prompts without a length, such as a generator or a streamed dataset.
    """

    prompts: Sequence[Prompt]
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

    def __post_init__(self) -> None:
        check_policy(self.policy)
        if not (hasattr(self.prompts, "__len__") and hasattr(self.prompts, "__getitem__")):
            raise ValueError(
                f"prompts must be a sequence, of which an epoch is one pass, got {type(self.prompts).__name__}; make a "
                "list of it"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> int:
        return range(len(self))[index]  # a trajectory is graded by the place of its prompt

    def check_prompts(self, models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
        """Check all prompts before generation begins.

        Raises:
            ValueError: a prompt that `synthesize` would refuse, named by its place in `prompts`.
        """
        encode_prompts(self.prompts, tokenizer, models, token_budget(self.policy, self.max_new_tokens))

    def write(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        places: Sequence[int],
        *,
        seed: int,
        first_index: int,
    ) -> list[Trajectory]:
        """One trajectory for each of these places in `prompts`, written with the student in evaluation mode.

        Raises:
            ValueError: all that `synthesize` refuses.
        """
        settings = {name: getattr(self, name) for name in SETTINGS if name != "seed"}
        settings |= {"seed": seed, "indices": range(first_index, first_index + len(places))}
        prompts = [self.prompts[place] for place in places]
        was_training = student.training
        student.eval()
        try:
            written = list(synthesize(student, teacher, tokenizer, prompts, policy=self.policy, **settings))
        finally:
            student.train(was_training)
        if self.grade is not None:
            for trajectory, place in zip(written, places, strict=True):
                trajectory.correct = bool(self.grade(trajectory, place))
        return written
