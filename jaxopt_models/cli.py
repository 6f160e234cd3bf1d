"""The command line: ``python -m jaxopt_models``, installed also as ``jaxopt-models``.

.. code-block:: text

    demo     [--seed N] [--out FILE] [--checkpoint DIR]
    compress CHECKPOINT RECIPE.json OUT [--dense bfloat16|float16] [--key N]
    inspect  FILE
    verify   FILE
    kernels  [--clear]
    each:    [--json] [--quiet] [--debug]

``demo`` trains a small network on bundled images, prunes it, shares its weights, codes them
into a file, loads that file and measures it again. With ``--checkpoint`` it can be interrupted
(Ctrl-C) and goes on when the same command is given again.

``compress`` reads a checkpoint (a ``.safetensors`` file, the folder or index of its shards, an
Orbax folder, or an artifact), prints the plan, encodes each parameter by the first rule of the
recipe whose regular expression matches its path, writes OUT, and prints what is in it, byte by
byte, with the ratio. A recipe is a list of rules, most specific first::

    [{"path": ".*/(wte|lm_head)/weight", "encoder": null},
     {"path": ".*/weight", "encoder": {"quant.Int": {"bits": 4}},
      "axes": {"Axes": {"out": [0]}}}]

``null`` keeps parameters dense; ``"out": [0]`` is the layout of torch, `(out, in, ...)`; a list
of encoders is a chain; ``--key`` seeds encoders that draw. ``--dense`` stores what no rule
encodes in two bytes an entry. An existing OUT is replaced only if it is an artifact.

``inspect`` says what an artifact holds, in bytes that add up to its length. ``verify`` checks
every checksum and every law that a file can be held to. ``kernels`` compiles the kernels for
this machine, unless that is done, and says where they are or why there are none; ``--clear``
removes them.

Results go to standard output, as tables or with ``--json`` as one JSON object; progress and
errors go to standard error. Without a terminal there are no control codes, and progress is log
lines. ``--debug`` shows the traceback of an error.

Exit codes: 0 done; 1 ``verify`` found the file damaged or unsound, or there are no kernels; 2 bad
input or no room to work, with one line that says what; 130 interrupted; 141 the reader of the
output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax

from . import artifact, kernels
from ._checkpoint import read_checkpoint
from ._compress import compress
from ._interrupt import Interrupt, interruptible
from ._plan import plan
from ._recipe import Rule, recipe_from_json
from ._verify import VerifyError, verify
from ._version import __version__

_LONGEST_LINE = 800


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments; default: those of the process.

    Returns:
      The exit code; see the module.

    Example:
      >>> from jaxopt_models.cli import main
      >>> main(["inspect", "no/such/file.jom"])
      2
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = argparse.Namespace(debug="--debug" in argv, interrupted="interrupted")
    try:
        _parser().parse_args(argv, args)
        _configure_logging(quiet=args.quiet)
        with interruptible(Interrupt):
            return args.run(args)
    except SystemExit as e:  # argparse, after --help or --version
        return int(e.code or 0)
    except KeyboardInterrupt:
        _complain(args.interrupted)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as e:
        if args.debug:
            raise
        _complain(_explain(e))
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxopt_models", description="Makes any JAX model smaller.")
    parser.add_argument("--version", action="version", version=f"jaxopt_models {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object, no tables")
        sub.add_argument("--quiet", action="store_true", help="show no progress")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    demo = command("demo", _demo, "Compress a small network on bundled images, start to end.")
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="random seed (0)")
    demo.add_argument("--out", metavar="FILE", help="the artifact to write (a temporary one)")
    demo.add_argument("--checkpoint", metavar="DIR", help="folder from which a run can go on")

    small = command("compress", _compress, "Compress a checkpoint by a recipe into a file.")
    small.add_argument("checkpoint", metavar="CHECKPOINT", help="safetensors, Orbax or .jom")
    small.add_argument("recipe", metavar="RECIPE.json", help="a list of rules")
    small.add_argument("out", metavar="OUT", help="the artifact to write")
    small.add_argument(
        "--dense", choices=("bfloat16", "float16"), help="type to store dense parameters in"
    )
    small.add_argument("--key", type=_seed, metavar="N", help="seed for encoders that draw")

    for name, run, text in (
        ("inspect", _inspect, "Say what an artifact holds, byte by byte."),
        ("verify", _verify, "Check an artifact against every law it can be held to."),
    ):
        command(name, run, text).add_argument("file", metavar="FILE", help="an artifact")

    built = command("kernels", _kernels, "Compile the kernels for this machine, and show them.")
    built.add_argument("--clear", action="store_true", help="remove what was compiled instead")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2**32 - 1")
    return int(text)


def _demo(args: argparse.Namespace) -> int:
    if args.out is not None:
        _check_out(args.out)
    args.interrupted = (
        "interrupted; nothing was kept: with --checkpoint DIR a run can be resumed"
        if args.checkpoint is None
        else f"interrupted; give the same command again to resume from {args.checkpoint}"
    )
    from ._demo import run_demo

    demo = run_demo(
        seed=args.seed, path=args.out, progress=not args.quiet, checkpoint=args.checkpoint
    )
    _print(json.dumps(demo.data) if args.json else demo.text())
    return 0


def _compress(args: argparse.Namespace) -> int:
    start = time.monotonic()
    args.interrupted = f"interrupted; {args.out} was not written: the work starts anew next time"
    recipe = _read_recipe(args.recipe)
    _check_out(args.out)
    tree = read_checkpoint(args.checkpoint)
    key = None if args.key is None else jax.random.key(args.key)
    planned = plan(tree, recipe, key=key)
    if not args.json:
        _print(f"{planned}\n")
    small = compress(tree, recipe, key=key, progress=not args.quiet)
    artifact.save(args.out, small, recipe=recipe, dense=args.dense)
    args.interrupted = f"interrupted; {args.out} is complete"
    table = artifact.inspect(args.out)
    if args.json:
        figures = {k: table.data[k] for k in ("file_bytes", "parameters", "ratio")}
        tables = {"plan": json.loads(planned.to_json()), "inspect": json.loads(table.to_json())}
        seconds = time.monotonic() - start
        _print(json.dumps({"path": args.out, **figures, "seconds": seconds, **tables}))
    else:
        _print(str(table))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    table = artifact.inspect(args.file)
    _print(table.to_json() if args.json else str(table))
    return 0


def _verify(args: argparse.Namespace) -> int:
    problems = []
    try:
        verify(args.file)
    except VerifyError as e:
        problems = [line.strip() for line in str(e).splitlines()[1:]]
    except artifact.ArtifactError as e:
        problems = [str(e)]
    if args.json:
        _print(json.dumps({"path": args.file, "sound": not problems, "problems": problems}))
    else:
        _print("\n  ".join([f"{args.file}: {'not sound' if problems else 'sound'}", *problems]))
    return 1 if problems else 0


def _kernels(args: argparse.Namespace) -> int:
    if args.clear:
        removed = kernels.clear()
        _print(json.dumps({"removed": removed}) if args.json else f"removed {removed} libraries")
        return 0
    found = kernels.status()
    if args.json:
        _print(json.dumps(dataclasses.asdict(found)))
    elif found.path:
        _print(f"kernels for {found.path}: {', '.join(found.names)}\n{found.file}")
    else:
        _print(f"no kernels, everything runs on XLA: {found.why}")
    return 0 if found.path else 1


def _read_recipe(path: str) -> list[Rule]:
    with open(path, encoding="utf-8") as f:
        try:
            return recipe_from_json(f.read())
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e


def _check_out(path: str) -> None:
    # A slip in the order of the arguments must not cost a checkpoint, nor root its /dev/null.
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: {folder} is no folder that one may write into")
    if not os.path.exists(path):
        return
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"cannot write {path}: it is a folder or a device")
    with open(path, "rb") as f:
        start = f.read(3)
    if start not in (b"", b"jom"):
        raise ValueError(f"{path} exists and is no artifact; give another name or remove it")


def _configure_logging(*, quiet: bool) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    terminal = sys.stderr is not None and sys.stderr.isatty()
    level = logging.WARNING if quiet or terminal else logging.INFO
    logging.getLogger("jaxopt_models").setLevel(level)
    # Orbax leaves failed tasks behind; what it raised is reported once, by us.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _print(text: str) -> None:
    """Writes a result to standard output, as far as that can show it."""
    out = sys.stdout
    if out is None:
        return
    encoding = getattr(out, "encoding", None) or "utf-8"
    text = _printable(text)
    try:
        text.encode(encoding)
    except UnicodeError:
        text = text.replace("\N{BOX DRAWINGS LIGHT HORIZONTAL}", "-")
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=out, flush=True)
    except OSError:
        # What is buffered would fail once more when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise


def _printable(text: str) -> str:
    # Names come from files of strangers: no escape sequences, no reversed text.
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _explain(e: BaseException) -> str:
    if isinstance(e, MemoryError):
        return "out of memory"
    if isinstance(e, OSError) and e.strerror:
        where = "standard output" if e.filename is None else os.fsdecode(e.filename)
        return f"{where}: {e.strerror}"
    return str(e) or type(e).__name__


def _complain(message: str) -> None:
    line = _printable(" ".join(message.split()))
    if len(line) > _LONGEST_LINE:
        line = line[:_LONGEST_LINE] + " ... (all of it with --debug)"
    if sys.stderr is not None:  # None would mean standard output to print
        with contextlib.suppress(OSError, ValueError):
            print(f"jaxopt_models: {line}", file=sys.stderr, flush=True)
