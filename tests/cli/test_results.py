"""Tables of results."""

import sys
from types import SimpleNamespace

import pytest

from mlx_turboquant.cli.results import print_rows, write_results

ROWS = [
    {"context": context, "cache": cache, "bytes": "1,234,567 (0.25)", "loss": "0.12345"}
    for context in ("1,024", "2,048")
    for cache in ("exact", "mlx-lm 4 bits")
]
WHOLE = """
Some caches
context  cache                     bytes     loss
-------  -------------  ----------------  -------
1,024    exact          1,234,567 (0.25)  0.12345
1,024    mlx-lm 4 bits  1,234,567 (0.25)  0.12345

2,048    exact          1,234,567 (0.25)  0.12345
2,048    mlx-lm 4 bits  1,234,567 (0.25)  0.12345

loss: in nats
"""
SPLIT = """
context  cache                     bytes
-------  -------------  ----------------
1,024    exact          1,234,567 (0.25)
1,024    mlx-lm 4 bits  1,234,567 (0.25)

context  cache             loss
-------  -------------  -------
1,024    exact          0.12345
1,024    mlx-lm 4 bits  0.12345

"""
LISTS = """
context: 1,024
cache: exact
bytes: 1,234,567 (0.25)
loss: 0.12345

"""


def test_a_table_in_a_file_has_a_line_for_each_row(capsys):
    print_rows(ROWS, keys=2, title="Some caches", caption="loss: in nats")
    assert capsys.readouterr().out == WHOLE


@pytest.mark.parametrize("columns, expected", [(48, SPLIT), (40, SPLIT), (31, LISTS)])
def test_columns_without_room_in_a_terminal_follow_below(capsys, monkeypatch, columns, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_rows(ROWS[:1] if expected is LISTS else ROWS[:2], keys=2)
    assert capsys.readouterr().out == expected


def test_a_row_may_lack_columns_and_a_table_may_lack_rows(capsys):
    print_rows([{"cache": "exact", "bits": "16"}, {"cache": "none"}])
    assert capsys.readouterr().out == "\ncache  bits\n-----  ----\nexact    16\nnone\n\n"
    print_rows([], title="Nothing was measured")
    assert capsys.readouterr().out == "\nNothing was measured\n"


def test_a_table_that_cannot_be_printed_loses_no_file_and_the_other_way_round(tmp_path, capsys):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    def draw(result, folder):
        (folder / "picture.png").touch()

    with pytest.raises(OSError, match="No space"):
        write_results(tmp_path, "result", {}, SimpleNamespace(draw=draw, print_table=fail))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["picture.png", "result.json"]
    with pytest.raises(OSError, match="No space left on device.: use a place with space"):
        write_results(tmp_path, "result", {}, SimpleNamespace(draw=fail, print_table=print))
    assert capsys.readouterr().out == "{}\n"
