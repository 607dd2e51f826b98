"""The figures of trajectories, counted by hand."""

from test_trainer import trajectory

from motab.summary import figures


def test_figures():
    """A target with two runs of the teacher; a breach with nothing to roll back; one cut off and right."""
    two, breached, cut = (
        trajectory(0, [1], [2] * 6, ["teacher", "student", "flawed", "stitch", "teacher", "teacher"]),
        trajectory(1, [1], [2] * 3, ["student", "stitch", "teacher"]),
        trajectory(2, [1], [2], ["student"]),
    )
    two.breach_step, two.rollback_step, two.correct = 3, 2, False
    breached.breach_step, breached.rollback_step = 0, 1
    cut.finish_reason, cut.correct = "length", True
    assert figures([two, breached, cut, trajectory(3, [1], [2, 2], ["student"] * 2)]) == {
        "trajectories": 4,
        "tokens": 12,
        "breach_rate": 2 / 4,
        "revised": 2 / 4,
        "mean_rollback": 2 / 2,
        "overlong": 1 / 4,
        "teacher_share": 4 / 12,
        "teacher_runs": 3 / 4,
        "correct": 1 / 2,
    }


def test_figures_of_nothing():
    found = figures([])
    assert {name for name in found if found[name] is None} == {"mean_rollback", "correct"}
    assert not any(found.values())
