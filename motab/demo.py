"""The whole method on the tiny pair: synthesise, train, evaluate before and after, beside teacher-only training."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from motab.config import MotabConfig
from motab.data import Problem, load_problems
from motab.evaluation import Evaluation, evaluate
from motab.files import write_whole
from motab.grading import grade
from motab.models import load_model, load_tokenizer
from motab.parsing import setting
from motab.policies import MotabPolicy, Policy, TeacherOnly
from motab.progress import watch
from motab.report import write_report
from motab.summary import figures
from motab.synthesis import synthesize_to_file
from motab.trainer import MotabTrainer
from motab.trajectory import Trajectory
from motab.trajectory_file import read_trajectories

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny"
TASK = "chain_sum?min_terms=4&max_terms=6&min_digits=2&max_digits=2"
# reasoning-gym draws problem i from seed + i: these lie far apart, and far from what trained the pair.
TRAIN_SEED, TEST_SEED = 10_000_000, 20_000_000
GENERATION: dict[str, Any] = {"max_new_tokens": 160, "batch_size": 256}
# By name, the trajectories a student is trained on and the settings: the paper's recipe; the same trajectories by a
# divergence from the teacher at every token except flawed ones and the phrase; trajectories of the teacher alone.
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "motab": ("motab", {"loss_type": "cross_entropy"}),
    "motab, jsd": ("motab", {"loss_type": "jsd", "ignore_authors": ["flawed", "stitch"]}),
    "teacher-only": ("teacher-only", {"loss_type": "cross_entropy"}),
}


@dataclass
class DemoArguments:
    """motab demo: the whole method on the tiny pair, in 3 to 6 minutes on a CPU."""

    output_dir: str = setting("runs/demo", "Run folder.")
    num_prompts: int = setting(3000, "Fresh problems to write on; each is trained on once.")
    num_problems: int = setting(500, "Held-out problems for the evaluation.")
    learning_rate: float = setting(1e-3, "Peak learning rate of each training.")
    epsilon0: float = setting(0.2, "Boundary at zero teacher entropy; at 0.2 about a fifth of the trajectories breach.")
    seed: int = setting(0, "Random seed for sampling and for the order of training.")


def run(args: DemoArguments, console: Console) -> dict[str, Evaluation]:
    """Run the demo and return the evaluations of its table."""
    began = time.monotonic()
    if not (TINY / "student").is_dir():
        raise ValueError(f"the tiny pair is not at {TINY}; run the demo from a checkout of the repository")
    folder = Path(args.output_dir)
    tokenizer = load_tokenizer(str(TINY / "student"), str(TINY / "teacher"))
    train, test = (
        load_problems(f"reasoning-gym:{TASK}&size={size}&seed={seed}")
        for size, seed in ((args.num_prompts, TRAIN_SEED), (args.num_problems, TEST_SEED))
    )
    results = {"student before": _evaluate("student", str(TINY / "student"), tokenizer, test, console)}
    policies: dict[str, Policy] = {"motab": MotabPolicy(epsilon0=args.epsilon0), "teacher-only": TeacherOnly()}
    written = {
        name: _write(folder / name, policy, tokenizer, train, args, console) for name, policy in policies.items()
    }
    for name, (policy_name, settings) in TRAININGS.items():
        model = folder / policy_name / f"model-{settings['loss_type']}"
        _train(name, model, written[policy_name], settings, tokenizer, args, console)
        results[f"student after {name}"] = _evaluate(name, str(model), tokenizer, test, console)
    results["teacher"] = _evaluate("teacher", str(TINY / "teacher"), tokenizer, test, console)
    rows = [{"name": name, **asdict(result)} for name, result in results.items()]
    synthesis = figures(written["motab"])
    metrics = {"arguments": asdict(args), "synthesis": synthesis, "evaluation": rows}
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=1))
    write_report(folder / "report.html", written["motab"], tokenizer.decode, title="motab demo", rows=rows)
    console.print(_table(results))
    console.print(
        f"breach rate {synthesis['breach_rate']:.1%}, right answers {synthesis['correct']:.1%}, revised answers "
        f"{synthesis['revised']:.1%} of {len(train)} trajectories; {time.monotonic() - began:.0f} s"
    )
    before, *after = (results[name] for name in results if name.startswith("student"))
    for name, result in zip(TRAININGS, after, strict=True):
        console.print(_verdict(name, before, result))
    console.print(f"Pictures: {folder / 'report.html'}. Figures: {folder / 'metrics.json'}.")
    console.print(f"Trajectories: motab show --output_dir {folder / 'motab'}")
    return results


def _write(
    folder: Path,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    args: DemoArguments,
    console: Console,
) -> list[Trajectory]:
    path = folder / "trajectories.jsonl"
    path.unlink(missing_ok=True)  # a demo starts from scratch
    student, teacher = (load_model(str(TINY / name)) for name in ("student", "teacher"))
    prompts = [problem.messages() for problem in problems]
    settings: dict[str, Any] = {**GENERATION, "temperature": 0.6, "seed": args.seed}
    settings["grade"] = lambda trajectory, place: grade(trajectory, problems[place], tokenizer)
    found = synthesize_to_file(path, student, teacher, tokenizer, prompts, policy=policy, **settings)
    tokenizer.save_pretrained(folder)
    for _ in watch(found, len(prompts), f"write ({folder.name})", console):
        pass
    return read_trajectories(path)


def _train(
    name: str,
    folder: Path,
    trajectories: Sequence[Trajectory],
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    args: DemoArguments,
    console: Console,
) -> None:
    console.print(f"train ({name})")
    config = MotabConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        learning_rate=args.learning_rate,
        warmup_steps=5,
        per_device_train_batch_size=64,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        seed=args.seed,
        **settings,
    )
    model = load_model(str(TINY / "student"))
    teacher = None if config.loss_type == "cross_entropy" else load_model(str(TINY / "teacher"))
    trainer = MotabTrainer(model, teacher, config, train_dataset=trajectories, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


def _evaluate(
    name: str, path: str, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], console: Console
) -> Evaluation:
    with console.status(f"evaluate ({name}) on {len(problems)} held-out problems"):
        result = evaluate(load_model(path), tokenizer, problems, temperature=0.0, **GENERATION)
    console.print(f"evaluate ({name}): accuracy {result}")
    return result


def _table(results: dict[str, Evaluation]) -> Table:
    table = Table(title="Greedy accuracy on held-out problems")
    for column in ("model", "accuracy ± standard error", "out of budget"):
        table.add_column(column)
    for name, result in results.items():
        table.add_row(name, str(result), f"{result.overlong:.1%}")
    return table


def _verdict(name: str, before: Evaluation, after: Evaluation) -> str:
    """One sentence on how a training changed accuracy, and whether the change exceeds the noise."""
    difference = after.accuracy - before.accuracy
    noise = (before.standard_error**2 + after.standard_error**2) ** 0.5
    told = "beyond" if abs(difference) > 2 * noise else "within"
    return f"{name} changed the student by {difference:+.3f}, {told} two standard errors."
