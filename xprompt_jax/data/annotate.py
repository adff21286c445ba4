"""Words for image pairs that have none, from a vision-language model: sent to an endpoint or through batch files.

    manifest.jsonl --requests_for--> requests --annotate--> OUT (JSONL, one answer a line) --merge--> a manifest with the words in it
                                         `--write_batch--> batch files ... their answers --read_batch--^

OUT only grows: a run that was stopped goes on where it was, several kinds of question may share a file, and what has an answer there
is never asked again. What could not be answered stands with the reason in OUT's name with .failed.jsonl, and is asked again next time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import queue
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from xprompt_jax.data import sources
from xprompt_jax.data.endpoint import Client, Endpoint, Failed, Request, batch_answers, write_batch
from xprompt_jax.data.phrases import say
from xprompt_jax.data.questions import QUESTIONS, parse_answer, request_for, requests_for
from xprompt_jax.data.readers import Manifest
from xprompt_jax.data.spellings import ours
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path

GIVE_UP_AFTER = 20
"""Failures in a row that end a run: the next ones would fail too, and cost money."""

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the requests."""

    before: int
    """Answered in OUT already."""
    answered: int = 0
    failed: int = 0
    left: int = 0
    """Not asked, or without an answer in the batch."""


class _Answers:
    """OUT, open for more lines, by one run at a time. A last line that was torn by a kill is cut off; other foreign lines are refused."""

    def __init__(self, path: Path):
        self.path, self.failures = path, path.with_suffix(".failed.jsonl")
        self.keys: set[str] = set()

    def __enter__(self) -> _Answers:
        try:
            with contextlib.ExitStack() as stack:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = stack.enter_context(self.path.open("ab"))
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however it ends
                whole = 0
                for row, whole in read_answers(self.path):  # noqa: B007
                    self.keys.add(row["key"])
                self._file.truncate(whole)
                self.failures.unlink(missing_ok=True)
                stack.pop_all()  # all is well: the file stays open
        except BlockingIOError:
            raise UserError(f"--out {self.path}: another run is writing there; wait for its end or choose another place") from None
        except OSError as e:
            raise UserError(f"--out {self.path}: cannot write: {e.strerror}; choose another place") from None
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def add(self, request: Request, model: str, text: str, parsed: dict[str, str]) -> None:
        """Appends an answer; it is out of this process before the call returns."""
        row = {"key": request.key, "kind": request.kind, "model": model, "text": text, "parsed": parsed}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self.keys.add(request.key)

    def fail(self, request: Request, reason: str, text: str = "") -> None:
        """Notes why there is no answer."""
        row = {"key": request.key, "kind": request.kind, "images": [str(p) for p in request.images], "reason": reason, "text": text}
        with self.failures.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")


def _unanswered(requests: Iterable[Request], keys: Container[str]) -> tuple[list[Request], int]:
    """The requests that have no answer, each once, and the number of those that have one."""
    wanted = {request.key: request for request in requests}
    left = [request for key, request in wanted.items() if key not in keys]
    return left, len(wanted) - len(left)


def read_answers(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The lines that `annotate` wrote, each with the byte after it; none if there is no such file. A torn last line is left out.

    Raises:
      UserError: the file cannot be read, or has lines that are no answers.
    """
    try:
        end = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if not line.endswith(b"\n") and (line.startswith(b'{"key": ') or b'{"key": '.startswith(line)):
                        return
                    row = json.loads(line)
                    if not (isinstance(row["key"], str) and row["kind"] in QUESTIONS and isinstance(row["parsed"], dict)):
                        raise ValueError
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}, line {number}: no answer of `annotate`; give --out a file of its own, or repair it") from None
                end += len(line)
                yield row, end
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"{path}: cannot read: {e.strerror}; give a file of answers") from None


def annotate(
    requests: Iterable[Request], out: Path, endpoint: Endpoint, *, concurrency: int = 8, retries: int = 5, progress: bool = True
) -> Counts:
    """Asks what OUT has no answer to, and appends the answers.

    Args:
      concurrency: requests under way at once.
      retries: of each request, after 429, 5xx, silence and lost connections.

    Raises:
      UserError: wrong address, model or key; OUT is no file of answers; `GIVE_UP_AFTER` failures in a row.
    """
    answered = failed = in_a_row = 0
    client = Client(endpoint, retries)
    ask = lambda request: client.ask(request, functools.partial(parse_answer, request))
    with _Answers(out) as answers, tqdm(disable=not progress, unit="request") as bar:
        left, before = _unanswered(requests, answers.keys)
        bar.reset(len(left))
        try:
            for request, result in _unordered(ask, left, concurrency):
                if isinstance(result, Failed):
                    answers.fail(request, str(result), result.text)
                    failed, in_a_row = failed + 1, in_a_row + 1
                    if in_a_row == GIVE_UP_AFTER:
                        raise UserError(
                            f"--endpoint {endpoint.url}: {in_a_row} failures in a row, see {answers.failures}; the last: {result}"
                        )
                else:
                    answers.add(request, endpoint.model, *result)
                    answered, in_a_row = answered + 1, 0
                bar.update()
        finally:
            client.close()
    return Counts(before, answered, failed, len(left) - answered - failed)


def _unordered(work: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Iterator[tuple[_T, _R | Failed]]:
    """(item, work(item) or its `Failed`) in the order of completion; `workers` at once. Other exceptions end it.

    The threads are daemons: Ctrl-C or an error need not wait for answers that are minutes away.
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()

    def loop():
        for item in iter(todo.get, None):
            try:
                done.put((item, work(item)))
            except BaseException as e:  # handed to the consumer
                done.put((item, e))

    for _ in range(workers):
        threading.Thread(target=loop, daemon=True).start()
    waiting = iter(items)
    under_way = 0
    try:
        for item in itertools.islice(waiting, workers):
            todo.put(item)
            under_way += 1
        while under_way:
            item, result = done.get()
            under_way -= 1
            if isinstance(result, BaseException) and not isinstance(result, Failed):
                raise result
            for following in itertools.islice(waiting, 1):
                todo.put(following)
                under_way += 1
            yield item, result
    finally:
        for _ in range(workers):
            todo.put(None)


def read_batch(paths: Sequence[Path], requests: Iterable[Request], out: Path) -> Counts:
    """Takes a batch's output and error files into OUT as if they had been asked for here.

    Raises:
      UserError: a file that is no batch output, or answers none of the requests.
    """
    failures: dict[str, tuple[str, str]] = {}
    answered = strangers = 0
    with _Answers(out) as answers:
        left, before = _unanswered(requests, answers.keys)
        wanted = {request.key: request for request in left}
        for key, text, model, reason in batch_answers(paths):
            if key in answers.keys:
                continue
            if key not in wanted:
                strangers += 1
                continue
            try:
                parsed = {} if reason else parse_answer(wanted[key], text)
            except ValueError as e:
                reason = f"unusable answer: {e}"
            if reason:
                failures[key] = reason, text
            else:
                answers.add(wanted[key], model, text, parsed)
                failures.pop(key, None)
                answered += 1
        for key, (reason, text) in failures.items():
            answers.fail(wanted[key], reason, text)
    failed = len(failures)
    if strangers and not answered and not failed:
        raise UserError(f"--batch-in {paths[0]}: answers none of these requests; give the manifest and --kind that the batch was made from")
    return Counts(before, answered, failed, len(wanted) - answered - failed)


def annotate_manifest(
    manifest: Path, out: Path, *, kind: str, endpoint: str = "", model: str = "", concurrency: int = 8, dry_run: bool = False,
    batch_out: Path | None = None, batch_in: Sequence[Path] = (), rewrite: bool = False, progress: bool = True,
) -> Counts:  # fmt: skip
    """Everything the command does: ask an endpoint, or write batch files, or read their answers, or only show what would be asked.

    With `rewrite`, it is about rows too that have the words already.

    Raises:
      UserError: see `annotate`, `write_batch`, `read_batch`; or flags that do not go together.
    """
    if concurrency < 1:
        raise UserError("--concurrency must be at least 1")
    if batch_out and batch_in:
        raise UserError("give --batch-out or --batch-in, not both")
    requests = requests_for(manifest, kind, rewrite=rewrite)
    if batch_in:
        counts = read_batch(batch_in, requests, out)
    else:
        left, before = _unanswered(requests, {row["key"] for row, _ in read_answers(out)})
        counts = Counts(before, left=len(left))
        if dry_run:
            for request in left[:3]:
                print(f"{request.key} {' '.join(map(str, request.images))}\n  {request.text}")
            print(f"{len(left)} to ask, {before} answered before; nothing was sent")
            return counts
        if not model:
            raise UserError("--model is missing; give the name by which the endpoint knows its model")
        if batch_out:
            print("\n".join([f"{path}: batch requests" for path in write_batch(left, batch_out, model)] or ["nothing left to ask"]))
            return counts
        counts = annotate(left, out, Endpoint(endpoint, model), concurrency=concurrency, progress=progress)
        counts = dataclasses.replace(counts, before=before)
    failures = f", {counts.failed} failed, see {_Answers(out).failures}" if counts.failed else ""
    print(f"{out}: {counts.answered} answers{failures}; {counts.before} were there before, {counts.left} have none yet")
    return counts


@dataclasses.dataclass(frozen=True)
class Merged:
    """What became of a manifest's rows."""

    rows: int
    """Written."""
    filled: int
    """Of them, rows with new words or a judge's answer."""
    dropped: int
    """Rows that a filter (style_same, layout_same) answered with no."""


def merge(manifest: Path, annotations: Path, out: Path, *, rewrite: bool = False) -> Merged:
    """Writes a manifest whose rows have what the answers say.

    Words fill empty fields (captions are always replaced, with `rewrite` all; a picture alone is also described by its caption). A "no" to
    style_same or layout_same drops the row. The answer to holdout is kept: whether it is trained on is for a run's `data.holdouts` to say.
    The subtask of a difference becomes part of the group, so that examples are of the same one, and the relation of a composition is what
    is asked for. Paths are written relative to `out`; all other fields stay as they were.

    Raises:
      UserError: a file that cannot be used, or answers to none of the manifest's rows.
    """
    answers = {row["key"]: row["parsed"] for row, _ in read_answers(annotations)}
    records = sources.ManifestRecords(manifest)
    lines, found, filled, dropped = [], 0, 0, 0
    for written, record in zip(Manifest(manifest), records, strict=True):
        row = ours({name: value for name, value in written.items() if name != "key"})
        replies = {kind: answers.get(request_for(record, manifest, kind).key) for kind in QUESTIONS}
        said = {kind: parsed for kind, parsed in replies.items() if parsed is not None}
        found += bool(said)
        if any(said[kind]["answer"] == "no" for kind in ("style_same", "layout_same") if kind in said):
            dropped += 1
            continue
        new = _told(record, row, said, rewrite)
        filled += bool(new)
        if record.more_inputs:
            row["more_inputs"] = [_relative(path, out) for path in record.more_inputs]
        lines.append(json.dumps({**row, "input": _relative(record.input, out), "output": _relative(record.output, out), **new}) + "\n")
    if not found:
        raise UserError(f"{annotations}: answers to no row of {manifest}; give the manifest that the questions were made from")
    with atomic_path(out) as temporary:
        temporary.write_text("".join(lines))
    return Merged(len(lines), filled, dropped)


def _told(record: sources.Record, row: Mapping[str, Any], said: Mapping[str, Mapping[str, str]], rewrite: bool) -> dict[str, str]:
    """Fields of a manifest's row that the answers, by kind, give it."""
    new: dict[str, str] = {}
    for kind, parsed in said.items():
        for name, field in QUESTIONS[kind].fills.items():
            if QUESTIONS[kind].rewrites or not (new.get(name) or (row.get(name) and not rewrite)):
                new[name] = parsed[field]
    if "caption" in said and record.input == record.output:  # a picture alone is described by its caption
        new["description"] = new["caption"]
    if "relation" in said and record.task == "compose":  # two images and what becomes of them: the relation is what is asked for
        new["instruction"] = say("compose", f"compose/{record.output.name}", prompt=said["relation"]["relation"])["instruction"]
    if "describe" in said and not f"/{record.group}".endswith(f"/{said['describe']['subtask']}"):  # once, if merged again
        new["group"] = "/".join(filter(None, (record.group, said["describe"]["subtask"])))
    if "holdout" in said:
        new["holdout"] = said["holdout"]["answer"]
    return new


def _relative(path: Path, out: Path) -> str:
    """The path as seen from the folder of `out`, whatever links lead there; a link to the image itself stays a link."""
    return os.path.join(os.path.relpath(os.path.realpath(path.parent), os.path.realpath(out.parent)), path.name)
