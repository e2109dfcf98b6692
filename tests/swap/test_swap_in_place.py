# SPDX-License-Identifier: Apache-2.0
"""A swap changes only which forward runs; it can be repeated, narrowed and undone."""

import pytest
import torch

import fastasr


def _outside(model):
    """Returns all that a user can hold on to: names, parameters, buffers, classes, modules."""
    return (
        [(name, id(module), type(module)) for name, module in model.named_modules()],
        [(name, id(p)) for name, p in model.named_parameters()],
        [(name, id(b)) for name, b in model.named_buffers()],
        [(name, t.data_ptr(), t.shape, t.dtype) for name, t in model.state_dict().items()],
    )


def test_state_dict_parameters_and_types_are_untouched(model):
    before = _outside(model)
    report = fastasr.accelerate(model)
    assert report.replaced
    assert _outside(model) == before
    fastasr.restore(model)
    assert _outside(model) == before


def test_class_and_other_instances_are_untouched(model):
    from zipformer.modules.scaling import BiasNorm

    other = BiasNorm(8)
    forward = BiasNorm.forward
    fastasr.accelerate(model)
    assert BiasNorm.forward is forward
    assert "forward" not in vars(other)


def test_accelerate_is_idempotent(model):
    first = fastasr.accelerate(model)
    bound = {name: vars(m).get("forward") for name, m in model.named_modules()}
    second = fastasr.accelerate(model)
    assert {name: vars(m).get("forward") for name, m in model.named_modules()} == bound
    assert [(r.path, r.status) for r in first.rows] == [(r.path, r.status) for r in second.rows]
    assert {r.reason for r in second.replaced} == {"already swapped"}


def test_restore_leaves_no_trace(model):
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    report = fastasr.accelerate(model)
    assert fastasr.restore(model) == len(report.replaced)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert fastasr.restore(model) == 0


def test_restore_leaves_foreign_forwards_alone(model):
    norm = model.encoder_embed.out_norm
    norm.forward = lambda x: x
    fastasr.accelerate(model)
    fastasr.restore(model)
    assert norm.forward(3) == 3


def test_explain_touches_nothing_and_tells_the_same(model):
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    told = fastasr.explain(model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    done = fastasr.accelerate(model)
    assert told.dry_run
    assert not done.dry_run
    assert told.rows == done.rows


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("encoder_embed.out_norm", {"encoder_embed.out_norm"}),
        ("encoder_embed.conv.*", {f"encoder_embed.conv.{i}" for i in (2, 3, 5, 6, 8, 9)}),
        (lambda path, module: path.endswith("embed.out"), {"encoder_embed.out"}),
        (["encoder_embed.out", "*.out_norm"], {"encoder_embed.out", "encoder_embed.out_norm"}),
    ],
    ids=["path", "glob", "callable", "list"],
)
def test_only(model, only, expected):
    report = fastasr.accelerate(model, only=only)
    assert {row.path for row in report.replaced} == expected
    assert report["encoder_embed.convnext"].reason == "not selected by only="


def test_only_and_exclude_take_classes(model):
    from zipformer.modules.scaling import BiasNorm

    report = fastasr.accelerate(model, only=BiasNorm, exclude="encoder_embed.*")
    assert {row.class_name for row in report.replaced} == {"BiasNorm"}
    assert all(row.path.startswith("encoder.") for row in report.replaced)
    assert report["encoder_embed.out_norm"].reason == "excluded by exclude="


def test_bad_arguments(model):
    with pytest.raises(ValueError, match=r"only pattern 'encodr\.\*' matches no module"):
        fastasr.accelerate(model, only="encodr.*")
    with pytest.raises(TypeError, match="exclude takes glob patterns, classes or callables"):
        fastasr.accelerate(model, exclude=3)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        fastasr.accelerate({})
    with pytest.raises(ValueError, match="strict=False"):
        fastasr.accelerate(model, strict=False)
    assert fastasr.restore(model) == 0


def test_eager_mode(model, inputs):
    model.eval()
    with torch.no_grad():
        expected, _ = model(*inputs)
    report = fastasr.accelerate(model)
    bound = {name: vars(m).get("forward") for name, m in model.named_modules()}
    with fastasr.eager_mode(model), torch.no_grad():
        assert not any("forward" in vars(m) for m in model.modules())
        assert torch.equal(model(*inputs)[0], expected)
    with pytest.raises(KeyError), fastasr.eager_mode(model):
        raise KeyError("the swap comes back after an error too")
    assert {name: vars(m).get("forward") for name, m in model.named_modules()} == bound
    assert len(fastasr.accelerate(model).replaced) == len(report.replaced)


def test_restore_inside_eager_mode(model):
    count = len(fastasr.accelerate(model).replaced)
    with fastasr.eager_mode(model):
        assert fastasr.restore(model) == count
    assert not any("forward" in vars(module) for module in model.modules())
    assert fastasr.restore(model) == 0
