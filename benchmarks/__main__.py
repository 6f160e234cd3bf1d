"""``python -m benchmarks NAME [--part P] [--quick] [--json F]``, ``--list``, ``--markdown F``."""

from __future__ import annotations

import argparse
import importlib
import logging
import pathlib
import sys

from . import _rows


def _names() -> list[str]:
    here = pathlib.Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if not p.stem.startswith("_"))


def main() -> int:
    """Runs one benchmark; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", help="which benchmark")
    parser.add_argument("--list", action="store_true", help="name them all")
    parser.add_argument(
        "--quick", action="store_true", help="a reduced setting, bars may be missed"
    )
    parser.add_argument("--part", metavar="NAME", help="one part of a benchmark that has parts")
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file")
    parser.add_argument("--markdown", nargs="+", metavar="FILE", help="print result files")
    args = parser.parse_args()
    if args.markdown:
        print(_rows.markdown(args.markdown))
        return 0
    if args.list or not args.name:
        for name in _names():
            module = importlib.import_module(f"benchmarks.{name}")
            print(f"{name:20} {(module.__doc__ or '').strip().splitlines()[0]}")
        return 0
    if args.name not in _names():
        parser.error(f"no benchmark {args.name!r}; there are {', '.join(_names())}")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    module, command = importlib.import_module(f"benchmarks.{args.name}"), args.name
    if args.part:
        parts = getattr(module, "PARTS", {})
        if args.part not in parts:
            parser.error(
                f"{args.name} has no part {args.part!r}; it has {', '.join(parts) or 'none'}"
            )
        module, command = parts[args.part], f"{args.name} --part {args.part}"
    rows = getattr(module, "run", None) or module.rows
    rows = rows(quick=args.quick)
    print(_rows.table(command, rows))
    if args.json:
        _rows.write(args.json, command, rows, quick=args.quick)
    return 0 if args.quick or all(r.holds is not False for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
