"""Runs one test program: run.py LOG SECONDS NAME COMMAND...

Passes on what the program prints and keeps a copy in LOG, and says how long it took. Where the program fails without a "not ok" of its own (it dies,
a sanitizer reports, time is up, there is no result at all), this adds one. What the program started and left running in
its process group ends with it, also when we are interrupted.
"""
import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 30
RESULTS = (b"ok - ", b"not ok - ", b"skip - ")
REPORTS = (b"Sanitizer: ", b"runtime error: ")


def interrupted(signo, frame):
    sys.exit(128 + signo)


def end(program, signo):
    try:
        os.killpg(program.pid, signo)
    except ProcessLookupError:
        pass


def wait(program, seconds):
    """The exit status, or None if the program still runs after that time."""
    try:
        return program.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def run(command, seconds, emit):
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    reader = threading.Thread(target=lambda: [emit(line) for line in program.stdout], daemon=True)
    reader.start()
    try:
        return wait(program, seconds)
    finally:
        if program.poll() is None:
            end(program, signal.SIGTERM)
            wait(program, GRACE_S)
        end(program, signal.SIGKILL)
        reader.join(GRACE_S)


def main():
    log_path, seconds, name, *command = sys.argv[1:]
    # Shells start background jobs with SIGINT ignored, and programs inherit that; a signal that we handle is back at its
    # default in the program.
    for signo in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(signo, interrupted)

    seen = set()
    with open(log_path, "ab") as log:
        def emit(line):
            seen.update(kind for kind in RESULTS if line.startswith(kind))
            seen.update(report for report in REPORTS if report in line)
            for out in (sys.stdout.buffer, log):
                out.write(line)
                out.flush()

        began = time.monotonic()
        status = run(command, float(seconds), emit)
        emit(f"# {name}: {time.monotonic() - began:.0f} s\n".encode())
        failure = None
        if status is None:
            failure = f"not done after {seconds} s"
        elif status < 0:
            failure = f"ended by {signal.Signals(-status).name}"
        elif b"not ok - " in seen:
            pass
        elif status > 0:
            failure = f"exit status {status}"
        elif seen.intersection(REPORTS):
            failure = "sanitizer report"
        elif not seen:
            failure = "no result"
        if failure:
            emit(f"not ok - {name}: {failure}\n".encode())


main()
