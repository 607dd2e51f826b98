"""The figures of trajectories, counted by hand."""

from test_trainer import trajectory

from motab.summary import MEANS, figures


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
    two.statistics = {"student_entropy": [None, 0.5, 1.0, None, None, None], "teacher_entropy": [0.25] * 3 + [None] * 3}
    cut.statistics = {"student_entropy": [3.0], "teacher_entropy": [1.25]}
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
        "student_entropy": 4.5 / 3,
        "teacher_entropy": 2.0 / 4,
        "forward_kl": None,
        "reverse_kl": None,
    }


def test_figures_of_nothing():
    found = figures([])
    assert {name for name in found if found[name] is None} == {"mean_rollback", "correct", *MEANS}
    assert not any(found.values())
