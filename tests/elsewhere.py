"""Programs in processes that have diffusers and not this project, as those of a user who was given an export.

Importing takes seconds: one process does it, and a copy of it runs each program, with no module of an export left.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER = """
import json, os, shutil, sys, traceback
import numpy, PIL.Image, torch, transformers
from diffusers import AutoModel, AutoPipelineForImage2Image, DiffusionPipeline, StableDiffusionPipeline
sys.modules['slimstep'] = None  # as good as not installed
for line in sys.stdin:
    folder, program, words = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            said = os.open('said.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1), os.dup2(said, 2)
            shutil.rmtree(os.environ['HF_MODULES_CACHE'], ignore_errors=True)
            sys.argv = ['program', *words]
            exec(program, {'__name__': '__main__'})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def processes_elsewhere(modules: Path) -> Iterator[Callable[..., None]]:
    """run(folder, program, *words) runs a Python program in that folder and raises where it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(modules), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                              cwd=modules.parent)  # fmt: skip

    def run(folder: Path, program: str, *words: str) -> None:
        print(json.dumps([str(folder), program, words]), file=server.stdin, flush=True)
        code = server.stdout.readline().strip()
        assert code == "0", f"exit code {code}: {(folder / 'said.txt').read_text()}"

    with server:
        yield run
        server.stdin.close()
