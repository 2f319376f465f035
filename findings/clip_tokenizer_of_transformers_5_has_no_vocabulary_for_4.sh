#!/usr/bin/env bash
# Library: transformers 5.24.0, and 4.57.3, which optimum-onnx 0.1.0 wants (below 4.58).
#
# A pipeline of Stable Diffusion is saved with transformers 5, and its model_index.json names a CLIPTokenizer, as ever.
#
# A good guess: the CLIPTokenizer of transformers 4, and with it optimum's ORTDiffusionPipeline, reads the folder; and
# save_vocabulary writes vocab.json and merges.txt for those that want them.
#
# What really happens: transformers 5 writes a tokenizer.json alone, and 4's CLIPTokenizer, which is not the fast one,
# reads a vocab.json and merges.txt alone: a TypeError about a path that is None, which names no file (and where protobuf
# is not installed an ImportError that asks for it). save_vocabulary of a CLIPTokenizer is an AttributeError ("has no
# attribute vocab_file").
#
# Whom it concerns: who hands a pipeline that was saved with transformers 5 to anything that still wants 4.
#
# What to do instead: tokenizer.backend_tokenizer.model.save(folder) writes both files, from which 4 makes the same ids.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1

for version in 5.24.0 4.57.3; do
    python3 -m venv "$tmp/$version"
    "$tmp/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version" protobuf
done

cat > "$tmp/save.py" <<'PYTHON'
import os
import sys

import transformers

tokens = ["a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
vocabulary = {token: number for number, token in enumerate(tokens)}
tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[("a", "b</w>")], pad_token="<|endoftext|>")
tokenizer.save_pretrained(sys.argv[1])
print("transformers", transformers.__version__, "writes", sorted(os.listdir(sys.argv[1])), "for 'ab ba':", tokenizer("ab ba").input_ids)
try:
    tokenizer.__class__.from_pretrained(sys.argv[1]).save_vocabulary(sys.argv[1])
except AttributeError as error:
    print("save_vocabulary:", error)
else:
    raise SystemExit("save_vocabulary works")
PYTHON

cat > "$tmp/read.py" <<'PYTHON'
import sys

import transformers

try:
    print("transformers", transformers.__version__, "reads:", transformers.CLIPTokenizer.from_pretrained(sys.argv[1])("ab ba").input_ids)
except TypeError as error:
    print("transformers", transformers.__version__, "TypeError:", error)
PYTHON

python5="$tmp/5.24.0/bin/python" python4="$tmp/4.57.3/bin/python"
saved=$("$python5" "$tmp/save.py" "$tmp/tokenizer" 2>/dev/null)
alone=$("$python4" "$tmp/read.py" "$tmp/tokenizer" 2>/dev/null)
"$python5" -c 'import sys, transformers; transformers.CLIPTokenizer.from_pretrained(sys.argv[1]).backend_tokenizer.model.save(sys.argv[1])' \
    "$tmp/tokenizer" 2>/dev/null
both=$("$python4" "$tmp/read.py" "$tmp/tokenizer" 2>/dev/null)
printf '%s\n' "$saved" "$alone" "with vocab.json and merges.txt, $both"
[[ $saved == *"no attribute vocab_file"* && $alone == *"TypeError"* ]]
[[ ${both##*: } == "$(head -n 1 <<< "$saved" | sed 's/.*: //')" ]]
