"""Whether where an edit applies goes through its code: ``IBKEConfig.keys``.

Shape suffixes: B edits, Z code, D width of the residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from ibke.editors.ibke.bottleneck import Bottleneck, Written


class Keys(ABC):
    """Where the address of an edit comes from."""

    moving: ClassVar[bool]
    """Whether it moves with the code: then it may come to reach any token, and is not told apart from others'."""

    @abstractmethod
    def address(self, network: Bottleneck, z_BZ: Tensor, written: Written) -> Tensor:
        """The addresses of some codes (B × D).

        Args:
            network: what the codes are of.
            z_BZ: codes.
            written: what they were made from.
        """


class AddressKeys(Keys):
    """As it was found in closed form: constant in the answer, so nothing of the answer passes by Z."""

    moving = False

    def address(self, network: Bottleneck, z_BZ: Tensor, written: Written) -> Tensor:
        """See :meth:`Keys.address`."""
        return written.address_BD


class CodeKeys(Keys):
    """Decoded from the context part of the code (strict), by the inverse of the linear map that the code begins as."""

    moving = True

    def address(self, network: Bottleneck, z_BZ: Tensor, written: Written) -> Tensor:
        """See :meth:`Keys.address`."""
        content, context = network.config.content_dim, network.config.context_dim
        return (z_BZ[:, content : content + context] * network.context_scale_X) @ network.context_basis_DX.T


KEYS: dict[str, Keys] = {"address": AddressKeys(), "code": CodeKeys()}
