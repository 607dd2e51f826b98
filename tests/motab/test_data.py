"""Sources of problems: local files, procedural tasks, and what is refused."""

import json
import pathlib

import pytest

from motab.data import load_problems

datasets = pytest.importorskip("datasets")


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "1+1?", "solution": "so 2", "answer": "2"}, "1+1?", "2"),  # LIMO-v2
        ({"problem": "1+1?", "answer": 2}, "1+1?", "2"),  # AceReason-Math
        ({"category": "math", "source": "s", "input": "1+1?", "output": "2"}, "1+1?", "2"),  # AceReason-1.1-SFT
        ({"prompt": [{"role": "user", "content": "1+1?"}]}, [{"role": "user", "content": "1+1?"}], None),
        (
            {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"style": "rule", "ground_truth": 2}},
            [{"role": "user", "content": "1+1?"}],
            "2",
        ),  # verl
        (
            {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
            [{"role": "user", "content": "1+1?"}],
            None,
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?", "n": 1}],
                    },
                    {"role": "assistant", "content": "2"},
                ]
            },
            [{"role": "user", "content": "1+1?"}],
            None,
        ),
    ],
)
def test_columns(jsonl, row, prompt, answer):
    (problem,) = load_problems(pathlib.Path(jsonl(row)))
    assert (problem.prompt, problem.answer) == (prompt, answer)
    assert problem.messages() == [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize("column", ["conversations", "question", "dialogue"])
@pytest.mark.parametrize(("user", "assistant"), [("human", "gpt"), ("user", "assistant")])
def test_conversations_as_sharegpt_has_them(jsonl, column, user, assistant):
    """And the columns that datasets of this kind have besides, as OpenThoughts-114k and OpenThoughts3 do."""
    said = [("system", "Add."), (user, "1+1?"), (assistant, "2"), (user, "1+2?"), (assistant, "3"), (assistant, "!")]
    row = {"system": "Add.", "source": "s", column: [{"from": who, "value": text} for who, text in said]}
    (problem,) = load_problems(jsonl(row), question_column="dialogue" if column == "dialogue" else None)
    roles = ["system", "user", "assistant", "user"]
    assert problem.prompt == [{"role": role, "content": text} for role, (_, text) in zip(roles, said[:4], strict=True)]


def test_a_column_of_the_system(jsonl):
    """As Bespoke-Stratos and Sky-T1 have it: without, the student would be asked otherwise than the texts' writer."""
    said = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    rows = [{"system": system, "conversations": said} for system in ("Add.", " ", None)]
    user = {"role": "user", "content": "1+1?"}
    found = [problem.prompt for problem in load_problems(jsonl(*rows))]
    assert found == [[{"role": "system", "content": "Add."}, user], [user], [user]]
    (problem,) = load_problems(jsonl({"system": "Add.", "question": "1+1?"}))
    assert problem.prompt == "1+1?"


def test_what_a_template_may_read_beside_a_content(jsonl):
    call = {"type": "function", "function": {"name": "add"}}
    said = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "add"},
    ]
    (problem,) = load_problems(jsonl({"messages": said}))
    assert problem.prompt == said


def test_rows_are_read_when_they_are_asked_for(jsonl):
    first, second = load_problems(jsonl({"question": "a?", "n": 1}, {"question": "b?", "n": 2}))
    assert (dict(second.record), len(second.record)) == ({"question": "b?", "n": 2}, 2)
    assert "none" not in first.record
    assert first.record.get("n") == 1
    assert not any(isinstance(value, dict) for value in vars(first).values())


def test_columns_of_other_names(jsonl):
    path = jsonl({"question": "no", "ask": "1+1?", "answer": "no", "gold": 2})
    load = lambda **columns: [(p.prompt, p.answer) for p in load_problems(path, **columns)]  # noqa: E731
    assert load(question_column="ask", answer_column="gold") == [("1+1?", "2")]
    assert load(question_column="ask") == [("1+1?", "no")]
    assert load(answer_column="gold") == [("no", "2")]
    assert load(question_column="answer") == [("no", None)]
    for name in ("question_column", "answer_column"):
        with pytest.raises(ValueError, match=f"{name} must be a column of .*, question or ask or .*, got 'none'"):
            load(**{name: "none"})
        with pytest.raises(ValueError, match="is a task without columns to name, got {'" + name):
            load_problems("reasoning-gym:chain_sum?size=1&seed=1", **{name: "question"})


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["a?", "b?"], "answer": ["1", None]}), path)
    assert [(p.prompt, p.answer) for p in load_problems(str(path))] == [("a?", "1"), ("b?", None)]


@pytest.mark.parametrize(
    ("split", "questions"), [("train", "abcd"), ("test", "abcd"), ("train[:2]", "ab"), ("test[50%:]", "cd")]
)
def test_a_part_of_a_file(jsonl, split, questions):
    path = jsonl(*({"question": letter} for letter in "abcd"))
    assert "".join(problem.prompt for problem in load_problems(path, split)) == questions


def test_a_split_that_is_none(jsonl):
    with pytest.raises(ValueError, match=r"got .*train\[:x\]"):
        load_problems(jsonl({"question": "a"}), "train[:x]")
    with pytest.raises(ValueError, match=r"has no splits to take a part of, got 'train\[:2\]'; set its size"):
        load_problems("reasoning-gym:chain_sum?size=5&seed=1", "train[:2]")


def test_a_configuration_is_asked_for(monkeypatch):
    asked = []
    table = datasets.Dataset.from_list([{"question": "1+1?", "answer": "2"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *x, **kw: asked.append((x, kw)) or table)
    assert load_problems("openai/gsm8k", "test", "main")[0].answer == "2"
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_a_configuration_of_what_has_none(jsonl):
    for name in (jsonl({"question": "1+1?"}), "reasoning-gym:chain_sum?size=1&seed=1"):
        with pytest.raises(ValueError, match="only a dataset of the hub has configurations, got 'main' for"):
            load_problems(name, config="main")


def test_instructions(tmp_path):
    """With an input beside it only where the column is named."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"instruction": "Add 1 and 2.", "output": "3"}) + "\n")
    assert [(p.prompt, p.answer) for p in load_problems(path)] == [("Add 1 and 2.", "3")]
    path.write_text(json.dumps({"instruction": "Add.", "input": "1, 2"}) + "\n")
    assert [p.prompt for p in load_problems(path, question_column="instruction")] == ["Add."]


def test_reasoning_gym():
    name = "reasoning-gym:chain_sum?size=5&seed=3&min_terms=4&max_terms=4"
    problems = load_problems(name)
    assert len(problems) == 5
    assert all(problem.prompt.count("+") + problem.prompt.count(" - ") == 3 for problem in problems)
    assert [problem.prompt for problem in problems] == [problem.prompt for problem in load_problems(name)]
    assert problems[0].answer == str(eval(problems[0].record["question"].split(":")[1].rstrip(" =.")))


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ([{"instruction": "x", "input": "y"}], "data.jsonl", "has columns instruction and input, of which a question"),
        ([{"text": "x"}], "data.jsonl", "none of the question columns question, problem.* it has text"),
        ([{"question": " "}], "data.jsonl", "row 0 of .* has an empty question"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "data.jsonl", "no message but the assistant's"),
        ([{"question": "x"}], "data.txt", r"must end in one of .jsonl, .json, .parquet, got '.txt'"),
    ],
)
def test_bad_files(jsonl, rows, name, message):
    with pytest.raises(ValueError, match=message):
        load_problems(jsonl(*rows, name=name))


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (None, "must have a text or a list of messages as its question, got null"),
        (
            5,
            "must have a text or a list of messages as its question, got 5; rewrite it, or give another question_c",
        ),
        (["a" * 999], 'must have messages as .*, got "a{199}[.]{3}; rewrite it'),
        ({"text": "a"}, 'must have a text or a list of messages as its question, got {"text": "a"}'),
        (["a", "b"], 'must have messages as {"role": "user", "content": "a text"}, got "a"'),
        ([{"from": "human", "content": "a"}], 'must have messages as .*, got {"role": "user", "content": null}'),
        (
            [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}, {"from": "gpt", "value": "c"}],
            'must have messages from human, user, gpt, assistant, system, got one from "observation"; rewrite it',
        ),
        ([{"from": None, "value": "a"}], "must have messages from .*, got one from null"),
        ([{"role": "user", "content": None}], 'must have messages as .*, got {"role": "user", "content": null}'),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "text": "b"}]}],
            'must have messages as .*, got {"role": "user", "content": ',
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "must have messages as .*, got "),
        ([], "no message but the assistant's"),
    ],
)
def test_what_is_no_question(jsonl, question, message):
    path = jsonl({"question": question})
    with pytest.raises(ValueError, match=f"row 0 of {path} (has )?{message}"):
        load_problems(path)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (
            b'{"question": "a"}\n\n{"question": "b\n{"question": "c"}\n',
            "a.jsonl",
            r"got no JSON in line 3 \(Invalid control character\)",
        ),
        (b'{"question": "a"}\n{"question": "\xff"}\n', "a.jsonl", r"got no JSON in line 2 \('utf-8' codec can't"),
        (b'{"question": "a"}\n5\n', "a.jsonl", "got no columns in line 2: 5"),
        (b"", "a.jsonl", "got no rows"),
        (b"", "a.json", "got no rows"),
        (b"\n\n", "a.jsonl", "got no rows"),
        (b"{", "a.json", "got .*JSON parse error"),
        (b"PAR1", "a.parquet", "got Parquet file size is 4 bytes"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, name, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} must hold rows of one kind, each a problem, {message}") as error:
        load_problems(str(path))
    assert "\n" not in str(error.value)


def test_a_folder_of_files_that_are_no_dataset(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(ValueError, match="nor a dataset of the hub with split 'train': An error occurred"):
        load_problems(tmp_path)


@pytest.mark.parametrize("answer", [{"value": "2"}, ["2"], {"ground_truth": ["2", "two"]}])
def test_an_answer_that_is_no_text(jsonl, answer):
    """`evaluate` refuses the problem: graded as its text, no answer would be right."""
    (problem,) = load_problems(jsonl({"question": "1+1?", "answer": answer}))
    assert problem.answer is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_task", "'no_such_task' with ''"),
        ("chain_sum?no_such_setting=1", "'chain_sum' with 'no_such_setting=1'"),
        ("chain_sum?size=&seed=", "'chain_sum' with 'size=&seed=': no value for size, seed"),
        ("chain_sum?size", "'chain_sum' with 'size': bad query field"),
        ("chain_sum?size=[", "'chain_sum' with 'size=.': while parsing"),
        ("chain_sum?size=none", "'chain_sum' with 'size=none': "),
    ],
)
def test_bad_tasks(name, message):
    with pytest.raises(ValueError, match=f"reasoning-gym cannot make task {message}"):
        load_problems(f"reasoning-gym:{name}")


@pytest.mark.parametrize("name", ["", None, 5])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match=f"dataset_name must be a task, a file or .*, got {name!r}"):
        load_problems(name)
