#!/usr/bin/env bash
# Library: transformers 5.24.0, with tokenizers.
#
# A pipeline's tokenizer is saved again after it was used: by an export, by save_pretrained of a trained pipeline.
#
# A good guess: what is saved is what was loaded, whatever captions went through it between.
#
# What really happens: the truncation and the padding of the last call are written into tokenizer.json. The same
# pipeline, saved before and after an image was drawn, differs, so that digests of two equal exports differ. And those
# who read tokenizer.json by itself (the tokenizers library, and programs in other languages that are built on it) get
# captions that are cut and filled up as that call was, without having asked for it.
#
# Whom it concerns: who compares or caches folders by their digests, and who hands tokenizer.json to another program.
#
# What to do instead: `tokenizer.backend_tokenizer.no_truncation()` and `.no_padding()` before saving; every call sets
# both anew.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0

cat > "$tmp/finding.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer
from transformers import CLIPTokenizer

for package in ("transformers", "tokenizers"):
    print(package, version(package))

words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
tokenizer = CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=8)


def saved(name):
    folder = Path(sys.argv[1]) / name
    tokenizer.save_pretrained(folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a b").ids
    print(f"{name}: tokenizers reads tokenizer.json and makes {len(ids)} ids of 'a b'")
    return (folder / "tokenizer.json").read_text(), len(ids)


before = saved("before a call")
tokenizer(["a b"], padding="max_length", max_length=8, truncation=True)
after = saved("after a call that fills up to 8")
tokenizer.backend_tokenizer.no_truncation()
tokenizer.backend_tokenizer.no_padding()
mended = saved("after no_truncation and no_padding")

assert before[1] == 4 and after[1] == 8, (before[1], after[1])
assert before[0] != after[0] and before == mended
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py" "$tmp/saved"
