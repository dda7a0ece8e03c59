"""Entry points of the two commands: errors become exit codes and one readable message."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

    from imkd_data.errors import ImkdError

__all__ = ["data", "model", "run_group"]


def data(argv: Sequence[str] | None = None) -> None:
    """``imkd-data``: caches."""
    from cli.data import group

    raise SystemExit(run_group(group, "imkd-data", argv))


def model(argv: Sequence[str] | None = None) -> None:
    """``imkd``: training and evaluation."""
    from cli.model import group

    raise SystemExit(run_group(group, "imkd", argv))


def run_group(group: click.Command, name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status (see imkd_data/errors.py)."""
    import click

    from imkd_data.errors import ImkdError, InterruptedBuildError

    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        result = group.main(args=arguments, prog_name=name, standalone_mode=False)
        # Click returns the exit code of --help and friends; anything a command returns is not a status.
        return result if isinstance(result, int) and not isinstance(result, bool) and result in (0, 2) else 0
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.UsageError as error:
        return _usage(error, name, as_json)
    except (click.Abort, KeyboardInterrupt):
        return _interrupted()
    except InterruptedBuildError as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is over; a second Ctrl-C must not spoil the message
        _show(error, as_json, error.exit_code)
        return error.exit_code
    except ImkdError as error:
        if error.code == 1:
            return _bug(error, name, as_json)
        _show(error, as_json, error.code)
        return error.code
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:  # a library's word for a file that it does not understand
            return _bug(error, name, as_json)
        named = _storage(error)
        _show(named, as_json, named.code)
        return named.code
    except MemoryError:
        print("error: out of memory\n  next      use fewer --workers", file=sys.stderr)
        return 5
    except Exception as error:
        if isinstance(error, SystemError) and _by_ctrl_c(error):
            return _interrupted()
        return _bug(error, name, as_json)


def _interrupted() -> int:
    print("interrupted; the same command continues", file=sys.stderr)
    return 130


def _storage(error: OSError) -> ImkdError:
    """What the operating system refused, and for which file (of a rename: its target)."""
    from imkd_data.cache.commit import storage_error

    name = error.filename2 or error.filename
    named = storage_error(error, Path(os.fsdecode(name)) if isinstance(name, str | bytes) else Path())
    if not isinstance(name, str | bytes):
        del named.details["file"]
    return named


def _by_ctrl_c(error: BaseException | None) -> bool:
    """Whether a KeyboardInterrupt lies below: a compiled kernel hands it on as a SystemError."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _usage(error: click.UsageError, name: str, as_json: bool) -> int:
    where = error.ctx.command_path if error.ctx else name
    if as_json:
        print(json.dumps({"v": 1, "level": "error", "code": 2, "rule": "usage", "what": error.format_message()}))
    print(f"error: {error.format_message()}\n  next      {where} --help", file=sys.stderr)
    return 2


def error_text(error: ImkdError) -> str:
    """The form of every message: what happened, then expected, found, where, next."""
    lines = [f"error: {error.what}"]
    lines += [f"  {key:<9} {value}" for key, value in error.details.items()]
    for problem in error.problems[:20]:
        where = ", ".join(f"{k} {v}" for k, v in problem.details.items() if k in ("file", "token", "scene", "shard", "field"))
        lines.append(f"  - {problem.what}" + (f" ({where})" if where else ""))
    if len(error.problems) > 20:
        lines.append(f"  ... and {len(error.problems) - 20} more; all with --json or --log-file")
    return "\n".join(lines)


def _show(error: ImkdError, as_json: bool, code: int) -> None:
    from cli import screen

    print(error_text(error), file=sys.stderr)
    entry = {**error.as_json(), "code": code}
    if error.problems:
        entry["problems"] = [p.as_json() for p in error.problems]
    screen.log_entry(entry)
    if as_json:
        print(json.dumps(entry, ensure_ascii=False))


def _bug(error: BaseException, name: str, as_json: bool) -> int:
    """Exit 1: the traceback goes to a file, the screen gets the place."""
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile("w", prefix=f"{name}-error-", suffix=".log", delete=False) as file:
        file.write(text)
    what = f"bug in {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    print(f"error: {what}\n  file      {file.name} (traceback)\n  next      please report it with this file", file=sys.stderr)
    if as_json:
        print(json.dumps({"v": 1, "level": "error", "code": 1, "rule": "bug", "what": what, "file": file.name}))
    return 1
