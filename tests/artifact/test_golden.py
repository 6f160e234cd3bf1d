"""Files of format version 1, written once: they load to the same values for ever."""

import json
import zlib

import msgpack
import pytest
from artifact_trees import take_apart
from make_golden import FILES, GOLDEN, RECIPE, describe

import jaxopt_models as jom
from jaxopt_models.artifact import audit, inspect, load_recipe
from jaxopt_models.artifact._container import DICTIONARY

EXPECTED = json.loads((GOLDEN / "v1_expected.json").read_text())


def golden(name):
    return GOLDEN / f"v1_{name}.jom"


@pytest.mark.parametrize("name", FILES)
def test_values(name):
    assert json.loads(json.dumps(describe(jom.load(golden(name))))) == EXPECTED[name]


@pytest.mark.parametrize("name", FILES)
def test_saved_again_the_bytes_are_the_same(tmp_path, name):
    """All but the version of the library, which the index holds."""
    make, options = FILES[name]
    # What was rounded is read as `float32`: only what was saved first is saved as it was.
    for tree in [make()] if "dense" in options else [make(), jom.load(golden(name))]:
        jom.save(tmp_path / "again.jom", tree, **options)
        new, old = (take_apart(p.read_bytes()) for p in (tmp_path / "again.jom", golden(name)))
        assert new[0][1:] == old[0][1:] and new[1:] == old[1:]
        assert msgpack.packb(new[0][1:]) == msgpack.packb(old[0][1:])


def test_the_dictionary_is_part_of_the_format():
    assert (len(DICTIONARY), zlib.crc32(DICTIONARY)) == (1356, 3057908703)


def test_recipes():
    assert load_recipe(golden("leaves")) == RECIPE
    assert load_recipe(golden("values")) is None


def test_they_are_small_and_cover_the_format():
    size = sum(golden(name).stat().st_size for name in FILES)
    assert size < 8000
    rows = [row for name in FILES for row in audit(golden(name))]
    coders = {row["coder"].split(":")[0] for row in rows}
    assert coders == {"constant", "plain", "huffman", "range", "bitmap", "gaps", "lines"}
    parts = {row["part"] for name in FILES for row in inspect(golden(name))}
    assert parts >= {"padding", "container", "index", "codes", "keys", "dense", "zero_point"}
