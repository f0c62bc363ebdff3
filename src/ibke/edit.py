"""An Edit: low-rank updates of linear modules, neurons added to MLPs, parts that act, and where they came from.

Shape suffixes: R rank, I d_in, O d_out. An update is ΔW_OI = B_OR @ A_RI, in ``nn.Linear`` orientation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ibke.edit_folder import read_folder, write_folder
from ibke.errors import FingerprintMismatchError, FormatError, IBKEError
from ibke.neurons import Neurons, packed_told, unpacked_neurons
from ibke.parts import Part, join_parts, part_class
from ibke.request import EditRequest

if TYPE_CHECKING:
    from ibke.batch import Batch
    from ibke.models import LanguageModel

Factors = tuple[Tensor, Tensor]


def dense_factors(delta_OI: Tensor) -> Factors:
    """An update of full rank as factors, exactly: itself and an identity on its shorter side.

    No smaller ones are exact: a decomposition keeps all min(O, I) directions, so it is larger, and rounds. The identity
    stays off the disk.
    """
    d_out, d_in = delta_OI.shape
    identity = torch.eye(min(d_out, d_in), device=delta_OI.device)
    return (delta_OI, identity) if d_out <= d_in else (identity, delta_OI)


@dataclass
class EditInfo:
    """How an Edit was made.

    Args:
        method: name of the editing method.
        fingerprint: of the model it was made for.
        model: name of that model.
        refine_steps: steps taken to refine the code after the first guess, or to find what is to be written.
        rate_nats: nats the code carries, summed over the requests; None where the method has no code.
        achieved: whether the edited model generates every target; None where nobody asked.
        already: whether the base generated every target before; None where nobody asked.
        seconds: wall-clock time it took.
        nll_before: NLL of the targets at the request's own prompt on the base, in nats, mean over the requests.
        nll_after: NLL with the edit, mean over the frames and wordings asked; None where nobody asked.
        editor: mark of the editor that made it (:attr:`~ibke.editors.base.Editor.mark`); empty where nobody noted it.
        latent: tensors of the code, e.g. ``{"z": …}``, or whatever else the method must know to go on from the edit.
    """

    method: str
    fingerprint: str
    model: str = ""
    refine_steps: int = 0
    rate_nats: float | None = None
    achieved: bool | None = None
    already: bool | None = None
    seconds: float = 0.0
    nll_before: float | None = None
    nll_after: float | None = None
    editor: str = ""
    latent: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Edit:
    """What is changed in a model: linear modules, MLPs, or what is done while it runs.

    Args:
        factors: module name to (A [R × I], B [O × R]), float32 and finite; kept on the CPU.
        requests: what was asked for.
        info: how it was made.
        neurons: name of an MLP's output projection to the neurons added to it (K × width), float32 and finite; kept on
            the CPU. They are low-rank updates too, of an MLP padded with empty neurons (see :mod:`ibke.neurons`).
        parts: what acts while the model runs, by its place (see :mod:`ibke.parts`); no weight is changed by it.

    Raises:
        FormatError: factors or neurons that do not fit each other or are not finite.
    """

    factors: dict[str, Factors]
    requests: tuple[EditRequest, ...]
    info: EditInfo
    neurons: dict[str, Neurons] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.requests = tuple(self.requests)
        self.factors = {name: _checked(name, *pair) for name, pair in self.factors.items()}
        self.neurons = {name: Neurons.checked(name, some) for name, some in self.neurons.items()}
        self.info.latent = {name: tensor.detach().cpu() for name, tensor in self.info.latent.items()}

    @property
    def rank(self) -> int:
        """The largest rank over the updates of linear modules."""
        return max((a_RI.shape[0] for a_RI, _ in self.factors.values()), default=0)

    @property
    def all_neurons(self) -> dict[str, Neurons]:
        """Neurons by MLP, those of parts too."""
        return {name: some for part in self.parts.values() for name, some in part.own_neurons.items()} | self.neurons

    def reaches(self, lm: LanguageModel, batch: Batch) -> Tensor:
        """In which rows it can change anything at all, as far as is easily told (R, bool); nothing is attached.

        Args:
            lm: the model it was made for.
            batch: rows to come.
        """
        if self.factors or self.neurons:
            return torch.ones(batch.rows, dtype=torch.bool)
        rows = [part.reaches(lm, place, batch) for place, part in self.parts.items()]
        return torch.stack(rows).any(0) if rows else torch.zeros(batch.rows, dtype=torch.bool)

    def delta(self, module: str) -> Tensor:
        """The dense update of one linear module (O × I, float32).

        Raises:
            FormatError: the edit does not touch that module, or adds neurons to it and changes none it has.
        """
        if module not in self.factors:
            raise FormatError(
                "the edit does not change this module's own weights.",
                module,
                f"It changes {', '.join(self.factors) or 'none'}, and adds neurons to "
                f"{', '.join(self.all_neurons) or 'none'}.",
            )
        a_RI, b_OR = self.factors[module]
        return b_OR @ a_RI

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that goes into a model: ``factors/MODULE/A``, ``neurons/MODULE/gate``, ``parts/PLACE/…`` etc."""
        found: dict[str, Tensor] = {}
        for name, (a_RI, b_OR) in self.factors.items():
            found |= {f"factors/{name}/A": a_RI, f"factors/{name}/B": b_OR}
        for name, some in self.neurons.items():
            found |= {f"neurons/{name}/{part}": tensor for part, tensor in some.tensors().items()}
        for place, acting in self.parts.items():
            found |= {f"parts/{place}/{name}": tensor for name, tensor in acting.tensors().items()}
        return found

    def records(self) -> dict[str, dict[str, Any]]:
        """What the parts hold beside tensors, JSON-ready: ``kind`` and ``record`` by place."""
        return {place: {"kind": acting.kind, "record": acting.record()} for place, acting in self.parts.items()}

    def norm(self) -> dict[str, float]:
        """Frobenius norm of each module's update, from the Gram matrices of its factors.

        Of neurons, what counts are the columns they add to the output projection. Parts change no weight.
        """
        norms = {name: some.out.norm().item() for name, some in self.neurons.items()}
        for name, (a_RI, b_OR) in self.factors.items():
            # ‖BA‖² = tr(BᵀB · AAᵀ): R × R products only. Float64, since terms may cancel.
            a, b = a_RI.double(), b_OR.double()
            square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).item()
            norms[name] = (square + norms.get(name, 0.0) ** 2) ** 0.5
        return norms

    def compose(self, other: Edit) -> Edit:
        """Both edits as one: updates add up, so factors and neurons stand side by side and ranks add.

        Parts of one place are joined as their kind says, and gates that have to be told apart are found again.

        The result is the output of no single code, so it has none; whether both targets still come is unknown.

        Raises:
            FingerprintMismatchError: they were made for different models.
            FormatError: their shapes differ, or parts of different kinds are in one place.
        """
        return Edit.join([self, other])

    @classmethod
    def join(cls, edits: Sequence[Edit]) -> Edit:
        """Several edits as one, as :meth:`compose` does with two, in one go.

        Raises:
            FormatError: there is none, their shapes differ, or parts of different kinds are in one place.
            FingerprintMismatchError: they were made for different models.
        """
        if not edits:
            raise FormatError("there is no edit.", "edits to compose", "Give at least one.")
        infos = [edit.info for edit in edits]
        if len({info.fingerprint for info in infos}) > 1:
            raise FingerprintMismatchError(
                f"made for models {' and '.join(dict.fromkeys(info.fingerprint for info in infos))}.",
                "edits to compose",
                "Compose edits of one model only.",
            )
        sides: dict[str, list[Factors]] = {}
        for edit in edits:
            for name, pair in edit.factors.items():
                sides.setdefault(name, []).append(pair)
        for name, pairs in sides.items():
            if len({(a_RI.shape[1], b_OR.shape[0]) for a_RI, b_OR in pairs}) > 1:
                raise FormatError("the edits' shapes differ.", name, "Compose edits of one model only.")
        factors = {n: (torch.cat([a for a, _ in s]), torch.cat([b for _, b in s], dim=1)) for n, s in sides.items()}
        names = dict.fromkeys(name for edit in edits for name in edit.neurons)
        neurons = {n: Neurons.join([edit.neurons[n] for edit in edits if n in edit.neurons]) for n in names}
        rates = [info.rate_nats for info in infos]
        info = EditInfo(
            method="+".join(dict.fromkeys(name for info in infos for name in info.method.split("+"))),
            fingerprint=infos[0].fingerprint,
            model=infos[0].model,
            refine_steps=sum(info.refine_steps for info in infos),
            rate_nats=None if None in rates else sum(rate for rate in rates if rate is not None),
            seconds=sum(info.seconds for info in infos),
        )
        requests = tuple(request for edit in edits for request in edit.requests)
        return cls(factors, requests, info, neurons, join_parts([edit.parts for edit in edits]))

    def compress(self, rank: int) -> tuple[Edit, float]:
        """The nearest edit of at most this rank in each linear module (Eckart–Young, through QR of the factors).

        Added neurons stay as they are: a gate is not linear, so leaving one out gives no nearby edit but another one.
        So do parts. They do not count in the error.

        Args:
            rank: the largest rank allowed, at least 1.

        Returns:
            (edit, error): the error is ‖ΔW − ΔW'‖ / ‖ΔW‖ in the Frobenius norm over all modules (ratio 0–1).

        Raises:
            FormatError: rank below 1, or an edit that changes no linear module.
        """
        if rank < 1:
            raise FormatError(f"an edit cannot have rank {rank}.", "compress", "Ask for at least 1.")
        if not self.factors:
            held = sum(some.count for some in self.all_neurons.values())
            raise FormatError(
                f"this edit by {self.info.method} changes no linear module; its {held} neurons stay as they are.",
                "compress",
                "Leave out edits that are needed no more instead.",
            )
        factors, lost, total = {}, 0.0, 0.0
        for name, (a_RI, b_OR) in self.factors.items():
            q_a, r_a = torch.linalg.qr(a_RI.double().T)
            q_b, r_b = torch.linalg.qr(b_OR.double())
            u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
            root = s[:rank].sqrt()
            factors[name] = ((root[:, None] * v[:rank] @ q_a.T).float(), (q_b @ u[:, :rank] * root).float())
            lost, total = lost + s[rank:].square().sum().item(), total + s.square().sum().item()
        small = Edit(factors, self.requests, replace(self.info), self.neurons, self.parts)
        return small, (lost / total) ** 0.5 if total else 0.0

    def save(self, folder: str | Path) -> Path:
        """Write the edit as a folder of one JSON and one safetensors file.

        Returns:
            The folder.

        Raises:
            FormatError: the folder cannot be written.
        """
        write_folder(Path(folder), *self.pack())
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Edit:
        """Read an edit written by :meth:`save`; bit for bit what was saved.

        Raises:
            FormatError: there is no edit, it is truncated or changed, of a newer format, or not an edit at all.
        """
        record, tensors = read_folder(Path(folder))
        return cls.unpack(record, tensors, str(folder))

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything in it, as a JSON-ready record and tensors; those of the code begin with ``latent/``."""
        tensors = self.tensors() | {f"latent/{name}": tensor for name, tensor in self.info.latent.items()}
        told, gates = packed_told(self.neurons)
        tensors |= told
        for name, (a_RI, b_OR) in self.factors.items():
            if _is_identity(b_OR):
                del tensors[f"factors/{name}/B"]
            elif _is_identity(a_RI):
                del tensors[f"factors/{name}/A"]
        record = {
            "modules": list(self.factors),
            "mlps": list(self.neurons),
            "gates": gates,
            "parts": self.records(),
            "info": _without_latent(self.info),
            "requests": [request.to_dict() for request in self.requests],
        }
        return record, tensors

    @classmethod
    def unpack(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Edit:
        """From :meth:`pack`, checked before it is believed.

        Args:
            record: JSON's.
            tensors: by name.
            where: they come from, for messages.

        Raises:
            FormatError: they are not whole.
        """
        try:
            latent = {key.removeprefix("latent/"): tensors[key] for key in tensors if key.startswith("latent/")}
            factors = {name: _factors_in(tensors, f"factors/{name}/") for name in record["modules"]}
            gates = record.get("gates", {})
            neurons = {name: unpacked_neurons(tensors, name, gates.get(name)) for name in record["mlps"]}
            parts = {place: _part_in(tensors, place, one) for place, one in record.get("parts", {}).items()}
            known = {item.name for item in fields(EditInfo)} - {"latent"}
            info = EditInfo(**{key: value for key, value in record["info"].items() if key in known}, latent=latent)
            requests = tuple(EditRequest.from_dict(one) for one in record["requests"])
            return cls(factors, requests, info, neurons, parts)
        except (KeyError, TypeError, ValueError, AttributeError, IBKEError) as error:
            raise FormatError(f"the edit is not complete ({error}).", where, "Make the edit again.") from error


def _checked(name: str, a_RI: Tensor, b_OR: Tensor) -> Factors:
    shapes = f"A {list(a_RI.shape)}, B {list(b_OR.shape)}"
    if a_RI.dim() != 2 or b_OR.dim() != 2 or a_RI.shape[0] != b_OR.shape[1]:
        raise FormatError(f"the factors do not fit: {shapes}.", name, "A is [rank, d_in], B is [d_out, rank].")
    a_RI, b_OR = a_RI.detach().to("cpu", torch.float32), b_OR.detach().to("cpu", torch.float32)
    if not (torch.isfinite(a_RI).all() and torch.isfinite(b_OR).all()):
        raise FormatError("the factors hold values that are not finite.", name, "Make the edit again, in float32.")
    return a_RI, b_OR


def _is_identity(tensor: Tensor) -> bool:
    rows, columns = tensor.shape
    return rows == columns and torch.equal(tensor, torch.eye(rows))


def _factors_in(tensors: Mapping[str, Tensor], at: str) -> Factors:
    """A and B; one that is not there is the identity."""
    a_RI, b_OR = tensors.get(f"{at}A"), tensors.get(f"{at}B")
    if a_RI is not None:
        return a_RI, torch.eye(len(a_RI)) if b_OR is None else b_OR
    b_OR = tensors[f"{at}B"]
    return torch.eye(b_OR.shape[1]), b_OR


def _part_in(tensors: Mapping[str, Tensor], place: str, one: Mapping[str, Any]) -> Part:
    at = f"parts/{place}/"
    own = {key.removeprefix(at): tensor for key, tensor in tensors.items() if key.startswith(at)}
    return part_class(one["kind"]).read(own, one["record"])


def _without_latent(info: EditInfo) -> dict[str, Any]:
    record = asdict(replace(info, latent={}))
    del record["latent"]
    return record
