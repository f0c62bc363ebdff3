"""Write the hard split as a request file: edits of relations that training never sees, asked in another form.

    IBKE_DATA=... python benchmarks/heldout_relations.py --limit 300 --out build/heldout-relations.jsonl

Each request is a statement to edit; its rephrase prompts are questions and chat wordings of the same fact.
"""

import argparse
import json
import random
from pathlib import Path

from ibke.data.facts import FactRequest, generate
from ibke.data.mixture import Source, triples
from ibke.data.relations import load_wordings
from ibke.data.triples import Skips
from ibke.files import write_atomically


def statement_first(item: FactRequest) -> dict | None:
    """The request with a statement as its edit prompt and questions as paraphrases, where it has both."""
    record = item.request.to_dict()
    texts = [item.request.prompt, *item.request.rephrase_prompts]
    statements = [text for text in texts if item.kinds[text] in ("statement", "indirect")]
    questions = [text for text in texts if item.kinds[text] in ("question", "chat")]
    if not statements or not questions or (item.request.subject or "").lower() not in statements[0].lower():
        return None
    return record | {"prompt": statements[0], "rephrase_prompts": questions}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--share", type=float, default=0.2, help="share of relations held out, as in training")
    parser.add_argument("--out", type=Path, default=Path("build/heldout-relations.jsonl"))
    args = parser.parse_args()
    facts = [
        triple for name in ("pararel", "lre") for triple in triples(Source.parse(name), args.share, want_held_out=True)
    ]
    random.Random(args.seed).shuffle(facts)
    made = generate(facts, load_wordings(), seed=args.seed, limit=4 * args.limit, skips=Skips())
    records = [record for item in made if (record := statement_first(item)) is not None][: args.limit]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    print(f"{len(records)} requests in {args.out}")


if __name__ == "__main__":
    main()
