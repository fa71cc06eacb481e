"""Reading and writing definition files: what each scalar means, where it stands, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from recon.errors import InputError
from recon.workflows.source import dotted, parse_source, read_source, to_yaml


def value(text: str) -> Any:
    return parse_source(f"a: {text}", "f.yaml").data["a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100", 100), ("-3", -3), ("+4", 4), ("0", 0),
        ("1e-3", 1e-3), ("1e5", 1e5), ("1.0e5", 1e5), ("1.0E+5", 1e5), (".5", 0.5), ("5.", 5.0), ("-2.5", -2.5),
        (".inf", math.inf), ("-.INF", -math.inf),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ],
)  # fmt: skip
def test_scalars_that_are_not_text(text: str, expected: Any) -> None:
    assert value(text) == expected
    assert type(value(text)) is type(expected)


def test_not_a_number() -> None:
    assert math.isnan(value(".nan"))


@pytest.mark.parametrize(
    "text",
    ["no", "off", "yes", "y", "012", "0x10", "1_000", "12:30:00", "2026-03-02", "1e", "e5", "+", "nan", "=", "<<"],
)
def test_everything_else_is_text(text: str) -> None:
    assert value(text) == text


def test_quoted_numbers_are_text() -> None:
    assert value("'1e5'") == "1e5"
    assert value('"12"') == "12"


def test_places_are_lines_and_columns_from_one() -> None:
    source = parse_source("# first\nproblem:\n  noise: {counts: 1e5}\nbaselines:\n- fbp\n- tv\n", "f.yaml")
    assert source.where(("problem", "noise", "counts")) == "f.yaml:3:19"
    assert source.where(("problem", "noise", "counts"), "key") == "f.yaml:3:11"
    assert source.where(("baselines", 1)) == "f.yaml:6:3"
    assert source.where(("problem", "noise", "absent")) == "f.yaml:3:10"
    assert source.where(()) == "f.yaml:2:1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"f\.yaml: expected keys and values, the file is empty"),
        ("# only a comment", "the file is empty"),
        ("- 1", r"f\.yaml:1:1: expected keys and values, this is a list"),
        ("word", r"f\.yaml:1:1: expected keys and values, this is the value 'word'"),
        ("a: 1\nb: 2\na: 3", r"f\.yaml:3:1: a: this key was already given in line 1"),
        ("a:\n  b: 1\n  b: 2", r"f\.yaml:3:3: a\.b: this key was already given in line 2"),
        ("a: [{b: 1, b: 2}]", r"f\.yaml:1:12: a\[0\]\.b: this key was already given"),
        ("1: 2", r"f\.yaml:1:1: top level: a key must be a name; got 1"),
        ("a: {? [x] : 1}", r"a: a key must be a name; got a list"),
        ("a: &x 1\nb: *x", r"f\.yaml:1:4: not readable as YAML: anchors"),
        ("a: !!python/name:os.system 1", r"f\.yaml:1:4: not readable as YAML: tags"),
        ("a: !x 1", "tags such as !x"),
        ("a: 1\n---\nb: 2", r"f\.yaml:2:1: not readable as YAML: expected a single document"),
        ("\ta: 1", r"f\.yaml:1:1: not readable as YAML: .*cannot start any token"),
        ("a: {b: 1", r"f\.yaml:1:9: not readable as YAML: while parsing a flow mapping"),
        ("a: \x00", "not readable as YAML: unacceptable character"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_source(text, "f.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: there is no such file"):
        read_source(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="expected a YAML file, this is a folder"):
        read_source(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(InputError, match=r"expected UTF-8 text; byte 3 is not"):
        read_source(tmp_path / "latin.yaml")
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(InputError, match="this is no definition file"):
        read_source(tmp_path / "huge.yaml")


def test_a_byte_order_mark_and_accents_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "with space é.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + "a: é\r\nb: 2\r\n".encode())
    assert read_source(path).data == {"a": "é", "b": 2}


def test_overrides_set_values_and_remember_themselves() -> None:
    source = parse_source("a: 1\nb: {c: 2, d: 3}\ne: [1, 2]\n", "f.yaml")
    after = source.overridden(["b.c=1e4", "x.y=[1, no]", "e.1=7", "a="])
    assert after.data == {"a": None, "b": {"c": 1e4, "d": 3}, "e": [1, 7], "x": {"y": [1, "no"]}}
    assert after.where(("b", "c")) == "--set 'b.c=1e4'"
    assert after.where(("x", "y", 0)) == "--set 'x.y=[1, no]'"
    assert after.where(("b", "d")) == "f.yaml:2:14"
    assert source.data["b"]["c"] == 2, "the source itself stays as it was"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "--set 'a': expected KEY=VALUE"),
        ("=1", "--set '=1': expected KEY=VALUE"),
        ("a..b=1", "expected KEY=VALUE"),
        ("a.b=1", r"--set 'a.b=1': a is 1 at f\.yaml:1:4, not a section that could hold 'b'"),
        ("e.9=1", r"e is a list of 2 at f\.yaml:2:4; expected a position from 0, got 9"),
        ("a=[1", r"--set 'a=\[1':1:3: not readable as YAML"),
        ("a={b: 1, b: 2}", r"a\.b: this key was already given"),
    ],
)
def test_overrides_that_are_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_source("a: 1\ne: [1, 2]", "f.yaml").overridden([override])


def test_what_is_written_reads_back_the_same() -> None:
    data = {
        "numbers": [1, -1, 0.001, 1e5, 1e22, 1e-9, math.inf, -math.inf, 2**64],
        "words": [
            "1e3",
            "no",
            "012",
            "true",
            "null",
            "",
            "~",
            ".inf",
            "<<",
            "=",
            "a: b",
            "#",
            "é",
            "12:30",
            "-1",
            "+.5",
            "1.",
        ],
        "others": [None, True, False],
        "nested": {"deep": {"text": "long " * 60, "empty": {}, "none": []}},
    }
    assert parse_source(to_yaml(data), "f.yaml").data == data
    assert list(parse_source(to_yaml(data), "f.yaml").data) == list(data), "in the same order"


def test_dotted() -> None:
    assert dotted(("a", 0, "b")) == "a[0].b"
    assert dotted((), "top level") == "top level"
