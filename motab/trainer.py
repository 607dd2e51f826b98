"""Training on trajectories through transformers' Trainer: by cross-entropy, the paper's recipe, or by a divergence from
the teacher at every token; on finished trajectories, or on those that the student writes during training."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from motab.config import MotabConfig
from motab.dataset import IGNORED, TrajectoryDataset, collate
from motab.distillation import (
    Divergence,
    attention_that_runs,
    cross_entropy_from_head,
    has_plain_head,
    last_hidden_states,
    loss_from_heads,
    loss_from_logits,
    output_and_loss,
)
from motab.models import load_model
from motab.padding import reads_rows_apart, without_padding
from motab.processes import Processes
from motab.quantization import method
from motab.rollouts import Rollouts
from motab.rollouts_file import RolloutsFile
from motab.sharding import (
    copy_weights_,
    is_sharded,
    release_head,
    shard_frozen,
    uses_fsdp,
    uses_zero3,
    whole_copy,
)
from motab.summary import Summary
from motab.trainer_input import (
    Trajectories,
    as_examples,
    check,
    check_processes,
    refuse_frozen,
    refuse_of_trainer,
    refuse_to_overwrite,
)


def _collate_or_list(examples: list[Any]) -> Any:
    """A padded batch of trajectories, or a list of places of prompts."""
    return collate(examples) if isinstance(examples[0], dict) else examples


def _end_with(model: PreTrainedModel, tokens: Iterable[int]) -> None:
    """Let the model's generation end with these tokens too: a student learns its teacher's end tokens."""
    if model.generation_config is not None:
        known = model.generation_config.eos_token_id
        ids = [*known] if isinstance(known, list) else [] if known is None else [known]
        ids += sorted(set(tokens) - set(ids))
        model.generation_config.eos_token_id = ids if len(ids) > 1 else next(iter(ids), None)


class MotabTrainer(Trainer):
    """Trains a student on trajectories, or on those that it writes during training (`Rollouts`): each optimizer step
    then trains on trajectories by the student of that step, and the log also holds their `motab.summary.figures` and
    the seconds that passed, of which ``writing_seconds`` went into writing. Under FSDP2 and DeepSpeed's ZeRO-3 each
    process writes with a whole copy of the student, in the dtype of the computation.

    No full logits are held: the loss is taken from hidden states and output embeddings, if these alone give the logits,
    which is tested on two tokens at the start. It is taken from logits for other models (a softcap, a scale, an adapter
    on the head), for cross-entropy with a router's loss, and where DeepSpeed compiles the student. It is the mean over
    all tokens of a step, however these are split into micro-batches and among processes.

    The end tokens of the trajectories (with `Rollouts`, of both models) are added to the student's
    ``generation_config``, which is saved with it.

    Args:
        model: the student; a name or path is loaded in float32.
        teacher_model: needed for a divergence and for `Rollouts` that it writes or scores; it has the student's
            tokenizer, and is moved to the student's device and put into evaluation mode; under FSDP2 and DeepSpeed's
            ZeRO-3 it is frozen, and sharded as the student is, but for `Rollouts` and if it is quantised. A name or
            path is loaded in the dtype it was saved in, except under ZeRO-3, which has one for both. Refused for
            cross-entropy on finished trajectories, which needs no teacher.
        args: `MotabConfig`.
        train_dataset: trajectories, the file that `synthesize_to_file` wrote, a `TrajectoryDataset` of them, or
            `Rollouts`.
        eval_dataset: held-out trajectories, their file, or several of these by name. Their loss, the mean over all
            their tokens, is logged as ``eval_strategy`` says and returned by `evaluate`.
        processing_class: the tokenizer, saved with the model; needed for `Rollouts`.
        kwargs: Trainer's ``callbacks``, ``optimizers`` and ``optimizer_cls_and_kwargs``.

    Raises:
        ValueError: another argument of Trainer; ``args`` or a dataset of another type; an ``accelerator_config`` that
            deals batches out otherwise; an ``output_dir`` that a model was loaded from; a student of which nothing is
            trained, as one with adapters that is given by name, or one in few bits without adapters (in 8 bits, under
            FSDP2, with them too); no trajectories or prompts; a missing teacher or tokenizer, or a teacher that is not
            needed; `Rollouts` with a policy under which the student writes nothing, or with models that version 1 of
            FSDP shards; a teacher under version 1 of FSDP; models that do not take ``padding_free``; several GPUs in
            one process (DataParallel); a prompt that `synthesize` refuses; during training, anything else it refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: MotabConfig | None = None,
        *,
        train_dataset: Trajectories | Rollouts,
        eval_dataset: Trajectories | Mapping[str, Trajectories] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args = MotabConfig() if args is None else args
        refuse_of_trainer(kwargs)
        check(args, teacher_model, train_dataset, processing_class)
        self.rollouts = train_dataset if isinstance(train_dataset, Rollouts) else None
        self.saved = RolloutsFile(Path(args.output_dir) / "rollouts", processing_class)
        self.held_out: TrajectoryDataset | None = None  # those of the last evaluation
        self.divergence: Divergence | None = None
        if args.loss_type != "cross_entropy":
            self.divergence = Divergence(args.loss_type, args.beta, args.alpha, args.temperature)
        dataset = train_dataset if isinstance(train_dataset, Rollouts) else as_examples(train_dataset, args)
        if not len(dataset):
            raise ValueError("train_dataset must hold at least one trajectory or prompt, got none")
        held_out: Any = eval_dataset
        if isinstance(eval_dataset, Mapping):
            held_out = {name: as_examples(data, args) for name, data in eval_dataset.items()}
        elif eval_dataset is not None:
            held_out = as_examples(eval_dataset, args)
        on_cpu = uses_fsdp(args)
        model = load_model(model, "float32", on_cpu=on_cpu) if isinstance(model, str) else model
        teacher_model = load_model(teacher_model, on_cpu=on_cpu) if isinstance(teacher_model, str) else teacher_model
        refuse_frozen(model)
        for each in (model, teacher_model):
            refuse_to_overwrite(args.output_dir, each)
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=held_out,
            data_collator=_collate_or_list,
            processing_class=processing_class,
            **kwargs,
        )
        check_processes(self.args, self.accelerator, model, teacher_model, writes=self.rollouts is not None)
        self.teacher_model, self.processes = teacher_model, Processes()
        by_fsdp2, by_zero3 = self.accelerator.is_fsdp2, uses_zero3(self.accelerator)
        # Weights in few bits take little memory, and most kinds cannot be sharded; a teacher that writes is whole.
        shards_teacher = teacher_model is not None and method(teacher_model) is None
        shards_teacher &= by_fsdp2 or (by_zero3 and (self.rollouts is None or is_sharded(teacher_model)))
        if isinstance(dataset, Rollouts):
            assert processing_class is not None
            writers = [model] if teacher_model is None else [model, teacher_model]
            dataset.check_prompts(writers, processing_class)
            _end_with(model, dataset.end_tokens(writers, processing_class))
        else:
            _end_with(model, dataset.end_tokens)
        if teacher_model is not None:
            teacher_model.eval()
            if not shards_teacher:
                teacher_model.to(self.args.device)
        # ZeRO-3 may have sharded the student, which then runs in a training alone: None until the first loss.
        self.fuses_head: bool | None = None
        if not by_zero3:
            self._look_at(model)
        if self.label_smoother is not None and self.divergence is None and by_fsdp2 and not self.fuses_head:
            # FSDP2 renames the model's class, by which transformers knows that labels are to be shifted.
            raise ValueError(
                f"label_smoothing_factor must be 0 under FSDP2 for {type(model).__name__}, whose logits are more than "
                f"its head's, got {self.args.label_smoothing_factor}"
            )
        self.writer: PreTrainedModel | None = None  # a whole copy of a sharded student, which writes
        if (by_fsdp2 or by_zero3) and self.rollouts is not None:
            self.writer = whole_copy(model, self._computed_dtype(model), self.args.device)
        if shards_teacher:
            assert teacher_model is not None
            self._shard_teacher(teacher_model)
        if self.divergence is not None or self.fuses_head:
            self.model_accepts_loss_kwargs = True  # compute_loss itself divides by the tokens of a whole step

    def _computed_dtype(self, model: PreTrainedModel) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, model.dtype)

    def _shard_teacher(self, teacher: PreTrainedModel) -> None:
        """A teacher that writes is then copied whole: under FSDP2 only the first process may have its weights, and one
        that is given by name is read in parts under ZeRO-3."""
        if self.writer is None:
            shard_frozen(teacher, self.accelerator)
            return
        self.teacher_model = whole_copy(teacher, teacher.dtype, self.args.device)
        if not is_sharded(teacher):
            shard_frozen(teacher, self.accelerator)
        copy_weights_(self.teacher_model, teacher)

    def _look_at(self, model: PreTrainedModel) -> None:
        """Find out whether hidden states and output embeddings alone give the loss, so that no logits need to be held,
        and whether the models can do without padding.

        Raises:
            ValueError: they cannot, and must.
        """
        models = [model]
        if self.divergence is not None:
            assert self.teacher_model is not None
            models.append(self.teacher_model)

        def all_of_them(test: Callable[[PreTrainedModel], bool]) -> bool:
            def passes(each: PreTrainedModel) -> bool:
                with attention_that_runs(each), self.accelerator.autocast():  # flash attention takes no float32
                    return test(each)

            def are_all() -> bool:
                return all([passes(each) for each in models])

            # Under FSDP only the main process may have read weights; of models that are sharded all have a part.
            return are_all() if any(map(is_sharded, models)) else self.processes.from_main(are_all)

        self.fuses_head = self._may_fuse_head(model) and all_of_them(has_plain_head)
        if self.args.padding_free and not all_of_them(reads_rows_apart):
            names = " or ".join(type(each).__name__ for each in models)
            raise ValueError(
                f"padding_free needs models that read rows in one sequence apart, by their position_ids, got {names}, "
                "which read them otherwise; leave it out, or choose another attn_implementation"
            )

    def _may_fuse_head(self, model: PreTrainedModel) -> bool:
        """Whether nothing but the models' heads may stand against it."""
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            return False
        if self.is_deepspeed_enabled and self.args.torch_compile:  # it would compile each step's loss again
            return False
        return self.divergence is not None or not getattr(model.config, "output_router_logits", False)

    def get_eval_dataloader(self, eval_dataset: str | Trajectories | None = None) -> Any:
        """Trainer's method, which also takes trajectories or a `Path`; a string names one of several datasets."""
        if eval_dataset is not None and not isinstance(eval_dataset, str | TrajectoryDataset):
            eval_dataset = as_examples(eval_dataset, self.args)
        loader = super().get_eval_dataloader(eval_dataset)
        self.held_out = loader.dataset
        return loader

    def train(self, *arguments: Any, **settings: Any) -> Any:
        """Trainer's method; the figures and seconds since the last entry of the log begin anew."""
        self.written, self.writing_seconds, self.logged_at = Summary(), 0.0, math.nan
        return super().train(*arguments, **settings)

    def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
        """Trainer's method; it may come before training, except under FSDP2 and DeepSpeed."""
        is_first = not self.accelerator._models
        if is_first and (self.accelerator.is_fsdp2 or self.is_deepspeed_enabled):
            raise ValueError(
                "evaluate must follow train under FSDP2 and DeepSpeed; to evaluate before it, set eval_on_start"
            )
        metrics = super().evaluate(*arguments, **settings)
        if is_first:  # else a training by several processes would take the model for prepared, and share no gradient
            for model in self.accelerator._models:
                model._is_accelerate_prepared = False
            self.accelerator._models.clear()
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's method; the generation config, which names the end tokens, is saved beside adapters too."""
        if self.args.should_save and self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def predict(self, *arguments: Any, **settings: Any) -> Any:
        """Refused: Trainer's method returns the logits of every token, which are never held."""
        raise ValueError(
            "MotabTrainer gives no predictions: evaluate(dataset) measures the loss on trajectories, motab.synthesize "
            "lets the model write, motab.evaluate grades its answers"
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step; for prompts, of the trajectories that the student writes now."""
        if self.rollouts is not None:
            epoch_iterator = iter(self._write(list(itertools.islice(epoch_iterator, num_batches))))
        else:
            epoch_iterator = map(self._training_batch, epoch_iterator)
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, count if count is None else count.clamp(min=1)  # none counts of what ignored authors wrote

    def _training_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self._ignore_repeats_(batch["labels"], len(self.train_dataset), self._train_batch_size)
        return batch

    def _ignore_repeats_(self, labels: Tensor, count: int, rows: int) -> None:
        """Ignore the rows that accelerate repeats in an epoch's last batch to give every process equally many."""
        # accelerate's own remainder is not there in an epoch that is resumed.
        remainder = count % (rows * self.accelerator.num_processes)
        if self.accelerator.gradient_state.end_of_dataloader and remainder and not self.args.dataloader_drop_last:
            labels[max(remainder - self.args.process_index * rows, 0) :] = IGNORED

    def _items_evaluated(self, labels: Tensor) -> Tensor:
        """What a batch's sum is divided by: as many tokens as that many trajectories have on average. Trainer takes the
        mean over trajectories of their batches' losses, which is then the mean over all tokens."""
        assert self.held_out is not None
        self._ignore_repeats_(labels, len(self.held_out), self.args.eval_batch_size)
        count = self.held_out.num_trained / len(self.held_out)
        if self.args.average_tokens_across_devices:
            count *= self.accelerator.num_processes  # as the loss will be
        return (labels != IGNORED).any(1).sum().clamp(min=1) * count

    def _write(self, batches: Sequence[list[int]]) -> list[dict[str, Tensor]]:
        assert self.rollouts is not None
        places = [place for batch in batches for place in batch]
        # A row's place among those of all steps, however they are split: each trajectory has its own random numbers.
        first = self.state.global_step * self.args.gradient_accumulation_steps
        rank, count, size = self.args.process_index, self.args.world_size, self.args.train_batch_size
        starts = [(number * count + rank) * size for number in range(first, first + len(batches))]
        indices = [start + row for start, batch in zip(starts, batches, strict=True) for row in range(len(batch))]
        student, began = self.model, time.perf_counter()
        if math.isnan(self.logged_at):
            self.logged_at = began
        if self.writer is not None:
            copy_weights_(self.writer, self.model)
            student = self.writer
        writers = (student, self.teacher_model, self.processing_class)
        with self.accelerator.autocast():  # in the precision of the training
            found = self.rollouts.write(*writers, places, seed=self.args.seed, indices=indices)
        self.writing_seconds += time.perf_counter() - began
        self.processes.wait()  # without a limit: another may have much longer texts to write
        trajectories = [t for t in found if t is not None]
        for trajectory in trajectories:
            self.written.add(trajectory)
        if self.args.save_rollouts and self.is_world_process_zero():
            self.saved.add(trajectories, self.state.global_step, indices[0])
        examples = self.rollouts.examples(found, places, self.args.ignore_authors)
        made = [collate(list(itertools.islice(examples, len(batch)))) for batch in batches]
        self._ignore_repeats_(made[-1]["labels"], len(self.rollouts), self._train_batch_size)
        return made

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's method, with the figures of the trajectories written since the last entry, how many seconds that
        took, and how many have passed."""
        if self.rollouts is not None and "loss" in logs:
            known = self.written.figures() if self.written.counts else {}
            logs |= {name: value for name, value in known.items() if value is not None}
            now = time.perf_counter()
            logs |= {"writing_seconds": round(self.writing_seconds, 3), "seconds": round(now - self.logged_at, 3)}
            self.written, self.writing_seconds, self.logged_at = Summary(), 0.0, now
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        bare = self.accelerator.unwrap_model(model)
        if self.fuses_head is None:
            self._look_at(bare)
        if not model.training:
            num_items_in_batch = self._items_evaluated(inputs["labels"])
        if self.args.padding_free:
            inputs = without_padding(inputs)
        if self.divergence is None and not self.fuses_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        mask = labels[:, 1:] != IGNORED
        inputs = {name: x for name, x in inputs.items() if name != "labels"}
        if self.divergence is not None:
            assert self.teacher_model is not None
            with torch.no_grad(), self.accelerator.autocast():
                if self.fuses_head:
                    teacher = last_hidden_states(self.teacher_model, **inputs)
                else:
                    teacher = self.teacher_model(**inputs, use_cache=False).logits

        def from_heads(hidden: Tensor) -> Tensor:
            with self.accelerator.autocast():
                if self.divergence is None:
                    smoothing = self.args.label_smoothing_factor
                    return cross_entropy_from_head(bare, hidden, labels, num_items_in_batch, smoothing)
                models, states = (bare, self.teacher_model), (hidden, teacher)
                return loss_from_heads(models, states, mask, self.divergence, num_items_in_batch)

        if self.fuses_head:
            from_output = self.args.torch_compile or self.accelerator.is_fsdp2
            settings = {"in_head": self.is_deepspeed_enabled, "from_output": from_output}
            student, loss = output_and_loss(model, bare, inputs, from_heads, **settings)
        else:
            student = model(**inputs)
            assert self.divergence is not None
            with self.accelerator.autocast():
                loss = loss_from_logits((student.logits, teacher), mask, self.divergence, num_items_in_batch)
        if self.divergence is not None:
            release_head(self.teacher_model)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # since gradients are averaged over the processes
        return (loss, student) if return_outputs else loss
