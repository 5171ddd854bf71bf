"""The normaliser, beyond `test_parts`: numbers done by hand, names of older checkpoints, malformed states, and scales
of other forms."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch

from pdp.normalizer import LinearNormalizer
from registry.core.errors import InvalidInput

OBS = torch.tensor([[0.0, 5.0], [10.0, 5.00005], [4.0, 5.0]])


def fitted(data: Any = OBS, **options: Any) -> LinearNormalizer:
    made = LinearNormalizer()
    made.fit({"obs": data}, **options)
    return made


def test_scale_offset_and_statistics_are_those_done_by_hand() -> None:
    made = fitted()
    entry: Any = made.params_dict.obs
    assert entry is made.params_dict["obs"]
    assert entry.scale.tolist() == pytest.approx([0.2, 1.0])  # the second varies less than range_eps
    assert entry.offset.tolist() == pytest.approx([-1.0, -5.0])
    stats = entry.input_stats
    assert (stats.min[0].item(), stats.max[0].item()) == (0, 10)
    assert stats.mean[0].item() == pytest.approx(14 / 3)
    assert stats.std[0].item() == pytest.approx(numpy.array([0.0, 10.0, 4.0]).std())
    assert stats.min is entry["input_stats"]["min"]


def test_state_names_are_those_of_older_checkpoints() -> None:
    assert set(fitted().state_dict()) == {
        f"params_dict.obs.{part}"
        for part in ("scale", "offset", *(f"input_stats.{s}" for s in ("min", "max", "mean", "std")))
    }


@pytest.mark.parametrize("mode", ["limits", "gaussian"])
def test_the_way_back_is_exact_to_rounding_of_float32(mode: str) -> None:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(500, 6, generator=draw) * torch.logspace(-3, 4, 6) + torch.linspace(-50, 50, 6)
    made = fitted(data, mode=mode)
    back = made.unnormalize(made.normalize({"obs": data}))["obs"]
    assert ((back - data).abs() <= 4e-7 * data.abs().amax(dim=0)).all()


def test_arrays_of_any_leading_form_and_type_fit_as_tensors_do() -> None:
    expected = fitted().state_dict()
    for data in (OBS.numpy(), OBS.double().reshape(1, 3, 2), OBS.numpy().astype(numpy.float64).reshape(3, 1, 2)):
        found = fitted(data).state_dict()
        assert all(torch.equal(found[name], one) for name, one in expected.items())
    assert fitted(numpy.array([[1, 2], [3, 4]])).normalize({"obs": torch.tensor([[2, 3]])})["obs"].tolist() == [[0, 0]]


@pytest.mark.parametrize(("last_n_dims", "form"), [(0, ()), (1, (2,)), (2, (3, 2))])
def test_scales_have_the_form_of_the_last_dimensions(last_n_dims: int, form: tuple[int, ...]) -> None:
    data = torch.randn(7, 3, 2)
    made = fitted(data, last_n_dims=last_n_dims)
    entry: Any = made.params_dict["obs"]
    assert tuple(entry.scale.shape) == tuple(entry.input_stats.std.shape) == form
    found = made.normalize({"obs": data})["obs"]
    axes = tuple(range(3 - last_n_dims))
    assert torch.allclose(found.amin(dim=axes), torch.tensor(-1.0), atol=1e-5)
    assert torch.allclose(found.amax(dim=axes), torch.tensor(1.0), atol=1e-5)
    other = LinearNormalizer()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.normalize({"obs": data})["obs"], found)


def test_fewer_dimensions_than_the_scale_has_are_named() -> None:
    made = fitted(torch.randn(7, 3, 2), last_n_dims=2)
    with pytest.raises(
        InvalidInput, match=r"obs: expected \(\.\.\., 3, 2\) as the normaliser was fitted, found \(2,\)"
    ):
        made.normalize({"obs": torch.zeros(2)})
    with pytest.raises(InvalidInput, match="last_n_dims is -1"):
        fitted(last_n_dims=-1)


@pytest.mark.parametrize("key", ["", "robot.obs", "keys", "items", "training"])
def test_a_key_that_a_state_dict_cannot_name_is_refused(key: str) -> None:
    with pytest.raises(InvalidInput, match="the normaliser cannot have the key"):
        LinearNormalizer().fit({key: OBS})


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(InvalidInput, match="obs: expected numbers"):
        fitted(numpy.array([["a"]]))
    for way in (fitted().normalize, fitted().unnormalize):
        with pytest.raises(InvalidInput, match="obs: expected numbers"):
            way({"obs": numpy.array([["a", "b"]])})


def test_arrays_are_normalised_and_brought_back_as_tensors_are() -> None:
    made = fitted()
    for way in (made.normalize, made.unnormalize):
        expected = way({"obs": OBS})["obs"]
        found = way({"obs": OBS.double().numpy()})["obs"]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    with pytest.raises(InvalidInput, match="data is a Tensor; expected a mapping"):
        made.fit(OBS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "options", "named"),
    [
        ([[-3e38], [3e38]], {}, r"obs: dimension 0, from -3e\+38 to 3e\+38, has no scale in float32"),
        ([[1e39], [1e39]], {"mode": "gaussian", "fit_offset": False}, "obs: dimension 0, from .* has no scale"),
        ([[1.0, 5.0], [2.0, 5.0]], {"range_eps": 0.0}, "obs: dimension 1, from 5 to 5, has no scale"),
        ([[1.0], [2.0]], {"output_max": numpy.inf}, "obs: dimension 0, .* output_min or output_max"),
        ([[0.0, 1e9], [1.0, 1e9 + 1]], {}, "obs: dimension 1 runs from 1e[+]09 to 1[.e+0-9]*, which float32 cannot"),
        ([[1e9 + 32 - 1e-5], [1e9 + 32 + 1e-5]], {}, "obs: dimension 0 runs .* which float32 cannot tell apart"),
    ],
)
def test_a_dimension_that_float32_cannot_scale_is_named(values: Any, options: Any, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        fitted(numpy.array(values), **options)


def test_the_range_is_taken_in_float64() -> None:
    made = fitted(numpy.array([[1e5 + 0.001], [1e5 + 1.001]]))
    assert made.params_dict["obs"]["scale"].item() == pytest.approx(2, abs=1e-6)  # in float32 the ends are rounded


@pytest.mark.parametrize("mode", ["limits", "gaussian"])
def test_a_dimension_that_does_not_vary_may_lie_anywhere(mode: str) -> None:
    data = numpy.array([[1e6 + 0.3, 0.0], [1e6 + 0.3, 1.0]])
    made = fitted(data, mode=mode)
    normal = made.normalize({"obs": data})
    assert normal["obs"][:, 0].tolist() == [0, 0]
    assert torch.equal(made.unnormalize(normal)["obs"], torch.tensor(data, dtype=torch.float32))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"params_dict.obs.scale": 3}, "scale is no tensor of floating-point numbers"),
        ({"params_dict.obs.scale": torch.ones(2, dtype=torch.long)}, "scale is no tensor of floating-point numbers"),
        ({"params_dict.obs.scale": torch.zeros(2)}, "scale is 0"),
        ({"params_dict.obs.offset": torch.tensor([0.0, torch.nan])}, "offset is not finite"),
        ({"params_dict.obs.offset": torch.zeros(3)}, r"sizes \[\(2,\), \(3,\)\]"),
        ({"params_dict.obs.shift": torch.zeros(2)}, "is not one: shift"),
        ({"params_dict.items.scale": torch.zeros(2)}, "cannot have the key 'items'"),
    ],
)
def test_a_malformed_state_is_named_and_changes_nothing(changed: dict[str, Any], named: str) -> None:
    state = dict(fitted().state_dict())
    made = fitted(OBS * 2)
    before = {name: one.clone() for name, one in made.state_dict().items()}
    for normalizer in (made, LinearNormalizer()):
        with pytest.raises(InvalidInput, match=named):
            normalizer.load_state_dict({**state, **changed})
    assert all(torch.equal(made.state_dict()[name], one) for name, one in before.items())


def test_a_state_replaces_keys_that_were_fitted_and_a_copy_is_its_own() -> None:
    made = LinearNormalizer()
    made.fit({"obs": OBS, "image": OBS})
    made.load_state_dict(fitted(OBS * 2).state_dict())
    assert list(made.params_dict) == ["obs"]
    twin = copy.deepcopy(made)
    made.fit({"obs": OBS})
    assert twin.params_dict["obs"]["input_stats"]["max"][0] == 20
    assert not any(one.requires_grad for one in twin.parameters())
