"""What every script does the same way: a user's mistakes, flags, files written whole, worker processes."""
import argparse
import concurrent.futures
import contextlib
import difflib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import shutil
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool

try:
    import fcntl
except ImportError:                                      # Windows
    fcntl = None


class UserError(Exception):
    """A user's mistake, or a broken file: one line that says what is wrong and what to do."""


def run_script(main, *errors):
    """Run a script's main. UserError, OSError and `errors` end it with one line and status 1."""
    for stream in sys.stdout, sys.stderr:                # a name that the terminal cannot write is escaped
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
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
    """How many this process may use: a batch system (affinity) or a container (cgroup) may grant fewer than
    there are."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):       # cgroup version 2: microseconds granted, of a period
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    return allowed


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


def lock(path):
    """Open a file to append to and hold it until it is closed or the process ends; UserError if another
    process holds it: two runs would mix. Where a system or a disk knows no locks, none is held.
    """
    file = open(path, "ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another run is writing into {pathlib.Path(path).parent}: wait for its end, or "
                        "choose another --out") from None
    except (OSError, AttributeError):                    # a file system without locks; Windows has no fcntl
        pass
    return file


def read_json(path, cure, most=1 << 26):
    """What a JSON file holds, an object; UserError with the cure if it is damaged, too large or too deep."""
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > most:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except (ValueError, RecursionError) as error:        # UnicodeDecodeError is a ValueError
        said = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is damaged ({said}): {cure}") from None


def make_room(directory, names=("*",)):
    """Move what an earlier run wrote, the files `names` (globs), from `directory` to directory.1 or the next
    free number, so that nothing is overwritten; other files stay. -> the new directory
    """
    directory, n = pathlib.Path(directory), 1
    while (aside := directory.with_name(f"{directory.name}.{n}")).exists():
        n += 1
    aside.mkdir()
    for path in sorted(path for name in names for path in directory.glob(name)):
        shutil.move(path, aside / path.name)             # `directory` may be a link or a disk of its own
    return aside


def check_apart(out, source):
    """UserError if `out` is the folder `source` or lies in it: they would mix."""
    out, source = pathlib.Path(out).resolve(), pathlib.Path(source).resolve()
    if source == out or source in out.parents:
        raise UserError(f"{out} is, or lies in, the data that is to be read ({source}): choose another OUT")


def check_same(before, now, where, cure=""):
    """UserError if two runs' settings differ, {name: value}: their results would be mixed."""
    changed = [f"{name} {before.get(name)}, now {now.get(name)}" for name in sorted(before | now)
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


class Crew:
    """Worker processes that talk with this one over pipes, in a `with` block, whose end they don't outlive.
    A worker is known by our end of its pipe; one that dies is a UserError, which says what is `kept`.
    """

    def __init__(self, kept):
        self.kept, self.processes = kept, {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes.values():
            process.terminate()

    def __len__(self):
        return len(self.processes)

    def hire(self, function, *args):
        """Start a worker, which calls function(its end of the pipe, *args)."""
        spawn = multiprocessing.get_context("spawn")
        worker, theirs = spawn.Pipe()
        process = spawn.Process(target=be_worker, args=(function, theirs, *args), daemon=True)
        process.start()
        theirs.close()                                   # so that its death is the end of ours
        self.processes[worker] = process
        return worker

    def hear(self):
        """Wait until workers speak; yields (worker, what it says)."""
        dead = []
        for worker in multiprocessing.connection.wait(self.processes):
            try:
                yield worker, worker.recv()
            except (EOFError, ConnectionResetError):     # later, so that the others' words are not lost
                dead.append(worker)
        if dead:
            raise self.died(dead[0])

    def tell(self, worker, what):
        try:
            worker.send(what)
        except (BrokenPipeError, ConnectionResetError):
            raise self.died(worker) from None

    def died(self, worker):
        process = self.processes[worker]
        process.join()
        return UserError(f"a worker died (exit status {process.exitcode}), what it said stands above; "
                         f"{self.kept}")

    def dismiss(self, worker):
        """Let a worker go. Should it hang in EGL's own end, nobody waits for that."""
        process = self.processes.pop(worker)
        process.join(10)
        process.terminate()
        worker.close()


def be_worker(function, connection, *args):
    begin_worker()
    function(connection, *args)
