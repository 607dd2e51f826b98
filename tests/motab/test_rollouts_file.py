"""The file of what a student writes as it trains."""

import copy

import pytest
from test_rollouts import POLICIES, SETTINGS, Kept, StopAt, config, rollouts_of, train

import motab
from motab.cli import main
from motab.rollouts_file import RolloutsFile
from motab.trajectory_file import read_trajectories


def test_kept_rollouts_are_shown(tmp_path, student, teacher, tokenizer, prompts, capsys):
    settings = {"max_steps": 2, "loss_type": "jsd", "save_rollouts": True}
    trainer = train(tmp_path, student, teacher, tokenizer, prompts, POLICIES["motab"], **settings)
    assert main(["show", "--output_dir", str(tmp_path / "rollouts"), "--index", "3"]) == 0
    (_, [*_, last], *_) = trainer.steps[1]
    assert tokenizer.decode(last.prompt_ids).strip() in capsys.readouterr().out
    # A training anew begins the file anew.
    again = train(tmp_path, student, teacher, tokenizer, prompts, POLICIES["motab"], **{**settings, "max_steps": 1})
    again.train()
    assert [t.index for t in read_trajectories(rollouts_of(tmp_path))] == [0, 1]


class Interrupt(StopAt):
    """As Ctrl-C does in a notebook, which keeps the trainer."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [2, 3])
def test_one_trainer_goes_on(tmp_path, student, teacher, tokenizer, prompts, step):
    """Anew, or at a checkpoint: no trajectory is in the file or the log twice, and no pause is."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "loss_type": "jsd", "save_rollouts": True}
    args = config(tmp_path, per_device_train_batch_size=2, logging_steps=2, **settings)
    rollouts = Kept(prompts, POLICIES["motab"], **SETTINGS)
    trainer = motab.MotabTrainer(
        *(copy.deepcopy(student), teacher, args), train_dataset=rollouts, processing_class=tokenizer
    )
    trainer.add_callback(Interrupt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.logged_at -= 10**6  # seconds of a pause
    trainer.train(resume_from_checkpoint=step > 2 or None)
    expected = rollouts.kept[:4] + rollouts.kept[6:] if step > 2 else rollouts.kept[4:]
    assert read_trajectories(rollouts_of(tmp_path)) == expected
    assert [t.index for t in expected] == list(range(8))
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["tokens"] for entry in entries] == [
        sum(len(t.token_ids) for t in part) for part in (expected[:4], expected[4:])
    ]
    assert all(entry["seconds"] < 10**5 for entry in entries)


def test_what_is_cut_short_is_dropped(tmp_path, student, teacher, tokenizer, prompts):
    """As on a full disk."""
    trajectories = list(motab.synthesize(student, teacher, tokenizer, prompts[:2], **SETTINGS))

    def on_a_full_disk():
        yield trajectories[1]
        raise OSError("No space left on device")

    file = RolloutsFile(tmp_path, tokenizer)
    file.add(trajectories[:1], 0, 0)
    with pytest.raises(OSError, match="No space"):
        file.add(on_a_full_disk(), 1, 1)
    with file.path.open("a") as cut:
        cut.write('{"index":1,')
    file.add(trajectories[1:], 1, 1)  # the same step, from a checkpoint before it
    assert read_trajectories(file.path) == trajectories
