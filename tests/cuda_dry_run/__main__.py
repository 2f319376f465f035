"""`python -m tests.cuda_dry_run MODULE [ARGUMENT …]` runs a module on the device that is not there."""

import runpy
import sys

from tests.cuda_dry_run.device import cuda_dry_run

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with cuda_dry_run():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
