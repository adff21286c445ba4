"""In-context image generation: train on image pairs, compile an example, do the same to new images.

The command line. Each command is a dataclass of flags with a `run` method, in `commands/`. A mistake is one line on
stderr and exit code 2. Heavy imports stay inside `run`, so that `--help` answers at once.

Every command also takes --no-compilation-cache: programs that JAX compiled are otherwise kept in the user's cache folder
between runs, so that the next start need not compile them again.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import inspect
import io
import logging
import os
import re
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from xprompt_jax.commands.data import Annotate, Index, Tokenize
from xprompt_jax.commands.demo import Demo
from xprompt_jax.commands.evaluate import Evaluate
from xprompt_jax.commands.inspect import Inspect
from xprompt_jax.commands.model import Compile, Convert
from xprompt_jax.commands.sample import Describe, Sample
from xprompt_jax.commands.serve import Serve
from xprompt_jax.commands.train import Export, Train, settings_of
from xprompt_jax.errors import UserError

COMMANDS: dict[str, Any] = {
    "demo": Demo,
    "tokenize": Tokenize,
    "annotate": Annotate,
    "index": Index,
    "inspect": Inspect,
    "train": Train,
    "export": Export,
    "convert": Convert,
    "compile": Compile,
    "sample": Sample,
    "serve": Serve,
    "describe": Describe,
    "eval": Evaluate,
}

NO_CACHE = "--no-compilation-cache"


def parse(arguments: Sequence[str]) -> Any:
    """Flags -> a command, one of `COMMANDS`.

    Raises:
      UserError: there is no such command, or the configuration that `train` or `inspect` starts from cannot be read.
      SystemExit: help was asked for, or the flags cannot be read; tyro has printed why.
    """
    name, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if name == "eval" and rest[:1] == ["--compare"]:
        rest[0] = "compare"
    if name not in COMMANDS and not name.startswith("-"):
        near = difflib.get_close_matches(name, COMMANDS, 1)
        cure = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown: {name}; {cure}; see `xprompt --help`")
    if name not in COMMANDS:
        lines = (__doc__ or "").splitlines()
        summary = lines[0] + "\n\n" + " ".join(lines[-2:])
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="xprompt", description=summary, args=list(arguments) or ["--help"])
    default: Any = None
    if name == "train":
        default = Train(workdir=tyro.MISSING, settings=settings_of(rest))
    elif name == "inspect":
        default = Inspect(settings=settings_of(rest))
    return tyro.cli(COMMANDS[name], prog=f"xprompt {name}", description=inspect.getdoc(COMMANDS[name]), args=rest, default=default)


def _one_line(text: str) -> str:
    """The point of tyro's boxed message in one line: what is wrong, where, and the nearest flags."""
    words = re.sub(r"[─│╭╮╰╯]|-{3,}|\x1b\[[0-9;]*m", " ", text)
    lines = [line for line in (" ".join(line.split()) for line in words.splitlines()) if line]
    found = " ".join(lines)
    end = r"(?= Perhaps | Similar | Available | Arguments | For full |$)"
    if match := re.search(rf"misplaced options: (\S+) .*?Available subcommands: (.+?){end}", found):
        return f"unknown: {match[1]}; choose from {match[2]}"
    if match := re.search(rf"Unrecognized options: (.+?){end}", found):
        near = re.findall(r"(?<![\w-])--[\w.-]+", found[match.end() :].split("For full")[0])
        return f"unknown: {match[1]}" + (f"; did you mean {near[0]}?" if near else "")
    if "Missing from" in found:
        flags = [line for line in lines if re.match(r"--[\w.-]+ [A-Z{]", line)]
        return f"missing {', '.join(flags)}"
    if match := re.search(r"Error parsing (.+?)(?= Argument helptext| For full |$)", found):
        return f"cannot read {match[1]}"
    return " ".join(line for line in lines[1:] if not line.startswith("For full helptext"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `xprompt`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _set_compilation_cache(keep=NO_CACHE not in arguments)
    arguments = [a for a in arguments if a != NO_CACHE]
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            command = parse(arguments)
    except UserError as e:
        _fail(str(e))
    except SystemExit as e:
        if e.code:
            name = f"xprompt {arguments[0]}" if arguments[0] in COMMANDS else "xprompt"
            _fail(f"{_one_line(captured.getvalue())}; see `{name} --help`")
        raise
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax", "httpx", "httpx2", "tensorboardX"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        command.run()
        sys.stdout.flush()
    except UserError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        print("xprompt: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        sys.stdout = None
        raise SystemExit(141) from None
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            _fail(f"{e.filename or 'a path'}: {e.strerror}; choose a shorter one")
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            _fail(f"{e.filename or 'disk'}: {e.strerror}; free space or choose another folder")
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP) and e.filename is not None:
            _fail(f"{e.filename}: {e.strerror}; correct the path or choose another")
        raise


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has seen enough, as `head` has."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _set_compilation_cache(*, keep: bool) -> None:
    """Tells JAX, before it is imported, where compiled programs are kept; what the environment says already stands."""
    if not keep:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or home) / "xprompt_jax" / "jit"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _fail(message: str) -> None:
    print("xprompt: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
