"""Tables: names of strangers, values, JSON, bars."""

import json

import matplotlib.pyplot as plt
import pytest

import jaxopt_models as jom


def table():
    rows = [("[/x].weight", 1234, 0.5), ("w[abc]", None, True)]
    return jom.Table(("path", "bytes", "error"), rows, title="a [title]", notes=["n"])


def test_names_are_not_read_as_markup():
    text = str(table())
    assert "[/x].weight" in text and "w[abc]" in text and "a [title]" in text
    assert "1,234" in text and text.endswith("n") and "\x1b" not in text


def test_rows_columns_and_json():
    t = table()
    assert len(t) == 2 and t[0]["bytes"] == 1234 and t.column("path")[1] == "w[abc]"
    assert [row["error"] for row in t] == [0.5, True]
    assert json.loads(t.to_json())["rows"][0] == {
        "path": "[/x].weight",
        "bytes": 1234,
        "error": 0.5,
    }


def test_html_escapes():
    t = jom.Table(("<b>",), [("<script>",)])
    assert "<script>" not in t._repr_html_() and "&lt;script&gt;" in t._repr_html_()


def test_plot_draws_a_bar_for_each_row():
    plt.switch_backend("agg")
    ax = table().plot("bytes")
    assert [p.get_width() for p in ax.patches] == [1234, 0]
    plt.close("all")
    with pytest.raises(ValueError, match="no column 'size'"):
        table().plot("size")
