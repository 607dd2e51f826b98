"""Solutions that a dataset holds, as trajectories to train on."""

import json

import pytest
from test_cli import TINY
from test_row import thinking_tokenizer  # noqa: F401, a fixture
from test_stitching import metaspace_tokenizer

import motab
from motab.cli import main
from motab.data import Problem, solution_of


def test_a_text_as_if_a_teacher_had_written_it(tokenizer):
    first, second, third = motab.as_trajectories([[9, 7], "ab", "a"], ["c.\n\nb", "b<eos>", "b<eos>\n"], tokenizer)
    assert (first.index, first.prompt_ids, first.token_ids) == (0, [9, 7], [9, 1, 2, 2, 8, 0])
    assert first.text == "c.\n\nb"
    assert (second.index, second.prompt_ids, second.token_ids) == (1, [11], [8, 0])
    assert third.token_ids == [8, 0]  # as some templates break the line behind the end token
    for t in (first, second, third):
        assert t.author == ["teacher"] * len(t.token_ids)
        assert (t.steps, t.statistics, t.finish_reason, t.correct) == ([], {}, "eos", None)
        assert motab.Trajectory.from_json(t.to_json()) == t


def test_no_space_where_the_text_begins():
    """With a tokenizer that begins a text alone with one."""
    tokenizer = metaspace_tokenizer()
    (found,) = motab.as_trajectories([tokenizer.convert_tokens_to_ids(["ab", "<0x0A>"])], ["ab,"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(found.token_ids) == ["ab", ",", "<eos>"]


@pytest.mark.parametrize(
    ("prompt", "text", "target"),
    [
        ("a<think>\n", "<think>\nb</think>c", "b</think>c"),
        ("a<think>\n", "\n<think>b</think>c", "b</think>c"),
        ("a<think>", "<think>\nb</think>c", "\nb</think>c"),
        ("a<think>\n", "b</think>c", "b</think>c"),
        ("a<think>\n", "b<think></think>c", "b<think></think>c"),
        ("a", "<think>\nb</think>c", "<think>\nb</think>c"),
        ("a<think></think>", "<think>b", "<think>b"),
    ],
)
def test_the_thinking_is_opened_once(thinking_tokenizer, prompt, text, target):  # noqa: F811
    (found,) = motab.as_trajectories([prompt], [text], thinking_tokenizer)
    assert thinking_tokenizer.decode(found.token_ids) == target + "<eos>"


@pytest.mark.parametrize(
    ("prompts", "texts", "message"),
    [
        (["a"], [], "texts must be one for each of 1 prompts, got 0"),
        (["a", "b"], ["a", " \n"], r"text 1 must be a text that is not empty, got ' \\n'"),
        (["a"], [None], "text 0 must be a text that is not empty, got None"),
        ([""], ["a"], "prompt 0 is empty"),
    ],
)
def test_refused_at_once(tokenizer, prompts, texts, message):
    with pytest.raises(ValueError, match=message):
        motab.as_trajectories(prompts, texts, tokenizer)


def test_a_tokenizer_without_an_end_token():
    tokenizer = metaspace_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an end token"):
        motab.as_trajectories(["ab"], ["ab"], tokenizer)


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "m"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "s"}]


@pytest.mark.parametrize(
    ("record", "column", "solution"),
    [
        ({"problem": "q", "solution": "s", "messages": MESSAGES}, None, "s"),
        ({"problem": "q", "solution": "s", "messages": MESSAGES}, "messages", "m"),
        ({"messages": MESSAGES}, None, "m"),
        ({"conversations": SHAREGPT}, None, "s"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, None, "m"),
        ({"messages": [{"role": "system", "content": "Add."}, *MESSAGES]}, None, "m"),
        ({"messages": [{**MESSAGES[1], "thinking": None, "tool_calls": [], "reasoning_content": ""}]}, None, "m"),
        ({"problem": "q", "r1": " s\n"}, "r1", " s\n"),
    ],
)
def test_where_a_solution_is(record, column, solution):
    assert solution_of(Problem("q", None, record), 0, column) == solution


@pytest.mark.parametrize(
    ("record", "column", "message"),
    [
        (
            {"problem": "q"},
            None,
            "problem 4 must have a column solution or .* or output with its solution",
        ),
        ({"problem": "q", "solution": "s"}, "r1", "must have a column r1 with its solution, got problem, solution"),
        ({"solution": ["s"]}, None, "column solution of problem 4 must have messages as"),
        (
            {"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "r", "thinking": None}]},
            None,
            "column messages of problem 4 must have all .* in its content, got reasoning_content beside it; put",
        ),
        ({"messages": [{**MESSAGES[1], "thinking": "t", "tool_calls": [{}]}]}, None, "got thinking, tool_calls beside"),
        ({"generations": ["s"]}, "generations", 'got "s"; give another solution_column'),
        ({"solution": 7}, None, "column solution of problem 4 must hold a text, or messages, got 7; give another"),
    ],
)
def test_no_solution(record, column, message):
    with pytest.raises(ValueError, match=message):
        solution_of(Problem("q", None, record), 4, column)


@pytest.mark.parametrize(
    "record", [{"messages": MESSAGES[:1]}, {"messages": []}, {"solution": " "}, {"solution": None}, {"solution": ""}]
)
def test_an_empty_place(record):
    assert solution_of(Problem("q", None, record), 4) is None


@pytest.mark.parametrize(
    ("prompt", "record"),
    [
        ("q", {"messages": [*MESSAGES, MESSAGES[1]]}),  # of which a prompt holds neither
        ("q", {"completion": [MESSAGES[1], *MESSAGES]}),
        (MESSAGES[:1], {"completion": [MESSAGES[1], MESSAGES[0], MESSAGES[1]]}),
    ],
)
def test_a_solution_of_another_prompt(prompt, record):
    """What the assistant said before would be lost."""
    assert solution_of(Problem(prompt, None, record), 4) is None


def test_the_last_turn_of_several():
    messages = [*MESSAGES, {"role": "user", "content": "r"}, {"role": "assistant", "content": "n"}]
    assert solution_of(Problem(messages[:3], None, {"messages": messages}), 4) == "n"


QUESTION = "State the final answer to the following arithmetic problem: 38 - 57 ="


@pytest.fixture
def command(tmp_path):
    rows = [
        {"problem": QUESTION, "solution": rf"38 - 57 = {answer}.\n\nThe answer is \boxed{{{answer}}}.", "answer": "-19"}
        for answer in (-19, 19)
    ]
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["import", "--model_name_or_path", str(TINY / "student"), "--dataset_name", str(path)]
    return [*run, "--output_dir", str(tmp_path / "run")]


def test_from_import_to_training(command, tmp_path, capsys):
    assert main([*command, "--grade"]) == 0
    file = tmp_path / "run" / "trajectories.jsonl"
    right, wrong = motab.read_trajectories(file)
    assert (right.correct, wrong.correct) == (True, False)
    tokenizer = motab.load_tokenizer(str(TINY / "student"))
    messages = [{"role": "user", "content": QUESTION}]
    assert right.prompt_ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for name in ("verify", "show", "report"):
        assert main([name, "--output_dir", str(tmp_path / "run")]) == 0
    assert r"\boxed{-19}" in capsys.readouterr().out
    train = ["train", "--model_name_or_path", str(TINY / "student"), "--train_file", str(file), "--only_correct"]
    train += ["--loss_type", "forward_kl", "--teacher_model_name_or_path", str(TINY / "teacher")]
    train += ["--num_train_epochs", "1", "--report_to", "none", "--output_dir", str(tmp_path / "model")]
    with pytest.warns(UserWarning, match="1 of 2 trajectories have a wrong answer"):
        assert main(train) == 0


def test_what_is_there_stays(command, tmp_path, capsys):
    """Of an import, and of what a synthesis would continue."""
    assert main(command) == 0
    file = tmp_path / "run" / "trajectories.jsonl"
    text = file.read_text()
    assert main(command) == 2
    assert f"{file} exists; remove it, or give another --output_dir" in capsys.readouterr().err
    others = ["--teacher_model_name_or_path", str(TINY / "teacher"), "--max_new_tokens", "20"]
    assert main(["synthesize", *command[1:], *others]) == 2
    assert "trajectories.jsonl" in capsys.readouterr().err
    assert file.read_text() == text


def test_problems_without_a_solution_are_left_out(command, tmp_path, capsys):
    path = tmp_path / "solutions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.insert(0, {**rows[0], "problem": "Another?", "solution": None})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command) == 0
    assert "1 of 3 problems have no solution, or one that" in capsys.readouterr().err
    found = motab.read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    assert [(t.index, r"\boxed{-19}" in t.text) for t in found] == [(0, True), (1, False)]
    assert found[0].prompt_ids == found[1].prompt_ids
    path.write_text(json.dumps(rows[0]) + "\n")
    assert main([*command, "--output_dir", str(tmp_path / "none")]) == 2
    assert "has no solution for any problem, a text or the assistant's first message after" in capsys.readouterr().err


def test_a_solution_is_not_graded_by_itself(command, tmp_path, capsys):
    assert main([*command, "--grade", "--answer_column", "solution"]) == 2
    assert "got the solutions as answers; give --answer_column" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
