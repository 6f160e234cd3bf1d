"""The command line: every command, good and bad, in this process where that is enough."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxopt_models as jom
from jaxopt_models import cli

RULES = [
    {"path": ".*/weight", "encoder": {"quant.Int": {"bits": 4}}, "axes": {"Axes": {"out": [0]}}}
]
# No HOME, no terminal, no PATH with git in it.
BARE = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
}


@pytest.fixture
def model(tmp_path):
    """A checkpoint, a recipe and a place for the artifact."""
    rng = np.random.default_rng(0)
    tensors = {
        f"ip{i}.{name}": rng.standard_normal(shape).astype(np.float32)
        for i, n in enumerate((32, 10))
        for name, shape in (("weight", (n, 64)), ("bias", (n,)))
    }
    save_file(tensors, tmp_path / "m.safetensors")
    (tmp_path / "r.json").write_text(json.dumps(RULES))
    return [str(tmp_path / name) for name in ("m.safetensors", "r.json", "m.jom")]


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit code, standard output and standard error."""

    def run(*argv):
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\r" not in out + err
        return code, out, err

    return run


def one_line(err):
    assert err.startswith("jaxopt_models: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


# A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that.
RUN = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("jaxopt_models", run_name="__main__", alter_sys=True)
"""


def child(*argv, **options):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, argv)],
        stdin=subprocess.DEVNULL,
        **{
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": BARE,
            **options,
        },
    )


def test_compress_prints_plan_contents_and_ratio(run, model):
    code, out, err = run("compress", *model)
    assert code == 0 and err == ""
    plan, contents = out.split(f"\n{model[2]}\n")
    assert "ip0/weight" in plan and "out in" in plan and "Int(bits=4)" in plan
    size = os.path.getsize(model[2])
    assert f"2,730 parameters in {size:,} bytes: {4 * 2730 / size:.2f}x" in contents
    loaded = jom.load(model[2])
    want = jom.compress(
        jom.materialize(cli_tree(model[0])), jom.recipe_from_json(json.dumps(RULES))
    )
    for layer in want:
        np.testing.assert_array_equal(
            loaded[layer]["weight"].materialize(), want[layer]["weight"].materialize()
        )
        np.testing.assert_array_equal(loaded[layer]["bias"], want[layer]["bias"])
    assert jom.artifact.load_recipe(model[2]) == jom.recipe_from_json(json.dumps(RULES))


def cli_tree(path):
    from jaxopt_models._checkpoint import read_checkpoint

    return read_checkpoint(path)


def test_compress_json_is_one_object(run, model):
    code, out, _ = run("compress", *model, "--json", "--dense", "bfloat16", "--key", 3)
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert found["path"] == model[2] and found["file_bytes"] == os.path.getsize(model[2])
    assert found["parameters"] == 2730
    assert found["ratio"] == 4 * 2730 / found["file_bytes"] and found["seconds"] > 0
    assert [r["path"] for r in found["plan"]["rows"]] == [
        "ip0/bias",
        "ip0/weight",
        "ip1/bias",
        "ip1/weight",
    ]
    assert sum(r["bytes"] for r in found["inspect"]["rows"]) == found["file_bytes"]
    assert {r["coder"] for r in found["inspect"]["rows"] if r["part"] == "dense"} == {"bfloat16"}


def test_compress_hands_its_key_to_encoders_that_draw(run, model):
    rules = [{"path": ".*/weight", "encoder": {"codebook.KMeans": {"bits": 2, "start": "random"}}}]
    with open(model[1], "w") as f:
        json.dump(rules, f)
    code, _, err = run("compress", *model)
    assert code == 2 and "ip0/weight" in err and "--key" in err
    assert run("compress", *model, "--key", 0)[0] == 0


def test_float64_that_becomes_float32_is_said(run, model, tmp_path):
    save_file({"a.weight": np.ones((4, 4)), "a.rest": np.ones(3)}, tmp_path / "m.safetensors")
    code, out, _ = run("compress", *model)
    assert code == 0 and "float64 is read as float32: JAX_ENABLE_X64 is not set" in out
    assert jom.load(model[2])["a"]["rest"].dtype == np.float64


def test_inspect_and_verify_of_a_sound_file(run, model):
    assert run("compress", *model)[0] == 0
    code, out, err = run("inspect", model[2])
    assert (code, err) == (0, "") and "smaller than float32" in out
    code, out, err = run("inspect", model[2], "--json")
    found = json.loads(out)
    assert code == 0 and found["file_bytes"] == os.path.getsize(model[2])
    assert json.loads(found["recipe"])[0]["path"] == ".*/weight"
    assert run("verify", model[2]) == (0, f"{model[2]}: sound\n", "")
    code, out, _ = run("verify", model[2], "--json")
    assert code == 0 and json.loads(out) == {"path": model[2], "sound": True, "problems": []}


def test_verify_says_what_is_unsound_or_damaged(run, model):
    leaf = jom.quant.Int(bits=4)(jnp.eye(8))
    bad = dataclasses.replace(leaf, scale=leaf.scale.at[0].set(jnp.nan))
    jom.save(model[2], {"w": bad, "v": bad})
    code, out, err = run("verify", model[2])
    assert code == 1 and err == "" and out.startswith(f"{model[2]}: not sound\n  ")
    code, out, err = run("verify", model[2], "--json")
    found = json.loads(out)
    assert code == 1 and not found["sound"]
    assert {p.split(":")[0] for p in found["problems"]} == {"v", "w"}
    with open(model[2], "r+b") as f:
        f.seek(6)
        f.write(b"\xff\xff")
    code, out, err = run("verify", model[2])
    assert code == 1 and "not sound" in out and err == ""


def test_bad_input_is_one_line_and_exit_code_2(run, model, tmp_path):
    checkpoint, recipe, out = model
    (tmp_path / "bad.json").write_text('[{"path": ".*", "encoder": {"quant.Imt": {}}}]')
    (tmp_path / "none.json").write_text('[{"path": "nothing", "encoder": null}]')
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut.jom").write_bytes(b"jom\1")
    for argv, says in [
        (["inspect", tmp_path / "x.jom"], "x.jom: No such file or directory"),
        (["inspect", tmp_path / "text"], "no jaxopt_models artifact"),
        (["inspect", tmp_path / "cut.jom"], ""),
        (["inspect", tmp_path], "Is a directory"),
        (["verify", tmp_path / "x.jom"], "x.jom: No such file or directory"),
        (["compress", tmp_path / "x", recipe, out], "x: No such file or directory"),
        (["compress", tmp_path / "text", recipe, out], "a checkpoint is a .safetensors file"),
        (["compress", tmp_path / "cut.jom", recipe, out], ""),
        (["compress", checkpoint, tmp_path / "x.json", out], "x.json: No such file or directory"),
        (
            ["compress", checkpoint, tmp_path / "bad.json", out],
            "bad.json: recipe_from_json: rule 0",
        ),
        (["compress", checkpoint, tmp_path / "latin.json", out], "latin.json: "),
        (["compress", checkpoint, tmp_path / "none.json", out], "Paths are: ip0/bias, ip0/weight"),
        (["compress", checkpoint, recipe, tmp_path / "no" / "m.jom"], "no is no folder"),
        (["compress", checkpoint, recipe, tmp_path], "folder or a device"),
        (["compress", checkpoint, recipe, os.devnull], "folder or a device"),
        (["compress", out, recipe, checkpoint], "exists and is no artifact"),
        (["compress", checkpoint, recipe], "required: OUT (see jaxopt_models compress --help)"),
        (["compress", checkpoint, recipe, out, "--dense", "int8"], "--dense"),
        (["compress", checkpoint, recipe, out, "--key", "-1"], "--key"),
        (["demo", "--seed", "x"], "'x' is no whole number"),
        (["demo", "--out", tmp_path / "no" / "m.jom"], "no is no folder"),
        (["explode"], "invalid choice"),
        ([], "required: COMMAND"),
    ]:
        code, printed, err = run(*argv)
        assert code == 2 and printed == "", argv
        assert says in one_line(err), argv
    assert not os.path.exists(out)


def test_a_long_message_is_cut_and_debug_raises(run, model, tmp_path):
    save_file({f"t{i}": np.ones(1) for i in range(500)}, tmp_path / "m.safetensors")
    code, _, err = run("compress", *model)
    assert code == 2 and len(one_line(err)) < 900 and err.endswith("(all of it with --debug)\n")
    with pytest.raises(ValueError, match="t499"):
        cli.main(["compress", *model, "--debug"])
    with pytest.raises(ValueError, match="required"):
        cli.main(["compress", "--debug"])


def test_an_artifact_in_the_way_is_replaced_and_kept_on_failure(run, model, tmp_path):
    assert run("compress", *model)[0] == 0
    before = (tmp_path / "m.jom").read_bytes()
    bad = np.float32([[1, np.nan]])
    save_file({"a.weight": bad}, tmp_path / "n.safetensors")
    code, _, err = run("compress", tmp_path / "n.safetensors", *model[1:])
    assert code == 2 and "a/weight" in one_line(err) and "NaN" in err
    assert (tmp_path / "m.jom").read_bytes() == before
    assert run("compress", *model)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["m.jom", "m.safetensors", "n.safetensors", "r.json"]


def test_names_of_strangers_cannot_steer_the_terminal(run, model, tmp_path):
    save_file({"\x1b[2Ja.weight": np.ones((2, 2), np.float32)}, tmp_path / "m.safetensors")
    code, out, _ = run("compress", *model)
    assert code == 0 and "\\x1b[2Ja/weight" in out


def test_progress_lines_unless_quiet(model, caplog):
    logger = logging.getLogger("jaxopt_models")
    assert cli.main(["compress", *model]) == 0
    assert any(r.getMessage().startswith("compress: 4 of 4") for r in caplog.records)
    caplog.clear()
    assert cli.main(["compress", *model, "--quiet"]) == 0
    assert not caplog.records and logger.level == logging.WARNING


def test_help_and_version_start_no_backend():
    # A platform that does not exist would fail as soon as a backend is asked for.
    code = (
        "import sys, jaxopt_models.cli as cli\n"
        "assert cli.main(['--help']) == 0 and cli.main(['compress', '--help']) == 0\n"
        "assert cli.main(['--version']) == 0\n"
        "heavy = {'flax', 'orbax.checkpoint', 'matplotlib', 'jaxopt_models._demo'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=BARE | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "" and done.stdout.endswith(f"jaxopt_models {jom.__version__}\n")
    assert "RECIPE.json" in done.stdout and done.stdout.isascii()


def test_a_bare_process_without_home_or_utf8(model):
    # One child for the whole way: log lines on standard error, tables in ASCII.
    with child("compress", *model, env=BARE | {"PYTHONIOENCODING": "ascii"}) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert err.startswith("compress: 4 of 4 in ") and err.count("\n") == 1
    assert out.isascii() and "-----" in out and "\x1b" not in out


def test_a_reader_that_went_away_and_a_full_disk(model):
    jom.save(model[2], {"w": jnp.ones(4)})
    read, write = os.pipe()
    os.close(read)
    with child("inspect", model[2], stdout=write) as process:
        os.close(write)
        assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 141
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full, child("inspect", model[2], stdout=full) as process:
            err = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and "standard output: No space left" in one_line(err)


def test_ctrl_c_while_compressing_leaves_no_file(model, tmp_path):
    w = np.random.default_rng(0).standard_normal((24, 512, 1024), np.float32)
    save_file({f"t{i}": x for i, x in enumerate(w)}, model[0])
    (tmp_path / "r.json").write_text(
        '[{"path": ".*", "encoder": {"codebook.KMeans": {"bits": 6}}}]'
    )
    with child("compress", *model) as process:
        assert process.stdout.readline() == "plan\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert one_line(err).endswith("m.jom was not written: the work starts anew next time\n")
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "r.json"]


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def test_ctrl_c_in_the_demo_says_how_to_go_on(tmp_path):
    with child("demo", "--checkpoint", tmp_path / "c", "--out", tmp_path / "m.jom") as process:
        wait_for(tmp_path / "c" / "run.json", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == ""
    # Python itself tells of an interrupt that falls into JAX's callback of the collector.
    assert "Traceback" not in err or "Exception ignored in: <function _xla_gc_callback" in err
    assert err.splitlines()[-1] == (
        f"jaxopt_models: interrupted; give the same command again to resume from {tmp_path / 'c'}"
    )
    assert not os.path.exists(tmp_path / "m.jom")


@pytest.mark.full
def test_the_demo_runs_and_reports(tmp_path):
    with child("demo", "--json", "--out", tmp_path / "m.jom", "--seed", 1) as process:
        out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found["file_bytes"] == os.path.getsize(tmp_path / "m.jom")
    assert found["ratio"] == 4 * found["parameters"] / found["file_bytes"]
    assert found["error_reloaded"] == found["error_after"] and found["ratio"] > 30
    assert [row["stage"] for row in found["stages"]] == ["train", "prune", "share", "tune", "code"]
    assert "\x1b" not in err and "prune:" in err
