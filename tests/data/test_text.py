import gzip
import hashlib
import io
import random
import tarfile

import numpy as np
import pytest

from jaxopt_models import data
from jaxopt_models.data import _text

# Published: sizes of the domains, and of the movie ratings above and below zero.
SIZES = {"movie": 10_605, "amazon": 3_708, "nyt": 5_190, "tweets": 4_200}


def full(domain):
    try:
        return data.vader(domain)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def fold(text):
    """The last decimal digit of the md5, by long division of its bytes."""
    rest = 0
    for byte in hashlib.md5(text.encode()).digest():
        rest = (rest * 256 + byte) % 10
    return rest


@pytest.mark.parametrize("domain", SIZES)
def test_domains_are_the_published_ones(domain):
    texts = full(domain)
    assert len(texts.texts) == len(texts.ratings) == len(texts.ids) == SIZES[domain]
    assert len(set(texts.ids)) == SIZES[domain]
    assert np.abs(texts.ratings).max() < 4
    assert all(text.strip() and "\t" not in text and "\r" not in text for text in texts.texts)
    documents = domain in ("amazon", "nyt")
    wanted = [fold(name.split("_")[0] if documents else name) for name in texts.ids]
    assert texts.folds.tolist() == wanted
    split = texts.split()
    assert sum(len(part.texts) for part in split) == SIZES[domain]
    assert 0.07 < len(split.test.texts) / SIZES[domain] < 0.12


def test_movie_ratings_are_the_published_ones():
    ratings = full("movie").ratings
    assert ((ratings > 0).sum(), (ratings < 0).sum()) == (5_242, 5_326)
    assert ((ratings >= 0.5).sum(), (ratings <= -0.5).sum()) == (4_996, 5_076)


def rows(documents):
    names = [f"{i}_{j}" if documents else str(5 * i + j) for i in range(1, 21) for j in range(5)]
    return [(name, f"{(k % 9) - 4.0}", f"text {k}, {'ü' * k}") for k, name in enumerate(names)]


def domain_of(documents):
    content = "\r\n".join("\t".join(row) for row in rows(documents)).encode() + b"\r\n"
    return _text.Domain("tiny.txt", hashlib.sha256(content).hexdigest(), documents), content


TINY, CONTENT = domain_of(False)


def tarred(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as out:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            out.addfile(about, io.BytesIO(content))
    return file.getvalue()


INNER = tarred({"folder/_README_.txt": b"read", "folder/tiny.txt": CONTENT})
OUTER = tarred({"v-3/setup.py": b"code", f"v-3/more/{_text.ARCHIVE}": INNER})


@pytest.mark.parametrize("documents", [False, True])
def test_a_file_is_read_and_split_by_its_ids(tmp_path, documents):
    domain, content = domain_of(documents)
    (tmp_path / "tiny.txt").write_bytes(content)
    texts = _text.read_domain(domain, tmp_path)
    wanted = rows(documents)
    assert list(zip(texts.ids, texts.texts, strict=True)) == [(i, t) for i, _, t in wanted]
    np.testing.assert_array_equal(texts.ratings, [np.float32(r) for _, r, _ in wanted])
    assert texts.ratings.dtype == np.float32 and texts.folds.dtype == np.uint8
    assert repr(texts) == "Texts(100 texts, rated -0.04 on average)"

    folds = dict(zip(texts.texts, texts.folds.tolist(), strict=True))
    for name, _, text in wanted:
        assert folds[text] == fold(name.split("_")[0])
    train, validation, test = texts.split()
    assert {folds[t] for t in train.texts} == set(folds.values()) - {0, 1}
    assert {folds[t] for t in validation.texts} <= {1}
    assert {folds[t] for t in test.texts} <= {0}
    together = train.texts + validation.texts + test.texts
    assert sorted(together) == sorted(texts.texts)
    for part in (train, validation, test):
        assert [folds[t] for t in part.texts] == [folds[t] for t in texts.texts if t in part.texts]
        found = dict(zip(part.texts, part.ratings.tolist(), strict=True))
        assert all(found[t] == float(r) for _, r, t in wanted if t in found)
        assert not part.ratings.flags.writeable
    if documents:
        where = [
            {name.split("_")[0] for name, _, t in wanted if t in p.texts} for p in texts.split()
        ]
        assert not (where[0] & where[1] or where[0] & where[2] or where[1] & where[2])


def test_archives_are_read_where_they_lie(tmp_path, monkeypatch):
    (tmp_path / "tiny.txt").write_bytes(CONTENT)
    wanted = _text.read_domain(TINY, tmp_path).texts
    (tmp_path / "tiny.txt").unlink()
    for name, content in ((_text.ARCHIVE, INNER), (_text.SDIST, OUTER), ("renamed", OUTER)):
        (tmp_path / name).write_bytes(content)
        assert _text.read_domain(TINY, tmp_path / name).texts == wanted
        if name != "renamed":
            assert _text.read_domain(TINY, str(tmp_path)).texts == wanted
            monkeypatch.setenv("JAXOPT_MODELS_VADER", str(tmp_path))
            assert _text.read_domain(TINY, None).texts == wanted
            (tmp_path / name).unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["renamed"]  # Nothing is unpacked.


def test_a_changed_file_is_refused_with_both_hashes(tmp_path):
    changed = CONTENT.replace(b"text 7", b"test 7")
    (tmp_path / _text.SDIST).write_bytes(
        tarred({"a/" + _text.ARCHIVE: tarred({"tiny.txt": changed})})
    )
    with pytest.raises(ValueError, match=r"not the published tiny\.txt") as caught:
        _text.read_domain(TINY, tmp_path)
    for content in (CONTENT, changed):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)


def test_missing_texts_say_where_they_were_sought(tmp_path, monkeypatch):
    command = "pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2"
    monkeypatch.delenv("JAXOPT_MODELS_VADER", raising=False)
    with pytest.raises(FileNotFoundError, match="JAXOPT_MODELS_VADER is not set") as caught:
        data.vader()
    assert command in str(caught.value)
    monkeypatch.setenv("JAXOPT_MODELS_VADER", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no movieReviewSnippets_GroundTruth") as caught:
        data.vader()
    assert f"{tmp_path} (JAXOPT_MODELS_VADER): no " in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"\(path\): no such file or folder") as caught:
        data.vader("nyt", path=tmp_path / "nowhere")
    assert "JAXOPT_MODELS_VADER" not in str(caught.value)
    with pytest.raises(ValueError, match="domain='film' is none of 'movie', 'amazon'"):
        data.vader("film")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no archive, or a damaged one"),
        (b"no archive", "no archive, or a damaged one"),
        (gzip.compress(b"no tar", 1), "no archive, or a damaged one"),
        (tarred({"a.txt": b"a"}), r"holds no tiny.txt and no hutto_ICWSM_2014.tar.gz"),
        (tarred({_text.ARCHIVE: tarred({"a.txt": b"a"})}), r"holds no tiny.txt"),
        (tarred({"tiny.txt": bytes((1 << 24) + 1)}), "has 16777217 bytes, too many"),
    ],
    # Archives hold the time at which they were made, and names of tests must not.
    ids=["empty", "text", "gzip", "another file", "an archive of another", "too large"],
)
def test_other_archives_are_refused_by_name(tmp_path, content, says):
    path = tmp_path / _text.SDIST
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        _text.read_domain(TINY, path)
    assert str(caught.value).startswith(str(path))


def test_damaged_archives_raise_value_error(tmp_path):
    rng = random.Random(0)
    path = tmp_path / _text.SDIST
    for _ in range(300):
        content = bytearray(OUTER if rng.random() < 0.5 else INNER)
        at = rng.randrange(len(content))
        if rng.random() < 0.3:
            del content[at:]
        else:
            content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            texts = _text.read_domain(TINY, path)
        except ValueError as error:
            assert str(error).startswith(str(path))
        else:
            assert len(texts.texts) == 100  # What was changed is not read.
