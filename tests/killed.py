"""Processes that end as kill -9 ends them, at a chosen step of their work on files."""

import os
import signal
import sys

WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "shutil.rmtree")


def killed(action, at: int) -> bool:
    """Whether ``action``, run in a process of its own, is killed before it touches files for the ``at``-th time."""
    child = os.fork()
    if not child:
        seen = iter(range(at - 1))

        def watch(event, arguments):
            if event in WATCHED and next(seen, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the action failed"
    return os.WIFSIGNALED(status)


def fails_with_little_room(action, size: int) -> str:
    """What ``action`` raises, in a process of its own, where no file may be larger than ``size`` bytes."""
    import resource

    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            action()
        except OSError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as file:
        return file.read().decode()
