"""The script beside the results: what it finds is the metrics' difference, and resampling leaves a sure difference sure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "results" / "resample.py"


def test_resampled_differences(tmp_path):
    for variant, right in (("good", True), ("poor", False)):
        folder = tmp_path / f"{variant}-seed0" / "evaluation"
        folder.mkdir(parents=True)
        rows = [
            {
                "id": str(i),
                "source": "s",
                "task": "ingredients",
                "question": "?",
                "image": "",
                "answer": "rice, bean" if right else "rice, leek",
                "truth": "rice, bean",
                "reference": ["rice", "bean"],
            }
            for i in range(6)
        ]
        nutrition = {"mass": 100.0, "energy": 100.0, "fat": 10.0, "protein": 10.0, "carb": 10.0}
        text = "mass {0} g, energy 100 kcal, fat 10 g, protein 10 g, carbohydrate 10 g"
        for i in range(6):
            answer = text.format(100 if right else 150)
            common = {
                "source": "s",
                "task": "nutrition",
                "question": "?",
                "image": "",
                "truth": text.format(100),
            }
            rows.append({"id": str(i), "answer": answer, "reference": nutrition, **common})
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(SCRIPT), str(tmp_path), "good", "poor", "--rounds", "20"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = {tuple(line.split()[:2]): line.split(maxsplit=2)[2] for line in printed.splitlines()}
    # IoU 100 and 1/3; one of five fields off by 50 %: pMAE 0 and 10
    assert lines["IoU", "difference"].split() == ["66.67", "(66.67", "to", "66.67)"]
    assert lines["pMAE", "difference"].split() == ["-10.00", "(-10.00", "to", "-10.00)"]
