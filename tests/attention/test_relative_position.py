"""Biases by the offset of a query and a key, against their definition."""

import pytest
import torch

from vil.attention import relative_position

FORMS = [relative_position._expand, relative_position._expand_by_views]


@pytest.mark.parametrize("expand", FORMS)
@pytest.mark.parametrize(
    ("queries", "keys"), [((1, 1), (1, 1)), ((2, 3), (6, 9)), ((4, 3), (4, 3)), ((1, 5), (3, 2))]
)
def test_definition(expand, queries, keys):
    table = torch.randn(2, *(a + c - 1 for a, c in zip(queries, keys)))
    rows, columns = (
        torch.arange(a)[:, None] - torch.arange(c)[None, :] + c - 1 for a, c in zip(queries, keys)
    )  # the first key and the last query have the last entry
    expected = table[:, rows[:, None, :, None], columns[None, :, None, :]]
    assert torch.equal(expand(table, queries), expected)


@pytest.mark.parametrize("expand", FORMS)
def test_gradients(expand):
    table = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda table: expand(table, (2, 3)), table)


def test_compiled_graphs_have_views_and_exported_ones_do_not():
    table = torch.randn(1, 5, 5, requires_grad=True)
    operators = []

    def record(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def expand(table):
        return relative_position.position_biases(table, (2, 2))

    compiled = torch.compile(expand, backend=record, fullgraph=True)
    assert torch.equal(compiled(table), expand(table))
    assert "unfold" not in operators
    program = torch.export.export(Expand(), (table,))
    assert any("unfold" in str(node.target) for node in program.graph.nodes)


class Expand(torch.nn.Module):
    def forward(self, table):
        return relative_position.position_biases(table, (2, 2))
