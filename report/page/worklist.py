"""predict.py --html: a reading list, the most suspicious first. No torch."""

import heapq
import itertools

import numpy as np
from scipy.special import logit

from report.page.build import render
from report.page.pictures import pictures

ROWS, PICTURES = 1000, 200  # listed, and with a picture


class Worklist:
    """Rows of predict.py on their way to the output. The ROWS most suspicious are kept, so memory does not
    grow with the number of files.

    `scorer`: a prediction.scorer.Scorer. A row is as suspicious as the score of any finding lies above its
    threshold, in log odds; without a threshold, above 0.5."""

    def __init__(self, scorer):
        self.scorer = scorer
        self.decisions = [d for d in scorer.decisions if d.point in ("@Rec", "@hand")]
        self.listed, self.unscored = [], []
        self.scored, self.passed, self.called = 0, 0, 0
        self._number = itertools.count()

    def watch(self, rows):
        """Yield rows (File, dict) as they come, and keep what is listed of them."""
        for file, row in rows:
            self._add(file, row)
            yield file, row

    def _add(self, file, row):
        answers = self._answers(row)
        if not answers:
            self.passed += 1
            if len(self.unscored) < ROWS:
                self.unscored.append({"path": file.name, "note": row["note"]})
            return
        self.scored += 1
        self.called += any(answer["called"] for answer in answers)
        above = max(answer["above"] for answer in answers)
        item = self._item(file, row, answers)
        # Rows of one study or patient are equally suspicious and stay together, in the order they came.
        heapq.heappush(self.listed, (above, item["unit"], -next(self._number), item))
        if len(self.listed) > ROWS:
            heapq.heappop(self.listed)

    def _answers(self, row):
        """[{"finding", "score", "above" (its threshold, in log odds), "called", "word"}]; none of a file that
        is not scored."""
        found = []
        for decision in self.decisions:
            score = row[self.scorer.column_of_unit(self.scorer.task.score_columns[decision.finding])]
            if score is None:
                continue
            # The log odds of 0 and 1 are infinite.
            limit = 0.5 if decision.threshold is None else decision.threshold
            above = float(np.subtract(*logit(np.clip([score, limit], 1e-16, 1 - 1e-16))))
            word = row[self.scorer.column_of_unit(decision.column)]
            called = decision.threshold is not None and score >= decision.threshold
            found.append({"finding": decision.finding, "score": score, "above": above, "called": called})
            found[-1]["word"] = word or "no threshold"
        return found

    def _item(self, file, row, answers):
        """What the page shows of a row. Of several findings: those that are called, or the nearest one."""
        if len(answers) > 1:
            shown = [answer for answer in answers if answer["called"]]
            answers = shown or [max(answers, key=lambda answer: answer["above"])]
        unit = "" if self.scorer.unit == "image" else str(row[self.scorer.unit])
        return {
            "path": file.name,
            "patient": file.patient if file.patient != file.name else "",
            "unit": unit,
            "answers": sorted(answers, key=lambda answer: -answer["above"]),
            "triage": self._triage(row),
            "typicality": row["typicality"],
            "note": row["note"],
        }

    def _triage(self, row):
        """The answers of the triage; of several findings with their names, negative ones left out."""
        found = []
        for key, value in row.items():
            _, triage, word = key.partition("triage")
            if triage and value and self.scorer.task.alone:
                found.append(value)
            elif triage and value and value != "negative":
                found.append(f"{word.removeprefix('_')} {value}")
        return found

    def page(self, words):
        """The page as text. `words`: sentences on all images together, as predict.py says them."""
        items = [item for *_, item in sorted(self.listed, key=lambda entry: entry[:3], reverse=True)]
        found = pictures([item["path"] for item in items[:PICTURES]], "pictures of the reading list")
        for item in items:
            item["picture"] = found.get(item["path"])
        return render(
            "worklist.html",
            title="Reading list: the most suspicious first",
            run=str(self.scorer.run),
            synthetic=self.scorer.results["synthetic"],
            words=words,
            counts=self._counts(len(items), sum(address is not None for address in found.values())),
            thresholds=[(d.finding, d.point, d.threshold) for d in self.decisions],
            unit=self.scorer.unit,
            alone=self.scorer.task.alone,
            items=items,
            unscored=self.unscored,
            more_unscored=self.passed - len(self.unscored),
            data={"sets": [], "arrays": [], "z": {}, "maps": []},
        )

    def _counts(self, listed, held):
        """How much there is, and what is left out, as sentences."""
        counts = [f"Scored: {self.scored} files, of which {self.called} are called positive for a finding."]
        if self.passed:
            counts.append(f"Not scored: {self.passed}, listed at the end of this page.")
        if self.scored > listed:
            counts.append(
                f"The {self.scored - listed} least suspicious are not listed here; the rows have them."
            )
        if listed > PICTURES:
            counts.append(f"Pictures are shown of the {PICTURES} most suspicious.")
        counts.append(
            f"This page holds {held} pictures of patients, with their file names: share it as you would "
            "share the images."
        )
        return counts
