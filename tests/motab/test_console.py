"""What the commands print: paths, and progress as a bar or as lines of a log."""

import io
import re

from rich.console import Console
from test_cli import TINY
from transformers import AutoTokenizer

import motab
from motab.cli import main
from motab.progress import watch


def test_a_log_has_a_line_a_minute(tmp_path, monkeypatch):
    """Where there is no terminal to draw a bar on."""
    found = [motab.Trajectory(i, [1], [2, 3], ["student"] * 2, "", [], None, None, "eos") for i in range(3)]
    monkeypatch.setattr("motab.progress.LOG_SECONDS", 0.0)
    with (tmp_path / "log").open("w") as file:
        assert list(watch(found, 5, "write", Console(file=file, width=200), before=1)) == found
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition("  ")[0] for line in lines[:3]] == ["write: 2 of 5", "write: 3 of 5", "write: 4 of 5"]


def test_the_bar_leaves_room_for_its_figures():
    found = [motab.Trajectory(i, [1], [], [], "", [], 0, 0, "eos", correct=True) for i in range(2000)]
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    assert len(list(watch(found, 4000, "synthesize", console))) == 2000
    last = re.sub(r"\x1b\[[\d;?]*\w", "", console.file.getvalue().strip("\n").rpartition("\r")[2])
    assert re.search(
        r"^synthesize .* 2000/4000 \d:\d\d:\d\d [\d,]+ tok/s  breach 100%  rollback 1.00  right 100%", last
    )


def test_paths_are_printed_as_they_are(tmp_path, capsys):
    """What rich takes for markup, and paths longer than a line of a terminal."""
    for name in ("[lr=1e-3]", "x[/b]", "run " * 40):
        folder = tmp_path / name.strip()
        AutoTokenizer.from_pretrained(TINY / "student").save_pretrained(folder)
        trajectory = motab.Trajectory(0, [1], [2], ["student"], "", [], None, None, "eos")
        (folder / "trajectories.jsonl").write_text(trajectory.to_json() + "\n")
        assert main(["report", "--output_dir", str(folder)]) == 0
        assert capsys.readouterr().out == f"{folder / 'report.html'}: open it in a browser\n"
