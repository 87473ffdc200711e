"""What benchmarks/scale.py computes: what is held out, errors, and the simulation's table."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scale

from hpctrain.plan.cost import Layout
from hpctrain.plan.schedule import Step, Work, step_s

CORES = 2
TRUE = replace(scale.BOX, bytes_per_s=1.1e7, overhead_s=5e-5, handshake=0.2)
WORKS = {
    name: Work.even(0.02, 0.04, 0.001, [model.layer_bytes] * model.layers)
    for name, model in scale.MODELS.items()
}


def measured_as(way_factor: float) -> list[scale.Measured]:
    """What would be measured if the model were true, times a factor where steps are held out."""
    found = []
    for layout in (*scale.FITTED_TO, *scale.HELD_OUT):
        for name, work in WORKS.items():
            is_held_out = name in scale.HELD_OUT_MODELS or layout not in scale.FITTED_TO
            for way in scale.ways_on(layout):
                step = Step(work=work, way=way, layout=layout)
                took_s = step_s(step, scale.box(layout, TRUE, CORES))
                took_s *= way_factor if is_held_out else 1
                found.append(scale.Measured(name, step, (took_s,) * 3, is_held_out))
    return found


def test_fit_sees_nothing_that_is_held_out() -> None:
    links = [scale.fitted(measured_as(factor), CORES) for factor in (1.0, 2.0)]
    assert links[0] == links[1]
    assert links[0].bytes_per_s == pytest.approx(TRUE.bytes_per_s, rel=0.02)
    assert links[0].handshake == pytest.approx(TRUE.handshake, rel=0.1)


def test_held_out_are_other_models_and_all_of_6_and_8_ranks() -> None:
    assert {layout.size for layout in scale.FITTED_TO} == {2, 3, 4}
    assert {layout.size for layout in scale.HELD_OUT} == {6, 8}
    assert not set(scale.FITTED_MODELS) & set(scale.HELD_OUT_MODELS)


def test_errors_are_of_what_is_held_out() -> None:
    found = measured_as(1 / 1.25)
    rows = scale.compared(found, TRUE, CORES)
    errors = scale.median_errors(rows)
    assert errors["all"] == pytest.approx(0.25, abs=1e-3)
    assert errors["way ring"] == errors["6 and 8 ranks"] == errors["all"]
    assert errors["fitted (for comparison)"] < 1e-3
    control = scale.median_errors(rows, "control's error")
    lines = "\n".join(scale.judged(errors, control, len(rows)))
    assert "MISSED" in lines
    assert "met" in "\n".join(scale.judged({"all": 0.15}, {"all": 0.2}, 1))
    assert "NOT WORSE" in "\n".join(scale.judged({"all": 0.1}, {"all": 0.05}, 1))


def test_ways_are_those_that_run_there() -> None:
    assert scale.ways_on(Layout(nodes=2)) == ["native", "direct", "ring"]
    assert scale.ways_on(Layout(nodes=2, ranks_per_node=2))[-1] == "two_level"


def test_control_ignores_the_way() -> None:
    layout = Layout(nodes=4)
    steps = [Step(work=WORKS["2 MB, wire"], way=way, layout=layout) for way in ("native", "ring")]
    assert scale.ideal_s(steps[0], TRUE) == scale.ideal_s(steps[1], TRUE)


def test_simulated_steps_are_labelled_and_no_faster_than_their_computation() -> None:
    rows = scale.simulated()
    assert [row["SIMULATED ranks"] for row in rows] == list(scale.FAR_RANKS)
    assert {16, 10240} <= set(scale.FAR_RANKS)
    least_ms = (scale.FAR_FORWARD_S + scale.FAR_BACKWARD_S + scale.FAR_OPTIMIZER_S) * 1e3
    for row in rows:
        times = {name: row[name] for name in row if name != "SIMULATED ranks" and row[name] != "-"}
        assert min(times.values()) >= least_ms - 0.5
        for name in scale.FAR_WAYS:
            if name in times:
                assert times[f"{name}, best"] <= times[name]
    assert rows[0]["shared"] != "-"
    assert all(row["shared"] == "-" for row in rows[1:])


def test_plot_is_drawn(tmp_path: Path) -> None:
    rows = scale.compared(measured_as(1.1), TRUE, CORES)
    scale.draw(rows, scale.simulated(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
