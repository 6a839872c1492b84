"""The line format of the bAbI tasks, and which file of a folder is read."""

import pytest

from dllm.data.longcontext.babi import Question, load_babi, parse_babi
from dllm.utils.parsing import InputError

STORY = (
    "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    "4 Mary went to the office.\n5 Where is Mary?\toffice\t4 1\n1 Bill took the milk.\n2 Who has the milk?\tBill\t1\n"
)


def test_questions_see_the_facts_above_them_in_their_story():
    mary, john, office = "Mary moved to the bathroom.", "John went to the hallway.", "Mary went to the office."
    assert parse_babi(STORY, "file") == [
        Question((mary, john), "Where is Mary?", "bathroom", (0,)),
        Question((mary, john, office), "Where is Mary?", "office", (2, 0)),
        Question(("Bill took the milk.",), "Who has the milk?", "Bill", (0,)),
    ]


@pytest.mark.parametrize(
    ("line", "damaged", "message"),
    [
        (2, "John went to the hallway.", "a line is NUMBER SENTENCE"),
        (2, "3 John went to the hallway.", "number 3 does not follow 1"),
        (3, "3 Where is Mary? bathroom 1", "separated by tabs"),
        (3, "3 Where is Mary?\tbathroom", "separated by tabs"),
        (3, "3 Where is Mary?\t\t1", "separated by tabs"),
        (3, "3 Where is Mary?\tbathroom\t7", "supporting line 7 is no fact"),
        (5, "5 Where is Mary?\toffice\t3", "supporting line 3 is no fact"),
        (7, "2 Who has the milk?\tBill\tone", "supporting line one is no fact"),
    ],
)
def test_a_damaged_line_is_named(line, damaged, message):
    lines = STORY.splitlines()
    lines[line - 1] = damaged
    with pytest.raises(InputError, match=message) as caught:
        parse_babi("\n".join(lines), "folder/qa1.txt")
    assert f"folder/qa1.txt, line {line}:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_questions_is_refused():
    with pytest.raises(InputError, match="holds no question"):
        parse_babi("1 Mary moved to the bathroom.\n", "file")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "babi").mkdir()

    def write(name, answer):
        text = f"1 Mary moved to the {answer}.\n2 Where is Mary?\t{answer}\t1\n"
        (tmp_path / "babi" / name).write_text(text)

    write("qa1_one_train.txt", "garden")
    write("qa1_one_test.txt", "office")
    write("qa2_two_train.txt", "kitchen")
    write("qa11_other_test.txt", "hallway")
    return tmp_path


def test_the_test_file_is_preferred_and_the_train_file_taken_where_there_is_none(folder):
    assert [question.answer for question in load_babi(str(folder), "qa1")] == ["office"]
    assert [question.answer for question in load_babi(str(folder), "qa2")] == ["kitchen"]


def test_folders_that_do_not_have_the_task_are_errors(folder, tmp_path):
    with pytest.raises(InputError, match="neither qa3_"):
        load_babi(str(folder), "qa3")
    with pytest.raises(InputError, match="no folder babi"):
        load_babi(str(tmp_path / "absent"), "qa1")
    (folder / "babi" / "qa2_again_train.txt").write_text("")
    load_babi.cache_clear()
    with pytest.raises(InputError, match="keep one of them"):
        load_babi(str(folder), "qa2")
    (folder / "babi" / "qa4_x_test.txt").write_bytes(b"1 \xff\n")
    with pytest.raises(InputError, match=r"qa4_x_test.txt is no UTF-8 text \(byte 2\)"):
        load_babi(str(folder), "qa4")
