"""The hard split: which relations training never sees, whoever trains."""

from __future__ import annotations

import hashlib

SPLIT_SALT = 2002  # chosen once so that about a fifth of ParaRel's and of LRE's relations fall out; never changes

# Relations of other tables that ask the same thing as a Wikidata property; they are held out together.
SAME_AS = {
    "facts:country_capital": "P36",
    "facts:country_borders": "P47",
    "facts:country_continent": "P30",
    "facts:country_currency": "lre:country currency",
    "facts:country_language": "P37",
    "facts:city_country": "P17",
    "facts:airport_country": "P17",
    "facts:subdivision_country": "P17",
    "facts:province_country": "P17",
    "facts:us_city_state": "P131",
    "lre:city in country": "P17",
    "lre:company hq": "P159",
    "lre:country capital city": "P36",
    "lre:country language": "P37",
    "lre:landmark in country": "P17",
    "lre:landmark on continent": "P30",
    "lre:object superclass": "P279",
    "lre:person native language": "P103",
    "lre:person occupation": "P106",
    "lre:person plays instrument": "P1303",
    "lre:person sport position": "P413",
    "lre:person university": "P69",
    "lre:product by company": "P176",
}


def held_out(relation: str, share: float) -> bool:
    """Whether a relation is kept out of training; depends on its name and the share alone, never on a seed."""
    digest = hashlib.sha256(f"{SPLIT_SALT}:{SAME_AS.get(relation, relation)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share
