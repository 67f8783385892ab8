"""Whether a training was worth it: what is held out, before and after, against the original.

Who learned to be as the original is has to be nearer to it, by the mean KL. Who learned a task goes
away from it on purpose: there the loss that was trained has to be less, on windows of the data that
were held apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from halfbyte.errors import GateMissedError, InvalidInputError
from halfbyte.evals.fidelity import Fidelity
from halfbyte.evals.report.facts import mean_kl
from halfbyte.evals.texts import Reading
from halfbyte.formats.manifest import record
from halfbyte.formats.progress import Progress
from halfbyte.specs import LoadOptions
from halfbyte.training.loop import Outcome
from halfbyte.workflows.asking import Distilling
from halfbyte.workflows.evaluating import Evaluation, Measured
from halfbyte.workflows.reporting import DEFAULT


class Judge:
    """Of results that are made from `place`."""

    def __init__(self, place: Path, asked: Distilling, progress: Progress | None) -> None:
        self._place, self._asked, self._progress = place, asked, progress
        self._reading = Reading(max_windows=asked.max_windows)

    def refuse_texts(self) -> None:
        """Raises `InvalidInputError` for texts that cannot be measured on, before the work."""
        evaluation = Evaluation(str(self._place))
        window, context = self._reading.window, evaluation.source.spec.context
        if window > context:
            raise InvalidInputError(
                f"is measured in windows of {window} tokens, and has a context of {context}",
                where=self._place,
            )
        for path in self._asked.held_out:
            evaluation.windows(path, self._reading)

    def measured(self, artefact: Path, *, kept: bool = False) -> Sequence[Fidelity]:
        """A model on what is held out; `kept` in its manifest, with what our gate says."""
        evaluation = self._evaluation(artefact)
        measured = self._measured(evaluation)
        if kept:
            verdict = evaluation.judge(evaluation.default_gate(), measured, strict=True)
            evaluation.keep(measured, DEFAULT, verdict)
        return measured.texts

    def adapted(self, body: Path, adapter: Path, *, kept: bool = False) -> Sequence[Fidelity]:
        """A model with an adapter on what is held out; `kept` in the adapter's manifest."""
        evaluation = self._evaluation(body, lora=str(adapter))
        measured = self._measured(evaluation)
        if kept:
            record(adapter, {**asdict(measured), "against": {"name": evaluation.base_name}})
        return measured.texts

    def refuse_worse(
        self,
        before: Sequence[Fidelity],
        after: Sequence[Fidelity],
        outcomes: Mapping[str, Outcome],
    ) -> None:
        """Raises `GateMissedError` for a result that is no better than what it began with."""
        how = _diverged(outcomes)
        if self._asked.task:
            if all(outcome.best >= outcome.before for outcome in outcomes.values()):
                loss = max(outcome.before for outcome in outcomes.values())
                raise GateMissedError(
                    f"{how}the loss on what is held apart of the data did not fall below the "
                    f"{loss:.5f} that it began with; nothing was written",
                    hint="another --rate, more --steps or more --task-data",
                )
        elif mean_kl(after) >= mean_kl(before):
            raise GateMissedError(
                f"{how}the training came to a KL of {mean_kl(after):.5f} on the held-out texts, "
                f"the start has {mean_kl(before):.5f}; nothing was written",
                hint="lower --rate, more --data, or data more like the held-out texts",
            )

    def refuse_better(
        self, target: Path, there: Sequence[Fidelity], after: Sequence[Fidelity]
    ) -> None:
        """Raises `GateMissedError` where what is at `target` is better."""
        if mean_kl(there) < mean_kl(after):
            raise GateMissedError(
                f"has a KL of {mean_kl(there):.5f} on the held-out texts, "
                f"the training came to {mean_kl(after):.5f}",
                where=target,
                hint="--force writes over it, another -o beside it",
            )

    def _evaluation(self, artefact: Path, lora: str | None = None) -> Evaluation:
        return Evaluation(
            str(artefact),
            against=str(self._place),
            options=LoadOptions(device=self._asked.device, threads=self._asked.threads),
            lora=lora,
            merged=self._asked.merged,
        )

    def _measured(self, evaluation: Evaluation) -> Measured:
        held_out = {path.name: path for path in self._asked.held_out}
        texts = held_out or evaluation.own_texts
        return evaluation.measure(texts, self._reading, progress=self._progress)


def _diverged(outcomes: Mapping[str, Outcome]) -> str:
    """What a message begins with where a training did not come to its end."""
    found = [name for name, outcome in outcomes.items() if outcome.ended == "diverged"]
    if not found:
        return ""
    steps = outcomes[found[0]].steps
    return f"{', '.join(found)} diverged{f' behind step {steps}' if len(found) == 1 else ''}; "
