"""The demo from end to end, on few problems."""

import json

import motab
from motab.cli import main


def test_demo_and_again(tmp_path, capsys):
    command = ["demo", "--output_dir", str(tmp_path), "--num_prompts", "12", "--num_problems", "6"]
    assert main(command) == 0
    out = capsys.readouterr().out
    names = [
        "student before",
        "student after motab",
        "student after motab, jsd",
        "student after teacher-only",
        "teacher",
    ]
    assert all(name in out for name in names)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["name"] for row in metrics["evaluation"]] == names
    assert all(row["num_problems"] == 6 for row in metrics["evaluation"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert f"{metrics['synthesis']['breach_rate']:.1%}" in page
    first = [motab.read_trajectories(tmp_path / name / "trajectories.jsonl") for name in ("motab", "teacher-only")]
    assert {author for t in first[1] for author in t.author} == {"teacher"}
    assert (tmp_path / "motab" / "model-jsd" / "model.safetensors").is_file()
    assert main(command) == 0
    assert motab.read_trajectories(tmp_path / "motab" / "trajectories.jsonl") == first[0]
