"""The mesh: layouts by rule, and results that do not depend on it."""

import itertools
from dataclasses import replace

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from smollm_jax.config.architecture import MODELS, PARAMETER_DIMS, parameter_shapes
from smollm_jax.config.settings import MESH_AXES, ComputeConfig, Config, RunConfig
from smollm_jax.distributed.sharding import make_mesh, padded_rows, partition
from tests.support.runs import ended, records

OF_135M = {
    "embedding": (49_152, 576), "q": (30, 576, 9, 64), "k": (30, 576, 3, 64), "o": (30, 9, 64, 576),
    "gate": (30, 576, 1_536), "down": (30, 1_536, 576), "scale": (30, 576),
}  # fmt: skip


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("embedding", {"data": 8}, PartitionSpec(None, None)),
        ("embedding", {"fsdp": 4}, PartitionSpec(None, "fsdp")),
        ("embedding", {"tensor": 2, "fsdp": 2}, PartitionSpec("tensor", "fsdp")),
        ("q", {"tensor": 3}, PartitionSpec(None, None, "tensor", None)),
        ("q", {"tensor": 2}, PartitionSpec(None, "tensor", None, None)),  # nine heads over two
        ("k", {"tensor": 2, "fsdp": 2}, PartitionSpec(None, "tensor", None, "fsdp")),
        ("o", {"tensor": 3, "fsdp": 2}, PartitionSpec(None, "tensor", None, "fsdp")),
        ("gate", {"tensor": 2, "fsdp": 4}, PartitionSpec(None, "fsdp", "tensor")),
        ("down", {"tensor": 2, "fsdp": 4}, PartitionSpec(None, "tensor", "fsdp")),
        ("q", {"tensor": 2, "fsdp": 6}, PartitionSpec(None, "fsdp", None, "tensor")),  # only D has six parts
        ("k", {"tensor": 2, "fsdp": 6}, PartitionSpec(None, "fsdp", None, "tensor")),
        ("o", {"tensor": 4, "fsdp": 18}, PartitionSpec(None, None, "tensor", "fsdp")),
        ("scale", {"tensor": 2, "fsdp": 4}, PartitionSpec()),
    ],
)
def test_an_axis_takes_the_first_dim_that_it_divides(name, sizes, expected):
    assert partition(name, OF_135M[name], mesh_of(**sizes)) == expected


def test_an_axis_that_divides_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match="--mesh tensor=5 divides no dim of q"):
        partition("q", OF_135M["q"], mesh_of(tensor=5))


def test_every_mesh_that_some_layout_fits_is_taken():
    """A search of all ways to give each axis a dim of its own, over the published shapes."""
    for model in (MODELS[name] for name in ("135M", "360M", "1.7B")):
        for path, shape in parameter_shapes(model).items():
            name = path.split("/")[-1]
            dims = [size for letter, size in zip(PARAMETER_DIMS[path], shape, strict=True) if letter != "L"]
            for tensor, fsdp in itertools.product((1, 2, 3, 5, 6), (1, 2, 3, 4, 6, 9, 10)):
                mesh = mesh_of(tensor=tensor, fsdp=fsdp)
                pairs = itertools.permutations(dims, 2) if name != "scale" else [(tensor, fsdp)]
                fits = any(a % tensor == b % fsdp == 0 for a, b in pairs)
                if fits:
                    partition(name, shape, mesh)
                else:
                    with pytest.raises(ValueError, match="divides no dim"):
                        partition(name, shape, mesh)


@pytest.mark.parametrize("spec", ["rows=2", "data", "data=0", "data=2,data=2", "data=x", "fsdp=-1"])
def test_a_mesh_that_is_none_is_refused(spec):
    with pytest.raises(ValueError, match=r"mesh=.*expected data=N"):
        ComputeConfig(mesh=spec)


def test_a_mesh_larger_than_the_machine_or_the_batch_is_refused():
    config = Config(run=RunConfig(phases="5x4"))
    too_many = replace(config, compute=ComputeConfig(mesh=f"data={jax.device_count() + 1}"))
    with pytest.raises(ValueError, match="needs"):
        make_mesh(too_many)
    few = replace(config, run=RunConfig(phases="5x3,5x2"), compute=ComputeConfig(mesh="data=4"))
    with pytest.raises(ValueError, match=r"3 rows.* leave some of 4 devices without any"):
        make_mesh(few)


@pytest.mark.parametrize(
    ("phases", "mesh", "parts", "expected"), [(8, 8, 1, 8), (6, 4, 1, 8), (6, 2, 2, 8), (50, 16, 1, 64)]
)
def test_a_batch_is_padded_until_all_devices_have_the_same(phases, mesh, parts, expected):
    assert padded_rows(phases, mesh_of(data=mesh // 2, fsdp=2), parts) == expected


@pytest.mark.parametrize(
    ("phases", "count", "expected"), [("9x8", 8, 8), ("9x4", 8, 4), ("9x5", 4, 3), ("99x32,9x8", 16, 16)]
)
def test_without_a_mesh_no_device_is_taken_that_saves_no_time(phases, count, expected):
    mesh = make_mesh(Config(run=RunConfig(phases=phases)), jax.devices()[:1] * count)
    assert mesh.size == expected


def test_all_axes_are_left_to_the_partitioner():
    mesh = make_mesh(Config(run=RunConfig(phases="5x4")))
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "meshes"),
    [
        ("float32", ("data=8", "data=2,fsdp=2,tensor=2", "fsdp=4")),
        pytest.param("bfloat16", ("data=2,fsdp=2,tensor=2",), marks=pytest.mark.release),
    ],
)
def test_results_do_not_depend_on_the_mesh(train, tmp_path, monkeypatch, dtype, meshes):
    """Over 20 steps: the batches are the same, and losses agree to rounding."""
    within = {"float32": 2e-4, "bfloat16": 0.02}[dtype]
    settings = [
        "--phases",
        "16x8,4x6",
        "--batch-size",
        "8",
        "--checkpoint-every",
        "8",
        "--eval-every",
        "10",
        "--no-export",
        "--sample-tokens",
        "4",
        "--dtype",
        dtype,
    ]
    ended(train(*settings, "--mesh", "data=1", run="one"))
    one = records(tmp_path / "one")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    for mesh in meshes:
        accumulate = "2" if mesh == "fsdp=4" else "1"
        _, err = ended(train(*settings, "--mesh", mesh, "--grad-accum", accumulate, run=mesh))
        assert mesh.replace(",", ", ") in err, err
        assert "padding     2 empty rows follow the 6 of a batch" in err, err
        assert ("; 2 of 8 devices have nothing else" in err) == (mesh == "data=8"), err
        assert ("embedding: " in err) == (mesh != "data=8")
        for line, other in zip(one, records(tmp_path / mesh), strict=True):
            assert line.get("ledger") == other.get("ledger")
            for name in {"loss", "grad_norm", "eval_loss"} & set(line):
                assert line[name] == pytest.approx(other[name], rel=within), (mesh, line["step"], name)


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(train, tmp_path, monkeypatch):
    settings = [
        "--phases",
        "12x8",
        "--batch-size",
        "8",
        "--checkpoint-every",
        "5",
        "--eval-every",
        "0",
        "--no-export",
        "--grad-accum",
        "1",
    ]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    ended(train(*settings, "--mesh", "data=8", run="straight"))
    ended(train(*settings, "--mesh", "data=2,fsdp=4", "--stop-after", "6"))
    _, err = ended(train(*settings, "--mesh", "fsdp=2,tensor=2", "--stop-after", "9"))
    assert "compute.mesh changed" in err
    ended(train(*settings, "--mesh", "data=1"))
    for line, other in zip(records(tmp_path / "straight"), records(tmp_path / "run"), strict=True):
        assert line["ledger"] == other["ledger"]
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-4)
