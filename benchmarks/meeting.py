"""Can two flags, one at a subject and one where a question ends, meet in an attention head, and at what cost?

    IBKE_DATA=... python benchmarks/meeting.py [--prompts 48] [--out FILE]

An edit shall be in force where its subject was named *and* its question is asked. What is asked is known at a prompt's
end, who it is about at the subject, and nothing harmless that is written at the subject is heard at the end by itself
(docs/experiments.md). So a flag of a few directions in which states hardly vary is written at each of the two places
after layer ``LAYER`` - 1. Fixed updates of one key-value head of layer ``LAYER`` read them: the one for queries and
the one for keys write along one direction of the head, so that their product draws the head's whole attention to the
subject if both are there; the one for values passes on a code of the subject's edit. All are of rank one or a few and
the same for every edit.

Measured per setting, for the updates alone, with either flag and with both: KL from the unedited model on the first
tokens that it says itself (nats a token), answers that stay, and how loud the code is at the prompt's end, in standard
deviations of generic states. Prompts are CounterFact's training edits, so that this can be tuned on.

Shape suffixes: D width, H a head's size, C code, S states, R rows, T tokens, N answer positions.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rivals import DATA, SEED  # the script beside this one
from torch import Tensor, nn

from ibke.batch import Batch, Pair, collate
from ibke.data.readers import read
from ibke.editors.key_statistics import lines_of, text_rows
from ibke.evaluation.machine import describe
from ibke.files import write_atomically
from ibke.frames import FRAMES, encode_pair
from ibke.models import LanguageModel, load_model
from ibke.partial import PartialModel, taking_input
from ibke.rows import continuations

LAYER = 25
TEXT, TRAIN = "text/wikitext2_valid.txt", "counterfact/counterfact-train.json"
CODE = 16  # directions of the code
SLOW = (
    20  # rotary pairs from here on hardly turn over a few hundred tokens, so what is along them meets at any distance
)
FIRST = 3.0  # weight of first positions, whose states belong to no word and are far from all others
AT_ONCE = 32
# Lengths of the flags at the question's end and at the subject, and what the updates of keys, queries and values add
# for a flag; the state itself is about 400 long there.
STRONG = {"question": 24.0, "subject": 90.0, "values": 8.0}
SETTINGS: list[dict[str, Any]] = [
    {"head": 1, "question": 18.0, "subject": 60.0, "values": 8.0, "keys": 6.0, "queries": 20.0},
    *({"head": head, "keys": 8.0, "queries": 15.0} | STRONG for head in (0, 1, 2)),
    {"head": 1, "keys": 12.0, "queries": 10.0} | STRONG,
    {"head": 1, "keys": 20.0, "queries": 6.0} | STRONG,
    {"head": 1, "keys": 9.0, "queries": 9.0} | STRONG,
]
# Flags at subject and question, and whether they are taken away again behind the layer, as neurons of its MLP could do.
CONDITIONS = {
    "updates alone": (0, 0, False),
    "subject": (1, 0, True),
    "question": (0, 1, True),
    "question, left standing": (0, 1, False),
    "both": (1, 1, True),
}


@dataclass
class States:
    """Generic states around layer ``LAYER`` (S × D, float64), first positions apart.

    Args:
        attention, first: what its attention sees.
        mlp: what its MLP sees.
        length: mean norm of the residual stream that enters it.
    """

    attention: Tensor
    first: Tensor
    mlp: Tensor
    length: float


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/meeting.json"))
    args = parser.parse_args()
    lm = load_model("smollm2-135m", dtype="float32")
    facts = list(read(DATA / TRAIN, "counterfact", []))
    random.Random(SEED).shuffle(facts)
    asked = prompts(lm, facts, args.prompts)
    states = gather(lm, [pair for fact in facts[-200:] for pair in framed(lm, fact.prompt, fact.subject)])
    trial = Trial(lm, asked)
    rows = []
    for setting in SETTINGS:
        meeting = Meeting(lm, states, **setting)
        found = {name: trial.run(meeting, *flags) for name, flags in CONDITIONS.items()}
        rows.append({"setting": setting, "noise": meeting.noise, "found": found})
        print(json.dumps(setting), *(f"\n  {name}: {some}" for name, some in found.items()), flush=True)
    how = {"command": f"python benchmarks/meeting.py --prompts {args.prompts}", "seed": SEED, "layer": LAYER}
    report = {"prompts": len(asked), "settings": rows, "config": how, "machine": describe(lm.device)}
    write_atomically(args.out, (json.dumps(report, indent=1) + "\n").encode())


def framed(lm: LanguageModel, text: str, subject: str | None) -> list[Pair]:
    """A prompt in every frame."""
    return [encode_pair(text, "-", frame, lm.tokenizer, subject) for frame in FRAMES]


def prompts(lm: LanguageModel, facts: list[Any], count: int) -> list[Pair]:
    """Other wordings of facts, bare and in chat, that go on after their subject, with what the model says to them."""
    found: list[Pair] = []
    for number, fact in enumerate(facts):
        for text in fact.rephrase_prompts[:1]:
            pair = framed(lm, text, fact.subject)[0 if number % 2 else 2]
            if pair.subject and 2 < pair.subject[1] < len(pair.prompt):
                found.append(pair)
        if len(found) == count:
            break
    said = continuations(lm.model, lm.tokenizer, [pair.prompt for pair in found])
    return [Pair(pair.prompt, answer, pair.span, pair.subject) for pair, answer in zip(found, said, strict=True)]


@torch.no_grad()
def gather(lm: LanguageModel, pairs: list[Pair]) -> States:
    """States of prompts and of running text."""
    rows = [Pair(row, [0], (0, 1)) for row in text_rows(lm.tokenizer, lines_of(str(DATA / TEXT)), 10_000)]
    layer = lm.model.get_submodule(f"{lm.architecture.layers}.{LAYER}")
    seen: dict[str, list[Tensor]] = {name: [] for name in ("attention", "first", "mlp", "length")}
    ordered = sorted([*pairs, *rows], key=len)
    for begin in range(0, len(ordered), AT_ONCE):
        batch = collate(ordered[begin : begin + AT_ONCE], lm.tokenizer.pad_token_id)
        words_RT = batch.attention_RT.clone()
        words_RT[:, 0] = False
        with (
            taking_input(layer) as entering,
            taking_input(layer.self_attn.k_proj) as attention,
            taking_input(layer.mlp.gate_proj, last=True) as mlp,
        ):
            lm.model(input_ids=batch.ids_RT, attention_mask=batch.attention_RT)
        seen["attention"].append(attention[0][words_RT])
        seen["first"].append(attention[0][:, 0])
        seen["mlp"].append(mlp[0][words_RT])
        seen["length"].append(entering[0][words_RT].norm(dim=-1))
    whole = {name: torch.cat(parts).double() for name, parts in seen.items()}
    return States(whole["attention"], whole["first"], whole["mlp"], float(whole["length"].mean()))


class Meeting:
    """Flags and the fixed updates that let them meet.

    Args:
        lm: the model.
        states: generic ones of its layer.
        head: the key-value head.
        question, subject: length of the flags.
        keys, queries, values: what the updates add for a flag.
    """

    def __init__(
        self,
        lm: LanguageModel,
        states: States,
        *,
        head: int,
        question: float,
        subject: float,
        keys: float,
        queries: float,
        values: float,
    ):
        self.layer = lm.model.get_submodule(f"{lm.architecture.layers}.{LAYER}")
        attention, size = self.layer.self_attn, self.layer.self_attn.head_dim
        self.group = attention.q_proj.out_features // attention.k_proj.out_features
        self.head, self.size = head, size
        scale = math.sqrt(states.attention.shape[1]) / states.length  # of a normalised state per unit of the residual
        # Directions in which states hardly vary: what is written along them is read with the least noise.
        norm_D = self.layer.input_layernorm.weight.detach().double()
        moment_DD = second_moment(states.attention) + FIRST * second_moment(states.first)
        inverse_DD = inverse(moment_DD, 1e-5)
        flags_DC = torch.linalg.eigh(norm_D[:, None] * inverse_DD * norm_D).eigenvectors.flip(1)[:, : CODE + 2]
        length_C = torch.tensor([question] + [subject] * (CODE + 1), dtype=torch.float64)
        reading_DC = inverse_DD @ (norm_D[:, None] * flags_DC)
        reading_DC /= ((norm_D[:, None] * flags_DC) * reading_DC).sum(0) * scale * length_C
        self.noise = round(float((reading_DC * (moment_DD @ reading_DC)).sum(0).sqrt().mean()), 4)
        self.flags_CD, self.reading_CD = (flags_DC * length_C).T.float(), reading_DC.T.float()
        along_H = self._shared_direction(states.attention)
        self.key_H, self.query_H = keys * along_H, queries * along_H
        # The code is passed on along the head's directions that generic states drown the least.
        out_DH = sum(self._slice(attention.o_proj.weight, query) for query in self._queries()).double()  # type: ignore[union-attr]
        seen_DH = self.layer.post_attention_layernorm.weight.detach().double()[:, None] * out_DH
        self.mean_D = states.mlp.mean(0)
        self.spread_DD = second_moment(states.mlp - self.mean_D)
        self.inverse_DD = inverse(self.spread_DD, 1e-4)
        loud_HC = torch.linalg.eigh(seen_DH.T @ self.inverse_DD @ seen_DH).eigenvectors.flip(1)[:, :CODE]
        self.values_CH, self.marks_DC = (values * loud_HC).T.float(), values * seen_DH @ loud_HC

    def _queries(self) -> range:
        """The query heads that share the key-value head."""
        return range(self.head * self.group, (self.head + 1) * self.group)

    def _slice(self, weight_DO: Tensor, head: int) -> Tensor:
        """A head's columns of the output projection."""
        return weight_DO.detach()[:, head * self.size : (head + 1) * self.size]

    def _shared_direction(self, states_SD: Tensor) -> Tensor:
        """A direction of the head along which keys are alike and queries short: an update alone then moves little."""
        attention, half = self.layer.self_attn, self.size // 2
        slow = [*range(SLOW, half), *range(half + SLOW, self.size)]
        keys_SH = (states_SD @ attention.k_proj.weight.detach().double().T).unflatten(1, (-1, self.size))[:, self.head]
        queries_SGH = (states_SD @ attention.q_proj.weight.detach().double().T).unflatten(1, (-1, self.size))
        queries_SH = queries_SGH[:, list(self._queries())].flatten(0, 1)
        between_HH, length_HH = torch.cov(keys_SH[:, slow].T), second_moment(queries_SH[:, slow])
        chosen = torch.linalg.eigh(between_HH / between_HH.trace() + length_HH / length_HH.trace()).eigenvectors[:, 0]
        return torch.zeros(self.size).index_put((torch.tensor(slow),), chosen.float())

    def codes(self, count: int) -> Tensor:
        """Codes of so many edits (count × C), unit vectors."""
        return F.normalize(torch.randn(count, CODE, generator=torch.Generator().manual_seed(SEED)), dim=-1)

    def question_flag(self) -> Tensor:
        """What is written where an edit's question ends (D)."""
        return self.flags_CD[0]

    def subject_flags(self, codes_RC: Tensor) -> Tensor:
        """What is written at each edit's subject (R × D)."""
        return self.flags_CD[1] + codes_RC @ self.flags_CD[2:]

    def listeners(self, codes_RC: Tensor) -> Tensor:
        """Where each code is heard by the MLP (R × D): generic states answer 0 ± 1."""
        address_DR = self.inverse_DD @ (self.marks_DC @ codes_RC.double().T)
        return (address_DR / (address_DR * (self.spread_DD @ address_DR)).sum(0).sqrt()).T

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the updates act."""
        attention, head = self.layer.self_attn, self.head
        queries = [(head * self.group + slot, self.query_H[None], slice(0, 1)) for slot in range(self.group)]
        updates = [
            (attention.q_proj, queries),
            (attention.k_proj, [(head, self.key_H[None], slice(1, 2))]),
            (attention.v_proj, [(head, self.values_CH, slice(2, None))]),
        ]
        with ExitStack() as stack:
            for module, parts in updates:
                stack.callback(module.register_forward_hook(self._adding(parts)).remove)
            yield

    def _adding(self, parts: list[tuple[int, Tensor, slice]]) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            out = out.clone()
            for head, written_CH, which in parts:
                place = slice(head * self.size, (head + 1) * self.size)
                out[..., place] += args[0] @ self.reading_CD[which].T @ written_CH
            return out

        return add


class Trial:
    """Prompts, each with an edit of its own about its subject.

    Args:
        lm: the model.
        pairs: prompts with the model's own answers.
    """

    def __init__(self, lm: LanguageModel, pairs: list[Pair]):
        self.batch: Batch = collate(pairs, lm.tokenizer.pad_token_id)
        self.part = PartialModel(lm.model, lm.architecture.layers, LAYER)
        self.mlp = lm.model.get_submodule(f"{lm.architecture.layers}.{LAYER}.mlp.gate_proj")
        self.hidden_RTD = self.part.prefix(self.batch)
        place_T = torch.arange(self.batch.ids_RT.shape[1])
        self.subject_RT = place_T == torch.tensor([[pair.place] for pair in pairs])
        self.ends_R = torch.tensor([len(pair.prompt) - 1 for pair in pairs])
        self.after_RT = place_T >= self.ends_R[:, None]
        self.log_probs_NV = self._run(self.hidden_RTD)[0]

    @torch.no_grad()
    def _run(self, hidden_RTD: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities at the answers, and what the layer's MLP sees at the prompts' ends (R × D)."""
        with taking_input(self.mlp) as seen:
            logits_NV = self.part.suffix(hidden_RTD, self.batch)
        return logits_NV.log_softmax(-1), seen[0][torch.arange(len(self.ends_R)), self.ends_R].double()

    def run(self, meeting: Meeting, subject: int, question: int, erased: bool) -> dict[str, Any]:
        """What the updates and some flags do."""
        codes_RC = meeting.codes(len(self.ends_R))
        flags_RTD = subject * self.subject_RT[..., None] * meeting.subject_flags(codes_RC)[:, None]
        flags_RTD = flags_RTD + question * self.after_RT[..., None] * meeting.question_flag()

        def erase(_: nn.Module, __: Any, out: Any) -> Any:
            return (out[0] - flags_RTD, *out[1:]) if isinstance(out, tuple) else out - flags_RTD

        with meeting.attached(), ExitStack() as stack:
            if erased:
                stack.callback(meeting.layer.register_forward_hook(erase).remove)
            log_probs_NV, states_RD = self._run(self.hidden_RTD + flags_RTD)
        base_NV = self.log_probs_NV
        moved_N = base_NV.argmax(-1) != log_probs_NV.argmax(-1)
        heard_RR = (states_RD - meeting.mean_D) @ meeting.listeners(codes_RC).T
        own_R = heard_RR.diagonal()
        others = heard_RR[~torch.eye(len(own_R), dtype=torch.bool)]
        return {
            "kl": round(float((base_NV.exp() * (base_NV - log_probs_NV)).sum(-1).mean()), 5),
            "answers_kept": round(1 - len(self.batch.row_N[moved_N].unique()) / len(own_R), 3),
            "own_code": [round(float(value), 1) for value in (own_R.min(), own_R.median(), own_R.max())],
            "others_codes_at_most": round(float(others.max()), 1),
        }


def second_moment(states_SD: Tensor) -> Tensor:
    """Mean outer product (D × D)."""
    return states_SD.T @ states_SD / len(states_SD)


def inverse(moment_DD: Tensor, ridge: float) -> Tensor:
    """Inverse with a ridge in units of the mean variance."""
    eye_DD = torch.eye(len(moment_DD), dtype=moment_DD.dtype)
    return torch.linalg.inv(moment_DD + ridge * moment_DD.diagonal().mean() * eye_DD)


if __name__ == "__main__":
    main()
