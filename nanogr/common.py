"""What every script does the same way: a user's mistakes, flags, files written whole, worker processes."""
import argparse
import concurrent.futures
import contextlib
import difflib
import multiprocessing
import os
import pathlib
import platform
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool


class UserError(Exception):
    """A user's mistake, or a broken file: one line that says what is wrong and what to do."""


def run_script(main, *errors):
    """Run a script's main. UserError, OSError and `errors` end it with one line and status 1."""
    try:
        main()
    except (UserError, OSError, *errors) as problem:
        sys.exit(f"error: {problem}")


# ---------------------------------------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    """An argument parser for all scripts: guesses no abbreviation, names the flag nearest to a wrong one."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        for word in message.split():
            near = nearest(word.split("=")[0], self._option_string_actions, 0.6)
            if word.startswith("--") and "unrecognized" in message and near:
                message += f"; did you mean {near}?"
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def nearest(word, words, least=0.0):
    """The one of `words` most like `word`, or None if none is like it (1: equal, 0: any will do)."""
    return next(iter(difflib.get_close_matches(word, words, 1, least)), None)


def parse_part(parser, text):
    """Read "I/N", the I-th of N parts, I = 1 .. N: -> (I, N); a parser's error for anything else."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        parser.error(f"--shard takes I/N with I from 1 to N, for instance 2/4, not {text}")
    return int(part), int(parts)


def cores():
    """How many this process may use: a container or a batch system may grant fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------- files
def temp_path(path):
    """A name beside `path` that no other process has: on shared storage another machine may have our pid."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")


def write_whole(path, content):
    """Write `content`, bytes or a function of a file's name, so that `path` holds either all of it or what it
    held before; it is on the disk when this returns. OSError if it can't be written.
    """
    path = pathlib.Path(path)
    temp = temp_path(path)
    try:
        content(temp) if callable(content) else temp.write_bytes(content)
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
    except Exception as error:                           # of `content` too, each library's own kind
        temp.unlink(missing_ok=True)
        kept = "; what it held before is whole" if path.exists() else ""
        said = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(f"cannot write {path} ({said}){kept}") from error
    with contextlib.suppress(OSError):                   # the name too, where a disk can; if not, in its time
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_room(directory, names=("*",)):
    """Move what an earlier run wrote, the files `names` (globs), from `directory` to directory.1 or the next
    free number, so that nothing is overwritten; other files stay. -> the new directory
    """
    directory, n = pathlib.Path(directory), 1
    while (aside := directory.with_name(f"{directory.name}.{n}")).exists():
        n += 1
    aside.mkdir()
    for path in sorted(path for name in names for path in directory.glob(name)):
        path.rename(aside / path.name)
    return aside


def check_same(before, now, where, cure=""):
    """UserError if two runs' settings differ, {name: value}: their results would be mixed."""
    changed = [f"{name} {before.get(name)}, not {now.get(name)}" for name in sorted(before | now)
               if before.get(name) != now.get(name)]
    if changed:
        raise UserError(f"{where} was begun with {'; '.join(changed)}{cure}")


# ---------------------------------------------------------------------------------------------- processes
def quiet():
    """No prints from here on: EGL and calvin_env announce themselves on starting and on ending."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def begin_worker():
    """A worker dies with its parent, however that dies, and of Ctrl-C at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    follow = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=follow, daemon=True).start()


def in_pool(function, jobs, workers):
    """Call function(job) for each job, on `workers` processes or, if that is 1, here; yields what it
    returns, as they end."""
    if workers == 1:
        yield from map(function, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, begin_worker) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(function, job) for job in jobs]):
                yield done.result()
        except BrokenProcessPool:
            raise UserError("a worker was killed, perhaps for want of memory (take fewer --workers); "
                            "the same command goes on where it was") from None
        finally:
            pool.shutdown(cancel_futures=True)
