"""The parity page says what its JSON says. The comparisons themselves are tests/peers."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import report


def row(area: str, peer: str, **changed) -> dict:
    row = {"area": area, "peer": peer, "case": "float32", "rlkern": "kl_coef=0.5", "value": 3e-7}
    row |= {"gradient": None, "budget": 2e-6, "gradient_budget": 2e-6, "agrees": True, "note": ""}
    return row | changed


def test_a_table_an_area_and_a_count(tmp_path, monkeypatch):
    machine = {"name": "box", "cpu": "Some CPU", "cores": 2, "threads": 2, "torch": "2.13"}
    rows = [
        row("policy loss", "verl b", gradient=4e-7, gradient_budget=1e-4),
        row("advantages", "TRL c", agrees=False, value=1.0, note="another mean"),
        row("policy loss", "TRL a"),
    ]
    saved = {
        "kind": "parity",
        "machine_info": machine | {"gpu": None},
        "versions": {"trl": "1.16.0"},
        "command": "make test-peers",
        "rows": rows,
    }
    path = tmp_path / "bench/results/box/parity.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(saved))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "bench/results")
    lines = report.markdown("parity", tmp_path / "docs/parity.md").splitlines()
    assert "torch 2.13, trl 1.16.0" in lines[0]
    table = [line for line in lines if line.startswith("|")]
    # areas in the order of the run, peers by name
    assert table[2] == "| TRL a | float32 | `kl_coef=0.5` | 3.0e-07 | – | 2.0e-06 | agrees |"
    figures = "3.0e-07 | 4.0e-07 | 2.0e-06, 1.0e-04"
    assert table[3] == f"| verl b | float32 | `kl_coef=0.5` | {figures} | agrees |"
    assert table[6].endswith("| 1.0e+00 | – | 2.0e-06 | **differs**: another mean |")
    assert lines.index("### Policy loss") < lines.index("### Advantages")
    assert lines[-1] == "2 of 3 cells agree."
