#!/usr/bin/env bash
# Trains the editor that ships for SmolLM2-135M-Instruct (validation's best, step 1200). On one thread of a CPU with
# avx512_bf16 it takes 30 minutes to cache what never changes and 25 to train. Killed, run it again with --resume.
set -euo pipefail
cd "$(dirname "$0")/.."
test -f build/heldout-relations.jsonl || .venv/bin/python benchmarks/heldout_relations.py
exec .venv/bin/ibke train --model smollm2-135m --out runs/shipped \
  --data facts=1 --data pararel=2 --data lre=1 --data entityquestions=3 \
  --data counterfact:counterfact/counterfact-train.json=3 \
  --episodes 5000 --steps "${STEPS:-1500}" --threads 1 --set validation=96 --set validate_every=150 --set patience=4 --set beta=0.003 --set text=text/wikitext2_valid.txt --set words=text/squad_val.json \
  --set exclude=counterfact:counterfact/counterfact-val.json,zsre:zsre/zsre_mend_train-1k.json,knowedit:knowedit/recent_train.json,jsonl:build/heldout-relations.jsonl \
  --set cache=runs/cache "$@"
