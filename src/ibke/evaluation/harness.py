"""Tasks of EleutherAI's lm-evaluation-harness put to a model (extra ``lm-eval``), from local files alone."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from ibke.batch import Pair
from ibke.errors import MissingPackageError, RequestError
from ibke.evaluation.scoring import score
from ibke.models import LanguageModel

BATCH_SIZE = 16
SEED = 1234  # lm-eval's own, of few-shot examples


class Harness:
    """The tasks whose files are in a folder; nothing of lm-eval's own collection is known here, nothing is fetched.

    Args:
        lm: the model; what is attached to it when scores are taken is in force.
        folder: of task files (YAML) as lm-eval reads them; their data are looked for where the command runs.
        limit: most questions of each task.

    Raises:
        MissingPackageError: lm-eval is not installed.
        RequestError: there is no task.
    """

    def __init__(self, lm: LanguageModel, folder: Path, limit: int):
        self.lm, self.limit, self.tasks = lm, limit, tasks_in(folder)
        self.names: list[str] = sorted(self.tasks.all_subtasks)

    def scores(self) -> dict[str, float]:
        """Every metric of every task, by ``task/metric``, zero-shot unless the task says otherwise.

        Raises:
            RequestError: a task cannot be run; says what lm-eval says.
        """
        from lm_eval import simple_evaluate

        with redirect_stderr(io.StringIO()):  # bars of its own
            try:
                asked = _asked(self.lm)
                found: Any = simple_evaluate(
                    asked,
                    tasks=list(self.names),
                    task_manager=self.tasks,
                    limit=self.limit,
                    bootstrap_iters=0,
                    log_samples=False,
                    verbosity="ERROR",
                    fewshot_random_seed=SEED,
                )
            except Exception as error:  # a task file can be wrong in any way
                logging.getLogger(__name__).debug("lm-eval", exc_info=True)
                raise RequestError(
                    f"lm-eval cannot run it ({type(error).__name__}: {error}).", ", ".join(self.names), "Mend the task."
                ) from error
        return {
            f"{task}/{metric.removesuffix(',none')}": float(value)
            for task, metrics in found["results"].items()
            for metric, value in metrics.items()
            if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
        }


def _asked(lm: LanguageModel) -> Any:
    """The model as lm-eval asks it; likelihoods are taken here, where edits are told where questions end."""
    from lm_eval.models.huggingface import HFLM

    class Asked(HFLM):
        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], *_: Any, **__: Any
        ) -> list[tuple[float, bool]]:
            pairs = []
            for _, context, continuation in requests:
                answer = continuation[-self.max_length :]
                # What is too long loses its beginning, as it does there; the last token of an answer is fed to nobody.
                prompt = context[-max(1, self.max_length + 1 - len(answer)) :]
                pairs.append(Pair(prompt, answer, (0, 1)))
            read = score(lm, pairs, batch_size=BATCH_SIZE)
            return [(-sum(one.nll), one.predicted == tuple(pair.answer)) for one, pair in zip(read, pairs, strict=True)]

    return Asked(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=BATCH_SIZE)


def tasks_in(folder: Path) -> Any:
    """lm-eval's knowledge of the tasks in a folder.

    Raises:
        MissingPackageError: lm-eval is not installed.
        RequestError: there is no task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingPackageError(
            "lm-eval is not installed.", "lm-eval", "Install it with `pip install 'ibke[lm-eval]'`."
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default it takes
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    if not tasks.all_subtasks:
        raise RequestError("there is no task in it.", str(folder), "Put lm-eval's task files (YAML) there.")
    return tasks
