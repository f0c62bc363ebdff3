"""Errors that say what happened, where, and what to do next."""


class IBKEError(Exception):
    """Base of every error the package raises on purpose.

    Args:
        what: one sentence on what is wrong.
        where: the file, line, module or field concerned.
        todo: what the reader can do about it.
    """

    def __init__(self, what: str, where: str = "", todo: str = ""):
        self.what, self.where, self.todo = what, where, todo
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message} {todo}" if todo else message)


class RequestError(IBKEError):
    """An edit request or a file of them cannot be used."""


class ModelError(IBKEError):
    """A model cannot be found, fetched, read or believed."""


class ModuleNotEditableError(IBKEError):
    """A module name does not exist in the model, or its module is not a linear map."""


class FingerprintMismatchError(IBKEError):
    """An editor or an Edit was made for other weights than those at hand."""


class CaptureError(IBKEError):
    """Keys or gradients could not be taken (non-finite values, a prompt longer than the window)."""


class FormatError(IBKEError):
    """A file on disk is not what it should be."""


class SettingError(FormatError):
    """A method's setting, or the file it names, does not suit the model; no edit can be made with it."""


class MissingPackageError(IBKEError):
    """A method needs an optional package that is not installed."""


class TrainingError(IBKEError):
    """Training cannot start or go on."""


class LedgerError(IBKEError):
    """A ledger cannot be read, written or believed, or has no such edit."""


class LedgerMovedError(LedgerError):
    """Somebody else has written to a ledger since it was last looked at."""
