#!/usr/bin/env bash
# Trains the hypernetworks that IBKE is compared with, on the same data and for as long as it was (59 minutes each, caching
# included): for one, `benchmarks/train_rivals.sh mend`. Killed, run it again with RESUME=--resume.
set -euo pipefail
cd "$(dirname "$0")/.."
test -f build/heldout-relations.jsonl || .venv/bin/python benchmarks/heldout_relations.py
for method in ${*:-mend malmen rledit}; do
  .venv/bin/ibke train --model smollm2-135m --method "$method" ${RESUME:-} \
    --data facts=1 --data pararel=2 --data lre=1 --data entityquestions=3 \
    --data counterfact:counterfact/counterfact-train.json=3 \
    --episodes 5000 --threads 1 --set minutes=59 \
    --set exclude=counterfact:counterfact/counterfact-val.json,zsre:zsre/zsre_mend_train-1k.json,knowedit:knowedit/recent_train.json,jsonl:build/heldout-relations.jsonl \
    --set cache=runs/rivals
done
