"""A sheet gives the figure that plotly's own methods give, called one by one."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from moescope.figures.sheets import Sheet
from moescope.figures.theme import template

GEOMETRIES = [
    {"cols": 2, "column_widths": [0.7, 0.3], "shared_yaxes": True},
    {"rows": 2, "cols": 2, "specs": [[{"colspan": 2}, None], [{}, {}]], "vertical_spacing": 0.3},
    {"rows": 2, "cols": 3, "shared_xaxes": True, "horizontal_spacing": 0.1},
]


def _panels(geometry):
    cells = geometry.get("specs", [[{}] * geometry["cols"]] * geometry.get("rows", 1))
    return [(row, col) for row, line in enumerate(cells, 1) for col, cell in enumerate(line, 1) if cell is not None]


def _drawn(figure, panels):
    for number, (row, col) in enumerate(panels):
        figure.add_trace(go.Scatter(x=[1, 2], y=[number, 3]), row=row, col=col)
    figure.update_xaxes({"title": {"text": "all", "standoff": 4}, "range": [0, 5]})
    figure.update_xaxes(title={"text": "one"}, row=panels[-1][0], col=panels[-1][1])
    figure.update_yaxes(tickformat=".0%", row=panels[-1][0])
    figure.update_yaxes(nticks=3, col=1)
    figure.add_vline(x=1.5, row=panels[-1][0], col=panels[-1][1], line={"width": 2})
    figure.update_layout(margin={"t": 20}, legend={"x": 0})
    figure.update_layout(margin={"b": 30}, height=400)
    return figure


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_gives_what_plotly_gives_step_by_step(geometry):
    panels = _panels(geometry)
    found = _drawn(Sheet(**geometry), panels).figure()
    wanted = _drawn(make_subplots(**geometry), panels).update_layout(template=template())
    assert found.to_dict() == wanted.to_dict()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_each_title_stands_at_the_left_of_its_panel(geometry):
    panels = _panels(geometry)
    titles = [f"panel {panel}" for panel in panels]
    found = Sheet(titles, **geometry).figure().layout.annotations
    plain = make_subplots(subplot_titles=titles, **geometry)
    for panel, title, wanted in zip(panels, found, plain.layout.annotations, strict=True):
        assert (title.text, title.y, title.yanchor) == (wanted.text, wanted.y, wanted.yanchor)
        assert (title.x, title.xanchor) == (plain.get_subplot(*panel).xaxis.domain[0], "left")


def test_panels_without_a_title_have_none_and_one_panel_needs_no_geometry():
    assert len(Sheet(["first"], cols=2).figure().layout.annotations) == 1
    with pytest.raises(ValueError, match="shorter"):
        Sheet(["first", "second", "third"], cols=2)
    sheet = Sheet()
    sheet.add_trace(go.Bar(x=[1], y=[2]))
    assert sheet.figure("dark").to_dict() == go.Figure(go.Bar(x=[1], y=[2]), {"template": template("dark")}).to_dict()


def test_settings_given_to_a_sheet_stay_as_they_were():
    axis = {"title": {"text": "mine"}}
    sheet = Sheet(cols=2)
    sheet.update_xaxes(axis)
    sheet.update_xaxes(title={"text": "other"}, col=2)
    assert axis == {"title": {"text": "mine"}}
    assert [sheet.axes(1, col)[0]["title"]["text"] for col in (1, 2)] == ["mine", "other"]


def test_a_setting_that_plotly_does_not_know_is_refused():
    sheet = Sheet()
    sheet.update_xaxes(rnge=[0, 1])
    with pytest.raises(ValueError, match="rnge"):
        sheet.figure()


def test_a_template_that_somebody_changed_changes_no_other_figure():
    template().layout.font.size = 40
    Sheet().figure().layout.template.layout.font.size = 40
    assert Sheet().figure().layout.template.layout.font.size == template().layout.font.size == 13
