import gzip

import pytest

from models_ml.benchmark import sequences
from warehouse.errors import HeadraceError


def written(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def as_words(found: sequences.Sequences) -> list[list[str]]:
    return [[found.item_names[item] for item in found.of(user)] for user in range(found.num_users)]


@pytest.mark.parametrize("name", ["toy.txt", "toy.txt.gz"])
def test_one_line_a_user_and_one_line_an_item_say_the_same(tmp_path, name):
    lists = sequences.read(written(tmp_path / "a" / name, "u 5 7 5\nv 7 9\n"))
    pairs = sequences.read(written(tmp_path / "b" / name, "u 5\nv 7\nu 7\nv 9\nu 5\n"))
    assert as_words(lists) == as_words(pairs) == [["5", "7", "5"], ["7", "9"]]
    assert lists.name == "toy"


def test_a_folder_stands_for_the_one_sequence_file_in_it(tmp_path):
    written(tmp_path / "ours" / "anything.txt.gz", "u 1 2 3\n")
    written(tmp_path / "ours" / "LICENSE.txt", "no sequences here")
    assert sequences.read(tmp_path / "ours").name == "anything"
    written(tmp_path / "ours" / "more.txt", "u 1 2 3\n")
    with pytest.raises(HeadraceError, match=r"must hold one sequence file .* it has anything.txt.gz, more.txt"):
        sequences.read(tmp_path / "ours")


def test_ratings_are_put_in_the_order_of_their_times_and_equal_times_keep_the_files(tmp_path):
    written(
        tmp_path / "ratings" / "u.data.gz", "u\tlate\t5\t30\nu\tearly\t1\t10\nv\tx\t2\t5\nu\tfirst\t3\t20\nu\tsecond\t3\t20\n"
    )
    assert as_words(sequences.read(tmp_path / "ratings")) == [["x"], ["early", "first", "second", "late"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("u 1 2 3\n\nv 1 2\n", r":2: expected .* got an empty line"),
        ("u 1 2 3\nv\n", r":2: expected .* got 'v'"),
        ("u 1 2 3\nv 1 2\nu 4 5\n", r":3: user u already has a sequence, on line 1"),
        ("u 1 2\nv 1 2\n", r"no user has three items"),
        ("", r"no user has three items"),
    ],
)
def test_what_is_neither_form_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(HeadraceError, match=message):
        sequences.read(written(tmp_path / "bad.txt", text))


def test_a_broken_gzip_file_and_words_that_are_no_text_are_refused_with_their_line(tmp_path):
    whole = gzip.compress("".join(f"u{n} {n} {n + 1} {n + 2}\n" for n in range(5000)).encode())
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HeadraceError, match=r"cut.txt.gz:\d+: the gzip file is broken or cut short"):
        sequences.read(tmp_path / "cut.txt.gz")
    (tmp_path / "bytes.txt").write_bytes(b"u 1 2 3\nv \xff 2\n")
    with pytest.raises(HeadraceError, match=r"bytes.txt:\d+: not UTF-8 text"):
        sequences.read(tmp_path / "bytes.txt")
    written(tmp_path / "u.data", "1\t2\t3\n")
    with pytest.raises(HeadraceError, match=r"u.data:1: expected user, item, rating and whole seconds"):
        sequences.read(tmp_path)
