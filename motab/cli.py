"""The command line: motab synthesize | import | train | evaluate | export | verify | report | show | demo."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from huggingface_hub import HfApi
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

from motab import evaluation, trainer_input
from motab.arguments import (
    EvaluateArguments,
    ExportArguments,
    FileArguments,
    ImportArguments,
    ShowArguments,
    SynthesizeArguments,
    TrainArguments,
)
from motab.config import MotabConfig
from motab.data import solution_of
from motab.dataset import TrajectoryDataset
from motab.demo import DemoArguments, run
from motab.export import check_output_file, export_dataset
from motab.files import whole_file, write_whole
from motab.fingerprint import hash_of_weights
from motab.grading import check_answers, grade
from motab.judgement import is_unbounded, label
from motab.lock import Lock
from motab.models import holds_adapters, load_model, load_tokenizer, load_with_adapters, with_lora
from motab.parsing import parse, require
from motab.policies import needs_student, needs_teacher
from motab.processes import Processes, process_state
from motab.progress import watch
from motab.prompts import encode_prompts
from motab.report import write_report
from motab.resume import FILE, decisive_settings, last_checkpoint, record
from motab.sharding import uses_fsdp
from motab.solutions import as_trajectories
from motab.synthesis import synthesize_to_file
from motab.trainer import MotabTrainer
from motab.trajectory_file import check_trajectories, some_trajectories_in, unfinished

_MANY_OVERLONG = 0.1  # share of answers out of budget above which an accuracy says little about the model
#: What is said of an interrupted command.
_CONTINUES = {
    "synthesize": "; the same command continues",
    "train": "; the same command continues from the last checkpoint",
    "evaluate": "; with --answers_file the same command continues",
}
_STYLES = {"student": "", "flawed": "red", "stitch": "yellow", "teacher": "green"}


def synthesize(arguments: list[str], console: Console) -> None:
    """Write trajectories."""
    args: SynthesizeArguments = parse(SynthesizeArguments, arguments, "synthesize")
    state = _state(console)
    policy, names = args.make_policy(), {}
    student_bits, teacher_bits = args.bits(), args.bits("teacher_")
    if needs_student(policy) or args.model_name_or_path:
        names["model_name_or_path"] = args.model_name_or_path
    if needs_teacher(policy) or args.teacher_model_name_or_path:
        names["teacher_model_name_or_path"] = args.teacher_model_name_or_path
    require(dataset_name=args.dataset_name, **names)
    prompt_format = args.prompt_format()
    problems = args.load(args.dataset_name, args.dataset_split)
    if args.grade:
        check_answers(problems)
    # The first one's template and end token count: the teacher's where the student only drafts.
    tokenizer = load_tokenizer(*(names.values() if needs_student(policy) else reversed(names.values())))
    problems = args.short_enough(problems, tokenizer)
    student, teacher = (
        load_model(names[name], args.dtype, bits=bits, shared=shared, attn_implementation=args.attn_implementation)
        if name in names
        else None
        for name, bits, shared in (
            ("model_name_or_path", student_bits, False),
            ("teacher_model_name_or_path", teacher_bits, args.share_teacher),
        )
    )
    rendered = encode_prompts([prompt_format.render(tokenizer, problem) for problem in problems], tokenizer)
    prompts = [prompt for prompt in rendered for _ in range(args.num_samples)]
    path = Path(args.output_dir) / "trajectories.jsonl"
    graded = (lambda t, place: grade(t, problems[place // args.num_samples], tokenizer)) if args.grade else None
    found = synthesize_to_file(
        path, student, teacher, tokenizer, prompts, policy=policy, grade=graded, **args.generation()
    )
    if state.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
    with path.open("rb") as lines:
        missing = len(prompts) - sum(1 for _ in lines)
    writers = 1 if args.share_teacher else state.num_processes
    total, left = -(-len(prompts) // writers), -(-missing // writers)  # of the main process
    for _ in watch(found, total, "synthesize", console, before=total - left):
        pass
    console.print(f"{path}: {len(prompts)} trajectories; motab report --output_dir {args.output_dir} draws them")


def import_(arguments: list[str], console: Console) -> None:
    """Make trajectories of existing solutions."""
    args: ImportArguments = parse(ImportArguments, arguments, "import")
    if not _state(console).is_main_process:
        return
    require(model_name_or_path=args.model_name_or_path, dataset_name=args.dataset_name)
    path, prompt_format = Path(args.output_dir) / "trajectories.jsonl", args.prompt_format()
    if path.exists():
        raise ValueError(f"{path} exists; remove it, or give another --output_dir")
    problems = args.load(args.dataset_name, args.dataset_split)
    if args.grade:
        check_answers(problems)
    tokenizer = load_tokenizer(args.model_name_or_path)
    given = [solution_of(problem, index, args.solution_column) for index, problem in enumerate(problems)]
    solved = {id(problem): text for problem, text in zip(problems, given, strict=True) if text is not None}
    if not solved:
        raise ValueError(
            f"{args.dataset_name} has no solution for any problem, a text or the assistant's first message after the "
            "prompt; give another --solution_column"
        )
    if missing := len(problems) - len(solved):
        print(
            f"motab import: {missing} of {len(problems)} problems have no solution, or one that does not follow their "
            "prompt (a question stands last, or two messages of the assistant's), and are left out",
            file=sys.stderr,
        )
    problems = args.short_enough([problem for problem in problems if id(problem) in solved], tokenizer)
    texts = [solved[id(problem)] for problem in problems]
    if args.grade and all(problem.answer == text for problem, text in zip(problems, texts, strict=True)):
        raise ValueError("--grade compares solutions with answers, got the solutions as answers; give --answer_column")
    prompts = [prompt_format.render(tokenizer, problem) for problem in problems]
    found = as_trajectories(prompts, texts, tokenizer)
    with whole_file(path) as file:
        for t, problem in zip(watch(found, len(texts), "import", console), problems, strict=True):
            t.correct = grade(t, problem, tokenizer) if args.grade else None
            file.write(t.to_json() + "\n")
    tokenizer.save_pretrained(args.output_dir)
    console.print(f"{path}: {len(texts)} trajectories; motab train --train_file {path} trains on them")


def train(arguments: list[str], console: Console) -> None:
    """Train on trajectories, written before or during training."""
    args, config = parse((TrainArguments, MotabConfig), arguments, "train")
    state = _state(console)
    require(model_name_or_path=args.model_name_or_path)
    args.check_source()
    teacher_bits = args.bits("teacher_")
    teacher_name = args.teacher_model_name_or_path
    if config.loss_type != "cross_entropy" or (args.writes() and needs_teacher(args.make_policy())):
        require(teacher_model_name_or_path=teacher_name)
    if config.push_to_hub:
        Processes().from_main(lambda: _check_login(config))
    tokenizer = load_tokenizer(args.model_name_or_path, *([teacher_name] if teacher_name else []))
    data = args.train_file
    if data and args.writes():
        data = args.rollouts(TrajectoryDataset(data, config.ignore_authors, config.max_length, config.only_correct))
    if args.dataset_name:
        prompt_format = args.prompt_format()
        problems = args.load(args.dataset_name, args.dataset_split or "train")
        if args.grade:
            check_answers(problems)
        problems = args.short_enough(problems, tokenizer)
        prompts = [prompt_format.render(tokenizer, problem) for problem in problems]
        data = args.rollouts(prompts, (lambda t, place: grade(t, problems[place], tokenizer)) if args.grade else None)
    trainer_input.check(config, teacher_name or None, data, tokenizer)
    loading: Any = {"attn_implementation": args.attn_implementation, "on_cpu": uses_fsdp(config)}
    if holds_adapters(args.model_name_or_path):
        model = load_with_adapters(
            args.model_name_or_path, args.dtype, train_them=args.use_peft, bits=args.bits(), **loading
        )
    else:
        model = load_model(args.model_name_or_path, args.dtype, bits=args.bits(), **loading)
    if not args.use_peft:
        trainer_input.refuse_frozen(model)
    teacher = load_model(teacher_name, args.teacher_dtype, bits=teacher_bits, **loading) if teacher_name else None
    weights = {"student": hash_of_weights(model), "teacher": hash_of_weights(teacher)}
    processes, folder = Processes(), config.output_dir
    settings = processes.from_main(lambda: decisive_settings(args, config, data, weights))
    locks: list[Lock] = []  # the main process's, for all

    def begin() -> tuple[str | None, bool]:
        locks.append(Lock(Path(folder) / FILE))  # two trainings would remove each other's checkpoints
        named = config.resume_from_checkpoint
        return (named, False) if named else last_checkpoint(folder, settings)

    last, finished = processes.from_main(begin)
    if finished:
        console.print(f"{folder}: already trained with these settings; remove it to train again")
        return
    if lora := args.lora():
        transformers.set_seed(config.seed)  # which the trainer does after the adapters are drawn
        model = with_lora(model, **lora)
    held_out = args.eval_file or None
    if state.is_main_process:
        _warn_of_unfinished("train", *filter(None, (args.train_file, args.eval_file)))
    try:
        trainer = MotabTrainer(
            model, teacher, config, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer
        )
    except RuntimeError as error:  # as for a --report_to whose package is missing
        raise ValueError(str(error)) from error
    processes.from_main(lambda: record(folder, settings, finished=False))
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    processes.from_main(lambda: record(folder, settings, finished=True))
    loss = f", held-out loss {trainer.evaluate()['eval_loss']:.4f}" if held_out else ""
    console.print(f"{folder}: the trained model{loss}")


def _check_login(config: MotabConfig) -> None:
    """Refuse a push to a hub that cannot be reached, or that knows no user, before anything is trained."""
    try:
        HfApi(token=config.hub_token).whoami()
    except Exception as error:  # the hub's client has had its errors from three packages
        raise ValueError(
            f"--push_to_hub needs the hub and a user known to it, got {' '.join(str(error).split())}; log in (hf auth "
            "login), give --hub_token, or leave it out"
        ) from error


def evaluate(arguments: list[str], console: Console) -> None:
    """Measure accuracy."""
    args: EvaluateArguments = parse(EvaluateArguments, arguments, "evaluate")
    state = _state(console)
    bits = args.bits()
    require(model_name_or_path=args.model_name_or_path, dataset_name=args.dataset_name)
    for name in ("output_file", "answers_file"):
        if (path := getattr(args, name)) and Path(path).is_dir():
            raise ValueError(f"--{name} must be a file to write, got the folder {path!r}; add a name")
    prompt_format = args.prompt_format()
    problems = args.load(args.dataset_name, args.dataset_split)
    check_answers(problems)
    tokenizer = load_tokenizer(args.model_name_or_path)
    problems = args.short_enough(problems, tokenizer)
    model = load_model(args.model_name_or_path, args.dtype, bits=bits, attn_implementation=args.attn_implementation)
    settings = {
        "num_samples": args.num_samples,
        "prompt_format": prompt_format,
        "answers_file": args.answers_file,
        **args.generation(),
    }
    shown = partial(watch, title="evaluate", console=console)
    result = evaluation.evaluate(model, tokenizer, problems, watch=shown, **settings)
    passed = f"pass@{result.num_samples} {result.pass_at_k:.3f}, " if result.num_samples > 1 else ""
    console.print(
        f"accuracy {result} (mean over {result.num_samples} samples of {result.num_problems} problems), "
        f"{passed}out of budget {result.overlong:.1%}"
    )
    if result.overlong > _MANY_OVERLONG and state.is_main_process:
        print(
            f"motab evaluate: {result.overlong:.1%} of the answers ran out of their budget of {args.max_new_tokens} "
            "tokens, and count only if the answer was already stated; raise --max_new_tokens",
            file=sys.stderr,
        )
    if args.output_file and state.is_main_process:
        write_whole(args.output_file, json.dumps({**asdict(result), "settings": asdict(args)}, indent=1))


def _state(console: Console) -> PartialState:
    """accelerate's state of this process; silences the console in all but the main process."""
    state = process_state()
    console.quiet = not state.is_main_process
    return state


def export(arguments: list[str], console: Console) -> None:
    """Write trajectories for another trainer."""
    import datasets

    args: ExportArguments = parse(ExportArguments, arguments, "export")
    require(output_file=args.output_file)
    check_output_file(args.output_file)
    if Path(args.output_file).resolve() == args.file.resolve():
        raise ValueError(f"--output_file must not be the trajectories' own file, got {args.output_file!r}")
    _warn_of_unfinished("export", args.file)
    dataset = TrajectoryDataset(args.file, args.ignore_authors, args.max_length, args.only_correct)
    datasets.disable_progress_bars()  # for a second's work
    if not len(dataset):
        raise ValueError(f"{args.file} holds no trajectory yet")
    rows, longest = export_dataset(dataset, args.output_file), max(map(len, dataset.ids))
    console.print(
        f"{args.output_file}: {rows} trajectories of at most {longest} tokens, the max_length that a trainer needs"
    )


def verify(arguments: list[str], console: Console) -> None:
    """Check that a file of trajectories is whole and consistent."""
    args: FileArguments = parse(FileArguments, arguments, "verify")
    console.print(f"{check_trajectories(args.file)} trajectories, whole and consistent")


def report(arguments: list[str], console: Console) -> None:
    """Draw a synthesis."""
    args: FileArguments = parse(FileArguments, arguments, "report")
    trajectories = some_trajectories_in(args.file)  # with statistics, which tokens' pictures need
    _warn_of_unfinished("report", args.file)
    path = Path(args.output_dir) / "report.html"
    write_report(path, trajectories, load_tokenizer(args.output_dir).decode, title=f"Synthesis {args.output_dir}")
    console.print(f"{path}: open it in a browser")


def show(arguments: list[str], console: Console) -> None:
    """Print one trajectory, coloured by author."""
    args: ShowArguments = parse(ShowArguments, arguments, "show")
    found, indices = None, []
    for each in some_trajectories_in(args.file, statistics=False):
        indices.append(each.index)
        if each.index == args.index:  # the rest of a file of gigabytes need not be read
            found = each
            break
    if found is None:
        there = f"{len(indices)} from {min(indices)} to {max(indices)}"
        raise ValueError(f"--index must be that of a trajectory in {args.file}, {there}, got {args.index}")
    trajectory, tokenizer = found, load_tokenizer(args.output_dir)
    console.print(Text(tokenizer.decode(trajectory.prompt_ids), style="dim"))
    for author, text in trajectory.segments(tokenizer.decode):
        console.print(Text(text, style=_STYLES[author]), end="")
    console.print()
    if trajectory.correct is not None:
        console.print(f"the answer is {'right' if trajectory.correct else 'wrong'}")
    digits = "{:.0f}".format if trajectory.score == "teacher_rank" else _digits
    for place, step in enumerate(trajectory.steps):
        where = f"token {step.start}" if trajectory.by_token else f"step {place}"
        told = [f"{where}: {label(trajectory.score)} {digits(step.value)}"]
        if not (step.accepted and is_unbounded(trajectory.score, step.threshold)):
            told += [f"boundary {digits(step.threshold)}", "accepted" if step.accepted else "breach"]
        if place == trajectory.breach_step and not trajectory.by_token:
            told.append(f"rolled back to step {trajectory.rollback_step}")
        if step.discarded_ids:
            told.append(f"left out {tokenizer.decode(step.discarded_ids)!r}")
        console.print(Text(", ".join(told)))


def _digits(number: float) -> str:
    """Three decimal places; three significant digits if the number is small."""
    return f"{number:.3f}" if abs(number) >= 0.1 else f"{number:.3g}"


def _warn_of_unfinished(command: str, *paths: str | Path) -> None:
    for path in paths:
        if missing := unfinished(path):
            print(f"motab {command}: {missing}", file=sys.stderr)


def demo(arguments: list[str], console: Console) -> None:
    """Run the whole method on the tiny pair."""
    run(parse(DemoArguments, arguments, "demo"), console)


COMMANDS: dict[str, Callable[[list[str], Console], None]] = {
    command.__name__.strip("_"): command
    for command in (synthesize, import_, train, evaluate, export, verify, report, show, demo)
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 and one line on standard error for bad input, 130 if it is interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        lines = [f"  {name:<11}{command.__doc__}" for name, command in COMMANDS.items()]
        usage = "\n".join(["usage: motab COMMAND [--config FILE] [flags]; motab COMMAND --help", *lines])
        asked = arguments[:1] in (["-h"], ["--help"])
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    transformers.utils.logging.disable_progress_bar()  # weights load in no time; the bars that matter are ours
    try:
        # What is printed holds paths: no markup, and a pipe has no width at which to break them.
        COMMANDS[arguments[0]](arguments[1:], Console(markup=False, highlight=False, soft_wrap=True))
    # As of a full disk, or an --optim whose package is missing; safetensors has an error of its own for the former.
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        print(f"motab {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"motab {arguments[0]}: interrupted{_CONTINUES.get(arguments[0], '')}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
