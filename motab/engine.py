"""Monitored generation: the student drafts a block, the teacher scores it, rows that stray roll back to the teacher.

Every row is one trajectory. Each round advances all of them by up to ``block_size`` tokens: a few forward passes,
one fused call that judges the block, and one transfer that tells the host what happened; the host keeps the record.
Where that is faster, the student also drafts what the teacher writes, see `motab.speculation`. Nothing of a trajectory
depends on the rows beside it, on where blocks begin or on who drafted it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import motab_kernels as mk
from motab import memory
from motab.admission import Admission
from motab.compiled_writer import CompiledWriter
from motab.drawing import Sampling, uniform
from motab.policies import UNJUDGED, Rules
from motab.prompts import end_tokens, vocabulary_size
from motab.recurrent_writer import RecurrentWriter
from motab.row import BROKEN, PADDING, STUDENT, TEACHER, Row
from motab.speculation import Plan, speculation_of
from motab.steps import delimiter_automaton, tokens_of_words
from motab.trajectory import STATISTICS, Trajectory
from motab.writer import Writer
from motab_kernels.ragged_kv_cache_checks import keeps_states
from motab_kernels.tensors import on_device

#: Of the columns that `Row.judge` takes, those that `Row.enter` does.
TEACHER_COLUMNS = [0, 1, *(5 + STATISTICS.index(name) for name in ("teacher_logprob", "teacher_entropy"))]


class Draft(NamedTuple):
    """A block of T tokens that one model proposes for each of b rows."""

    cache_rows: Tensor  # (b,) where the rows lie in the caches and in the state of their judgement
    pending: Tensor  # (b,) the token before the block
    remaining: Tensor  # (b,) tokens of budget left
    draws: Tensor  # (b, T) random numbers
    tokens: Tensor  # (b, T)
    can_be_drawn: Tensor  # (b, T) bool, see `mk.Samples.valid`
    logits: Tensor  # (b, T, V)


class Block(NamedTuple):
    """What b rows write of a draft."""

    tokens: Tensor  # (b, T)
    entries: Tensor  # (b, T) as `Row` takes them: PADDING if not valid, BROKEN if the logits cannot be drawn from
    valid: Tensor  # (b, T) bool: within budget and text, and not after a token that was not drafted; always the first
    step_ends: Tensor  # (b, T) bool: valid, and the last of a step or of the text


class Judged(NamedTuple):
    """What the host needs to know of a block of T tokens by the student in each of b rows."""

    columns: Tensor  # (b, T, ...) as `Row.judge` takes them
    rollback: Tensor  # (b,) tokens of its turn that a rollback keeps
    counts: Tensor  # (2,) of the teacher's tokens those that are as drafted, and all
    instead: Tensor  # (b, n, 4) what the teacher writes after a rollback, as `Row.enter` takes it; n = 0: not yet known


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
        torch_compile: bool,
        max_cached_tokens: int | None,
    ):
        self.tokenizer, self.rules = tokenizer, UNJUDGED if rules is None else rules
        self.indices, self.block_size, self.sampling = indices, block_size, sampling
        batch_size = min(batch_size, len(prompts))
        self.waits = 0
        models = [model for model in (student, teacher) if model is not None]
        self.device = models[0].device
        self.vocab_size = vocabulary_size(tokenizer)  # columns beyond it are padding, neither written nor scored
        # A student that only drafts has no say in the text.
        self.end_ids = end_tokens(models if rules is not None else models[-1:], tokenizer)
        self.is_end = self._table(self.end_ids)
        # A block may run past the budget by its own length before it is cut.
        max_length = max(map(len, prompts)) + max_new_tokens + block_size
        pages = memory.pages_for(max_cached_tokens, batch_size, max_length)

        def writer(model: PreTrainedModel | None) -> Writer | None:
            if model is None:
                return None
            sizes = (batch_size, max_length, self.vocab_size, pages)
            if torch_compile:
                return CompiledWriter(model, *sizes, block_size)
            return (RecurrentWriter if keeps_states(model.config) else Writer)(model, *sizes)

        self.student, self.teacher = writer(student), writer(teacher)
        self.speculation = speculation_of(student, teacher, block_size, torch_compile)
        self.automaton = None
        if self.rules.delimiter is not None:
            self.automaton = delimiter_automaton(tokenizer, self.rules.delimiter, self.vocab_size, self.device)
        self.automaton_state = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        self.state = self.rules.boundary.new_state(batch_size, self.device)
        if self.rules.reflection:
            self.is_reflection = self._table(tokens_of_words(tokenizer, self.rules.reflection, self.vocab_size))
        end_ids, by_index = self.end_ids, dict(zip(indices, prompts, strict=True))
        turn = TEACHER if rules is None else STUDENT

        # No method: a cycle of references would keep the caches until Python looks for cycles.
        def new_row(index: int) -> Row:
            return Row(index, by_index[index], seed, rules, max_new_tokens, end_ids, turn=turn)

        self.admission = Admission(
            indices,
            new_row,
            [writer for writer in (self.student, self.teacher) if writer is not None],
            (self.automaton_state, *self.state.tensors),
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
            plan = self._plan()
            alone = self._rows(plan, drafted=False)
            self._student_round(plan)
            # Planned anew for those that the teacher has just taken over, unless others would have to wait for it.
            self._teacher_round(plan if alone else self._plan())
            done |= {row.index: row.trajectory(self.tokenizer) for row in self.admission.finished()}
            while done and (expected[0] in done or not in_order):
                yield done.pop(expected.popleft() if in_order else min(done))

    def _begin_turns(self, rows: list[Row]) -> None:
        """Reset the judgement of rows whose next turn begins."""
        if rows:
            index = on_device(_cache_rows(rows), self.device)
            self.state.reset_(index)
            self.automaton_state.index_fill_(0, index, 0)  # which, unlike an assignment, does not make the host wait

    def _plan(self) -> Plan:
        """How the rows in progress are best written."""
        rows = [row for row in self.admission.busy() if not row.finished]
        turns = Counter(row.author for row in rows)
        cached = sum(row.length for row in rows) / max(1, len(rows))
        return self.speculation.plan(turns[STUDENT], turns[TEACHER], cached)

    def _rows(self, plan: Plan, *, drafted: bool) -> list[Row]:
        """The rows that the student drafts, or those that the teacher writes alone, as it does where only one token is
        left of its turn."""
        return [
            row
            for row in self.admission.busy()
            if not row.finished and (row.author == STUDENT or (plan.speculates and row.turn_remaining > 1)) == drafted
        ]

    def _draft(self, writer: Writer, rows: list[Row], length: int) -> Draft:
        count = min(length, max(row.turn_remaining for row in rows))
        numbers = [(row.cache_row, row.pending, row.key, len(row.seen), row.remaining) for row in rows]
        cache_rows, pending, keys, positions, remaining = on_device(numbers, self.device).unbind(1)
        draws = uniform(keys[:, None], positions[:, None] + torch.arange(count, device=self.device))
        drawn: list[Tensor] = []

        def draw(step: Tensor, offset: int) -> Tensor:
            chosen, can_be_drawn = self.sampling.draw(step, draws[:, offset])
            drawn.append(can_be_drawn)
            return chosen

        tokens, logits = writer.draft(_cache_rows(rows), pending, count, draw)
        return Draft(cache_rows, pending, remaining, draws, tokens, torch.stack(drawn, 1), logits)

    def _corrected(self, draft: Draft, rows: list[Row], teacher_logits: Tensor) -> Draft:
        """The draft with the teacher's choices instead of the student's in the teacher's rows, where the student's
        logits become 0: no statistic needs them, and NaN among them would make the teacher's own NaN."""
        places = [place for place, row in enumerate(rows) if row.author == TEACHER]
        if not places:
            return draft
        index = on_device(places, self.device)
        # As many at a time as a step of a draft may have: a copy of all logits would take much memory.
        width = max(1, len(self.admission.rows) // len(places))
        choices = []
        for begin in range(0, draft.tokens.shape[1], width):
            part = slice(begin, begin + width)
            choices.append(self.sampling.draw(teacher_logits[index, part], draft.draws[index, part]))
        tokens, can_be_drawn = (torch.cat(parts, 1) for parts in zip(*choices, strict=True))
        return draft._replace(
            tokens=draft.tokens.index_copy(0, index, tokens),
            can_be_drawn=draft.can_be_drawn.index_copy(0, index, can_be_drawn),
            logits=draft.logits.index_fill_(0, index, 0),
        )

    def _block(self, draft: Draft, drafted: Tensor) -> Block:
        """What the rows write if these (b, T) tokens were drafted and `draft` holds their writers' choices."""
        tokens = draft.tokens
        ended = self.is_end[tokens]
        stops = (ended | (tokens != drafted)).long()
        left = draft.remaining[:, None] - torch.arange(tokens.shape[1], device=self.device)
        valid = (left > 0) & (stops.cumsum(1) - stops == 0)
        entries = torch.where(valid, torch.where(draft.can_be_drawn, tokens, BROKEN), PADDING)
        step_ends = valid
        if self.automaton is not None:
            states, completes = self.automaton.scan(self.automaton_state[draft.cache_rows], tokens)
            self.automaton_state[draft.cache_rows] = states.gather(1, valid.sum(1, keepdim=True) - 1)[:, 0]
            step_ends = valid & (completes | ended | (left == 1))
        return Block(tokens, entries, valid, step_ends)

    def _student_round(self, plan: Plan) -> None:
        """One block drafted by the student: its own text, which the teacher judges if there is one, and the teacher's
        if so planned."""
        rows = self._rows(plan, drafted=True)
        if not rows:
            return
        assert self.student is not None
        self._catch_up(self.student, rows)
        draft = self._draft(self.student, rows, plan.length)
        turned = []
        if self.teacher is None:
            (entries,) = self._to_host(self._block(draft, draft.tokens).entries)
            for row, tokens in zip(rows, entries.tolist(), strict=True):
                for token in tokens:
                    if token != PADDING:
                        row.write(int(token), [None] * len(STATISTICS))
        else:
            self._catch_up(self.teacher, rows)
            teacher_logits = self.teacher.score(_cache_rows(rows), draft.pending, draft.tokens)
            columns, rollback, (confirmed, drafted), instead = self._to_host(*self._judged(rows, draft, teacher_logits))
            self.speculation.observe(float(confirmed), float(drafted))
            for row, block, keeps, own in zip(rows, columns, rollback.tolist(), instead.tolist(), strict=True):
                if row.author == TEACHER:
                    turn_ends = not row.enter(block[:, TEACHER_COLUMNS].tolist())
                elif turn_ends := row.judge(block.tolist()):
                    row.take_over(int(keeps), self.tokenizer)
                    row.enter(own)
                if turn_ends:
                    turned.append(row)
        self._settle(rows, (self.student, self.teacher))
        self._begin_turns(turned)

    def _judged(self, rows: list[Row], draft: Draft, teacher_logits: Tensor) -> Judged:
        block = self._block(self._corrected(draft, rows, teacher_logits), draft.tokens)
        state = mk.BoundaryState.of(*(x[draft.cache_rows] for x in self.state.tensors))
        out = mk.fused_kl_boundary(
            draft.logits,
            teacher_logits,
            torch.where(block.valid, block.tokens, PADDING),
            boundary=self.rules.boundary,
            state=state,
            step_ends=block.step_ends,  # in the teacher's rows to no effect: the student's next turn resets their state
        )
        for x, part in zip(self.state.tensors, state.tensors, strict=True):
            x.index_copy_(0, draft.cache_rows, part)
        strays, step_ends = out.stray, block.step_ends
        if self.rules.reflection:
            strays = self._reflects(rows, draft.logits, teacher_logits, out.teacher_argmax) & block.valid
            step_ends = step_ends & ~strays
        judged = [block.entries, step_ends, strays, out.score, out.threshold]
        statistics = _rounded(*(getattr(out, name) for name in STATISTICS))
        theirs = block.valid & (on_device([row.author == TEACHER for row in rows], self.device)[:, None] != 0)
        counts = torch.stack([(theirs & (block.tokens == draft.tokens)).sum(), theirs.sum()])
        instead = self._instead(rows, draft, teacher_logits, strays)
        return Judged(torch.cat([_columns(*judged), statistics], -1), state.rollback_position, counts, instead)

    def _instead(self, rows: list[Row], draft: Draft, teacher_logits: Tensor, strays: Tensor) -> Tensor:
        """(b, 1, 4): the teacher's token instead of a row's first that strays, if each token is a step and the teacher
        starts at the one that breaches: the pass that judged it gave the logits. Else (b, 0, 4)."""
        if self.rules.delimiter is not None or self.rules.backtrack != "breach":
            return teacher_logits.new_empty(len(rows), 0, 4)
        place = strays.long().argmax(1)
        logits = teacher_logits[torch.arange(len(rows), device=self.device), place]
        keys, positions = on_device([(row.next_key, len(row.seen)) for row in rows], self.device).unbind(1)
        tokens, can_be_drawn = self.sampling.draw(logits, uniform(keys, positions + place))
        own = mk.fused_kl_boundary(logits, logits, tokens)
        entries = torch.where(can_be_drawn, tokens, BROKEN)
        statistics = _rounded(own.teacher_logprob, own.teacher_entropy)
        return torch.cat([_columns(entries, torch.zeros_like(entries)), statistics], -1)[:, None]

    def _reflects(self, rows: list[Row], logits: Tensor, teacher_logits: Tensor, argmax: Tensor) -> Tensor:
        """(b, T) bool: the teacher's likeliest token is a reflection word, and not among the student's likeliest."""
        # The op ranks by its second logits: with the sides swapped, by the student's.
        rank = mk.fused_kl_boundary(teacher_logits, logits, argmax).teacher_rank
        watched = on_device([row.author == STUDENT and row.watched for row in rows], self.device)[:, None] != 0
        return watched & self.is_reflection[argmax] & (rank >= self.rules.student_top_k)

    def _teacher_round(self, plan: Plan) -> None:
        """One block by the teacher, for the rows that it writes alone."""
        rows = self._rows(plan, drafted=False)
        if not rows:
            return
        assert self.teacher is not None
        self._catch_up(self.teacher, rows)
        draft = self._draft(self.teacher, rows, self.block_size)
        own = mk.fused_kl_boundary(draft.logits, draft.logits, draft.tokens)  # only for the teacher's statistics
        block = self._block(draft, draft.tokens)
        statistics = _rounded(own.teacher_logprob, own.teacher_entropy)
        (packed,) = self._to_host(torch.cat([_columns(block.entries, block.step_ends), statistics], -1))
        turned = [row for row, tokens in zip(rows, packed.tolist(), strict=True) if not row.enter(tokens)]
        self._settle(rows, (self.teacher,))
        self._begin_turns(turned)

    def _catch_up(self, writer: Writer, rows: list[Row]) -> None:
        """Let a model read what it has not: the student what the teacher wrote alone, and one with recurrent states
        what a rollback cut."""
        lengths = writer.lengths
        behind = [row for row in rows if lengths[row.cache_row] < row.length - 1]
        writer.catch_up({row.cache_row: row.text_from(lengths[row.cache_row]) for row in behind}, self.block_size)

    def _settle(self, rows: list[Row], writers: tuple[Writer | None, ...]) -> None:
        """Cut the caches back to all of a row's tokens but the pending one."""
        safe = None
        if self.rules.delimiter is not None and self.rules.max_interventions not in (0, 1):
            safe = {row.cache_row: row.safe_length - 1 for row in rows}
        for writer in writers:
            if writer is not None:
                writer.rollback({row.cache_row: row.length - 1 for row in rows}, safe)

    def _to_host(self, *tensors: Tensor) -> list[Tensor]:
        """The only place where the host waits for the device: one transfer per round and model that writes."""
        self.waits += 1
        flat = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _cache_rows(rows: list[Row]) -> list[int]:
    return [row.cache_row for row in rows]


def _columns(*parts: Tensor) -> Tensor:
    return torch.stack([part.double() for part in parts], -1)


def _rounded(*statistics: Tensor) -> Tensor:
    """As columns, to six decimal places: more mean nothing, and take half of a trajectory's file."""
    return _columns(*statistics).round(decimals=6)
