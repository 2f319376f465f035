#!/usr/bin/env bash
# Library: torch 2.14.1, AOTInductor on a CPU.
#
# A package of AOTInductor's (.pt2) holds compiled code, so that a process which loads it pays no compiler.
#
# A good guess: torch._inductor.package.load_package reads the file, and starts no compiler.
#
# What really happens: to compare the machine with the one that the package was made on, it asks inductor for the
# processor's instruction sets, and inductor finds them out by compiling small programs, unless its cache folder has
# them from before. In a new folder, as a container's or another user's, loading calls the C++ compiler six times.
#
# Whom it concerns: who ships packages for a fast first image, or measures how fast that is with the cache of the
# machine that made them.
#
# What to do instead: keep the cache folder, with which it is called no more; or TORCHINDUCTOR_VEC_ISA_OK=1 before
# torch._inductor is imported, where the instruction sets are known to be there: then it is called three times.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy

cat > "$tmp/make.py" <<'PYTHON'
import sys

import torch
from torch._inductor import aoti_compile_and_package

module, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()).eval(), torch.ones(2, 8)
with torch.no_grad():
    aoti_compile_and_package(torch.export.export(module, (x,)), package_path=sys.argv[1])
PYTHON

cat > "$tmp/load.py" <<'PYTHON'
import sys

import torch
from torch._inductor.package import load_package

with torch.no_grad():
    assert load_package(sys.argv[1])(torch.ones(2, 8)).shape == (2, 8)
print("torch", torch.__version__.partition("+")[0], end=": ")
PYTHON

# A compiler that notes when it is asked to make a library.
cat > "$tmp/g++" <<SH
#!/usr/bin/env bash
case " \$* " in *" -shared "*|*" -c "*) echo "\$@" >> "$tmp/calls" ;; esac
exec $(command -v g++) "\$@"
SH
chmod +x "$tmp/g++"

TORCHINDUCTOR_CACHE_DIR="$tmp/made" "$tmp/venv/bin/python" "$tmp/make.py" "$tmp/model.pt2" 2>/dev/null

calls() { # of the compiler while the package is loaded: calls FOLDER VARIABLES...
    : > "$tmp/calls"
    env CXX="$tmp/g++" TORCHINDUCTOR_CACHE_DIR="$1" "${@:2}" "$tmp/venv/bin/python" "$tmp/load.py" "$tmp/model.pt2" 2>/dev/null
    wc -l < "$tmp/calls"
}

new=$(calls "$tmp/new"); again=$(calls "$tmp/new"); given=$(calls "$tmp/other" TORCHINDUCTOR_VEC_ISA_OK=1)
echo "programs compiled while loading, with a new cache folder: $new"
echo "once more with the same folder: $again"
echo "with a new folder and TORCHINDUCTOR_VEC_ISA_OK=1: $given"
[ "${new##* }" -eq 6 ] && [ "${again##* }" -eq 0 ] && [ "${given##* }" -eq 3 ]
