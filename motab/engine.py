"""Monitored generation: the student drafts a block, the teacher scores it, rows that stray roll back to the teacher.

Every row is one trajectory. Each round advances all of them by up to ``block_size`` tokens: a few forward passes,
one fused call that judges the block, and one transfer that tells the host what happened; the host keeps the record.
Nothing of a trajectory depends on the rows beside it or on where blocks begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import motab_kernels as mk
from motab import memory
from motab.admission import Admission
from motab.compiled_writer import CompiledWriter
from motab.policies import Rules
from motab.prompts import end_tokens, vocabulary_size
from motab.row import BROKEN, PADDING, STUDENT, TEACHER, Row
from motab.sampling import Sampling, choose, uniform
from motab.steps import delimiter_automaton, tokens_of_words
from motab.trajectory import STATISTICS, Trajectory
from motab.writer import Writer
from motab_kernels.backend import on_device


class Draft(NamedTuple):
    """A block of T tokens for each of b rows."""

    pending: Tensor  # (b,) the token before the block
    tokens: Tensor  # (b, T)
    entries: Tensor  # (b, T) as `Row` takes them: PADDING if not valid, BROKEN if the logits cannot be drawn from
    logits: Tensor  # (b, T, V)
    valid: Tensor  # (b, T) bool: within budget and text
    last: Tensor  # (b, T) bool: ends the text


class Engine:
    """One run of `synthesize`; ``waits`` counts the times that the host waited for the device."""

    def __init__(
        self,
        student: PreTrainedModel | None,
        teacher: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        rules: Rules | None,
        *,
        max_new_tokens: int,
        batch_size: int,
        block_size: int,
        sampling: Sampling,
        seed: int,
        indices: Sequence[int],
        torch_compile: bool = False,
        max_cached_tokens: int | None = None,
    ):
        self.tokenizer, self.rules = tokenizer, rules
        self.indices, self.block_size, self.sampling = indices, block_size, sampling
        batch_size = min(batch_size, len(prompts))
        self.waits = 0
        models = [model for model in (student, teacher) if model is not None]
        self.device = models[0].device
        self.vocab_size = vocabulary_size(tokenizer)  # columns beyond it are padding, neither written nor scored
        self.end_ids = end_tokens(models, tokenizer)
        self.is_end = self._table(self.end_ids)
        # A block may run past the budget by its own length before it is cut.
        max_length = max(map(len, prompts)) + max_new_tokens + block_size
        pages = memory.pages_for(max_cached_tokens, batch_size, max_length)

        def writer(model: PreTrainedModel | None) -> Writer | None:
            if model is None:
                return None
            sizes = (batch_size, max_length, self.vocab_size, pages)
            return CompiledWriter(model, *sizes, block_size) if torch_compile else Writer(model, *sizes)

        self.student, self.teacher = writer(student), writer(teacher)
        judged: tuple[Tensor, ...] = ()
        self.automaton = None
        if rules is not None:
            if rules.delimiter is not None:
                self.automaton = delimiter_automaton(tokenizer, rules.delimiter, self.vocab_size, self.device)
            self.automaton_state = torch.zeros(batch_size, dtype=torch.long, device=self.device)
            self.state = rules.boundary.new_state(batch_size, self.device)
            judged = (self.automaton_state, *self.state.tensors)
            if rules.reflection:
                ids = tokens_of_words(tokenizer, rules.reflection, self.vocab_size)
                self.is_reflection = self._table(ids)
        end_ids, by_index = self.end_ids, dict(zip(indices, prompts, strict=True))
        turn = TEACHER if rules is None else STUDENT

        # No method: a cycle of references would keep the caches until Python looks for cycles.
        def new_row(index: int) -> Row:
            return Row(index, by_index[index], seed, rules, max_new_tokens, end_ids, turn=turn)

        self.admission = Admission(
            indices,
            new_row,
            [writer for writer in (self.student, self.teacher) if writer is not None],
            judged,
            batch_size=batch_size,
            block_size=block_size,
            max_length=max_length,
        )

    def _table(self, ids: Sequence[int]) -> Tensor:
        """(V,) bool: which tokens are among these."""
        return torch.isin(torch.arange(self.vocab_size, device=self.device), torch.tensor(ids, device=self.device))

    def run(self, in_order: bool) -> Iterator[Trajectory]:
        """Trajectories in the order of their indices, or each as soon as it is finished."""
        expected = deque(self.indices)
        done: dict[int, Trajectory] = {}
        while self.admission.has_more():
            self._begin_turns(self.admission.admit())
            self._monitored_round()
            self._teacher_round()
            done |= {row.index: row.trajectory(self.tokenizer) for row in self.admission.finished()}
            while done and (expected[0] in done or not in_order):
                yield done.pop(expected.popleft() if in_order else min(done))

    def _begin_turns(self, slots: list[int]) -> None:
        """Reset the judgement of rows whose next turn begins."""
        if self.rules is not None and slots:
            index = on_device(slots, self.device)
            self.state.reset_(index)
            self.automaton_state.index_fill_(0, index, 0)  # which, unlike an assignment, does not make the host wait

    def _steps_ended(self, index: Tensor, tokens: Tensor) -> Tensor:
        """(b, T) bool: which tokens of the rows `index` complete a step."""
        if self.automaton is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        states, completes = self.automaton.scan(self.automaton_state[index], tokens)
        self.automaton_state[index] = states[:, -1]
        return completes

    def _active(self, author: int) -> tuple[list[int], list[Row]]:
        pairs = [(slot, row) for slot, row in self.admission.busy() if row.author == author and not row.finished]
        return [slot for slot, _ in pairs], [row for _, row in pairs]

    def _draft(self, writer: Writer, slots: list[int], rows: list[Row]) -> Draft:
        count = min(self.block_size, max(row.wanted for row in rows))
        numbers = [(row.pending, row.key, len(row.records), row.remaining) for row in rows]
        pending, keys, positions, remaining = on_device(numbers, self.device).unbind(1)
        offsets = torch.arange(count, device=self.device)
        draws = uniform(keys[:, None], positions[:, None] + offsets)
        drawn: list[Tensor] = []

        def draw(step: Tensor, offset: int) -> Tensor:
            chosen, can_be_drawn = choose(step, draws[:, offset], self.sampling)
            drawn.append(can_be_drawn)
            return chosen

        tokens, logits = writer.draft(slots, pending, count, draw)
        ended = self.is_end[tokens]
        left = remaining[:, None] - offsets
        valid = (left > 0) & (ended.cumsum(1) - ended.long() == 0)
        entries = torch.where(valid, torch.where(torch.stack(drawn, 1), tokens, BROKEN), PADDING)
        return Draft(pending, tokens, entries, logits, valid, valid & (ended | (left == 1)))

    def _monitored_round(self) -> None:
        """One block by the student, judged by the teacher if there is one."""
        slots, rows = self._active(STUDENT)
        if not rows:
            return
        assert self.student is not None
        draft = self._draft(self.student, slots, rows)
        index = on_device(slots, self.device)
        step_ends = draft.valid & (self._steps_ended(index, draft.tokens) | draft.last)
        strayed = []
        if self.teacher is None:
            (entries,) = self._to_host(draft.entries)
            for row, block in zip(rows, entries.tolist(), strict=True):
                for token in block:
                    if token != PADDING:
                        row.write(int(token), [None] * len(STATISTICS))
        else:
            teacher_logits = self.teacher.score(slots, draft.pending, draft.tokens)
            block, rollback = self._to_host(*self._judged(index, rows, draft, teacher_logits, step_ends))
            for place, (slot, row) in enumerate(zip(slots, rows, strict=True)):
                if row.judge(block[place].tolist()):
                    row.take_over(int(rollback[place]), self.tokenizer)
                    strayed.append(slot)
        self._settle(slots, rows, (self.student, self.teacher))
        self._begin_turns(strayed)

    def _judged(
        self, index: Tensor, rows: list[Row], draft: Draft, teacher_logits: Tensor, step_ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The columns that `Row.judge` takes for each of (b, T) tokens, and per row how much of its turn a rollback
        keeps."""
        assert self.rules is not None
        tokens = torch.where(draft.valid, draft.tokens, PADDING)
        state = mk.BoundaryState.of(*(x[index] for x in self.state.tensors))
        out = mk.fused_kl_boundary(
            draft.logits, teacher_logits, tokens, boundary=self.rules.boundary, state=state, step_ends=step_ends
        )
        for x, part in zip(self.state.tensors, state.tensors, strict=True):
            x.index_copy_(0, index, part)
        strays = out.stray
        if self.rules.reflection:
            strays = self._reflects(rows, draft.logits, teacher_logits, out.teacher_argmax) & draft.valid
            step_ends = step_ends & ~strays
        judged = [draft.entries, step_ends, strays, out.score, out.threshold]
        statistics = _rounded(*(getattr(out, name) for name in STATISTICS))
        return torch.cat([_columns(*judged), statistics], -1), state.rollback_position

    def _reflects(self, rows: list[Row], logits: Tensor, teacher_logits: Tensor, argmax: Tensor) -> Tensor:
        """(b, T) bool: the teacher's likeliest token is a reflection word, and not among the student's likeliest."""
        assert self.rules is not None
        # The op ranks by its second logits: with the sides swapped, by the student's.
        rank = mk.fused_kl_boundary(teacher_logits, logits, argmax).teacher_rank
        watched = on_device([row.watched for row in rows], self.device)[:, None] != 0
        return watched & self.is_reflection[argmax] & (rank >= self.rules.student_top_k)

    def _teacher_round(self) -> None:
        """One block by the teacher, for the rows that it writes."""
        slots, rows = self._active(TEACHER)
        if not rows:
            return
        assert self.teacher is not None
        draft = self._draft(self.teacher, slots, rows)
        own = mk.fused_kl_boundary(draft.logits, draft.logits, draft.tokens)  # only for the teacher's statistics
        completes = torch.zeros_like(draft.valid)
        if self.rules is not None:
            completes = self._steps_ended(on_device(slots, self.device), draft.tokens)
        statistics = _rounded(own.teacher_logprob, own.teacher_entropy)
        (packed,) = self._to_host(torch.cat([_columns(draft.entries, completes), statistics], -1))
        for row, block in zip(rows, packed.tolist(), strict=True):
            for token, completes_step, token_logprob, token_entropy in block:
                if token == PADDING:
                    break
                known = {"teacher_logprob": token_logprob, "teacher_entropy": token_entropy}
                row.write(int(token), [known.get(name) for name in STATISTICS])
                if not row.continue_turn(bool(completes_step)):
                    break
        self._settle(slots, rows, (self.teacher,))
        returned = {
            slot: row for slot, row in zip(slots, rows, strict=True) if row.author == STUDENT and not row.finished
        }
        if returned:
            assert self.student is not None
            texts = {slot: row.text_from(self.student.lengths[slot]) for slot, row in returned.items()}
            self.student.catch_up(texts, self.block_size)
            self._begin_turns(list(returned))

    def _settle(self, slots: list[int], rows: list[Row], writers: tuple[Writer | None, ...]) -> None:
        """Cut the caches back to all of a row's tokens but the pending one."""
        for writer in writers:
            if writer is not None:
                writer.rollback({slot: row.length - 1 for slot, row in zip(slots, rows, strict=True)})

    def _to_host(self, *tensors: Tensor) -> list[Tensor]:
        """The only place where the host waits for the device: one transfer per round and model that writes."""
        self.waits += 1
        flat = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _columns(*parts: Tensor) -> Tensor:
    return torch.stack([part.double() for part in parts], -1)


def _rounded(*statistics: Tensor) -> Tensor:
    """As columns, to six decimal places: more mean nothing, and take half of a trajectory's file."""
    return _columns(*statistics).round(decimals=6)
